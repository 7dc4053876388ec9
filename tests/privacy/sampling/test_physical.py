"""Physical parts of logical batches."""

import pytest

from ...models import drawn
from .helpers import batches_of, indices, loader_over, private


@pytest.mark.parametrize("largest", [1, 3, 7, 1000])
def test_physical_parts_are_small_and_their_union_is_the_logical_batch(largest: int) -> None:
    """No part exceeds the maximum; the parts of a logical batch are disjoint and add up to a Poisson batch."""
    logical: dict[int, list[float]] = {}
    ends: list[int] = []
    with private(loader_over(40, 8, generator=drawn(4)), max_physical_batch_size=largest) as (opt, own):
        for batch in own:
            part = opt.physical_batch
            assert len(batch) == part.size
            assert len(batch) <= largest
            rows = logical.setdefault(part.logical, [])
            assert (part.index == 0) == (rows == [])
            rows.extend(batch[:, 0].tolist())
            ends += [part.logical] if part.last else []
    assert ends == list(logical)
    assert list(logical.values()) == indices(batches_of(loader_over(40, 8, generator=drawn(4))))


def test_physical_parts_of_order_based_batches() -> None:
    """Without Poisson sampling the loader's own batches are split in order."""
    with private(loader_over(10, 4), max_physical_batch_size=3, poisson_sampling=False) as (opt, own):
        seen = [(batch[:, 0].tolist(), opt.physical_batch.last) for batch in own]
    assert seen == [([1, 2, 3], False), ([4], True), ([5, 6, 7], False), ([8], True), ([9, 10], True)]


@pytest.mark.parametrize(("largest", "length"), [(None, 5), (8, 5), (4, 10), (3, 15)])
def test_length_is_the_expected_number_of_parts(largest: int | None, length: int) -> None:
    """``len(loader)`` is the number of logical batches times the expected number of parts of one."""
    with private(loader_over(40, 8), max_physical_batch_size=largest) as (_, own):
        assert len(own) == length
