"""What scopes over trainers have in common: how they end, and the step on the parts of a logical batch."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from .._validate import bad
from ..distributed.world import processes
from ..errors import ScopeError
from ..training.scope import PrivateTraining
from ..training.step import dp_step
from .logical_batches import LogicalBatch
from .stepped_optimizer import SteppedOptimizer


class TrainerScope(ABC):
    """A scope over a trainer, which is entered once: whatever is put on the trainer is taken off when ``_stack`` unwinds."""

    _scope: PrivateTraining
    _stepped: SteppedOptimizer

    def __init__(self, trainer: Any, options: dict[str, Any]) -> None:
        """Over ``trainer``, with the ``options`` of :func:`dp_hooks.private_training`.

        Raises:
            ScopeError: there are several processes.
        """
        if processes() > 1:
            raise ScopeError(
                f"private_trainer() in one of {processes()} processes of torch.distributed: trainers train in one process only. "
                "Train with private_training() in a loop of your own, which several processes can share."
            )
        self._trainer = trainer
        self._options = options
        self._stack = ExitStack()
        self._step = dp_step(self._loss)
        for name in ("model", "optimizer", "loader"):
            if name in options:
                raise bad(name, options[name], "it is the trainer's; leave it out.")

    @abstractmethod
    def __enter__(self) -> PrivateTraining:
        """Make the trainer private, and return the scope; if anything fails, everything is taken back."""

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None) -> None:
        """Take everything off the trainer and the model."""
        self._stack.__exit__(kind, exc, trace)

    @abstractmethod
    def _loss(self, model: nn.Module, part: Any) -> Tensor:
        """The loss of one part, by the trainer's or module's own training step."""

    def _before(self, part: Any, size: int) -> tuple[int, int]:
        """A part of ``size`` examples, not 0, comes: how many its loss is over, and what makes a sum over them of the loss."""
        return size, size if self._scope.loss_reduction == "mean" else 1

    def _parts(self, batch: Any, instead: str) -> Iterator[tuple[Any, int]]:
        """Each part of a logical batch, and the number of examples in it."""
        if not isinstance(batch, LogicalBatch):
            raise ScopeError(f"training_step() in a private scope was given a batch that is not from the private loader. {instead}")
        return batch.parts()

    def _step_on(self, model: nn.Module, batch: Any, instead: str) -> Tensor:
        """Take one private step, on all parts of a logical batch; return the mean loss."""
        total, count = torch.zeros((), device=next(model.parameters()).device), 0
        for part, size in self._parts(batch, instead):
            counted, times = self._before(part, size) if size else (0, 0)
            loss = self._step(model, part)
            if size:
                total, count = total + loss.to(total) * times, count + counted
        self._stepped.taken = True
        return total / max(count, 1)


def refuse(holder: Any, name: str, reasons: Mapping[str, bool]) -> None:
    """Refuse the argument ``name`` for the first of ``reasons`` that holds, and one whose ``training_step`` is in a scope already.

    Raises:
        InvalidArgumentError, ScopeError: it is refused.
    """
    if isinstance(getattr(vars(holder).get("training_step"), "__self__", None), TrainerScope):
        raise ScopeError(f"this {name} is in an open private scope already: leave that one first.")
    for reason, holds in reasons.items():
        if holds:
            raise bad(name, type(holder).__name__, f"{reason}.")


def batch_of_one(collate_fn: Any, dataset: Any) -> Any:
    """The first example, collated alone. It is a copy, and generators are left as they are: collate functions may draw masks."""
    with torch.random.fork_rng(devices=[]):
        return collate_fn([copy.deepcopy(dataset[0])])
