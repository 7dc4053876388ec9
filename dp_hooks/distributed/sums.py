"""Sums over processes: each adds its noise to a part of them, so that every number gets noise once."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .peers import Peers

_AT_ONCE = 1 << 24  # numbers that are exchanged at a time: 64 MB of float32


def add_up(totals: Sequence[Tensor], peers: Peers, add_noise: Callable[[Sequence[Tensor]], bool], repeatable: bool) -> bool:
    """Replace ``totals`` in every process by their sums over all, with noise; the same numbers everywhere, to the bit.

    Each process gets the sum of one part of the numbers (reduce-scatter), adds noise to that part, and hands it to the others
    (all-gather): no number gets noise twice, the work is shared, and what is exchanged is as much as for an all-reduce. Noise
    from a generator that can be ``repeatable``, of which every process may have a copy in the same state, is drawn by the first
    process alone: by several, parts would have the same noise.

    Returns:
        Whether the results can be released, in all processes.
    """
    if repeatable:
        for total in totals:
            dist.reduce(_real(total), dst=0)
        fine = add_noise(totals) if peers.is_first else True
        for total in totals:
            dist.broadcast(_real(total), src=0)
        return peers.all(fine)
    fine = True
    for some in _alike(totals):
        sizes = [total.numel() for total in some]
        each = -(-sum(sizes) // peers.size)
        joined = some[0].new_zeros(each * peers.size)
        torch.cat([total.reshape(-1) for total in some], out=joined[: sum(sizes)])
        mine = torch.empty_like(joined[:each])
        _reduce_scatter(mine, joined)
        fine = add_noise([mine]) and fine
        _all_gather(joined, mine)
        for total, summed in zip(some, joined[: sum(sizes)].split(sizes), strict=True):
            total.copy_(summed.view(total.shape))
    return peers.all(fine)


def _real(total: Tensor) -> Tensor:
    return torch.view_as_real(total) if total.is_complex() else total


def _alike(totals: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Those of one device and dtype together, as real numbers, so many at a time."""
    kinds: dict[Any, list[Tensor]] = {}
    for total in map(_real, totals):
        some = kinds.setdefault((total.device, total.dtype), [])
        if some and sum(t.numel() for t in some) + total.numel() > _AT_ONCE:
            yield kinds.pop((total.device, total.dtype))
            some = kinds.setdefault((total.device, total.dtype), [])
        some.append(total)
    yield from (some for some in kinds.values() if some)


# Renamed in PyTorch 2.14.
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or getattr(dist, "reduce_scatter_tensor", None)
_all_gather: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)
