"""Statistics of private samples that are not private: for looking at a run, not for publishing."""

import math
from typing import Any

import torch
from torch import Tensor

REMARK = "exact numbers of private samples, without noise: epsilon does not cover them, and they must not be published"
_OF_NORMS = ("mean_norm", "median_norm", "max_norm", "fraction_clipped")
_TOGETHER = 1024  # rows that are put into one tensor


class NonprivateStatistics:
    """What ``nonprivate_statistics=True`` keeps of each private step. NOT private: made of exact gradients, without noise.

    ``mean_norm``, ``median_norm`` and ``max_norm`` are of the norms of the samples' gradients, over all trainable parameters and
    before clipping (and after ``opt.weigh_rows``), ``fraction_clipped`` of the samples were made shorter, in any of the
    groups that are clipped for themselves. Samples whose gradient is not finite are left out; NaN where none is left.
    ``drawn_batch_size`` counts the examples of the logical batch, as they were drawn. With ``privacy_unit`` all but the last are of
    units in the place of samples.

    The numbers stay on the device until they are asked for, so that no step waits. They are never part of ``state_dict()``.
    """

    def __init__(self, device: torch.device) -> None:
        """Nothing is known; numbers are kept on ``device``."""
        self._rows: list[Tensor] = []  # [steps, 4]
        self._sizes: list[int] = []
        self._nothing = torch.full((1, len(_OF_NORMS)), math.nan, device=device)

    def __len__(self) -> int:
        """Private steps that something was kept of."""
        return len(self._sizes)

    def add(self, watched: list[tuple[Tensor, Tensor]], drawn: int | None) -> None:
        """A step is released: of each part of its batch the norms ``[n]``, and which samples were made shorter ``[n]``.

        ``drawn`` is None for a batch from elsewhere: it has as many examples as there are norms.
        """
        self._sizes.append(sum(len(norms) for norms, _ in watched) if drawn is None else drawn)
        self._rows.append(self._row(watched) if watched else self._nothing)
        if len(self._rows) == _TOGETHER:
            self._rows = [torch.cat(self._rows)]

    def _row(self, watched: list[tuple[Tensor, Tensor]]) -> Tensor:
        norms, shorter = torch.cat([norms for norms, _ in watched]), torch.cat([shorter for _, shorter in watched])
        finite = norms.isfinite()
        known = norms.where(finite, math.nan)
        largest = norms.where(finite, -math.inf).amax().where(finite.any(), math.nan)
        row = torch.stack([known.nanmean(), known.nanmedian(), largest, (shorter & finite).sum() / finite.sum()])
        return row.to(self._nothing)[None]

    @property
    def last(self) -> dict[str, float]:
        """The numbers of the last step; empty before the first."""
        if not self._sizes:
            return {}
        return {**dict(zip(_OF_NORMS, self._rows[-1][-1].tolist(), strict=True)), "drawn_batch_size": self._sizes[-1]}

    @property
    def run(self) -> dict[str, list[float]]:
        """The numbers of all steps in this scope, one after the other."""
        columns = torch.cat(self._rows).T.tolist() if self._rows else [[] for _ in _OF_NORMS]
        return {**dict(zip(_OF_NORMS, columns, strict=True)), "drawn_batch_size": list(self._sizes)}

    def as_dict(self) -> dict[str, Any]:
        """Return ``last`` and ``run``, and a remark that they are not private."""
        return {"private": False, "remark": REMARK, "last": self.last, "run": self.run}
