"""Parameters hold other values for a while: rounded ones, or such as they may have later."""

import itertools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .without_pattern import without_pattern

# Larger parameters get other numbers only if all are zero: a copy takes memory, and not all units of a large layer are dead.
_SMALL = 65_536
# Where all numbers of a parameter are the same, up to this deviation, new ones have the other deviation.
_ALIKE, _SPREAD = 1e-3, 0.5


@contextmanager
def rounded(params: Iterable[nn.Parameter], *, coarse: bool = False, sign: int = 1) -> Iterator[None]:
    """Change parameters by some units in the last place (``coarse``: of bfloat16), unseen: every second one the other way."""
    with _kept(p for p in params if p.is_floating_point()) as tensors:
        for p in tensors:
            signs = torch.arange(p.numel(), device=p.device).remainder(2).mul(2).sub(1).reshape(p.shape)
            size = torch.finfo(torch.bfloat16).eps / 2 if coarse else 4 * torch.finfo(p.dtype).eps
            p.mul_(1 + sign * size * signs.to(p.dtype))
        yield


@contextmanager
def exchanged(params: Iterable[nn.Parameter], sign: int = 1, *, closed: bool = False) -> Iterator[None]:
    """Give parameters other values, unseen, for another function of the same kind.

    What is dead, zero or saturated now need not be so later: units that no sample of this batch switches on, gates and adapters
    that begin at zero. Mean and deviation stay what they are, so that most models compute something; with ``sign=-1`` all numbers
    are the opposite of those with 1. Values are exactly the same again afterwards.

    Args:
        params: the parameters.
        sign: 1 or -1.
        closed: only those that are zero, or nearly, get other values; else all that are small or zero.
    """
    plain = [p for p in params if _is_plain(p)]
    moments = [_moments(p) for p in plain]
    chosen = [_is_zero(*some) or (p.numel() <= _SMALL and not closed) for p, some in zip(plain, moments, strict=True)]
    with _kept(itertools.compress(plain, chosen)) as tensors:
        for number, (p, (spread, mean)) in enumerate(zip(tensors, itertools.compress(moments, chosen), strict=True)):
            scale = 3**0.5 * (spread if spread > _ALIKE else _SPREAD)
            p.copy_(sign * (mean + scale * without_pattern(p.shape, 7919 * (number + 1)).to(p.device)))
        yield


def is_closed(param: nn.Parameter) -> bool:
    """Whether a parameter is zero, or nearly: what is multiplied with it is not seen."""
    return _is_plain(param) and _is_zero(*_moments(param))


def _is_plain(p: nn.Parameter) -> bool:
    return type(p.data) is Tensor and p.layout == torch.strided and p.is_floating_point() and p.numel() > 0


def _moments(p: nn.Parameter) -> tuple[float, float]:
    spread, mean = torch.std_mean(p.data, correction=0)
    return float(spread), float(mean)


def _is_zero(spread: float, mean: float) -> bool:
    return not max(spread, abs(mean)) > _ALIKE


@contextmanager
def _kept(params: Iterable[nn.Parameter]) -> Iterator[list[Tensor]]:
    """The data of ``params``, to be written to; they get it back, also where a forward pass puts other data in its place."""
    kept = [(p, p.data, p.detach().clone()) for p in params]
    try:
        yield [data for _, data, _ in kept]
    finally:
        for p, data, values in kept:
            if p.data.data_ptr() != data.data_ptr():
                p.data = data
            data.copy_(values)
