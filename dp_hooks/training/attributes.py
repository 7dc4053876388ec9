"""Attributes that are put on somebody's object for a while."""

from contextlib import ExitStack
from typing import Any

_MISSING = object()


def put(stack: ExitStack, holder: Any, **attributes: Any) -> None:
    """Set ``attributes`` on ``holder``, on this object alone, until ``stack`` unwinds; then each is what it was, or gone."""
    own = vars(holder)
    for name, value in attributes.items():
        stack.callback(_put_back, own, name, own.get(name, _MISSING))
        own[name] = value


def _put_back(own: dict[str, Any], name: str, value: Any) -> None:
    if value is _MISSING:
        own.pop(name, None)
    else:
        own[name] = value


def copied(value: Any) -> Any:
    """A copy that can be added to."""
    if isinstance(value, dict):
        held = value.copy()  # of a class of its own, it may be
        for key, item in value.items():
            held[key] = copied(item)
        return held
    return list(value) if isinstance(value, list) else value
