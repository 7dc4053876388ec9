"""What a clipping function promises, and what the optimizer asks of it."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..noise.noise import Noise
from .norms import SampleNorms


class ClippingFunction(ABC):
    """Bounds what one sample can add to the sum of gradients.

    Guarantee: for every sample, the norm over all parameters of ``factor * gradient`` is at most :attr:`sensitivity`,
    provided that the squared norms are upper bounds. Samples whose norm is not finite get factor 0; their rows must be
    removed by selection, since ``0 * nan`` is ``nan``.

    A function that learns from the samples also releases a statistic of them. Its part of the noise is taken out of the
    noise multiplier that is charged: see :meth:`gradient_noise_multiplier`. All methods below ``factors`` do nothing
    for functions that do not learn.
    """

    learns = False  # whether it does: from :meth:`statistic`, by :meth:`update`

    @property
    @abstractmethod
    def max_grad_norm(self) -> Any:
        """The bound or bounds, as the user gives them."""

    @property
    @abstractmethod
    def sensitivity(self) -> float:
        """The largest norm that one sample's contribution can have, in the units of the gradient."""

    @abstractmethod
    def groups(self, params: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
        """Put together the parameters whose norm is taken together; each is in one group."""

    @abstractmethod
    def factors(self, norms: SampleNorms, groups: Sequence[Sequence[nn.Parameter]]) -> list[Tensor]:
        """Return the factors ``[n]`` for each of ``groups`` of samples of these norms."""

    def gradient_noise_multiplier(self, noise_multiplier: float) -> float:
        """Return the noise on the clipped sum, in units of the sensitivity, if ``noise_multiplier`` is charged."""
        return noise_multiplier

    def check_noise(self, noise_multiplier: float) -> None:  # noqa: B027
        """Raise ``InvalidArgumentError`` if the function cannot work at ``noise_multiplier``."""

    def statistic(self, norms: SampleNorms) -> Tensor | None:
        """Return what the samples of a physical part add to the statistic of their logical batch; None: nothing."""
        return None

    def update(self, statistic: Tensor | None, noise: Noise, noise_multiplier: float) -> None:  # noqa: B027
        """Learn from a released logical batch that was charged with ``noise_multiplier``; ``noise`` adds the noise.

        ``statistic`` is the sum of :meth:`statistic` over its parts, without noise; None if there were no samples.
        """

    def details(self, noise_multiplier: float) -> dict[str, float]:
        """Return what a report says besides the bound and the sensitivity."""
        return {}
