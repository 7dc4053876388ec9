"""Poisson sampling: the rate, and draws that are independent of each other at that rate and no other."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset, TensorDataset

from dp_hooks.privacy.sampling.poisson import PoissonSampler, SecurePoissonSampler

from ...models import drawn
from ..seeded_bytes import SeededBytes
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


@pytest.mark.parametrize("secure", [False, True], ids=["generator", "secure"])
def test_rates_are_met_where_all_or_few_are_drawn(secure: bool) -> None:
    """At rate 1 all examples are drawn; at the smallest positive rate none is; in ascending order at any."""

    def sampler(rate: float, most: int | None = None) -> PoissonSampler:
        return SecurePoissonSampler(9, rate, 2, most=most) if secure else PoissonSampler(9, rate, 2, most=most)

    assert list(sampler(1.0)) == [list(range(9))] * 2
    assert list(sampler(5e-324)) == [[], []]
    assert [len(batch) for batch in sampler(1.0, most=4)] == [4, 4]


def test_bits_that_nobody_can_predict_are_asked_for_as_needed() -> None:
    """A secure batch reads eight bytes for each gap between the examples drawn, not for each example there is."""
    read = SeededBytes(4)
    (batch,) = SecurePoissonSampler(1 << 24, 1e-4, 1, read)
    assert deviation(len(batch), 1 << 24, 1e-4) < 4.5
    assert 8 * len(batch) < sum(read.asked) < 8 * (len(batch) + 500)
    assert all(a < b for a, b in pairwise(batch))


# ---------------------------------------------------------------- at most so many

MOST = 8  # about two batches in five are larger


def kept_share() -> float:
    """The probability of an example to be in a batch of at most MOST: E[min(S, MOST)] / N, by the binomial distribution of S."""
    sizes = [math.comb(N, k) * Q**k * (1 - Q) ** (N - k) for k in range(N + 1)]
    return sum(min(k, MOST) * p for k, p in enumerate(sizes)) / N


@pytest.fixture(scope="module", params=["generator", "secure"])
def truncated(request: pytest.FixtureRequest) -> Tensor:
    """0/1 matrix [draw, example] of batches with at most MOST examples."""
    secure = request.param == "secure"
    sampler = SecurePoissonSampler if secure else PoissonSampler
    counts = torch.zeros(DRAWS, N, dtype=torch.float64)
    for row, now in zip(counts, sampler(N, Q, DRAWS, SeededBytes(12) if secure else drawn(12), most=MOST), strict=True):
        assert all(a < b for a, b in pairwise(now))
        row[now] = 1
    return counts


def first_of(inclusions: Tensor) -> Tensor:
    """Batches of which the first MOST examples are kept: a wrong way to drop the others."""
    return inclusions * (inclusions.cumsum(1) <= MOST)


def test_no_batch_is_larger_and_smaller_ones_are_left_as_they_are(truncated: Tensor) -> None:
    """Sizes are those of Poisson sampling, those above the limit at it: the share of full batches fits, and not that of others."""
    sizes = truncated.sum(1)
    assert int(sizes.max()) == MOST
    full = 1 - sum(math.comb(N, k) * Q**k * (1 - Q) ** (N - k) for k in range(MOST))
    found = int((sizes == MOST).sum())
    assert deviation(found, DRAWS, full) < 4.5
    assert deviation(found, DRAWS, 0.85 * full) > 4.5


def test_who_is_dropped_does_not_hang_on_who_it_is(truncated: Tensor, inclusions: Tensor) -> None:
    """Every example is kept at the same rate, E[min(S, B)] / N; q and 0.95 of it, and dropping the last ones, are rejected."""
    share = kept_share()
    assert max(deviation(count, DRAWS, share) for count in truncated.sum(0).tolist()) < 4.5
    assert max(deviation(count, DRAWS, share) for count in first_of(inclusions).sum(0).tolist()) > 4.5
    total = float(truncated.sum())
    assert deviation(total, N * DRAWS, share) < 4.5  # the total varies less than independent draws would
    assert deviation(total, N * DRAWS, Q) > 4.5
    assert deviation(total, N * DRAWS, 0.95 * share) > 4.5


def test_pairs_are_kept_together_by_chance(truncated: Tensor) -> None:
    """Any two examples are in a batch together as often as a uniform subset of those drawn has both."""
    sizes = [math.comb(N, k) * Q**k * (1 - Q) ** (N - k) for k in range(N + 1)]
    pair = sum(min(k, MOST) * (min(k, MOST) - 1) * p for k, p in enumerate(sizes)) / (N * (N - 1))
    together = truncated.T @ truncated
    together.fill_diagonal_(DRAWS * pair)
    assert float((together - DRAWS * pair).abs().max()) / math.sqrt(DRAWS * pair) < 5.5
    after = (truncated[1:] * truncated[:-1]).sum().item()
    assert deviation(after, N * (DRAWS - 1), kept_share() ** 2) < 4.5


def test_the_private_loader_truncates() -> None:
    """Batches of the private loader have at most ``max_batch_size`` examples, or what is exceeded once in a million batches."""
    found = batches_of(loader_over(200, 40, generator=drawn(1)), 10, sampling="truncated_poisson", max_batch_size=41)
    assert max(len(batch) for batch in found) == 41
    assert min(len(batch) for batch in found) < 38
    assert private(loader_over(1000, 100), sampling="truncated_poisson").plan.max_batch_size == 148
    assert private(loader_over(1000, 100)).plan.max_batch_size is None
