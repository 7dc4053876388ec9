"""Poisson sampling: the rate, and draws that are independent of each other at that rate and no other."""

import math
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset, TensorDataset

from dp_hooks.privacy.sampling.poisson import PoissonSampler, SecurePoissonSampler

from ...models import drawn
from ..seeded_bytes import SeededBytes, Then
from .helpers import Rows, as_tensor, batches_of, indices, loader_over, private


def test_generator_of_the_loader_repeats_the_batches_and_no_generator_does_not() -> None:
    """The loader's generator fixes the draws; without one, ``torch.manual_seed`` does not."""

    def found(generator: torch.Generator | None) -> list[list[float]]:
        torch.manual_seed(1)
        return indices(batches_of(loader_over(40, 10, generator=generator)))

    assert found(drawn(5)) == found(drawn(5))
    assert found(drawn(5)) != found(drawn(6))
    assert found(None) != found(None)


@pytest.mark.parametrize(
    ("examples", "batch", "drop_last", "rate", "q", "expected", "batches"),
    [
        (1000, 300, False, None, 0.3, 300.0, 4),
        (1000, 300, True, None, 0.3, 300.0, 3),
        (1000, 250, False, None, 0.25, 250.0, 4),
        (7, 7, False, None, 1.0, 7.0, 1),
        (10, 3, False, 0.25, 0.25, 2.5, 4),
        (10, 3, True, 0.3, 0.3, 3.0, 4),
        (10, 3, False, 1.0, 1.0, 10.0, 1),
        (49, 7, False, 1 / 49, 1 / 49, 1.0, 49),
    ],
)
def test_rate_expected_batch_size_and_length(
    examples: int, batch: int, drop_last: bool, rate: float | None, q: float, expected: float, batches: int
) -> None:
    """The rate q is batch_size / len(dataset) or ``sample_rate``, and the expected batch size is q * N, never truncated."""
    scope = private(loader_over(examples, batch, drop_last=drop_last), sample_rate=rate)
    with scope as (opt, own):
        assert own.sample_rate == pytest.approx(q, rel=1e-12)
        assert opt.expected_batch_size == pytest.approx(expected, rel=1e-12)
        assert len(own) == batches
    report = scope.report()
    assert report.sample_rate == pytest.approx(q, rel=1e-12)
    assert report.dataset_size == examples
    assert scope.plan.batches_per_pass == batches


def test_subset_counts_as_its_own_dataset() -> None:
    """For a ``Subset`` q is relative to the subset, and only its examples are drawn."""
    loader = DataLoader(Subset(Rows(100), range(10, 20)), batch_size=5, collate_fn=as_tensor)
    assert private(loader).plan.sample_rate == 0.5
    values = {v for batch in indices(batches_of(loader, 20)) for v in batch}
    assert values == {float(i) for i in range(11, 21)}


N, Q, DRAWS = 60, 0.15, 3000


@pytest.fixture(scope="module", params=["generator", "secure"])
def inclusions(request: pytest.FixtureRequest) -> Tensor:
    """0/1 matrix [draw, example] of many logical batches."""
    secure = request.param == "secure"
    sampler = SecurePoissonSampler(N, Q, DRAWS, SeededBytes(11)) if secure else PoissonSampler(N, Q, DRAWS, drawn(11))
    counts = torch.zeros(DRAWS, N, dtype=torch.float64)
    for row, drawn_now in zip(counts, sampler, strict=True):
        assert all(a < b for a, b in pairwise(drawn_now))
        row[drawn_now] = 1
    return counts


def deviation(count: float, trials: float, rate: float) -> float:
    """In standard deviations of Binomial(trials, rate)."""
    return abs(count - trials * rate) / math.sqrt(trials * rate * (1 - rate))


def test_inclusion_rate_accepts_q_and_rejects_others(inclusions: Tensor) -> None:
    """The total number of inclusions fits Binomial(N * draws, q), and neither q / 2, 2 q nor 0.95 q."""
    total = inclusions.sum().item()
    assert deviation(total, N * DRAWS, Q) < 4.5
    for wrong in (Q / 2, 2 * Q, 0.95 * Q, 1.05 * Q):
        assert deviation(total, N * DRAWS, wrong) > 4.5


def test_every_example_is_drawn_at_the_same_rate(inclusions: Tensor) -> None:
    """Each single example's count fits Binomial(draws, q); for half or double the rate every one of them is rejected."""
    counts = inclusions.sum(0).tolist()
    assert max(deviation(c, DRAWS, Q) for c in counts) < 4.5
    assert min(deviation(c, DRAWS, Q / 2) for c in counts) > 4.5
    assert min(deviation(c, DRAWS, 2 * Q) for c in counts) > 4.5


def test_batch_sizes_vary_as_independent_draws_do(inclusions: Tensor) -> None:
    """Batch sizes have variance N q (1 - q): fixed-size batches and shared draws are both rejected."""

    def fits(variance: float) -> bool:
        # A sample variance of DRAWS near-normal values has relative standard deviation sqrt(2 / DRAWS).
        return abs(variance / (N * Q * (1 - Q)) - 1) < 4.5 * math.sqrt(2 / DRAWS)

    assert fits(inclusions.sum(1).var().item())
    fixed = torch.full((DRAWS,), float(round(N * Q)))
    assert not fits(fixed.var().item())
    pairs = 2 * inclusions[:, : N // 2].sum(1)  # examples that come and go in pairs
    assert not fits(pairs.var().item())


def test_pairs_of_examples_and_of_batches_are_uncorrelated(inclusions: Tensor) -> None:
    """No two examples, and no two consecutive batches, are drawn together more or less often than by chance."""
    centred = (inclusions - Q) / math.sqrt(Q * (1 - Q))
    across = centred.T @ centred / math.sqrt(DRAWS)
    across.fill_diagonal_(0)
    assert across.abs().max() < 5.5
    after = (centred[1:] * centred[:-1]).sum().item() / math.sqrt(N * (DRAWS - 1))
    assert abs(after) < 4.5


def test_loader_draws_what_the_sampler_draws() -> None:
    """Batches of the private loader, not only of the sampler inside, have the rate q and reject q / 2 and 2 q."""
    loader = DataLoader(TensorDataset(torch.arange(50)), batch_size=5, generator=drawn(2))
    sizes = [len(batch[0]) for batch in batches_of(loader, 30)]
    assert len(sizes) == 300
    assert len(set(sizes)) > 3
    assert deviation(sum(sizes), 50 * 300, 0.1) < 4.5
    assert deviation(sum(sizes), 50 * 300, 0.05) > 4.5
    assert deviation(sum(sizes), 50 * 300, 0.2) > 4.5


def test_tiny_rates_are_met_to_their_last_digit() -> None:
    """At a rate below what float32 uniforms can tell apart, float32 draws would take 16 times too many examples."""
    examples, draws, rate = 1 << 22, 32, 2.0**-28

    def fits(count: int) -> bool:
        return abs(count - rate * examples * draws) < 3.5  # half an example is expected

    assert fits(sum(map(len, PoissonSampler(examples, rate, draws, drawn(1)))))
    generator = drawn(1)
    assert not fits(sum(int((torch.rand(examples, generator=generator) < rate).sum()) for _ in range(draws)))


@pytest.mark.parametrize("rate", [0.15, 0.5, 2048 / 8454, 1e-3, 1e-9, 2.0**-64, 1.0])
def test_secret_bits_are_met_to_the_last_of_64(rate: float) -> None:
    """An example is in the batch for the largest 64 bits below rate * 2^64, and not for the next: the rate is never above q."""
    below = math.floor(Fraction(rate) * 2**64)
    for bits, there in ((below - 1, True), (below, False), (0, True), (2**64 - 1, rate == 1)):
        if bits < 2**64:
            signed = (bits - 2**63) % 2**64
            assert list(SecurePoissonSampler(1, rate, 1, Then(signed.to_bytes(8, "little"), 0))) == [[0] if there else []]


def test_many_examples_are_drawn_part_by_part() -> None:
    """More examples than bits are read for at a time have each their own bits, in order."""
    examples = (1 << 20) + 3
    read = SeededBytes(4)
    (batch,) = SecurePoissonSampler(examples, 0.25, 1, read)
    assert read.asked == [8 << 20, 24]
    assert deviation(len(batch), examples, 0.25) < 4.5
    assert all(a < b for a, b in pairwise(batch))
    assert batch[-1] < examples
