"""Canaries: gradients that nothing else has, to be found again in what is released."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


class Canaries:
    """m gradients at right angles to each other, each in one number of one parameter, and a fair coin for each: whether it is in.

    A canary of norm C in one number is the worst that one example can send (Nasr et al., USENIX Security 2023, "Dirac canaries"),
    and the noise is the same in all directions. Every parameter has some.

    Attributes:
        coins: ``[m]``, whether each is in.
    """

    def __init__(self, params: Sequence[Tensor], count: int, generator: torch.Generator) -> None:
        """Choose ``count`` places in ``params``, as many as there are numbers at most, and toss the coins."""
        places = _share_out([p.numel() for p in params], count)
        order = torch.randperm(sum(places), generator=generator, device="cpu")
        self.coins = torch.rand(sum(places), generator=generator, device="cpu") < 0.5
        self._of: list[tuple[Tensor, Tensor]] = []  # for each parameter: which canaries are in it, and where
        done = 0
        for p, here in zip(params, places, strict=True):
            where = torch.randperm(p.numel(), generator=generator, device="cpu")[:here]
            self._of.append((order[done : done + here], where))
            done += here

    def __len__(self) -> int:
        """How many there are."""
        return len(self.coins)

    def put(self, totals: Sequence[Tensor], times: Tensor, norm: float) -> None:
        """Add those that are in to the sums ``totals`` of the parameters, ``[m]`` times each, with this norm."""
        for total, (which, where) in zip(totals, self._of, strict=False):
            sent = norm * (times * self.coins)[which]
            here = sent.nonzero().flatten()
            view, places = _places(total, where[here])
            view[places] += sent[here].to(view)

    def read(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return what is in the places of the canaries, ``[m]`` in float64."""
        found = torch.zeros(len(self), dtype=torch.float64, device="cpu")
        for tensor, (which, where) in zip(tensors, self._of, strict=True):
            view, places = _places(tensor.detach(), where)
            values = view[places]
            found[which] = (values.real if values.is_complex() else values).double().cpu()
        return found


def log_ratio(seen: Tensor, sigma: float, rate: float) -> Tensor:
    """Return ``log p(seen | in) / p(seen | not in)`` for what was seen of canaries in one step, in units of their norm.

    In is a canary of length 1 with probability ``rate``, and 0 otherwise; the noise is ``N(0, sigma^2)``. No test is better than
    one of the sum of these over the steps (Neyman and Pearson 1933).
    """
    ratio = (2 * seen - 1) / (2 * sigma * sigma)
    if rate >= 1:
        return ratio
    return torch.logaddexp(ratio + math.log(rate), torch.full_like(ratio, math.log1p(-rate)))


def _places(tensor: Tensor, where: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return a view of ``tensor`` with an axis at least, and the indices in it of the numbers ``where``, counted in its order."""
    view = tensor.unsqueeze(0) if tensor.dim() == 0 else tensor
    return view, torch.unravel_index(where.to(tensor.device), view.shape)


def _share_out(sizes: Sequence[int], count: int) -> list[int]:
    """Share ``count`` places out by size, but some for each."""
    total = sum(sizes)
    count = min(count, total)
    least = max(1, count // (4 * len(sizes)))
    places = [min(size, max(least, count * size // total)) for size in sizes]
    missing = count - sum(places)
    for k in sorted(range(len(sizes)), key=lambda k: sizes[k] - places[k] if missing > 0 else places[k], reverse=True):
        change = max(-places[k], min(sizes[k] - places[k], missing))
        places[k] += change
        missing -= change
    return places
