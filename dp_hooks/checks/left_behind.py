"""What calls leave behind in a model, where another call depends on it, is refused."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .._rerun import write_back
from ..capture.calls.carried_state import Unlike
from ..errors import SelfCheckError, some_of

# By how much a call may differ from itself where it begins with what other samples left, elementwise.
_RERUN = {torch.float64: 1e-6, torch.float32: 1e-4}


def compare_left(unlike: Unlike, found: list[list[Tensor]], what: str, *, buffers: bool = True) -> None:
    """Two calls on other samples left things behind that are ``unlike``, and then the same call gave what was ``found``."""
    if unlike.trained:
        raise SelfCheckError(
            f"{what}: {some_of(unlike.trained)}: what is trained is written to in a forward pass, with what is in the batch: no "
            "noise is added to that. Nothing was released. Remedy: leave parameters to the optimizer, or keep what follows from "
            "the batch out of them."
        )
    if unlike.stored and buffers:
        raise SelfCheckError(
            f"{some_of(unlike.stored)}: written during the forward pass, from private samples and without noise; buffers and "
            "frozen parameters last, and are saved with the model. Remedy: call .eval() on the module that does it (an observer, "
            "running statistics), or take it out of the model."
        )
    names = [*unlike.stored, *unlike.attributes]
    for one, other in zip(*found, strict=True) if names else ():
        if one.shape != other.shape or not _alike(one, other):
            raise SelfCheckError(
                f"{what}: what comes out depends on {some_of(names)}, where an earlier batch left something of its "
                "samples: an example would have a part in later batches, too, where nothing bounds it. Nothing was released. "
                "Remedy: keep no statistics, queues or states between batches, or reset them at the beginning of every "
                "forward pass."
            )


@contextmanager
def trained_kept(params: Iterable[nn.Parameter]) -> Iterator[None]:
    """Write back what is trained after the block, in which a forward pass may write to it."""
    before = [(p, p.detach().clone()) for p in params]
    try:
        yield
    finally:
        with torch.no_grad():
            for p, value in before:
                write_back(p, value)


def _alike(one: Tensor, other: Tensor) -> bool:
    """Whether two runs of the same call on the same samples gave the same; kernels need not add up in the same order."""
    tolerance = _RERUN.get(one.dtype, 1e-3)
    return torch.allclose(one.double(), other.double(), tolerance, 1e-3 * tolerance, equal_nan=True)
