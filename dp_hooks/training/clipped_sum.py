"""The clipped sum of a logical batch, before it gets its noise."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .._rerun import without_autocast
from ..errors import ScopeError
from ..gradients.sample_gradients import SampleGradients
from ..gradients.unit_gradients import UnitGradients
from ..gradients.units import Units
from ..privacy.clipping import ClippingFunction, SampleNorms


class ClippedSum:
    """Adds up the clipped gradients of one logical batch, physical batch by physical batch.

    Guarantee: one example, or one unit where there are units, changes the totals of all parameters together by at most
    ``clipping.sensitivity``. They are without noise, and nobody but the optimizer that adds it may see them.
    """

    def __init__(self, make_clipping: Callable[[Any], ClippingFunction], max_grad_norm: Any, *, watched: bool = False) -> None:
        """Begin with no batch; gradients are clipped by ``make_clipping(max_grad_norm)``.

        If it is to be ``watched``, the norms of the samples, and which of them were made shorter, are kept with the sums.
        """
        self._make_clipping = make_clipping
        self.clipping = make_clipping(max_grad_norm)
        self._totals: dict[nn.Parameter, Tensor] = {}
        self._statistic: Tensor | None = None
        self.watched: list[tuple[Tensor, Tensor]] | None = [] if watched else None

    def change_bound(self, max_grad_norm: Any) -> None:
        """Clip to another bound from the next logical batch on."""
        if self:
            raise ScopeError(
                f"max_grad_norm={max_grad_norm!r}: cannot change in the middle of a logical batch, parts of which were clipped "
                f"to {self.clipping.max_grad_norm!r} already. Change it between steps."
            )
        self.clipping = self._make_clipping(max_grad_norm)

    def __bool__(self) -> bool:
        """Whether a physical batch with samples was added."""
        return bool(self._totals)

    def add(
        self, gradients: SampleGradients, params: list[nn.Parameter], weights: Tensor | None = None, units: Units | None = None
    ) -> Tensor:
        """Clip the gradients of at least one sample for ``params`` (at least one), add them, and let go of them.

        Before it is clipped, the gradient of a sample is multiplied by its weight, where there are ``weights`` ``[n]``. Where there
        are ``units``, what is clipped is the sum over the samples of each.

        Returns norms ``[n]``, as they were before; NaN or infinite where a sample is left out. Where there are units, those of the
        unit of each sample, with its weights.
        """
        if units is not None and not units.are_single:
            summed = UnitGradients(gradients, units, weights)
            return units.spread(self._add(summed, params, None))
        return self._add(gradients, params, weights)

    def _add(self, gradients: SampleGradients | UnitGradients, params: list[nn.Parameter], weights: Tensor | None) -> Tensor:
        # A step, or the loader that finishes a physical batch, may be used inside the user's autocast.
        with without_autocast(params[0].device.type):
            groups = self.clipping.groups(params)
            raw = SampleNorms(gradients.group_sq_norms(groups))
            norms = raw if weights is None else raw.weighted(weights)
            clipped = self.clipping.factors(norms, groups)
            if self.watched is not None:
                shorter = torch.stack([factor.to(raw.joint.device) < 1 for factor in clipped]).any(0)
                self.watched.append((norms.joint, shorter))
            if weights is not None:
                clipped = [factor * weights.to(factor) for factor in clipped]
            factors: dict[nn.Parameter, Tensor] = {}
            for group, factor in zip(groups, clipped, strict=True):
                on = {device: factor.to(device) for device in {p.device for p in group}}
                factors |= {p: on[p.device] for p in group}
            sums = gradients.weighted_sums(factors, norms.finite, consume=True)
            for p, total in sums.items() if self._totals else ():
                sums[p] = self._totals[p].add_(total) if p in self._totals else total
            self._totals |= sums
        statistic = self.clipping.statistic(norms)
        if statistic is not None:
            self._statistic = statistic if self._statistic is None else self._statistic + statistic
        return raw.joint

    def take(self) -> tuple[dict[nn.Parameter, Tensor], Tensor | None]:
        """Return the totals, in at least float32, and what the clipping function learns from; nothing is left here."""
        taken = self._totals, self._statistic
        self.clear()
        return taken

    def clear(self) -> None:
        """Forget the logical batch."""
        self._totals, self._statistic = {}, None
        self.watched = None if self.watched is None else []
