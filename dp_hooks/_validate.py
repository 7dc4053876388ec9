"""Checks of plain arguments. Each error names the argument, the value it got and what to pass instead."""

import math
from collections.abc import Collection, Sequence
from numbers import Real
from typing import Any

from .errors import InvalidArgumentError


def bad(name: str, value: object, remedy: str) -> InvalidArgumentError:
    """Return the error for argument ``name`` with ``value``; ``remedy`` says what would be right."""
    return InvalidArgumentError(f"{name}={value!r} cannot be used: {remedy}")


def real(name: str, value: object, remedy: str) -> float:
    """Return ``value`` as a float if it is a finite real number (no bool), else raise."""
    try:
        number = math.nan if isinstance(value, bool) or not isinstance(value, Real) else float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise bad(name, value, remedy)
    return number


def positive(name: str, value: object, remedy: str = "pass a number greater than 0.") -> float:
    """Return ``value`` as a float greater than 0."""
    number = real(name, value, remedy)
    if number <= 0:
        raise bad(name, value, remedy)
    return number


def non_negative(name: str, value: object, remedy: str = "pass a number of 0 or more.") -> float:
    """Return ``value`` as a float of 0 or more."""
    number = real(name, value, remedy)
    if number < 0:
        raise bad(name, value, remedy)
    return number


def fraction(name: str, value: object, remedy: str, *, one_allowed: bool = False) -> float:
    """Return ``value`` as a float in (0, 1), or in (0, 1] if ``one_allowed``."""
    number = positive(name, value, remedy)
    if number > 1 or (number == 1 and not one_allowed):
        raise bad(name, value, remedy)
    return number


def probability(name: str, value: object, remedy: str = "pass a number from 0 to 1.") -> float:
    """Return ``value`` as a float in [0, 1]."""
    number = non_negative(name, value, remedy)
    if number > 1:
        raise bad(name, value, remedy)
    return number


def positive_int(name: str, value: object, remedy: str = "pass a whole number of 1 or more.") -> int:
    """Return ``value`` as an int of 1 or more."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise bad(name, value, remedy)
    return value


def one_of(name: str, value: Any, allowed: Collection[str]) -> str:
    """Return ``value`` if it is one of the strings ``allowed``."""
    if not isinstance(value, str) or value not in allowed:
        raise bad(name, value, f"pass one of {', '.join(map(repr, sorted(allowed)))}.")
    return value


def boolean(name: str, value: object) -> bool:
    """Return ``value`` if it is True or False; 0, 1, "no" and the like are refused."""
    if not isinstance(value, bool):
        raise bad(name, value, "pass True or False.")
    return value


def clipping_bounds(name: str, value: object, clipping: str, tensors: int) -> tuple[float, ...]:
    """Return the clipping bounds as positive floats: ``tensors`` of them for "per_layer", else one."""
    if clipping != "per_layer":
        return (positive(name, value, "the clipping bound C must be greater than 0 (a typical value is 1.0)."),)
    remedy = (
        f"with clipping={clipping!r} pass a list with one positive bound for each of the {tensors} trainable tensors, or a "
        'mapping from name patterns to bounds, such as {"encoder.*": 0.5, "*": 1.0}.'
    )
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != tensors:
        raise bad(name, value, remedy)
    return tuple(positive(f"{name}[{i}]", item, remedy) for i, item in enumerate(value))
