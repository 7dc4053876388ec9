"""What accountants have been charged with: ``(noise multiplier, sampling rate, steps)``, one entry after the other."""

from ...errors import ScopeError

History = list[tuple[float, float, int]]


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
    raise ScopeError(
        f"budget was spent already ({spent}) that what is loaded ({loaded}) knows nothing of; loading would forget it. Load into "
        "something new."
    )
