"""Draws that are exactly what they are said to be, made of random words of 64 bits: who is in a batch, and in which."""

import math
from collections.abc import Callable
from decimal import Context, Decimal, localcontext
from functools import partial

import torch
from torch import Tensor

from ..._no_randomness import undisturbed_generators
from ..noise.secret_bytes import ReadBytes

Words = Callable[[int], Tensor]  # so many words of 64 random bits, an int64 tensor [n] on the CPU

_AT_ONCE = 1 << 20  # words that are asked for at a time, 8 MB of them
_BITS = 53  # of a word that a first answer is worked out from: a float64 holds them without error
_SLACK = 8 * 2.0**-53  # relative; a logarithm of torch's is off by little more than one unit, a quotient of two by less than this


def words_of(generator: torch.Generator) -> Words:
    """Return words of a generator, of whatever device; a seed of it fixes them."""
    return partial(_drawn_by, generator)


def words_from(read: ReadBytes) -> Words:
    """Return words made of bytes, such as those that nobody can predict."""
    return partial(_read_by, read)


def _drawn_by(generator: torch.Generator, count: int) -> Tensor:
    with undisturbed_generators():  # the user's generator may be one of PyTorch's own
        words = torch.empty(count, dtype=torch.int64, device=generator.device)
        return words.random_(-(2**63), None, generator=generator).cpu()


def _read_by(read: ReadBytes, count: int) -> Tensor:
    return torch.frombuffer(read(8 * count), dtype=torch.int64)


def included(trials: int, rate: float, words: Words) -> Tensor:
    """Return which of ``trials`` independent trials, each successful with probability ``rate``, are: ascending numbers ``[k]``.

    Takes time and memory for the ``k`` successes only, about ``rate * trials``: what is drawn is how many failures come before
    the next success. Exactly that distribution, at the very number that ``rate`` is as a float64, for words of independent fair
    bits: a gap is ``floor(log(U) / log(1 - rate))`` for a uniform real number U, and where the 53 bits of U that are looked at,
    or the rounding of the logarithms, leave open which whole number that is, more bits and more digits are taken until it is
    certain. No gap is cut off.
    """
    if rate == 1:
        return torch.arange(trials, device="cpu")
    found, last = [], -1
    while True:
        expected = rate * (trials - 1 - last)
        count = min(_AT_ONCE, math.ceil(expected + 5 * math.sqrt(expected)) + 4)
        places = last + torch.cumsum(1 + _gaps(count, rate, trials, words), 0)
        found.append(places[places < trials])
        if len(found[-1]) < count:
            return torch.cat(found)
        last = int(places[-1])


def _gaps(count: int, rate: float, most: int, words: Words) -> Tensor:
    """Return ``count`` independent numbers of failures before a success; of ``most`` or more, ``most``."""
    bits = words(count) >> (64 - _BITS) & (2**_BITS - 1)
    per_failure = math.log1p(-rate)  # U is between these bits as a fraction, and one more in the last place
    high = (bits.double() * 2.0**-_BITS).log() / per_failure * (1 + _SLACK)
    low = ((bits + 1).double() * 2.0**-_BITS).log() / per_failure * (1 - _SLACK)
    gaps: Tensor = low.clamp(0, most).floor().long()
    for at in (gaps != high.clamp(0, most).floor().long()).nonzero().flatten().tolist():
        gaps[at] = _certain_gap(int(bits[at]), rate, most, words)
    return gaps


def _certain_gap(bits: int, rate: float, most: int, words: Words) -> int:
    known = _BITS
    while True:
        # Relative errors of what follows are below 10^-(digits - 2): operations of Decimal are rounded correctly, and logarithms
        # of numbers near 1 lose as many digits as those are near to it, which are added here.
        digits = 40 + known // 3
        with localcontext(Context(prec=digits + known // 3 + max(0, math.ceil(-math.log10(rate))))):
            slack = Decimal(10) ** -(digits - 5)
            per_failure = (1 - Decimal(rate)).ln()
            low = (Decimal(bits + 1) / 2**known).ln() / per_failure * (1 - slack)
            high = (Decimal(bits) / 2**known).ln() / per_failure * (1 + slack) if bits else Decimal("Infinity")
            if low >= most:
                return most
            if high < most + 1 and int(low) == int(high):
                return int(low)
        bits, known = bits << 64 | int(words(1)) & (2**64 - 1), known + 64


def numbers_below(bound: int, count: int, words: Words) -> Tensor:
    """Return ``count`` independent numbers, each of ``range(bound)`` exactly as likely: an int64 tensor ``[count]``.

    ``torch.randint`` takes a remainder, which makes some numbers likelier: by percents for bounds of a hundred million.
    """
    whole = 2**63 - 2**63 % bound  # of the numbers of 63 bits: those above would make the first remainders likelier
    found, left = [torch.empty(0, dtype=torch.int64, device="cpu")], count
    while left:
        drawn = words(min(left, _AT_ONCE)) & (2**63 - 1)
        if whole < 2**63:
            drawn = drawn[drawn < whole]
        found.append(drawn % bound)
        left -= len(drawn)
    return torch.cat(found)


def some_of(values: Tensor, most: int, words: Words) -> Tensor:
    """Return ``values`` ``[n]``, in their order, of which all but ``most`` are dropped: every subset is as likely."""
    if len(values) <= most:
        return values
    while True:
        keys = words(len(values))
        if len(keys.unique()) == len(keys):  # given that no two are equal, every order of them is as likely
            return values[keys.argsort()[:most].sort().values]
