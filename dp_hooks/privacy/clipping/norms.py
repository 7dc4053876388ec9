"""The norms of per-sample gradients: for every parameter, and over several."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn


class SampleNorms:
    """Squared norms ``[n]`` of the samples' gradients for every parameter, and their norm over all, worked out once."""

    def __init__(self, squares: Mapping[nn.Parameter, Tensor]) -> None:
        """Take the squared norms of at least one parameter."""
        self.squares = squares  # the squared norms of every parameter, each where that parameter is
        stacked = self._stacked(squares)
        total = stacked.sum(0).sqrt()
        # ``[n]`` norms over all parameters; NaN where a square is below 0: that cannot be right, and adding it would hide it.
        self.joint = torch.where((stacked >= 0).all(0), total, torch.full_like(total, torch.nan))
        self.finite = self.joint.isfinite()  # ``[n]`` bools: which samples have a usable norm in every parameter

    def over(self, params: Iterable[nn.Parameter]) -> Tensor:
        """Return norms ``[n]`` over ``params``; to be used only for samples that are ``finite``."""
        return self._stacked(params).sum(0).sqrt()

    def _stacked(self, params: Iterable[nn.Parameter]) -> Tensor:
        device = next(iter(self.squares.values())).device
        return torch.stack([self.squares[p].to(device) for p in params])

    def factors(self, factors: Tensor, params: Iterable[nn.Parameter]) -> dict[nn.Parameter, Tensor]:
        """Return ``factors`` ``[n]`` for each of ``params``, where that is, with 0 for samples that are not finite."""
        kept = torch.where(self.finite, factors, torch.zeros_like(factors))
        return {p: kept.to(self.squares[p].device) for p in params}
