"""make_noise: where the noise of a scope comes from."""

import torch

from ..._validate import bad
from .gaussian import GaussianNoise
from .noise import Noise
from .secure import SecureNoise


def make_noise(generator: object, *, secure: bool) -> Noise:
    """Return noise from the user's ``generator``, from fresh generators (None), or, if ``secure``, such that stands up to attacks.

    Raises:
        InvalidArgumentError: it is no generator, or there is one although the noise is to be secure.
    """
    if generator is not None and not isinstance(generator, torch.Generator):
        raise bad("noise_generator", generator, "pass a torch.Generator on the parameters' device, or None.")
    if secure and generator is not None:
        remedy = "secure_mode=True draws noise that nobody can draw again; leave out one of the two."
        raise bad("noise_generator", generator, remedy)
    return SecureNoise() if secure else GaussianNoise(generator)
