"""Whether the gradients of units, as they are clipped, are the sums of those of their examples."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .._precision import wide_dtype
from ..capture.controller import HookController
from ..errors import SelfCheckError
from ..gradients.sample_gradients import SampleGradients
from ..gradients.unit_gradients import UnitGradients
from ..gradients.units import Units

# How far norms and sums may be off, relative to the norms of the examples' gradients added up: from sums of what was captured in
# the same pass, and from plain autograd, where rounding may have switched a neuron (see :mod:`.compare`).
_SAME_PASS, _PLAIN, _PLAIN_COARSE = 3e-3, 0.1, 0.6
_FLOAT64 = 1e-5
_UNITS = 4  # so many are looked at, one of them by plain autograd


def to_compare(units: Units) -> int | None:
    """The unit to look at: with two examples or more, and as few as there are; None: each has one."""
    sizes = torch.bincount(units.of_rows, minlength=units.count)
    several = sizes.where(sizes > 1, len(units) + 1)
    return int(several.argmin()) if bool((sizes > 1).any()) else None


def compare_unit(
    found: SampleGradients,
    units: Units,
    plain: Callable[[Tensor], dict[nn.Parameter, Tensor]],
    params: list[nn.Parameter],
    controller: HookController,
    what: str,
    *,
    coarse: bool,
) -> None:
    """Compare the norm of a unit's gradient, and what a sum over units has of it, with gradients added up example by example.

    Args:
        found: what was captured of the rows; all of it finite.
        units: which rows belong to a unit.
        plain: returns gradients by plain autograd, added up over rows of these numbers.
        params: the parameters to compare.
        controller: for names.
        what: for messages.
        coarse: autocast or half precision is in use.

    Raises:
        SelfCheckError: a disagreement beyond rounding.
    """
    first = to_compare(units)
    captured = set(found.params)
    seen = [p for p in params if p in captured]
    if first is None or not seen:
        return
    exact = not coarse and all(p.dtype == torch.float64 for p in seen)
    for unit in list(dict.fromkeys([first, *range(units.count)]))[:_UNITS]:
        rows, of_units = units.rows_of(unit), UnitGradients(found, units)
        (squares,) = of_units.group_sq_norms([seen])
        here = (torch.arange(units.count, device="cpu") == unit).to(seen[0].device)
        sums = of_units.weighted_sums({p: here.to(p.device, wide_dtype(p.dtype)) for p in seen}, here)
        each = [{p: found.grads(p, row.to(p.device))[0] for p in seen} for row in rows.split(1)]
        size = sum(float(_norm(list(one.values()))) for one in each)
        wanted = [({p: functools.reduce(torch.add, [one[p] for one in each]) for p in seen}, _SAME_PASS)]
        if unit == first:
            wanted.append((plain(rows), _PLAIN_COARSE if coarse else _PLAIN))
        for gradients, limit in wanted:
            want = {p: gradients.get(p, torch.zeros_like(p)).to(sums[p]) for p in seen}
            of_sums = {p: float(_norm([sums[p] - want[p]])) for p in seen}
            off = abs(float(squares[unit].double().clamp(min=0).sqrt()) - float(_norm(list(want.values()))))
            if not max(off, *of_sums.values()) <= (_FLOAT64 if exact else limit) * max(size, 1e-30):
                worst = controller.name_of(max(seen, key=lambda p: of_sums[p]))
                raise SelfCheckError(
                    f"{what}: the gradient of a unit of {len(rows)} examples, clipped as one, is not the sum of theirs: its "
                    f"norm is off by {off:.1e}, and its part of the sum over units by up to {max(of_sums.values()):.1e} ({worst}), "
                    f"of {size:.1e}; nothing was released. Likely causes: a rule with formulas of its own that are wrong, or "
                    "examples that mix."
                )


def _norm(tensors: list[Tensor]) -> Tensor:
    norms = torch.stack([torch.linalg.vector_norm(t).double().cpu() for t in tensors])
    return norms.square().sum().sqrt()
