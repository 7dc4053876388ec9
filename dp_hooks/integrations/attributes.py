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
