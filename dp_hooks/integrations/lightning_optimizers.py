"""The optimizers of a LightningModule: which of them is private, and how it is put among the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .._validate import bad
from ..training.optimizer import PrivateOptimizer
from ..training.wrapped_optimizer import WrappedOptimizer
from .private_values import PrivateValues

# What to do if two of them are to be private: a step of each would be a release of its own.
ONE_PRIVATE = (
    "To train several submodules privately, let configure_optimizers() return one optimizer over all of them (with a parameter "
    "group for each), and training_step() step it once, for the sum of their losses."
)


class ManualOptimizer(WrappedOptimizer):
    """What stands under ``self.optimizers()`` in manual optimization: the private optimizer, whose steps are asked for there."""

    original_optimizer: PrivateOptimizer

    def __init__(self, optimizer: PrivateOptimizer, values: PrivateValues) -> None:
        """Around ``optimizer``, whose steps release what was computed from private ``values``."""
        super().__init__(optimizer)
        self._values = values

    def __getattr__(self, name: str) -> Any:
        """What it lacks (``step_empty``, ``skip_batch``, ``physical_batch``), the private optimizer has."""
        if name == "original_optimizer":
            raise AttributeError(name)
        return getattr(self.original_optimizer, name)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take the private step."""
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        with self._values.released():
            self.original_optimizer.step()
        return result

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop what was captured since the last step, and every gradient."""
        self.original_optimizer.zero_grad(set_to_none)


class ConfiguredOptimizers:
    """What ``configure_optimizers()`` returned, in whatever form, with one of its optimizers the private one.

    Attributes:
        private: the optimizer that holds parameters of the private part.
        schedulers: learning-rate schedulers over it.
        others: the other optimizers.
    """

    def __init__(self, configured: Any, part: nn.Module, name: str | None) -> None:
        """Look for the optimizer of ``part``, which is the submodule ``name`` of the module (None: the whole of it).

        Raises:
            InvalidArgumentError: there is none, or there are several.
        """
        self._configured = configured
        found = _optimizers_in(configured)
        if not found or not all(isinstance(optimizer, torch.optim.Optimizer) for optimizer in found):
            raise bad("module", type(configured).__name__, "configure_optimizers() has to return optimizers of torch.optim.")
        if name is None and len(found) > 1:
            raise bad(
                "module",
                f"{len(found)} optimizers",
                "with several optimizers, one of them is private: pass part=, the name of the submodule that sees private data. "
                f"{ONE_PRIVATE}",
            )
        inside = {id(p) for p in part.parameters()}
        holding = [optimizer for optimizer in found if any(id(p) in inside for p in _params(optimizer))]
        if len(holding) != 1:
            raise bad("part", name, f"{len(holding)} of {len(found)} optimizers hold parameters of it; it needs one of its own.")
        self.private: torch.optim.Optimizer = holding[0]
        self.others = [optimizer for optimizer in found if optimizer is not self.private]
        listed = [s["scheduler"] if isinstance(s, dict) else s for s in _schedulers_in(configured)]
        self.schedulers = [scheduler for scheduler in listed if scheduler.optimizer is self.private]

    def with_private(self, optimizer: torch.optim.Optimizer) -> Any:
        """The same, with ``optimizer`` in the place of the one that is private."""
        return _replaced(self._configured, self.private, optimizer)


def _params(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _is_pair(configured: Any) -> bool:
    """Whether it is a list of optimizers and a list of schedulers."""
    return isinstance(configured, (tuple, list)) and len(configured) == 2 and isinstance(configured[0], (tuple, list))


def _optimizers_in(configured: Any) -> list[Any]:
    if isinstance(configured, dict):
        return [configured.get("optimizer")]
    if _is_pair(configured):
        return list(configured[0])
    if isinstance(configured, (tuple, list)):
        return [optimizer for entry in configured for optimizer in _optimizers_in(entry)]
    return [configured]


def _schedulers_in(configured: Any) -> list[Any]:
    if isinstance(configured, dict):
        return [configured["lr_scheduler"]] if configured.get("lr_scheduler") is not None else []
    if _is_pair(configured):
        return list(configured[1]) if isinstance(configured[1], (tuple, list)) else [configured[1]]
    if isinstance(configured, (tuple, list)):
        return [scheduler for entry in configured for scheduler in _schedulers_in(entry)]
    return []


def _replaced(configured: Any, old: Any, new: Any) -> Any:
    if configured is old:
        return new
    if isinstance(configured, dict):
        return {**configured, "optimizer": _replaced(configured["optimizer"], old, new)}
    if _is_pair(configured):
        return [_replaced(entry, old, new) for entry in configured[0]], configured[1]
    if isinstance(configured, (tuple, list)):
        return [_replaced(entry, old, new) for entry in configured]
    return configured
