"""What a clipping function promises, and what the optimizer asks of it."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..noise.gaussian import GaussianNoise

Norms = Mapping[nn.Parameter, Tensor]


class ClippingFunction(ABC):
    """Bounds what one sample can add to the sum of gradients.

    Guarantee: for every sample, the norm over all parameters of ``factor * gradient`` is at most :attr:`sensitivity`,
    provided that the squared norms are upper bounds. Samples whose norm is not finite get factor 0; their rows must be
    removed by selection, since ``0 * nan`` is ``nan``.

    A function that learns from the samples also releases a statistic of them. Its part of the noise is taken out of the
    noise multiplier that is charged: see :meth:`gradient_noise_multiplier`. All methods below ``factors`` do nothing
    for functions that do not learn.
    """

    @property
    @abstractmethod
    def max_grad_norm(self) -> Any:
        """The bound or bounds, as the user gives them."""

    @property
    @abstractmethod
    def sensitivity(self) -> float:
        """The largest norm that one sample's contribution can have, in the units of the gradient."""

    @abstractmethod
    def factors(self, sq_norms: Norms) -> dict[nn.Parameter, Tensor]:
        """Return, per parameter, the factors ``[n]`` for squared norms ``[n]``."""

    def gradient_noise_multiplier(self, noise_multiplier: float) -> float:
        """Return the noise on the clipped sum, in units of the sensitivity, if ``noise_multiplier`` is charged."""
        return noise_multiplier

    def check_noise(self, noise_multiplier: float) -> None:  # noqa: B027
        """Raise ``InvalidArgumentError`` if the function cannot work at ``noise_multiplier``."""

    def statistic(self, sq_norms: Norms) -> Tensor | None:
        """Return what the samples of a physical part add to the statistic of their logical batch; None: nothing."""
        return None

    def update(self, statistic: Tensor | None, noise: GaussianNoise, noise_multiplier: float) -> None:  # noqa: B027
        """Learn from a released logical batch.

        Args:
            statistic: the sum of :meth:`statistic` over its parts, without noise; None if there were no samples.
            noise: adds the noise.
            noise_multiplier: what the release was charged with.
        """

    def details(self, noise_multiplier: float) -> dict[str, float]:
        """Return what a report says besides the bound and the sensitivity."""
        return {}


def norms_over(sq_norms: Collection[Tensor]) -> Tensor:
    """Return the norms ``[n]`` over several tensors, not finite where one of their squares is not a finite number >= 0.

    A square below 0 cannot be right, and adding it to others would hide it: that sample's norm is NaN.
    """
    device = next(iter(sq_norms)).device
    stacked = torch.stack([s.to(device) for s in sq_norms])
    total = stacked.sum(0).sqrt()
    return torch.where((stacked >= 0).all(0), total, torch.full_like(total, torch.nan))


def finite_samples(sq_norms: Norms) -> Tensor:
    """Return ``[n]`` bools: which samples have a usable norm in every parameter."""
    return torch.isfinite(norms_over(sq_norms.values()))


def drop(factors: Tensor, keep: Tensor) -> Tensor:
    """Return ``factors`` with 0 for the samples outside ``keep``."""
    return torch.where(keep.to(factors.device), factors, torch.zeros_like(factors))
