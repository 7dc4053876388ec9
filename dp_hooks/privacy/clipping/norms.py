"""The norms of per-sample gradients: over every group of parameters, and over all."""

from collections.abc import Sequence

import torch
from torch import Tensor


class SampleNorms:
    """Norms ``[n]`` of the samples' gradients over groups of parameters, and over all, worked out once."""

    def __init__(self, squares: Sequence[Tensor]) -> None:
        """Take the squared norms ``[n]`` over at least one group, each where its parameters are."""
        stacked = torch.stack([square.to(squares[0].device) for square in squares])
        self._squares = stacked
        self.of_groups = stacked.sqrt().unbind()  # to be used only for samples that are ``finite``
        total = stacked.sum(0).sqrt()
        # ``[n]`` norms over all parameters; NaN where a square is below 0: that cannot be right, and adding it would hide it.
        self.joint = torch.where((stacked >= 0).all(0), total, torch.full_like(total, torch.nan))
        self.finite = self.joint.isfinite()  # ``[n]`` bools: which samples have a usable norm in every parameter

    def weighted(self, weights: Tensor) -> "SampleNorms":
        """The norms of gradients that are multiplied by ``weights`` ``[n]``, one for each sample."""
        return SampleNorms((self._squares * weights.to(self._squares).square()).unbind())

    def kept(self, factors: Tensor) -> Tensor:
        """Return ``factors`` ``[n]`` with 0 for samples that are not finite."""
        return torch.where(self.finite, factors, torch.zeros_like(factors))
