"""UserLoop: the loop that is audited, and the scope that it is run in."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from opacus.accountants import IAccountant
from torch import nn

from .._validate import bad
from ..distributed.world import processes
from ..errors import InvalidArgumentError, ScopeError
from ..privacy.accounting.opacus import ACCOUNTANTS
from ..training.optimizer import PrivateOptimizer
from ..training.scope import PrivateTraining, private_training
from ..training.step import is_dp_step

_NOT_HERE = ("ledger", "nonprivate_statistics")  # nothing of an audit is spent, or kept


class UserLoop:
    """How the user trains: a function ``(model, opt, loader)`` with the body of the ``with`` block, or a ``@dp_step`` function."""

    def __init__(self, train: Callable[..., Any], options: Mapping[str, Any]) -> None:
        """With the arguments ``options`` of ``private_training``.

        Raises:
            InvalidArgumentError: ``train`` is not such a function.
        """
        if not callable(train) or isinstance(train, type):
            remedy = "pass a function that trains, train(model, opt, loader), or a @dp_step function, step(model, batch)."
            raise bad("train", train, remedy)
        self._train = train
        self._passes = 1
        if isinstance(epochs := options.get("epochs"), (int, float)) and math.isfinite(epochs):
            self._passes = max(1, math.ceil(epochs))
        self.options = {name: value for name, value in options.items() if name not in _NOT_HERE}
        if isinstance(accountant := options.get("accountant"), IAccountant):  # which would be charged
            name = accountant.mechanism()
            self.options["accountant"] = name if name in ACCOUNTANTS else "rdp"

    def scope(self, model: nn.Module, optimizer: torch.optim.Optimizer, loader: Any, **changed: Any) -> PrivateTraining:
        """Return a scope with these arguments, and an accountant of its own; it is not entered.

        Raises:
            ScopeError: there are several processes.
            InvalidArgumentError: of its sampling it is not known what a canary would have to do.
        """
        if processes() > 1:
            raise ScopeError(
                f"an audit in one of {processes()} processes of torch.distributed: each would see a part of the sums only. Audit "
                "the same loop in one process, without torchrun."
            )
        scope = private_training(model, optimizer, loader, **{**self.options, **changed})
        if scope.plan.needs_pld:
            remedy = "audits know 'poisson' and 'sequential' sampling. Gradients and noise are the same with these."
            raise bad("sampling", scope.plan.sampling, remedy)
        if scope.plan.units is not None:
            remedy = "audits know single examples only. Leave it out: each example is a unit of its own then."
            raise bad("privacy_unit", self.options.get("privacy_unit"), remedy)
        return scope

    def run(self, model: nn.Module, opt: PrivateOptimizer, loader: Any) -> None:
        """Run it once; a ``@dp_step`` function on all batches of the ``epochs`` that are planned, or of one pass."""
        if not is_dp_step(self._train):
            self._train(model, opt, loader)
            return
        for _ in range(self._passes):
            for batch in loader:
                self._train(model, batch)


def no_steps(train: object) -> InvalidArgumentError:
    """The error of a loop that steps nothing."""
    return bad(
        "train",
        getattr(train, "__qualname__", train),
        "it took no step on a batch of the private loader. It is called as train(model, opt, loader), and has to iterate that "
        "loader and step that optimizer.",
    )


def number_of_batch(optimizer: PrivateOptimizer | None) -> int:
    """Return the number of the logical batch that is being stepped.

    Raises:
        InvalidArgumentError: it is not from the private loader.
    """
    batch = None if optimizer is None else optimizer.physical_batch
    if batch is None:
        raise bad("train", "a loop", "it stepped a batch that the private loader did not hand out: an audit is of that loader's.")
    return batch.logical
