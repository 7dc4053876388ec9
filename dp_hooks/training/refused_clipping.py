"""What accelerate clips gradients with: refused for the parameters of open scopes."""

import functools
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

from torch import Tensor

from ..errors import ScopeError
from .attributes import put

_NAMES, _LET = ("clip_grad_norm_", "clip_grad_value_"), "_dp_hooks_lets_clip"

_lock = threading.RLock()  # a scope may be collected, and let go, in the middle
_open: list[set[int]] = []  # the parameters of each open scope
_originals: dict[str, Callable[..., Any]] = {}  # while any is open: what accelerate has


def refuse_clipping(params: Sequence[Tensor], stack: ExitStack) -> None:
    """Let ``accelerator.clip_grad_norm_`` and ``clip_grad_value_`` refuse ``params``, by name, until ``stack`` unwinds.

    No accelerator can be found from what it has prepared, so this is put on its class, while any scope is open; calls for other
    parameters go to the method itself. A program that has not imported accelerate is left alone.
    """
    module = sys.modules.get("accelerate.accelerator")
    if module is None:
        return
    held = {id(p) for p in params}
    with _lock:
        _open.append(held)
        stack.callback(_close, module.Accelerator, held)
        if not _originals:
            for name in _NAMES:
                _originals[name] = getattr(module.Accelerator, name)
                setattr(module.Accelerator, name, _refusing(name, _originals[name]))


def _close(kind: Any, held: set[int]) -> None:
    with _lock:
        _open.remove(held)
        while _originals and not _open:
            name, original = _originals.popitem()
            setattr(kind, name, original)


def _refusing(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def method(self: Any, parameters: Any, *args: Any, **kwargs: Any) -> Any:
        parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        if _LET not in vars(self) and any(id(p) in held for p in parameters for held in _open):
            raise ScopeError(
                f"accelerator.{name}() was given parameters of an open private scope: the gradient of each example is clipped by "
                "the scope's max_grad_norm, and there is nothing else to clip before opt.step() but noise. Leave it out."
            )
        return original(self, parameters, *args, **kwargs)

    return method


def let_clip(accelerator: Any, stack: ExitStack) -> None:
    """A trainer's own ``accelerator`` clips what a private step has left behind, which changes nothing: let it."""
    put(stack, accelerator, **{_LET: True})
