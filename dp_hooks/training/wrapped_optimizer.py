"""Optimizers that can be private, and a ``torch.optim.Optimizer`` in front of one."""

import copy
from typing import Any

import torch
from torch import nn

from .._validate import bad
from ..capture.validate import trainable_beside
from ..errors import ScopeError, some_of

_HOOKS = tuple(
    f"_optimizer_{method}_{when}_hooks" for method in ("step", "state_dict", "load_state_dict") for when in ("pre", "post")
)


def _wrapped(name: str) -> Any:
    """Return a property that is the wrapped optimizer's own attribute ``name``."""
    return property(
        lambda self: getattr(self.original_optimizer, name), lambda self, value: setattr(self.original_optimizer, name, value)
    )


class WrappedOptimizer(torch.optim.Optimizer):
    """The user's optimizer by another name: parameter groups, state, defaults and hooks are its own.

    So learning-rate schedulers and checkpoints work as usual; a copy or pickle is a copy of the user's optimizer.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        """Stand in front of ``optimizer``."""
        # Not calling super().__init__: it would build parameter groups and state of its own.
        self.original_optimizer = optimizer
        for name in _HOOKS:  # shared, so that hooks registered here run when the wrapped optimizer works
            setattr(self, name, getattr(optimizer, name))

    param_groups = _wrapped("param_groups")
    state = _wrapped("state")
    defaults = _wrapped("defaults")

    def state_dict(self) -> dict[str, Any]:
        """Return the wrapped optimizer's state dict."""
        return self.original_optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of the wrapped optimizer's class."""
        self.original_optimizer.load_state_dict(state_dict)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused: the set of private parameters is fixed when the scope begins."""
        raise ScopeError("parameter groups cannot be added inside a private scope: add them before entering it.")

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.optim.Optimizer:
        """A deep copy of the wrapped optimizer: ordinary, over copied parameters, outside the scope."""
        return copy.deepcopy(self.original_optimizer, memo)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as the wrapped optimizer."""
        return (_same, (self.original_optimizer,))


def _same(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    return optimizer


def check_optimizer(optimizer: object, model: nn.Module) -> list[nn.Parameter]:
    """Return the trainable parameters that ``optimizer`` manages, in its order.

    Raises:
        InvalidArgumentError: not an optimizer, foreign parameters, none that is trainable, or an optimizer that
            evaluates its closure several times (LBFGS) or needs sparse gradients.
    """
    if isinstance(optimizer, WrappedOptimizer):
        raise bad("optimizer", type(optimizer).__name__, "it is private already; pass the optimizer it was made from.")
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise bad("optimizer", optimizer, "pass a torch.optim.Optimizer over the model's parameters.")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise bad(
            "optimizer",
            "LBFGS",
            "it evaluates the loss several times per step, and every evaluation would need a charge of its own. Use SGD or Adam.",
        )
    if isinstance(optimizer, torch.optim.SparseAdam):
        raise bad("optimizer", "SparseAdam", "noise makes every gradient dense. Use Adam.")
    own = {id(p) for p in model.parameters()}
    params = [p for group in optimizer.param_groups for p in group["params"]]
    foreign = [tuple(p.shape) for p in params if id(p) not in own]
    if foreign:
        raise bad(
            "optimizer",
            type(optimizer).__name__,
            "Module parameters are different than optimizer Parameters: "
            f"{len(foreign)} of its {len(params)} tensors (shapes {foreign[:3]}) are not in the model. Create it "
            "from model.parameters() after the model has its final form.",
        )
    trainable = [p for p in params if p.requires_grad]
    if not trainable:
        raise bad(
            "optimizer",
            type(optimizer).__name__,
            "none of its parameters is trainable. Set requires_grad_(True) on those to train before entering.",
        )
    if left := trainable_beside(model, params):
        raise bad(
            "optimizer",
            type(optimizer).__name__,
            f"{some_of(left)} can be trained, but the optimizer does not hold them: they would get no gradient "
            "inside the scope, and another optimizer could not train them. Freeze them (requires_grad_(False)), or give them to "
            "this optimizer.",
        )
    return trainable
