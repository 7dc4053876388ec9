"""What accountants have been charged with: ``(noise multiplier, rate, steps)``, one entry after the other; see :mod:`.rates`."""

import math
from collections.abc import Iterable
from numbers import Real
from typing import Any

from ...errors import ScopeError
from .rates import Rate, as_rate

Charge = tuple[float, Rate, int]
History = list[Charge]


def as_number(value: object) -> float:
    """Return a finite number that was read from somewhere.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"{value!r} is no number")
    return float(value)


def as_charge(entry: object) -> Charge:
    """Return an entry that was read from somewhere, if it is one.

    Raises:
        ValueError, OverflowError: it is not of a noise multiplier, a rate and a number of steps.
    """
    if not isinstance(entry, (list, tuple)) or len(entry) != 3:
        raise ValueError(f"{entry!r} is no charge")
    sigma, rate, steps = as_number(entry[0]), as_rate(entry[1]), as_number(entry[2])
    if sigma < 0 or steps < 0 or steps != int(steps):
        raise ValueError(f"{entry!r} is no charge")
    return sigma, rate, int(steps)


def as_json(history: Iterable[Charge]) -> list[list[Any]]:
    """Return a history in the shape that it has after it was kept as JSON; :func:`as_charge` reads its entries."""
    return [[float(sigma), list(rate) if isinstance(rate, tuple) else float(rate), int(steps)] for sigma, rate, steps in history]


def add_charge(history: History, sigma: float, rate: Rate, steps: int = 1) -> None:
    """Add to ``history``: to its last entry, if that is alike."""
    if history and history[-1][:2] == (sigma, rate):
        history[-1] = (sigma, rate, history[-1][2] + steps)
    else:
        history.append((sigma, rate, steps))


def continues(earlier: History, later: History) -> bool:
    """Whether more of the last entry of ``earlier``, and further entries, make it ``later``."""
    if not earlier:
        return True
    *head, (sigma, rate, steps) = earlier
    at = len(head)
    return later[:at] == head and len(later) > at and later[at][:2] == (sigma, rate) and later[at][2] >= steps


def beyond(earlier: History, later: History) -> History:
    """What ``later``, which continues ``earlier``, has more than that."""
    if not earlier:
        return later
    at = len(earlier) - 1
    sigma, rate, steps = later[at]
    more = steps - earlier[at][2]
    return [*([(sigma, rate, more)] if more else []), *later[at + 1 :]]


def joined(spent: History, loaded: History) -> tuple[History, bool]:
    """Return the history to go on with, the longer of two of which one continues the other; and whether that is ``spent``.

    Raises:
        ScopeError: neither continues the other.
    """
    spent, loaded = ([(sigma, rate, steps) for sigma, rate, steps in history] for history in (spent, loaded))
    if continues(spent, loaded):
        return loaded, False
    if continues(loaded, spent):
        return spent, True
    raise unknown(spent, loaded)


def unknown(spent: History, loaded: History) -> ScopeError:
    """The error where what is ``loaded`` is of another run than what was ``spent``."""
    return ScopeError(
        f"budget was spent already ({spent}) that what is loaded ({loaded}) knows nothing of; loading would forget it. Load into "
        "something new."
    )
