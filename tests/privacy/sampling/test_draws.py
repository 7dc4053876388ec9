"""Draws made of random words: exactly the distribution that they are said to have, to the last bit that can be told."""

import math
import time
from collections.abc import Callable, Iterable

import mpmath
import pytest
import torch
from torch import Tensor

from dp_hooks.privacy.sampling import draws
from dp_hooks.privacy.sampling.draws import included, numbers_below, some_of, words_from, words_of

from ...models import drawn
from ..seeded_bytes import SeededBytes

BITS = 53 + 64  # that a gap is decided by in these tests: of the first word, and of one more


def given(first: Iterable[int], more: int) -> Callable[[int], Tensor]:
    """Words that begin with the 53 bits ``first``, each in one word; the next is ``more``, and then each begins with a 1 alone."""
    left = [*(bits << 11 for bits in first), more]

    def read(count: int) -> Tensor:
        taken = [*left[:count], *[2**63] * (count - len(left))]
        del left[:count]
        return torch.tensor([(word + 2**63) % 2**64 - 2**63 for word in taken])

    return read


SMALL = [(rate, failures) for rate in (0.15, 0.5, 2048 / 8454, 1e-3, 1e-5, 1e-9, 2.0**-64) for failures in (1, 2, 37)]


@pytest.mark.parametrize(("rate", "failures"), [*SMALL, (0.999, 1), (0.999, 11), (1 - 2.0**-53, 1), (1 - 2.0**-53, 2)])
def test_a_gap_is_exact_to_the_last_of_117_bits(rate: float, failures: int) -> None:
    """A uniform number right below ``(1 - q)^g`` has g failures before the next success, one right above it has fewer."""
    with mpmath.workdps(400):
        edge = int(mpmath.floor((1 - mpmath.mpf(rate)) ** failures * 2**BITS))
    assert 2 < edge < 2**BITS - 2
    for number, fewer in ((edge - 1, False), (edge + 1, True)):
        read = given([number >> 64], number & (2**64 - 1))
        gap = int(draws._gaps(1, rate, 10**9, read)[0])
        assert (gap < failures) is fewer


@pytest.mark.parametrize("rate", [0.3, 0.999, 1e-3, 1e-9])
def test_logarithms_in_float64_and_in_many_digits_agree(rate: float) -> None:
    """What is decided at once is what the slow way decides from the same bits."""
    bits = torch.randint(0, 2**53, (300,), generator=drawn(1)).tolist()
    quick = draws._gaps(300, rate, 10**9, given(bits, 0)).tolist()
    assert quick == [draws._certain_gap(number, rate, 10**9, given([], 0)) for number in bits]


@pytest.mark.parametrize("source", ["generator", "bytes"])
def test_a_hundred_million_examples_take_milliseconds(source: str) -> None:
    """Of 10^8 examples at rate 1e-5: the rate is met (0.95 and 1.05 of it are rejected), all parts alike, in 10 ms a batch.

    Limits are 4.5 standard deviations; for the 64 parts a chi-square of 63 degrees below its 1 - 1e-6 quantile of 131.
    """
    words = words_of(drawn(2)) if source == "generator" else words_from(SeededBytes(2))
    start = time.process_time()
    batches = [included(10**8, 1e-5, words) for _ in range(100)]
    assert (time.process_time() - start) / 100 < 0.01
    everything = torch.cat(batches)
    for rate, fits in ((1e-5, True), (0.95e-5, False), (1.05e-5, False)):
        expected = 100 * 10**8 * rate
        assert (abs(len(everything) - expected) < 4.5 * math.sqrt(expected)) is fits
    counts = torch.bincount(everything * 64 // 10**8, minlength=64).double()
    assert float(((counts - counts.mean()) ** 2 / counts.mean()).sum()) < 131
    sizes = torch.tensor([float(len(batch)) for batch in batches])
    assert abs(float(sizes.var()) / 1000 - 1) < 4.5 * math.sqrt(2 / 100)
    assert all(bool((batch.diff() > 0).all()) for batch in batches)


def test_gaps_are_put_together_across_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """However few gaps are drawn at a time, the same words make the same batch."""
    bits = torch.randint(0, 2**53, (4000,), generator=drawn(3)).tolist()
    whole = included(2000, 0.5, given(bits, 0)).tolist()
    monkeypatch.setattr(draws, "_AT_ONCE", 7)
    assert included(2000, 0.5, given(bits, 0)).tolist() == whole
    assert 900 < len(whole) < 1100


def test_numbers_below_a_bound_are_alike() -> None:
    """Three quarters of 2^63 numbers: a remainder makes the first third twice as likely as it should be, which would be seen."""
    bound, count = 3 * 2**61, 3000
    low = int((numbers_below(bound, count, words_of(drawn(4))) < 2**61).sum())
    limit = 4.5 * math.sqrt(count * 2 / 9)
    assert abs(low - count / 3) < limit
    remainders = (words_of(drawn(4))(count) & (2**63 - 1)) % bound
    assert abs(int((remainders < 2**61).sum()) - count / 3) > limit


def test_every_subset_is_as_likely() -> None:
    """Of five values three are kept, in their order: each of ten subsets a tenth of the time; the first three would be noticed."""
    words, counts = words_of(drawn(5)), torch.zeros(32)
    for _ in range(3000):
        kept = some_of(torch.arange(5), 3, words)
        assert bool((kept.diff() > 0).all())
        counts[int((2**kept).sum())] += 1
    found = counts[counts > 0]
    assert len(found) == 10
    assert float(((found - 300) ** 2 / 300).sum()) < 42.5  # the 1 - 1e-6 quantile of chi-square with 9 degrees is 42.7
    assert (3000 - 300) ** 2 / 300 > 42.5


def test_equal_keys_are_drawn_again() -> None:
    """Where two keys are equal their order would not be chance: all are drawn anew."""
    asked: list[int] = []

    def words(count: int) -> Tensor:
        asked.append(count)
        return torch.tensor([1, 1, 2]) if len(asked) == 1 else torch.tensor([3, 1, 2])

    assert some_of(torch.tensor([10, 20, 30]), 2, words).tolist() == [20, 30]
    assert asked == [3, 3]
