"""The private loader: workers, settings and the end of the original loader, and which loaders it is made from."""

import warnings
from typing import Any

import pytest
import torch
from opacus.data_loader import DPDataLoader
from opacus.utils.uniform_sampler import UniformWithReplacementSampler
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from dp_hooks import PrivateDataLoader
from dp_hooks.errors import InvalidArgumentError, ScopeError

from ...models import drawn
from ..gaussian import NEVER
from .helpers import Rows, as_dict, as_tensor, batches_of, indices, loader_over, private


def only_in_workers(worker: int) -> None:
    assert torch.utils.data.get_worker_info().id == worker


def test_workers_with_prefetching_deliver_every_part_in_order() -> None:
    """Two workers that fetch ahead give the same parts, in order, as the main process, over two passes."""

    def passes(workers: int) -> list[tuple[int, int, bool, list[float]]]:
        more = {"num_workers": workers, "prefetch_factor": 3} if workers else {}
        rows = []
        with private(loader_over(12, 4, generator=drawn(3), **more), max_physical_batch_size=2) as (opt, own):
            for _ in range(2):
                for batch in own:
                    part = opt.physical_batch
                    rows.append((part.logical, part.index, part.last, batch[:, 0].tolist()))
                    assert part.size == len(batch)
        return rows

    assert passes(2) == passes(0)


def test_persistent_workers_end_with_the_scope() -> None:
    """Persistent workers serve all passes of the scope, and none of them is alive after it."""
    with private(loader_over(4, 4, num_workers=2, persistent_workers=True), sample_rate=1.0) as (_, own):
        for _ in range(2):
            assert indices(own) == [[1, 2, 3, 4]]
        iterator = own._iterator
        workers = list(iterator._workers)
        assert all(w.is_alive() for w in workers)
    alive = [w.is_alive() for w in workers]
    iterator._shutdown_workers()  # if need be, here and not in a garbage collection, where it takes ten seconds
    assert alive == [False, False]


def test_empty_batches_come_out_of_workers() -> None:
    """With loader workers, a first batch without examples arrives with the right structure."""
    loader = loader_over(4, 2, collate_fn=as_dict, num_workers=2, worker_init_fn=only_in_workers)
    with private(loader, sample_rate=NEVER) as (_, own):
        first = next(iter(own))
    assert first["x"].shape == (0, 3)
    assert first["extra"]["mask"].dtype == torch.bool


def test_breaking_off_with_workers_leaves_the_next_pass_aligned() -> None:
    """After a pass is broken off amid prefetched parts, the next pass starts with part 0 of a new logical batch."""
    loader = loader_over(8, 8, num_workers=2, persistent_workers=True, generator=drawn())
    with private(loader, max_physical_batch_size=2, sample_rate=1.0) as (opt, own):
        next(iter(own))
        first = opt.physical_batch
        sizes = []
        for batch in own:
            sizes.append((opt.physical_batch.index, len(batch)))
            assert opt.physical_batch.logical > first.logical
        own._iterator._shutdown_workers()
    assert sizes == [(0, 2), (1, 2), (2, 2), (3, 2)]


def test_loader_settings_are_kept() -> None:
    """Dataset, workers, pinning, time-out, generator and worker settings are those of the original loader."""
    generator = drawn()
    original = loader_over(
        4,
        2,
        num_workers=1,
        timeout=7,
        generator=generator,
        worker_init_fn=only_in_workers,
        prefetch_factor=5,
        persistent_workers=True,
        multiprocessing_context="fork",
    )
    with private(original) as (_, own):
        assert isinstance(own, PrivateDataLoader)
        assert isinstance(own, DataLoader)
        assert own.dataset is original.dataset
        assert own.generator is generator
        for name in ("num_workers", "timeout", "worker_init_fn", "prefetch_factor", "persistent_workers", "pin_memory"):
            assert getattr(own, name) == getattr(original, name), name
        assert own.multiprocessing_context.get_start_method() == "fork"
    with private(loader_over(4, 2, pin_memory=True)) as (_, own):
        assert own.pin_memory is True


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_ends_with_the_budget(workers: int) -> None:
    """With a budget, passes stop at the calibrated number of logical batches, prefetching or not; then none come."""
    model, lengths = nn.Linear(3, 1), []
    budget = {"noise_multiplier": None, "target_epsilon": 5.0, "target_delta": 1e-5, "epochs": 1.5, "accountant": "rdp"}
    with private(loader_over(10, 3, collate_fn=None, num_workers=workers), model, **budget) as (opt, own):
        for _ in range(2):
            lengths.append(0)
            for x, y in own:
                opt.zero_grad()
                (model(x).squeeze(1) - y).square().mean().backward() if len(x) else None
                opt.step()
                lengths[-1] += 1
        with pytest.warns(UserWarning, match="budget"):
            assert list(own) == []
    assert lengths == [4, 2]


class Repeating(Sampler[int]):
    def __iter__(self) -> Any:
        return iter([0, 1, 2, 0])

    def __len__(self) -> int:
        return 4


def test_order_based_loader_refuses_a_sampler_of_the_user() -> None:
    """Without Poisson sampling the order may depend on the data, or examples may come twice: not known of such a sampler."""
    with pytest.raises(InvalidArgumentError, match="in an order that does not depend on the data"):
        private(loader_over(4, 2, sampler=Repeating()), poisson_sampling=False)


def test_order_based_loader_refuses_a_known_sampler_that_repeats() -> None:
    """Without Poisson sampling the guard stops at the first example that comes twice in a pass."""
    scope = private(loader_over(4, 2, sampler=SubsetRandomSampler([1, 1, 1])), poisson_sampling=False)
    with scope as (_, own), pytest.raises(ScopeError, match="more than once"):
        list(own)


@pytest.mark.parametrize(
    "make_sampler",
    [lambda d: None, RandomSampler, SequentialSampler, lambda d: SubsetRandomSampler([0, 2, 4])],
    ids=["default", "random", "sequential", "subset"],
)
def test_order_based_loader_accepts_samplers_without_repetition(make_sampler: Any) -> None:
    """Without Poisson sampling every sampler that yields an example once at most keeps its own order."""
    with private(loader_over(6, 2, sampler=make_sampler(Rows(6))), poisson_sampling=False) as (_, own):
        first, second = (sorted(v for batch in indices(own) for v in batch) for _ in range(2))
    assert first == second
    assert first in ([1, 2, 3, 4, 5, 6], [1, 3, 5])


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


class Shuffling(DataLoader):
    """Does more than to load."""

    def __iter__(self) -> Any:
        return (batch.flip(0) for batch in super().__iter__())


class Named(DataLoader):
    """Does nothing else."""


ROWS = Rows(4)


def two(**options: Any) -> DataLoader:
    """Return a loader of four rows in batches of two."""
    return DataLoader(ROWS, batch_size=2, **options)


UNIFORM = UniformWithReplacementSampler


class Skewed(UniformWithReplacementSampler):
    """Might draw in any way."""


WEIGHTED = WeightedRandomSampler([1, 2, 3, 4], 4)
OWN = MyBatches(SequentialSampler(ROWS), 2, False)
REFUSED = [
    ("not a loader", [1, 2], True, "DataLoader"),
    ("iterable", DataLoader(Stream(), batch_size=2), True, "map-style"),
    ("iterable, in order", DataLoader(Stream(), batch_size=2), False, "map-style"),
    ("batch_size None", DataLoader(ROWS, batch_size=None), True, "batch_size=..."),
    ("batch sampler", DataLoader(ROWS, batch_sampler=Batches()), True, "batch_size=..."),
    ("batch sampler, in order", DataLoader(ROWS, batch_sampler=Batches()), False, "batch_size=..."),
    ("subclass", DataLoader(ROWS, batch_sampler=OWN), True, "batch_size=..."),
    ("weighted", two(sampler=WEIGHTED), True, "Weight the loss"),
    ("weighted, in order", two(sampler=WEIGHTED), False, "Weight the loss"),
    ("subset sampler", two(sampler=SubsetRandomSampler([0, 1])), True, "Subset(dataset"),
    ("own sampler", two(sampler=Repeating()), True, "Subset(dataset"),
    ("replacement", two(sampler=RandomSampler(ROWS, replacement=True)), False, "poisson_sampling=True"),
    ("more draws than examples", two(sampler=RandomSampler(ROWS, num_samples=9)), False, "poisson_sampling=True"),
    ("empty dataset", DataLoader(Rows(0), batch_size=2), True, "empty"),
    ("batch too large", DataLoader(ROWS, batch_size=5), True, "4 examples"),
    ("own __iter__", Shuffling(ROWS, batch_size=2), True, "collate_fn"),
    ("own __iter__, in order", Shuffling(ROWS, batch_size=2), False, "collate_fn"),
    ("out of order", two(num_workers=1, in_order=False), True, "in_order"),
]


@pytest.mark.parametrize(("loader", "poisson", "remedy"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
def test_loaders_that_cannot_be_accounted_for_are_refused(loader: Any, poisson: bool, remedy: str) -> None:
    """A loader without known, independent sampling is refused before entering, with what to do instead."""
    with pytest.raises(InvalidArgumentError) as caught:
        private(loader, poisson_sampling=poisson)
    assert "loader=" in str(caught.value)
    assert remedy in str(caught.value)


INDEPENDENT = {
    "DPDataLoader": (lambda: DPDataLoader(Rows(10), sample_rate=0.3), 0.3, 3),
    "DPDataLoader of a loader": (lambda: DPDataLoader.from_data_loader(DataLoader(Rows(10), batch_size=4)), 1 / 3, 3),
    "sampler": (lambda: DataLoader(Rows(10), batch_sampler=UNIFORM(num_samples=10, sample_rate=0.3, steps=7)), 0.3, 7),
}


@pytest.mark.parametrize("case", INDEPENDENT)
def test_loaders_that_draw_independently_keep_their_rate(case: str) -> None:
    """What an Opacus loader for Poisson sampling draws with is what is drawn with, divided by and charged, in as many batches."""
    make, rate, batches = INDEPENDENT[case]
    scope = private(make(), accountant="rdp")
    with scope as (opt, own):
        assert (own.sample_rate, opt.expected_batch_size, len(own)) == (rate, rate * 10, batches)
        for _ in own:
            opt.step_empty()
        assert scope.accountant.history == [(1.0, rate, batches)]
        sizes = [len(x) for _ in range(300 // batches) for x, _ in own]
    assert abs(sum(sizes) / len(sizes) - rate * 10) < 4 * (rate * (1 - rate) * 10 / len(sizes)) ** 0.5


def test_the_rate_of_an_independent_loader_can_be_another() -> None:
    """``sample_rate=`` replaces it, also in what is drawn; a seeded sampler gives the same batches every time."""
    for seed in (None, 3):
        sampler = UNIFORM(num_samples=10, sample_rate=0.3, generator=None if seed is None else drawn(seed))
        loader = DataLoader(Rows(10), batch_sampler=sampler, collate_fn=as_tensor)
        runs = []
        for _ in range(2):
            if seed is not None:
                sampler.generator.manual_seed(seed)
            runs.append(indices(batches_of(loader, passes=5)))
        assert (runs[0] == runs[1]) == (seed is not None)
    with private(DPDataLoader(Rows(10), sample_rate=0.3), sample_rate=0.05) as (opt, own):
        assert (own.sample_rate, opt.expected_batch_size, len(own)) == (0.05, 0.5, 20)


NOT_INDEPENDENT = {
    "in order": (DPDataLoader(ROWS, sample_rate=0.5), False, "poisson_sampling=True"),
    "of other data": (DataLoader(ROWS, batch_sampler=UNIFORM(num_samples=3, sample_rate=0.5)), True, "num_samples=len"),
    "rate": (DataLoader(ROWS, batch_sampler=UNIFORM(num_samples=4, sample_rate=1.5, steps=3)), True, "in \\(0, 1\\]"),
    "no batches": (DataLoader(ROWS, batch_sampler=UNIFORM(num_samples=4, sample_rate=0.5, steps=0)), True, "steps=0"),
    "derived": (DataLoader(ROWS, batch_sampler=Skewed(num_samples=4, sample_rate=0.5)), True, "batch_sampler of its own"),
}


@pytest.mark.parametrize("case", NOT_INDEPENDENT)
def test_independent_loaders_that_cannot_be_accounted_for_are_refused(case: str) -> None:
    """Asked for an order they do not have, or drawing other than by one known rate from the dataset: each by name."""
    loader, poisson, remedy = NOT_INDEPENDENT[case]
    with pytest.raises(InvalidArgumentError, match=remedy):
        private(loader, poisson_sampling=poisson)


def test_a_subclass_that_loads_as_its_base_class_does_is_accepted() -> None:
    """A subclass of DataLoader without an ``__iter__`` of its own gives its batches."""
    with private(Named(ROWS, batch_size=2, collate_fn=as_tensor), poisson_sampling=False) as (_, own):
        assert indices(list(own)) == [[1, 2], [3, 4]]


def test_private_loader_cannot_be_made_private_again() -> None:
    """A loader that a scope handed out is refused by the next scope, which would sample from samples."""
    with private(two()) as (_, own):
        pass
    with pytest.raises(InvalidArgumentError, match=r"loader=.*pass the DataLoader it was made from"):
        private(own)


def test_loader_is_dead_after_the_scope() -> None:
    """Iterating the private loader after its scope, or going on with an old iterator, is an error."""
    with private(two()) as (_, own):
        old = iter(own)
        next(old)
    with pytest.raises(ScopeError, match="original loader"):
        list(own)
    with pytest.raises(ScopeError, match="original loader"):
        next(old)


def test_original_loader_is_untouched() -> None:
    """The user's own loader gives what it gave before, inside the scope and after it."""
    loader = loader_over(6, 2)
    before, attributes = [b.tolist() for b in loader], dict(vars(loader))
    with private(loader) as (_, own), warnings.catch_warnings():
        warnings.simplefilter("error")
        list(own)
        assert [b.tolist() for b in loader] == before
    assert vars(loader) == attributes
