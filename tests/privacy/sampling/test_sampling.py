"""The private loader: Poisson sampling, empty batches, physical parts, the data path of the original loader."""

import math
import warnings
from collections import UserDict
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)
from transformers import BatchEncoding

from dp_hooks import PrivateDataLoader, private_training
from dp_hooks.errors import InvalidArgumentError, ScopeError
from dp_hooks.privacy.sampling.loader import PoissonSampler

from .gaussian import NEVER
from .models import drawn


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


@dataclass
class Record:
    x: Tensor
    ids: Tensor
    scale: float = 1.0


class Rows(Dataset):
    """Example ``i`` is ``(vector of ones times i + 1, label i + 1)``: every value tells its index, and none is zero."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        if not 0 <= i < self.n:
            raise IndexError(i)
        return torch.full((3,), float(i + 1)), i + 1


def _stack(examples: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    return torch.stack([x for x, _ in examples]), torch.tensor([y for _, y in examples])


def _as_tensor(examples: Any) -> Tensor:
    return _stack(examples)[0]


def _as_list(examples: Any) -> list[Tensor]:
    return list(_stack(examples))


def _as_dict(examples: Any) -> dict[str, Any]:
    x, y = _stack(examples)
    return {"x": x, "extra": {"y": y, "mask": x > 0}}


def _as_named(examples: Any) -> Pair:
    return Pair(*_stack(examples))


def _as_record(examples: Any) -> Record:
    return Record(*_stack(examples))


def _as_user_dict(examples: Any) -> UserDict:
    x, y = _stack(examples)
    return UserDict(x=x, y=y)


def _as_encoding(examples: Any) -> BatchEncoding:
    x, y = _stack(examples)
    return BatchEncoding({"input_ids": y[:, None].expand(-1, 4), "attention_mask": x.half()})


def _as_lists(examples: Any) -> dict[str, Any]:
    x, y = _stack(examples)
    return {"x": x, "names": [f"row {i}" for i in y.tolist()], "rows": len(examples), "nothing": None}


def _time_first(examples: Any) -> Tensor:
    return _stack(examples)[0].T


def _scope_over(loader: Any, model: nn.Module | None = None, **kwargs: Any) -> Any:
    model = nn.Linear(3, 1) if model is None else model
    kwargs = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, **kwargs}
    return private_training(model, torch.optim.SGD(model.parameters(), lr=0.1), loader, **kwargs)


def _leaves(batch: Any) -> list[Any]:
    if isinstance(batch, (tuple, list)):
        return [leaf for item in batch for leaf in _leaves(item)]
    if isinstance(batch, (dict, UserDict)):
        return [leaf for item in batch.values() for leaf in _leaves(item)]
    if isinstance(batch, Record):
        return [leaf for item in vars(batch).values() for leaf in _leaves(item)]
    return [batch]


COLLATES = [None, _as_tensor, _as_list, _as_dict, _as_named, _as_record, _as_user_dict, _as_encoding, _as_lists]


@pytest.mark.parametrize("collate", COLLATES, ids=lambda c: getattr(c, "__name__", "default"))
def test_batches_keep_the_structure_of_the_original_loader(collate: Any) -> None:
    """A Poisson batch that holds every example equals the original loader's batch, types and dtypes included."""
    loader = DataLoader(Rows(4), batch_size=4, collate_fn=collate)
    (expected,) = list(loader)
    with _scope_over(loader, sample_rate=1.0) as (_, private):
        (batch,) = list(private)
    assert type(batch) is type(expected)
    for ours, theirs in zip(_leaves(batch), _leaves(expected), strict=True):
        assert type(ours) is type(theirs)
        if isinstance(ours, Tensor):
            assert ours.dtype == theirs.dtype
            assert torch.equal(ours, theirs)
        else:
            assert ours == theirs


@pytest.mark.parametrize("collate", COLLATES, ids=lambda c: getattr(c, "__name__", "default"))
def test_first_batch_empty_has_structure_dtypes_and_no_content(collate: Any) -> None:
    """A batch of no example, also the first one, has the usual structure, zero rows and nothing of any example."""
    loader = DataLoader(Rows(4), batch_size=2, collate_fn=collate)
    example = next(iter(loader))
    with _scope_over(loader, sample_rate=NEVER) as (_, private):
        batch = next(iter(private))
    assert type(batch) is type(example)
    if isinstance(example, (dict, UserDict)):
        assert list(batch) == list(example)
    tensors, full = ([leaf for leaf in _leaves(b) if isinstance(leaf, Tensor)] for b in (batch, example))
    assert len(tensors) == len(full)
    assert len(tensors) > 0
    for empty, usual in zip(tensors, full, strict=True):
        assert empty.shape == (0, *usual.shape[1:])
        assert empty.dtype == usual.dtype
    others = [leaf for leaf in _leaves(batch) if not isinstance(leaf, Tensor)]
    assert all(leaf is None or leaf == 0 for leaf in others)


def test_empty_batch_of_a_time_first_collate_has_zero_samples_on_that_axis() -> None:
    """The axis that counts examples is found by comparison, not assumed to be the first."""
    loader = DataLoader(Rows(4), batch_size=2, collate_fn=_time_first)
    with _scope_over(loader, sample_rate=NEVER, batch_first=False) as (_, private):
        assert next(iter(private)).shape == (3, 0)


def _shared_mask(examples: Any) -> dict[str, Tensor]:
    x = _as_tensor(examples)
    return {"x": x, "mean": x.mean(), "column": x.mean(0)}


def test_empty_batch_blanks_tensors_that_do_not_count_examples() -> None:
    """A tensor without a sample axis keeps its shape in an empty batch, but none of dataset[0]'s content."""
    loader = DataLoader(Rows(4), batch_size=2, collate_fn=_shared_mask)
    with _scope_over(loader, sample_rate=NEVER) as (_, private):
        batch = next(iter(private))
    assert batch["x"].shape == (0, 3)
    assert torch.equal(batch["mean"], torch.zeros(()))
    assert torch.equal(batch["column"], torch.zeros(3))


class Growing(Dataset):
    """Random augmentation at its worst: the same example is longer each time it is fetched."""

    def __init__(self) -> None:
        self.length = 0

    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> Tensor:
        self.length += 1
        return torch.ones(self.length, 2)


def _padded(examples: list[Tensor]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(examples, batch_first=True)


def test_empty_batch_of_a_dataset_with_random_lengths_keeps_its_other_axes() -> None:
    """Only the axis of the examples becomes 0, also if two fetches of one example differ in length."""
    loader = DataLoader(Growing(), batch_size=2, collate_fn=_padded)
    with _scope_over(loader, sample_rate=NEVER) as (_, private):
        empty = next(iter(private))
    assert empty.shape[0] == 0
    assert empty.shape[1] > 0
    assert empty.shape[2] == 2


def _popping(examples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    labels = torch.stack([example.pop("y") for example in examples])
    return {"y": labels, **torch.utils.data.default_collate(examples)}


class Records(Rows):
    def __getitem__(self, i: int) -> Any:
        return {"x": torch.ones(3), "y": torch.tensor(i)}


def test_empty_batch_with_a_collate_function_that_consumes_its_examples() -> None:
    """A collate function that changes the examples it is given does not see an example twice."""
    loader = DataLoader(Records(4), batch_size=2, collate_fn=_popping)
    with _scope_over(loader, sample_rate=NEVER) as (_, private):
        empty = next(iter(private))
    assert {key: tuple(value.shape) for key, value in empty.items()} == {"y": (0,), "x": (0, 3)}


def test_empty_batch_can_be_trained_on() -> None:
    """An empty first batch goes through model, loss, backward and step like any other and is charged."""
    model = nn.Linear(3, 1)
    loader = DataLoader(Rows(4), batch_size=2)
    before = model.weight.detach().clone()
    scope = _scope_over(loader, model, sample_rate=NEVER)
    with scope as (opt, private):
        x, y = next(iter(private))
        opt.zero_grad()
        ((model(x).squeeze(1) - y) ** 2).sum().backward()
        opt.step()
    assert scope.steps == 1
    assert scope.accountant.history == [(1.0, NEVER, 1)]
    assert not torch.equal(before, model.weight)


def _only_in_workers(worker: int) -> None:
    assert torch.utils.data.get_worker_info().id == worker


def test_workers_with_prefetching_deliver_every_part_in_order() -> None:
    """Two workers that fetch ahead give the same parts, in order, as the main process, over two passes."""

    def passes(workers: int) -> list[tuple[int, int, bool, list[float]]]:
        more = {"num_workers": workers, "prefetch_factor": 3} if workers else {}
        loader = DataLoader(Rows(12), batch_size=4, collate_fn=_as_tensor, generator=drawn(3), **more)
        rows = []
        scope = _scope_over(loader, max_physical_batch_size=2)
        with scope as (_, private):
            for _ in range(2):
                for batch in private:
                    part = scope.current_part
                    rows.append((part.logical, part.index, part.last, batch[:, 0].tolist()))
                    assert part.size == len(batch)
        return rows

    assert passes(2) == passes(0)


def test_persistent_workers_end_with_the_scope() -> None:
    """Persistent workers serve all passes of the scope, and none of them is alive after it."""
    loader = DataLoader(Rows(4), batch_size=4, collate_fn=_as_tensor, num_workers=2, persistent_workers=True)
    with _scope_over(loader, sample_rate=1.0) as (_, private):
        for _ in range(2):
            assert [batch[:, 0].tolist() for batch in private] == [[1, 2, 3, 4]]
        iterator = private._iterator
        workers = list(iterator._workers)
        assert all(w.is_alive() for w in workers)
    alive = [w.is_alive() for w in workers]
    iterator._shutdown_workers()  # if need be, here and not in a garbage collection, where it takes ten seconds
    assert alive == [False, False]


def test_empty_batches_come_out_of_workers() -> None:
    """With loader workers, a first batch without examples arrives with the right structure."""
    loader = DataLoader(Rows(4), batch_size=2, collate_fn=_as_dict, num_workers=2, worker_init_fn=_only_in_workers)
    with _scope_over(loader, sample_rate=NEVER) as (_, private):
        first = next(iter(private))
    assert first["x"].shape == (0, 3)
    assert first["extra"]["mask"].dtype == torch.bool


def test_breaking_off_with_workers_leaves_the_next_pass_aligned() -> None:
    """After a pass is broken off amid prefetched parts, the next pass starts with part 0 of a new logical batch."""
    loader = DataLoader(
        Rows(8), batch_size=8, collate_fn=_as_tensor, num_workers=2, persistent_workers=True, generator=drawn()
    )
    scope = _scope_over(loader, max_physical_batch_size=2, sample_rate=1.0)
    with scope as (_, private):
        next(iter(private))
        first = scope.current_part
        sizes = []
        for batch in private:
            sizes.append((scope.current_part.index, len(batch)))
            assert scope.current_part.logical > first.logical
        private._iterator._shutdown_workers()
    assert sizes == [(0, 2), (1, 2), (2, 2), (3, 2)]


def test_loader_settings_are_kept() -> None:
    """Dataset, workers, pinning, time-out, generator and worker settings are those of the original loader."""
    generator, dataset = drawn(), Rows(4)
    original = DataLoader(
        dataset,
        batch_size=2,
        collate_fn=_as_tensor,
        num_workers=1,
        timeout=7,
        generator=generator,
        worker_init_fn=_only_in_workers,
        prefetch_factor=5,
        persistent_workers=True,
        multiprocessing_context="fork",
    )
    with _scope_over(original) as (_, private):
        assert isinstance(private, PrivateDataLoader)
        assert isinstance(private, DataLoader)
        assert private.dataset is dataset
        assert private.generator is generator
        for name in ("num_workers", "timeout", "worker_init_fn", "prefetch_factor", "persistent_workers", "pin_memory"):
            assert getattr(private, name) == getattr(original, name), name
        assert private.multiprocessing_context.get_start_method() == "fork"
    pinned = DataLoader(dataset, batch_size=2, pin_memory=True)
    with _scope_over(pinned) as (_, private):
        assert private.pin_memory is True


def test_generator_of_the_loader_repeats_the_batches_and_no_generator_does_not() -> None:
    """The loader's generator fixes the draws; without one, ``torch.manual_seed`` does not."""

    def indices(generator: torch.Generator | None) -> list[list[float]]:
        torch.manual_seed(1)
        loader = DataLoader(Rows(40), batch_size=10, collate_fn=_as_tensor, generator=generator)
        with _scope_over(loader) as (_, private):
            return [batch[:, 0].tolist() for batch in private]

    assert indices(drawn(5)) == indices(drawn(5))
    assert indices(drawn(5)) != indices(drawn(6))
    assert indices(None) != indices(None)


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
    loader = DataLoader(Rows(examples), batch_size=batch, drop_last=drop_last)
    scope = _scope_over(loader, sample_rate=rate)
    with scope as (opt, private):
        assert private.sample_rate == pytest.approx(q, rel=1e-12)
        assert opt.expected_batch_size == pytest.approx(expected, rel=1e-12)
        assert len(private) == batches
    report = scope.report()
    assert report.sample_rate == pytest.approx(q, rel=1e-12)
    assert report.dataset_size == examples
    assert scope.plan.batches_per_pass == batches


def test_subset_counts_as_its_own_dataset() -> None:
    """For a ``Subset`` q is relative to the subset, and only its examples are drawn."""
    loader = DataLoader(Subset(Rows(100), range(10, 20)), batch_size=5, collate_fn=_as_tensor)
    with _scope_over(loader) as (_, private):
        assert private.sample_rate == 0.5
        values = {v for _ in range(20) for batch in private for v in batch[:, 0].tolist()}
    assert values == {float(i) for i in range(11, 21)}


N, Q, DRAWS = 60, 0.15, 3000


@pytest.fixture(scope="module")
def inclusions() -> Tensor:
    """0/1 matrix [draw, example] of many logical batches."""
    sampler = PoissonSampler(N, Q, DRAWS, drawn(11))
    counts = torch.zeros(DRAWS, N, dtype=torch.float64)
    for row, indices in zip(counts, sampler, strict=True):
        assert all(a < b for a, b in pairwise(indices))
        row[indices] = 1
    return counts


def _deviation(count: float, trials: float, rate: float) -> float:
    return abs(count - trials * rate) / math.sqrt(trials * rate * (1 - rate))


def test_inclusion_rate_accepts_q_and_rejects_others(inclusions: Tensor) -> None:
    """The total number of inclusions fits Binomial(N * draws, q), and neither q / 2, 2 q nor 0.95 q."""
    total = inclusions.sum().item()
    assert _deviation(total, N * DRAWS, Q) < 4.5
    for wrong in (Q / 2, 2 * Q, 0.95 * Q, 1.05 * Q):
        assert _deviation(total, N * DRAWS, wrong) > 4.5


def test_every_example_is_drawn_at_the_same_rate(inclusions: Tensor) -> None:
    """Each single example's count fits Binomial(draws, q); for half or double the rate every one of them is rejected."""
    counts = inclusions.sum(0).tolist()
    assert max(_deviation(c, DRAWS, Q) for c in counts) < 4.5
    assert min(_deviation(c, DRAWS, Q / 2) for c in counts) > 4.5
    assert min(_deviation(c, DRAWS, 2 * Q) for c in counts) > 4.5


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
    with _scope_over(loader) as (_, private):
        sizes = [len(batch[0]) for _ in range(30) for batch in private]
    assert len(sizes) == 300
    assert len(set(sizes)) > 3
    assert _deviation(sum(sizes), 50 * 300, 0.1) < 4.5
    assert _deviation(sum(sizes), 50 * 300, 0.05) > 4.5
    assert _deviation(sum(sizes), 50 * 300, 0.2) > 4.5


@pytest.mark.parametrize("largest", [1, 3, 7, 1000])
def test_physical_parts_are_small_and_their_union_is_the_logical_batch(largest: int) -> None:
    """No part exceeds the maximum; the parts of a logical batch are disjoint and add up to a Poisson batch."""
    logical: dict[int, list[float]] = {}
    ends: list[int] = []

    def loader() -> DataLoader:
        return DataLoader(Rows(40), batch_size=8, collate_fn=_as_tensor, generator=drawn(4))

    scope = _scope_over(loader(), max_physical_batch_size=largest)
    with scope as (_, private):
        for batch in private:
            part = scope.current_part
            assert len(batch) == part.size
            assert len(batch) <= largest
            rows = logical.setdefault(part.logical, [])
            assert (part.index == 0) == (rows == [])
            rows.extend(batch[:, 0].tolist())
            ends += [part.logical] if part.last else []
    assert ends == list(logical)
    with _scope_over(loader()) as (_, private):
        whole = [batch[:, 0].tolist() for batch in private]
    assert list(logical.values()) == whole


def test_physical_parts_of_order_based_batches() -> None:
    """Without Poisson sampling the loader's own batches are split in order."""
    loader = DataLoader(Rows(10), batch_size=4, collate_fn=_as_tensor)
    scope = _scope_over(loader, max_physical_batch_size=3, poisson_sampling=False)
    seen = []
    with scope as (_, private):
        for batch in private:
            seen.append((batch[:, 0].tolist(), scope.current_part.last))
    assert seen == [([1, 2, 3], False), ([4], True), ([5, 6, 7], False), ([8], True), ([9, 10], True)]


@pytest.mark.parametrize(("largest", "length"), [(None, 5), (8, 5), (4, 10), (3, 15)])
def test_length_is_the_expected_number_of_parts(largest: int | None, length: int) -> None:
    """``len(loader)`` is the number of logical batches times the expected number of parts of one."""
    with _scope_over(DataLoader(Rows(40), batch_size=8), max_physical_batch_size=largest) as (_, private):
        assert len(private) == length


def test_logical_batches_of_two_iterators_do_not_mix() -> None:
    """A part that continues another logical batch than the present one is refused, so that no example counts twice."""
    model = nn.Linear(3, 1, bias=False)
    scope = _scope_over(
        DataLoader(Rows(4), batch_size=4, collate_fn=_as_tensor), model, max_physical_batch_size=2, sample_rate=1.0
    )
    with scope as (opt, private):
        one, two = iter(private), iter(private)
        for iterator in (one, two):
            model(next(iterator)).sum().backward()
            opt.step()
        with pytest.raises(ScopeError, match="logical"):
            next(one)
    assert scope.steps == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_ends_with_the_budget(workers: int) -> None:
    """With a budget, passes stop at the calibrated number of logical batches, prefetching or not; then none come."""
    model = nn.Linear(3, 1)
    loader = DataLoader(Rows(10), batch_size=3, num_workers=workers)
    scope = _scope_over(
        loader, model, noise_multiplier=None, target_epsilon=5.0, target_delta=1e-5, epochs=1.5, accountant="rdp"
    )
    lengths = []
    with scope as (opt, private):
        for _ in range(2):
            count = 0
            for x, y in private:
                opt.zero_grad()
                (model(x).squeeze(1) - y).square().mean().backward() if len(x) else None
                opt.step()
                count += 1
            lengths.append(count)
        with pytest.warns(UserWarning, match="budget"):
            assert list(private) == []
    assert lengths == [4, 2]


class Repeating(Sampler[int]):
    def __iter__(self) -> Any:
        return iter([0, 1, 2, 0])

    def __len__(self) -> int:
        return 4


def test_order_based_loader_refuses_a_sampler_that_repeats() -> None:
    """Without Poisson sampling the guard stops at the first example that comes twice in a pass."""
    loader = DataLoader(Rows(4), batch_size=2, sampler=Repeating())
    with _scope_over(loader, poisson_sampling=False) as (_, private):
        batches = iter(private)
        next(batches)
        with pytest.raises(ScopeError, match="more than once"):
            next(batches)


@pytest.mark.parametrize(
    "make_sampler",
    [lambda d: None, RandomSampler, SequentialSampler, lambda d: SubsetRandomSampler([0, 2, 4])],
    ids=["default", "random", "sequential", "subset"],
)
def test_order_based_loader_accepts_samplers_without_repetition(make_sampler: Any) -> None:
    """Without Poisson sampling every sampler that yields an example once at most keeps its own order."""
    dataset = Rows(6)
    loader = DataLoader(dataset, batch_size=2, sampler=make_sampler(dataset), collate_fn=_as_tensor)
    with _scope_over(loader, poisson_sampling=False) as (_, private):
        first = [v for batch in private for v in batch[:, 0].tolist()]
        second = [v for batch in private for v in batch[:, 0].tolist()]
    assert sorted(first) == sorted(second)
    assert sorted(first) in ([1, 2, 3, 4, 5, 6], [1, 3, 5])


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter(range(4))


class Batches(Sampler[list[int]]):
    def __iter__(self) -> Any:
        return iter([[0, 1]])

    def __len__(self) -> int:
        return 1


class MyBatches(BatchSampler):
    pass


ROWS = Rows(4)
REFUSED = [
    ("not a loader", [1, 2], True, "DataLoader"),
    ("iterable", DataLoader(Stream(), batch_size=2), True, "map-style"),
    ("iterable, in order", DataLoader(Stream(), batch_size=2), False, "map-style"),
    ("batch_size None", DataLoader(ROWS, batch_size=None), True, "batch_size=..."),
    ("batch sampler", DataLoader(ROWS, batch_sampler=Batches()), True, "batch_size=..."),
    ("batch sampler, in order", DataLoader(ROWS, batch_sampler=Batches()), False, "batch_size=..."),
    ("subclass", DataLoader(ROWS, batch_sampler=MyBatches(SequentialSampler(ROWS), 2, False)), True, "batch_size=..."),
    (
        "weighted",
        DataLoader(ROWS, batch_size=2, sampler=WeightedRandomSampler([1, 2, 3, 4], 4)),
        True,
        "Weight the loss",
    ),
    (
        "weighted, in order",
        DataLoader(ROWS, batch_size=2, sampler=WeightedRandomSampler([1, 2, 3, 4], 4)),
        False,
        "Weight the loss",
    ),
    ("subset sampler", DataLoader(ROWS, batch_size=2, sampler=SubsetRandomSampler([0, 1])), True, "Subset(dataset"),
    ("own sampler", DataLoader(ROWS, batch_size=2, sampler=Repeating()), True, "Subset(dataset"),
    (
        "replacement, in order",
        DataLoader(ROWS, batch_size=2, sampler=RandomSampler(ROWS, replacement=True)),
        False,
        "poisson_sampling=True",
    ),
    (
        "more draws than examples, in order",
        DataLoader(ROWS, batch_size=2, sampler=RandomSampler(ROWS, num_samples=9)),
        False,
        "poisson_sampling=True",
    ),
    ("empty dataset", DataLoader(Rows(0), batch_size=2), True, "empty"),
    ("batch too large", DataLoader(ROWS, batch_size=5), True, "4 examples"),
    ("out of order", DataLoader(ROWS, batch_size=2, num_workers=1, in_order=False), True, "in_order"),
]


@pytest.mark.parametrize(("loader", "poisson", "remedy"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
def test_loaders_that_cannot_be_accounted_for_are_refused(loader: Any, poisson: bool, remedy: str) -> None:
    """A loader without known, independent sampling is refused before entering, with what to do instead."""
    with pytest.raises(InvalidArgumentError) as caught:
        _scope_over(loader, poisson_sampling=poisson)
    assert "loader=" in str(caught.value)
    assert remedy in str(caught.value)


def test_private_loader_cannot_be_made_private_again() -> None:
    """A loader that a scope handed out is refused by the next scope, which would sample from samples."""
    with _scope_over(DataLoader(ROWS, batch_size=2)) as (_, private):
        pass
    with pytest.raises(InvalidArgumentError, match=r"loader=.*pass the DataLoader it was made from"):
        _scope_over(private)


def test_loader_is_dead_after_the_scope() -> None:
    """Iterating the private loader after its scope, or going on with an old iterator, is an error."""
    with _scope_over(DataLoader(ROWS, batch_size=2)) as (_, private):
        old = iter(private)
        next(old)
    with pytest.raises(ScopeError, match="original loader"):
        list(private)
    with pytest.raises(ScopeError, match="original loader"):
        next(old)


def test_original_loader_is_untouched() -> None:
    """The user's own loader gives what it gave before, inside the scope and after it."""
    loader = DataLoader(Rows(6), batch_size=2, collate_fn=_as_tensor)
    before, attributes = [b.tolist() for b in loader], dict(vars(loader))
    with _scope_over(loader) as (_, private), warnings.catch_warnings():
        warnings.simplefilter("error")
        list(private)
        assert [b.tolist() for b in loader] == before
    assert vars(loader) == attributes
