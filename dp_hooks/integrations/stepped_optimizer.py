"""The private optimizer as a trainer sees it: steps were taken already when the trainer asks for them."""

from collections.abc import Callable
from typing import Any

import torch

from ..errors import ScopeError
from ..training.wrapped_optimizer import WrappedOptimizer


class SteppedOptimizer(WrappedOptimizer):
    """A trainer's handle on the private optimizer: ``step()`` acknowledges the private step that ``training_step()`` took.

    Attributes:
        taken: whether a step was taken that the trainer has not asked for yet.
    """

    taken = False

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Acknowledge the step; if the trainer takes its steps by a ``closure``, that is where it is taken.

        Raises:
            ScopeError: none was taken.
        """
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        if not self.taken:
            raise ScopeError(
                "the trainer asked for an optimizer step of its own. In a private scope the step belongs to training_step(): "
                "clipping and noise are for one logical batch at a time."
            )
        self.taken = False
        return result

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop every gradient."""
        self.original_optimizer.zero_grad(set_to_none)
