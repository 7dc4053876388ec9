"""Rounded normal numbers from bits: their law, their tails, and that a number is what its bits say."""

import math
from itertools import pairwise

import mpmath
import pytest
import torch
from torch import Tensor

from dp_hooks.privacy.noise import rounded_gaussian as module
from dp_hooks.privacy.noise.normal_table import BITS
from dp_hooks.privacy.noise.rounded_gaussian import MOST_UNITS, rounded_gaussian

from ..gaussian import assert_fits_only
from ..seeded_bytes import SeededBytes, Then

CPU = torch.device("cpu")


def of(count: int, units: int, seed: int = 0) -> Tensor:
    """So many numbers, from a seed."""
    return rounded_gaussian(count, units, CPU, SeededBytes(seed))


def chi_square(numbers: Tensor, std: float, reach: int) -> float:
    """How far counts of -reach..reach are from those of round(std X), in standard deviations of chi-square; ends take the tails."""
    edges = [-math.inf, *(k + 0.5 for k in range(-reach, reach)), math.inf]
    below = [0.5 * math.erfc(-edge / std / math.sqrt(2)) for edge in edges]
    expected = torch.tensor([b - a for a, b in pairwise(below)], dtype=torch.float64) * numbers.numel()
    counts = torch.bincount(numbers.clamp(-reach, reach) + reach, minlength=2 * reach + 1)
    assert expected.min() > 20
    return float(((counts - expected).square() / expected).sum() - 2 * reach) / math.sqrt(4 * reach)


@pytest.mark.parametrize(("units", "reach"), [(1, 3), (2, 7), (7, 20), (100, 280)])
def test_counts_are_those_of_the_exact_law_and_of_no_other(units: int, reach: int) -> None:
    """A chi-square test accepts P(k) = Phi((k + 1/2) / M) - Phi((k - 1/2) / M), and rejects 0.95 M and 1.05 M."""
    numbers = of(400_000, units)
    assert chi_square(numbers, units, reach) < 4.5
    assert chi_square(numbers, 0.95 * units, reach) > 20
    assert chi_square(numbers, 1.05 * units, reach) > 20


def test_many_units_are_a_normal_number_and_its_last_digits_are_even() -> None:
    """With 2^24 units: the standard deviation, and every residue of the last 8 binary digits as often as every other."""
    numbers = of(1 << 18, 1 << 24)
    assert_fits_only(numbers.double() / 2**24, 1.0)
    counts = torch.bincount(numbers % 256, minlength=256).double()
    assert float((counts - 1024).square().sum() / 1024) < 255 + 4.5 * math.sqrt(2 * 255)


def test_large_numbers_are_as_frequent_as_they_should_be() -> None:
    """Beyond 2, 3, 3.5 and 4 standard deviations, on either side: the counts of the normal law, not those 5 % nearer."""
    numbers = torch.cat([of(1 << 20, 1 << 20, seed) for seed in range(3)])
    for z in (2.0, 3.0, 3.5, 4.0):
        for side in (numbers, -numbers):
            expected = numbers.numel() * 0.5 * math.erfc(z / math.sqrt(2))
            found = int((side > z * 2**20).sum())
            assert abs(found - expected) < 4.5 * math.sqrt(expected)
            other = numbers.numel() * 0.5 * math.erfc(1.05 * z / math.sqrt(2))
            assert z > 3.5 or abs(found - other) > 4.5 * math.sqrt(other)


@pytest.mark.parametrize("cell", [6_000, 9_000, 13_000])
def test_tails_go_on_where_floats_would_end(cell: int) -> None:
    """Bits for a number at 5.9, 8.8 or 12.7 standard deviations give it, though 17 of them alone give nothing of the kind."""
    word = (cell << 17).to_bytes(4, "little")
    (number,) = rounded_gaussian(1, 1 << 20, CPU, Then(bytes(8) + word, 0)).tolist()
    assert number == cell << 10
    (nearer,) = rounded_gaussian(1, 1 << 20, CPU, Then(bytes(8) + word, 255 if cell > 6_000 else 0x40)).tolist()
    assert nearer != number


@pytest.mark.parametrize("units", [1, 3, 1 << 20, (1 << 24) + 1, MOST_UNITS - 1])
@pytest.mark.parametrize("rest", [0x00, 0x40, 0x7F])
def test_a_number_is_what_its_bits_say_to_the_last_digit(units: int, rest: int) -> None:
    """What 96 bits give for many numbers at once is what Python's integers give for all bits of each, whatever follows."""
    count, read = 6_000, SeededBytes(units)
    raw = bytes(read(12 * count))
    found = rounded_gaussian(count, units, CPU, Then(raw, rest)).tolist()
    for k, number in enumerate(found):
        more = int.from_bytes(raw[8 * k : 8 * k + 8], "little")
        word = int.from_bytes(raw[8 * count + 4 * k :][:4], "little")
        size = module._exactly(word, more, units, Then(b"", rest))
        assert number == (-size if word >> 31 else size)


def test_few_numbers_need_more_bits_and_get_them() -> None:
    """About one number in 1,200 is gone on with; each asks for the bits that it lacks."""
    read = SeededBytes(3)
    rounded_gaussian(200_000, 1 << 20, CPU, read)
    assert read.asked[0] == 12 * 200_000
    assert 300 < len(read.asked) < 1_500
    assert max(read.asked[1:]) <= 24


@pytest.mark.parametrize("cell", [0, 1, 77, 1024, 9_999, 16_383])
@pytest.mark.parametrize("place", [0, 1, 1 << 191, (1 << 192) - 1, 3**120])
def test_places_are_kept_by_the_density_in_their_cell(cell: int, place: int) -> None:
    """The probability of a place is exp(-(c y + y^2 / 2) 2^-20), to 186 binary digits, and the quick test never keeps too many."""
    with mpmath.workprec(400):
        y = mpmath.mpf(place) / 2**BITS
        exact = mpmath.exp(-(cell * y + y * y / 2) / 2**20) * 2**BITS
        assert abs(module._kept(cell, place) - exact) < 2**6
        assert 1 - (cell + mpmath.mpf(1) / 2) / 2**20 <= exact / 2**BITS


def test_other_bits_give_other_numbers() -> None:
    """Numbers of one call, and of two, are uncorrelated; the same bits give the same."""
    a, b = (of(1 << 17, 1 << 20, seed).double() / 2**20 for seed in (1, 2))
    assert abs(float(a @ b)) < 4.5 * math.sqrt(1 << 17)
    assert abs(float(a[1:] @ a[:-1])) < 4.5 * math.sqrt(1 << 17)
    assert abs(float(a.abs() @ a.sign())) < 4.5 * math.sqrt(1 << 17)
    assert torch.equal(of(50, 1 << 20, 1), of(50, 1 << 20, 1))
