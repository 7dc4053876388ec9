"""Normal numbers rounded to whole ones, drawn without a float."""

from functools import cache

import torch
from torch import Tensor

from .normal_table import BITS, CELLS_LOG2, WIDTH_LOG2, alias_table
from .secret_bytes import ReadBytes

MOST_UNITS = 1 << 31  # of the standard deviation: products stay below 2^63

# A number takes 96 bits: 1 for the sign, 14 for a cell, 17 for it or its alias; 44 for the place in the cell, 20 for a coin.
_BYTES = 12
_SHARE, _PLACE, _COIN = 17, 44, 20
_LOW = 27  # the place counts 2^-54: whole numbers of ``units`` are made of two products, one of each half
_HALF = 1 << (WIDTH_LOG2 + _PLACE - _LOW - 1)  # a half, in units of 2^-27


def rounded_gaussian(count: int, units: int, device: torch.device, read: ReadBytes) -> Tensor:
    """Draw ``round(units * X)`` for ``count`` independent standard normal X: whole numbers ``[count]``, int64, on ``device``.

    That is, k with probability ``Phi((k + 1/2) / units) - Phi((k - 1/2) / units)``: the rounded normal distribution with standard
    deviation ``units``, a whole number of 1 to 2^31.

    How: the cell of ``|X|`` (2^-10 wide) is drawn from a table of whole numbers (:mod:`.normal_table`). The place y in the cell is
    uniform at first, and kept with probability ``exp(-(c y + y^2 / 2) 2^-20)``, the density there against that at the cell's
    beginning, else drawn anew; so X is a normal number of as many digits as are asked for (cf. Karney 2016, arXiv:1303.6257).
    Some digits decide nearly always. About one number in 1,200, whose coin, share or rounding they leave open, is gone on
    with digit by digit, in Python's integers, from the very bits that it began with (as in Haney et al. 2022, arXiv:2207.13793).

    Guarantee: for independent uniform bits the law of a number is within a total variation of 2^-160 of that above: 2^-177 for the
    table (with tails cut off at 16 standard deviations), the rest for coins and places that end after 192 bits. Bits are those of
    ``read``, made on the CPU; they go to another device in one copy, and there is one synchronisation with it.
    """
    raw = torch.frombuffer(read(_BYTES * count), dtype=torch.uint8).to(device)
    more, words = raw[: 8 * count].view(torch.int64), raw[8 * count :].view(torch.int32)
    first = (words >> _SHARE).bitwise_and_((1 << CELLS_LOG2) - 1)
    begins, alias = (table.index_select(0, first) for table in _tables(device))
    share = words & ((1 << _SHARE) - 1)
    cell = torch.where(share < begins, first, alias).to(torch.int64)
    place = (more >> _COIN) & ((1 << _PLACE) - 1)
    # units * |X| in units of 2^-27, cut off: below the truth by less than 1 + units / 2^27.
    product = ((cell << (_PLACE - _LOW)) | (place >> _LOW)) * units
    product += ((place & ((1 << _LOW) - 1)) * units) >> _LOW
    product += _HALF
    number = product >> (WIDTH_LOG2 + _PLACE - _LOW)
    coin = more & ((1 << _COIN) - 1)
    # 1 - (c + 1/2) 2^-20 is below the probability of being kept, wherever in the cell the place is.
    open_ = coin + cell > (1 << _COIN) - 2
    open_ |= share == begins
    open_ |= (product & (2 * _HALF - 1)) > 2 * _HALF - 3 - (units >> _LOW)
    left = open_.nonzero().flatten()
    if left.numel():
        begun = zip(words[left].tolist(), more[left].tolist(), strict=True)
        number[left] = torch.tensor([_exactly(word, rest, units, read) for word, rest in begun], device=device)
    sign = words >> 31  # -1 or 0
    return (number ^ sign).sub_(sign)


@cache
def _tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return for each cell how its threshold begins (with 17 binary digits; 2^17 where it is full), and its alias: int32."""
    threshold, alias = alias_table()
    begins = [number >> (BITS - CELLS_LOG2 - _SHARE) for number in threshold]
    return torch.tensor(begins, dtype=torch.int32, device=device), torch.tensor(alias, dtype=torch.int32, device=device)


def _exactly(word: int, rest: int, units: int, read: ReadBytes) -> int:
    """Return ``round(units * |X|)`` for the number that began with these bits, from as many more as it takes."""

    def bits(count: int) -> int:
        return int.from_bytes(read(count + 7 >> 3), "little") & ((1 << count) - 1)

    threshold, alias = alias_table()
    cell = word >> _SHARE & ((1 << CELLS_LOG2) - 1)
    more = BITS - CELLS_LOG2 - _SHARE
    share = (word & ((1 << _SHARE) - 1)) << more | bits(more)
    if share >= threshold[cell]:
        cell = alias[cell]
    place = (rest >> _COIN & ((1 << _PLACE) - 1)) << (BITS - _PLACE) | bits(BITS - _PLACE)
    coin = (rest & ((1 << _COIN) - 1)) << (BITS - _COIN) | bits(BITS - _COIN)
    while coin >= _kept(cell, place):
        place, coin = bits(BITS), bits(BITS)
    behind = WIDTH_LOG2 + BITS
    return units * (cell << BITS | place) + (1 << behind - 1) >> behind


def _kept(cell: int, place: int) -> int:
    """Return ``2^BITS exp(-(c y + y^2 / 2) 2^-20)`` for cell c and place ``y = place / 2^BITS``, off by less than 2^6."""
    exponent = cell * place + (place * place >> BITS + 1) >> 2 * WIDTH_LOG2
    total, term, n = 0, 1 << BITS, 0
    while term:
        total += term if n % 2 == 0 else -term
        n += 1
        term = (term * exponent >> BITS) // n
    return total
