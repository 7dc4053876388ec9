"""How the examples of a release were sampled: the second entry of a charge, in the place of Opacus's sampling rate.

A charge is ``(noise multiplier, rate, steps)``, as in the history of Opacus's accountants. The rate is one of

- a number q in (0, 1]: Poisson sampling of one batch; 1: without amplification;
- ``("truncated_poisson", q, N, B)``: Poisson sampling of one batch from N examples, of which at most B are kept;
- ``("random_allocation", t)``: one pass over t batches, in which every example is in one of them, a random one.

These are plain tuples of plain numbers: they can be compared, pickled without a class, loaded with ``weights_only=True`` and kept
as JSON, which makes lists of them, of which :func:`as_rate` makes tuples again. Code that takes a rate for a number fails on
them, it does not go on.
"""

import math
from numbers import Real
from typing import Any

TRUNCATED, ALLOCATION = "truncated_poisson", "random_allocation"
Rate = float | tuple[Any, ...]
_MOST = 2**53  # of examples or batches: a float64 holds them


def truncated_poisson(rate: float, examples: int, most: int) -> Rate:
    """Return the rate of batches of at most ``most`` of ``examples``; a number where no batch can be larger."""
    return rate if most >= examples else (TRUNCATED, rate, examples, most)


def random_allocation(batches: int) -> Rate:
    """Return the rate of a pass over so many batches; one batch has all examples."""
    return 1.0 if batches == 1 else (ALLOCATION, batches)


def as_rate(value: object) -> Rate:
    """Return a rate that was read from somewhere.

    Raises:
        ValueError: it is none.
    """
    if isinstance(value, Real) and not isinstance(value, bool) and 0 < value <= 1 and float(value) > 0:  # type: ignore[operator]
        return float(value)
    if isinstance(value, (list, tuple)) and value and isinstance(value[0], str):
        kind, *numbers = value
        if kind == TRUNCATED and len(numbers) == 3 and _are_counts(*numbers[1:]) and numbers[2] < numbers[1]:
            rate = as_rate(numbers[0])
            if not isinstance(rate, tuple):
                return kind, rate, *numbers[1:]
        if kind == ALLOCATION and len(numbers) == 1 and _are_counts(*numbers) and numbers[0] > 1:
            return kind, *numbers
    raise ValueError(f"{value!r} is no sampling rate")


def _are_counts(*values: object) -> bool:
    return all(isinstance(value, int) and not isinstance(value, bool) and 0 < value < _MOST for value in values)


def kind_of(rate: Rate) -> str:
    """Return the sampling that only some accountants know, by its name; empty where any accountant knows it."""
    return str(rate[0]) if isinstance(rate, (tuple, list)) else ""


def number(rate: Rate) -> float:
    """Return a rate that is known to be one of Poisson sampling, or without amplification."""
    assert not isinstance(rate, tuple)
    return rate


def most_likely(rate: Rate) -> float:
    """Return an upper bound of the probability that an example is used in the release at all."""
    if not isinstance(rate, tuple):
        return rate
    return float(rate[1]) if rate[0] == TRUNCATED else 1.0


def unamplified(rate: Rate) -> float:
    """Return a number in the place of the rate with which a release certainly spends no less.

    With all batches revealed, an example is in none of them or in one, so that a release is at most one Gaussian release.
    """
    return 1.0 if isinstance(rate, tuple) else rate


def raised(rate: Rate, per_octave: float) -> Rate:
    """Return a rate that spends no less, of fewer that there are: on a logarithmic grid; for other samplings the coarsest is 1."""
    if isinstance(rate, tuple):
        return rate if per_octave >= 16 else 1.0
    return min(1.0, 2 ** (math.ceil(math.log2(rate) * per_octave) / per_octave))
