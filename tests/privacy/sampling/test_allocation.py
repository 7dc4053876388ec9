"""Random allocation: every example once in a pass, in a batch that is drawn for it alone."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from dp_hooks.errors import ScopeError
from dp_hooks.privacy.sampling.allocation import AllocationSampler
from dp_hooks.privacy.sampling.draws import words_from

from ...models import drawn
from ..seeded_bytes import SeededBytes
from .helpers import batches_of, indices, loader_over, private

N, BATCHES, PASSES = 40, 5, 4000
LIMIT = 4.5  # standard deviations; 5.5 where the largest of many numbers is looked at


@pytest.fixture(scope="module", params=["generator", "bytes"])
def places(request: pytest.FixtureRequest) -> Tensor:
    """Which batch every example is in: ``[pass, example]``; seen on the way: each is in one, in ascending order."""
    words = words_from(SeededBytes(7)) if request.param == "bytes" else None
    sampler = AllocationSampler(N, BATCHES, drawn(7), words=words)
    found = torch.full((PASSES, N), -1)
    for row in found:
        batches = list(sampler)
        assert len(batches) == BATCHES == len(sampler)
        for number, batch in enumerate(batches):
            assert all(a < b for a, b in pairwise(batch))
            assert bool((row[batch] == -1).all())
            row[batch] = number
        assert int(row.min()) == 0
    return found


def deviation(count: float, trials: float, rate: float) -> float:
    return abs(count - trials * rate) / math.sqrt(trials * rate * (1 - rate))


def test_every_batch_is_as_likely_for_every_example(places: Tensor) -> None:
    """Counts of example and batch fit the rate 1 / 5; over all examples 0.95 and 1.05 of that are rejected for each batch."""
    for number in range(BATCHES):
        there = places == number
        assert max(deviation(count, PASSES, 1 / BATCHES) for count in there.sum(0).tolist()) < 5.5
        total = int(there.sum())
        assert deviation(total, PASSES * N, 1 / BATCHES) < LIMIT
        for wrong in (0.95, 1.05):
            assert deviation(total, PASSES * N, wrong / BATCHES) > LIMIT


def sizes_fit(sizes: Tensor) -> bool:
    """Whether the sizes ``[pass, batch]`` vary as those of independent allocation do."""
    wanted = N / BATCHES * (1 - 1 / BATCHES)
    return abs(float(sizes[:, 0].var()) / wanted - 1) < LIMIT * math.sqrt(2 / PASSES)


def test_sizes_vary_as_those_of_independent_examples(places: Tensor) -> None:
    """The variance of a size is N / t (1 - 1 / t); a shuffled partition, and examples that go in pairs, are rejected."""
    assert sizes_fit(torch.stack([(places == number).sum(1) for number in range(BATCHES)], 1).double())
    assert not sizes_fit(torch.full((PASSES, BATCHES), N / BATCHES, dtype=torch.float64))
    half = places[:, : N // 2]
    assert not sizes_fit(2 * torch.stack([(half == number).sum(1) for number in range(BATCHES)], 1).double())


def test_examples_and_passes_are_independent(places: Tensor) -> None:
    """Any two examples meet in one pass of five, and an example is where it was in the pass before in one of five."""
    same = torch.stack([(places == places[:, [i]]).double().sum(0) for i in range(N)])
    apart = [deviation(same[i, j].item(), PASSES, 1 / BATCHES) for i in range(N) for j in range(i)]
    assert max(apart) < 5.5
    again = int((places[1:] == places[:-1]).sum())
    assert deviation(again, N * (PASSES - 1), 1 / BATCHES) < LIMIT


def test_the_private_loader_allocates() -> None:
    """A pass hands out every example once, in as many batches as the loader has; a seed repeats it, and no seed does not."""
    passes = [indices(batches_of(loader_over(10, 3, generator=drawn(seed)), sampling="random_allocation")) for seed in (1, 1, 2)]
    assert [len(found) for found in passes] == [4, 4, 4]
    assert all(sorted(value for batch in found for value in batch) == [float(i) for i in range(1, 11)] for found in passes)
    assert passes[0] == passes[1] != passes[2]
    secret = [indices(batches_of(loader_over(30, 3), sampling="random_allocation", secure_mode=True)) for _ in range(2)]
    assert secret[0] != secret[1]
    assert sorted(value for batch in secret[0] for value in batch) == [float(i) for i in range(1, 31)]


def test_sizes_of_the_plan_are_those_of_a_pass() -> None:
    """With ten examples in four batches the expected size is 2.5, not the loader's 3, and the rate a quarter."""
    plan = private(loader_over(10, 3), sampling="random_allocation").plan
    assert (plan.expected_batch_size, plan.sample_rate, plan.batches_per_pass) == (2.5, 0.25, 4)
    assert private(loader_over(10, 3, drop_last=True), sampling="random_allocation").plan.batches_per_pass == 3


def test_parts_of_batches_and_interleaved_passes() -> None:
    """Physical parts add up to the batches; a pass that goes on after another one began is refused."""
    with private(loader_over(12, 6, generator=drawn(3)), sampling="random_allocation", max_physical_batch_size=2) as (opt, own):
        found, parts = [], []
        for batch in own:
            found.extend(batch[:, 0].tolist())
            parts.append((opt.physical_batch.logical, len(batch)))
            opt.zero_grad()
        assert sorted(found) == [float(i) for i in range(1, 13)]
        assert max(size for _, size in parts) == 2
        assert len({logical for logical, _ in parts}) == 2
        first = iter(own)
        next(first)
        next(iter(own))
        with pytest.raises(ScopeError, match="interleaved"):
            next(first)
