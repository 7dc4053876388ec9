"""Finds a forward method that was called past the module's ``__call__``, and so past all hooks: ``model.forward(x)``."""

import inspect
import sys
from types import FrameType
from typing import Any

from torch import nn

# How far up the stack is looked: a forward pass is not deeper between a module and the part it calls.
_DEPTH = 100


def forward_around(module: nn.Module, names: dict[int, str]) -> FrameType | None:
    """Return the frame of the outermost forward that runs, of a module in ``names`` (by identity), around ``module``; or None."""
    frame: FrameType | None = sys._getframe(1)
    found: FrameType | None = None
    for _ in range(_DEPTH):
        if frame is None:
            break
        owner = _owner(frame) if frame.f_code.co_name == "forward" else None
        if isinstance(owner, nn.Module) and owner is not module and id(owner) in names:
            found = frame
        frame = frame.f_back
    del frame
    return found


def call_in(frame: FrameType) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """Return the module whose forward runs in ``frame``, and its inputs, if it has not given their names to anything else yet."""
    given = inspect.getargvalues(frame)
    args = [given.locals[name] for name in given.args[1:]]
    args += given.locals[given.varargs] if given.varargs else ()
    code = frame.f_code
    only = code.co_varnames[code.co_argcount : code.co_argcount + code.co_kwonlyargcount]
    kwargs = {name: given.locals[name] for name in only}
    kwargs |= given.locals[given.keywords] if given.keywords else {}
    return _owner(frame), tuple(args), kwargs


def _owner(frame: FrameType) -> Any:
    """The first argument of a method, whatever it is called."""
    code = frame.f_code
    return frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
