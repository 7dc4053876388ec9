"""Clipping functions whose bounds stay as they are given: flat, per tensor or group of tensors, and automatic."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from .base import ClippingFunction
from .norms import SampleNorms


class FlatClipping(ClippingFunction):
    """``min(1, C / |g|)`` with the norm over all parameters (Abadi et al., CCS 2016, algorithm 1)."""

    def __init__(self, max_grad_norm: float) -> None:
        """Clip to ``max_grad_norm`` (C > 0)."""
        self._bound = max_grad_norm

    @property
    def max_grad_norm(self) -> float:
        """C."""
        return self._bound

    @property
    def sensitivity(self) -> float:
        """C."""
        return self._bound

    def groups(self, params: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
        """All together."""
        return [list(params)]

    def factors(self, norms: SampleNorms, groups: Sequence[Sequence[nn.Parameter]]) -> list[Tensor]:
        """Return the factors by the norm over all parameters."""
        return [norms.kept(self._factors(norms.joint))]

    def _factors(self, norms: Tensor) -> Tensor:
        return clip(norms, self._bound)


class AutomaticClipping(FlatClipping):
    """AUTO-S, ``C / (|g| + gamma)`` with the norm over all parameters.

    Bu, Wang, Zha and Karypis, "Automatic Clipping: Differentially Private Deep Learning Made Easier and Stronger",
    NeurIPS 2023; C is the paper's R. Every sample is scaled, large gradients down and small ones up to at most
    ``C / gamma`` times; its contribution ``C |g| / (|g| + gamma)`` stays below C. The noise grows with C as well, so C only
    scales the update: with plain SGD it can be merged with the learning rate, with Adam it hardly matters.
    """

    def __init__(self, max_grad_norm: float, gamma: float = 0.01) -> None:
        """Scale to ``max_grad_norm`` (C > 0) with the stability constant ``gamma`` > 0."""
        super().__init__(max_grad_norm)
        self.gamma = gamma

    def _factors(self, norms: Tensor) -> Tensor:
        return self._bound / (norms + self.gamma)

    def details(self, noise_multiplier: float) -> dict[str, float]:
        """Gamma."""
        return {"gamma": self.gamma}


class GroupClipping(ClippingFunction):
    """Groups of parameters, the gradient of each clipped to a bound of its own.

    With one group per tensor: McMahan, Ramage, Talwar and Zhang, "Learning Differentially Private Recurrent Language
    Models", ICLR 2018, section 3 ("per-layer clipping").
    """

    def __init__(self, bounds: Sequence[float], group_of: Mapping[nn.Parameter, int], max_grad_norm: Any) -> None:
        """Clip the joint gradient of the parameters of group k to ``bounds[k]``; the user gave them as ``max_grad_norm``."""
        self.bounds = tuple(bounds)
        self.group_of = dict(group_of)
        self._given = max_grad_norm

    @property
    def max_grad_norm(self) -> Any:
        """The bounds as the user gave them: a list or a dictionary."""
        return self._given.copy()

    @property
    def sensitivity(self) -> float:
        """``sqrt(sum_k C_k^2)``: all bounds can be reached by one sample."""
        return math.sqrt(sum(bound * bound for bound in self.bounds))

    def groups(self, params: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
        """Those that have a bound together."""
        groups: dict[int, list[nn.Parameter]] = {}
        for p in params:
            groups.setdefault(self.group_of[p], []).append(p)
        return list(groups.values())

    def factors(self, norms: SampleNorms, groups: Sequence[Sequence[nn.Parameter]]) -> list[Tensor]:
        """Return separate factors for every group; a sample that is not finite anywhere is dropped everywhere."""
        bounds = [self.bounds[self.group_of[group[0]]] for group in groups]
        return [norms.kept(clip(norm, bound)) for norm, bound in zip(norms.of_groups, bounds, strict=True)]


def clip(norms: Tensor, bound: float) -> Tensor:
    """Return ``min(1, bound / norm)``."""
    # No 1e-6 added to the norm as in Opacus: rounding is covered by the tests, and the bound stays the stated one.
    return (bound / norms).clamp(max=1.0)
