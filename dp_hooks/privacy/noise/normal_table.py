"""The law of the standard normal's absolute value, cell by cell, in whole numbers."""

from functools import cache
from typing import NamedTuple

CELLS_LOG2 = 14  # cells of [0, 16)
WIDTH_LOG2 = 10  # each 2^-10 wide
BITS = 192  # probabilities are multiples of 2^-192
_WORK = 256  # bits behind the point while they are worked out


class AliasTable(NamedTuple):
    """How to draw a cell: one in ``2^CELLS_LOG2`` at first, and it or its alias.

    Attributes:
        threshold: for each cell, out of ``2^(BITS - CELLS_LOG2)``, how often it is itself that is meant.
        alias: for each cell, which one is meant else.
    """

    threshold: tuple[int, ...]
    alias: tuple[int, ...]


@cache
def cell_weights() -> tuple[int, ...]:
    """Return ``2^BITS * P(c <= |X| 2^10 < c + 1)`` for standard normal X and each cell c, in whole numbers that sum to ``2^BITS``.

    Made by integer arithmetic alone. With ``h = 2^-10``, the density f fulfils ``f' = -x f``: the terms
    ``b_n = f^(n)(c h) h^n / n!`` of its Taylor series about ``c h`` follow from ``b_(n+1) = -(c b_n + b_(n-1)) 2^-20 / (n + 1)``.
    Their sum is f at the next cell, and the sum of ``b_n / (n + 1)`` is the cell's share. Constants drop out, since the shares
    are divided by their sum.

    Error: a step cuts off less than 2^-248 of ``f(0)``, and passes earlier errors on shrunk, as f falls; a share is off by less
    than 2^-230, a weight by rounding to 2^-192, and that of cell 0 by what the others are rounded, 2^-178. What lies beyond 16,
    with a probability below 2^-188, is put nowhere. The law of the table is within a total variation of 2^-177 of the normal's.
    """
    shares, density = [], 1 << _WORK
    for cell in range(1 << CELLS_LOG2):
        before, term, n, following, share = 0, density, 0, 0, 0
        while before or term:
            following += term
            share += term // (n + 1)
            n += 1
            before, term = term, -_quotient(cell * term + before, n << 2 * WIDTH_LOG2)
        shares.append(share)
        density = following
    total = sum(shares)
    weights = [(share << BITS) // total for share in shares]
    weights[0] += (1 << BITS) - sum(weights)  # less than 2^14
    return tuple(weights)


def _quotient(number: int, divisor: int) -> int:
    """Divide, rounded towards 0, so that terms of both signs end."""
    return number // divisor if number >= 0 else -(-number // divisor)


@cache
def alias_table() -> AliasTable:
    """Return the table that draws cells by :func:`cell_weights`, exactly (Walker 1977; made as by Vose 1991, in whole numbers)."""
    cells, full = 1 << CELLS_LOG2, 1 << (BITS - CELLS_LOG2)
    left = list(cell_weights())
    threshold, alias = [full] * cells, list(range(cells))
    small = [c for c in range(cells) if left[c] < full]
    large = [c for c in range(cells) if left[c] >= full]
    while small:
        low, high = small.pop(), large[-1]
        threshold[low], alias[low] = left[low], high
        left[high] -= full - left[low]
        if left[high] < full:
            small.append(large.pop())
    return AliasTable(tuple(threshold), tuple(alias))
