"""Steps that a check refuses, or does not."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dp_hooks import dp_step, errors

from .. import laws
from ..models import loader_of, randn, scope_over, values
from ..reference import losses_of

N, D = 8, 4
whole = dp_step(lambda model, x: losses_of(model, x))
STYLES = {"bare loop": laws.step_in(laws.MODE["ghost"]), "dp_step": lambda model, opt, batch: whole(model, batch[0])}
each_style = pytest.mark.parametrize("step", STYLES.values(), ids=STYLES)


@contextmanager
def refused(match: str, model: nn.Module) -> Iterator[None]:
    """The block is refused, and moves nothing."""
    before = values(model)
    with pytest.raises(errors.SelfCheckError, match=match):
        yield
    assert all(torch.equal(a, b) for a, b in zip(before, values(model), strict=True))


def opened(model: nn.Module, batches: int = 1, **options: Any) -> Any:
    """A scope with so many batches."""
    return scope_over(model, loader=loader_of([randn(batches * N, D)], N), max_grad_norm=1.0, **options)


def nothing(model: nn.Module, x: Tensor) -> None:
    """Before or after a step."""


def refused_in(
    number: int,
    match: str,
    model: Any,
    step: Any,
    *,
    before: Callable[[nn.Module, Tensor], None] = nothing,
    after: Callable[[nn.Module, Tensor], None] = nothing,
) -> None:
    """Steps pass up to the one of this number, in which ``model.late`` is set."""
    taken = 0
    with opened(model, number + 1) as (opt, loader):
        for batch in loader:
            model.late = taken == number
            before(model, batch[0])
            with refused(match, model) if model.late else nullcontext():
                step(model, opt, batch)
            after(model, batch[0])
            taken += 1
    assert taken == number + 1
