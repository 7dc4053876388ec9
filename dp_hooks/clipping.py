"""Clipping functions: from per-sample squared norms to factors, each with the sensitivity it guarantees."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ._validate import clipping_bounds, one_of

Norms = Mapping[nn.Parameter, Tensor]


class ClippingFunction(ABC):
    """Bounds what one sample can add to the sum of gradients.

    Guarantee: for every sample, the norm over all parameters of ``factor * gradient`` is at most :attr:`sensitivity`,
    provided that the squared norms are upper bounds. Samples whose norm is not finite get factor 0; their rows must be
    removed by selection, since ``0 * nan`` is ``nan``.
    """

    @property
    @abstractmethod
    def sensitivity(self) -> float:
        """The largest norm that one sample's contribution can have, in the units of the gradient."""

    @abstractmethod
    def factors(self, sq_norms: Norms) -> dict[nn.Parameter, Tensor]:
        """Return, per parameter, the factors ``[n]`` for squared norms ``[n]``."""


def _factors(sq_norm: Tensor, bound: float) -> Tensor:
    # No 1e-6 added to the norm as in Opacus: rounding is covered by the tests, and the bound stays the stated one.
    factors = (bound / sq_norm.sqrt()).clamp(max=1.0)
    return torch.where(torch.isfinite(sq_norm), factors, torch.zeros_like(factors))


class FlatClipping(ClippingFunction):
    """``min(1, C / |g|)`` with the norm over all parameters (Abadi et al., CCS 2016, algorithm 1)."""

    def __init__(self, max_grad_norm: float) -> None:
        """Clip to ``max_grad_norm`` (C > 0)."""
        self.max_grad_norm = max_grad_norm

    @property
    def sensitivity(self) -> float:
        """C."""
        return self.max_grad_norm

    def factors(self, sq_norms: Norms) -> dict[nn.Parameter, Tensor]:
        """Return the same factors for every parameter."""
        first = next(iter(sq_norms.values()))
        total = torch.stack([s.to(first.device) for s in sq_norms.values()]).sum(0)
        factors = _factors(total, self.max_grad_norm)
        return {p: factors.to(s.device) for p, s in sq_norms.items()}


class PerLayerClipping(ClippingFunction):
    """Each parameter tensor clipped to a bound of its own (McMahan et al., ICLR 2018, section 3.1)."""

    def __init__(self, bounds: Mapping[nn.Parameter, float]) -> None:
        """Clip the gradient of each parameter to its entry in ``bounds``."""
        self.bounds = dict(bounds)

    @property
    def sensitivity(self) -> float:
        """``sqrt(sum_k C_k^2)``: all bounds can be reached by one sample."""
        return math.sqrt(sum(bound * bound for bound in self.bounds.values()))

    def factors(self, sq_norms: Norms) -> dict[nn.Parameter, Tensor]:
        """Return separate factors for every parameter; a sample that is not finite anywhere is dropped everywhere."""
        first = next(iter(sq_norms.values()))
        finite = torch.stack([torch.isfinite(s).to(first.device) for s in sq_norms.values()]).all(0)
        out: dict[nn.Parameter, Tensor] = {}
        for p, s in sq_norms.items():
            factors = _factors(s, self.bounds[p])
            out[p] = torch.where(finite.to(s.device), factors, torch.zeros_like(factors))
        return out


CLIPPING_MODES = ("flat", "per_layer")


def make_clipping(clipping: str, max_grad_norm: object, params: list[nn.Parameter]) -> ClippingFunction:
    """Build the clipping function ``clipping`` for ``params`` (in optimizer order).

    Raises:
        InvalidArgumentError: unknown name, a bound that is not positive, or a list of the wrong length.
    """
    one_of("clipping", clipping, CLIPPING_MODES)
    bounds = clipping_bounds("max_grad_norm", max_grad_norm, clipping, len(params))
    if clipping == "flat":
        return FlatClipping(bounds[0])
    return PerLayerClipping(dict(zip(params, bounds, strict=True)))
