"""Sampling of units: which examples belong to which, the rate, draws that are independent, parts that split no unit."""

import math
from collections import Counter
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from dp_hooks.errors import DPHooksError, InvalidArgumentError, ScopeError
from dp_hooks.privacy.sampling.poisson import PoissonSampler, SecurePoissonSampler
from dp_hooks.privacy.sampling.unit_batches import UnitSampler
from dp_hooks.privacy.sampling.units import DatasetUnits, read_units

from ...models import drawn
from ..seeded_bytes import SeededBytes
from .helpers import as_tensor, batches_of, indices, loader_over, private

SIZES = [1, 4, 2, 9, 1, 3]  # of the units 0 to 5: twenty examples
OF = [unit for unit, size in enumerate(SIZES) for _ in range(size)]
EXAMPLES = len(OF)


class Records(Dataset[dict[str, Any]]):
    """Dictionaries with a unit in them."""

    def __init__(self, units: list[Any], make: Any = dict) -> None:
        self.units, self.make, self.read = units, make, 0

    def __len__(self) -> int:
        return len(self.units)

    def __getitem__(self, i: int) -> Any:
        self.read += 1
        torch.rand(1)  # as augmentation does
        return self.make(x=torch.zeros(2), user=self.units[i])


class Table(Records):
    """A table, as those of ``datasets``: a column can be had without reading examples."""

    column_names = ("x", "user")

    def __getitem__(self, i: Any) -> Any:
        return self.units if i == "user" else super().__getitem__(i)


NAMES = ["b", "a", "b", "c", "a", "b"]
SAME = [0, 1, 0, 2, 1, 0]
PAIRS = Records(NAMES, lambda x, user: (x, user))
WAYS: dict[str, tuple[Any, Any]] = {
    "a list": (NAMES, Records(NAMES)),
    "a tuple of tuples": (tuple((name, 1) for name in NAMES), Records(NAMES)),
    "an array": (np.array(NAMES), Records(NAMES)),
    "an array of numbers": (np.array(SAME) * 7, Records(NAMES)),
    "a tensor": (torch.tensor(SAME) * -5, Records(NAMES)),
    "a list of tensors": (list(torch.tensor(SAME)), Records(NAMES)),
    "floats": ([s + 0.5 for s in SAME], Records(NAMES)),
    "a field": ("user", Records(NAMES)),
    "an attribute": ("user", Records(NAMES, SimpleNamespace)),
    "a place": (1, PAIRS),
    "the last place": (-1, PAIRS),
    "a column": ("user", Table(NAMES)),
    "a function": (lambda example: example["user"].upper(), Records(NAMES)),
}


@pytest.mark.parametrize("way", WAYS)
def test_units_can_be_told_in_many_ways(way: str) -> None:
    """Labels of any kind, fields and functions give the same units; no random number is spent, no row of a table is read."""
    told, dataset = WAYS[way]
    before = torch.get_rng_state()
    units = read_units(told, dataset, None)
    assert torch.equal(before, torch.get_rng_state())
    found = {frozenset(units.drawn_from(unit, drawn())) for unit in range(units.count)}
    assert found == {frozenset({0, 2, 5}), frozenset({1, 4}), frozenset({3})}
    assert (units.count, units.most, units.in_play) == (3, 3, 6)
    assert units.name == {"a field": "user", "an attribute": "user", "a column": "user", "a place": "field 1"}.get(
        way, "field -1" if way == "the last place" else ""
    )
    assert way != "a column" or dataset.read == 0


@pytest.mark.parametrize(
    ("told", "message"),
    [
        (NAMES[:-1], "5 labels, and the dataset 6 examples"),
        (torch.arange(7), "7 labels, and the dataset 6 examples"),
        ([*NAMES[:-1], None], "unit of example 5"),
        ([*NAMES[:-1], math.nan], "unit of example 5"),
        ([*NAMES[:-1], ["a"]], "unit of example 5"),
        ([*NAMES[:-1], torch.arange(2)], "unit of example 5"),
        (torch.zeros(6, 2), "Pass the unit of each example"),
        (set(NAMES), "Pass the unit of each example"),
        (dict.fromkeys(range(6), "a"), "Pass the unit of each example"),
        (b"abcabc", "Pass the unit of each example"),
        (1.5, "Pass the unit of each example"),
        (True, "Pass the unit of each example"),
        ("author", "of example 0 it gives no unit"),
        (lambda example: example["author"], "of example 0 it gives no unit"),
        (lambda example: None, "unit of example 0"),
    ],
)
def test_what_tells_no_units_is_refused(told: Any, message: str) -> None:
    """Labels that are missing, too many, unhashable or NaN, and fields that are not there, are refused by name."""
    with pytest.raises(InvalidArgumentError, match=f"privacy_unit.*{message}"):
        read_units(told, Records(NAMES), None)


@pytest.mark.parametrize("most", [0, -1, 1.5, True, "2"])
def test_at_most_so_many_examples_is_a_whole_number(most: Any) -> None:
    """Zero, fractions, bools and strings are refused by name; and so is a number without units."""
    with pytest.raises(InvalidArgumentError, match="max_examples_per_unit"):
        read_units(NAMES, Records(NAMES), most)
    with pytest.raises(InvalidArgumentError, match=r"max_examples_per_unit.*privacy_unit"):
        private(loader_over(6, 2), max_examples_per_unit=2)


DRAWS, Q, MOST = 3000, 0.3, 3


@pytest.fixture(scope="module", params=["generator", "secure"])
def batches(request: pytest.FixtureRequest) -> list[list[list[int]]]:
    """Many logical batches of units."""
    units = DatasetUnits(torch.tensor(OF), MOST)
    secure = request.param == "secure"
    drawn_units = (units.count, Q, DRAWS)
    inner = SecurePoissonSampler(*drawn_units, SeededBytes(5)) if secure else PoissonSampler(*drawn_units, drawn(5))
    sampler = UnitSampler(units, inner)
    if secure:
        sampler._generator = drawn(6)
    return list(sampler)


def within(count: int, draws: int, p: float, sigmas: float = 5.0) -> bool:
    """Whether a binomial count is where it has to be, but for one in a million."""
    return abs(count - draws * p) <= sigmas * math.sqrt(draws * p * (1 - p))


def test_units_are_drawn_independently_at_the_rate_and_no_other(batches: list[list[list[int]]]) -> None:
    """Every unit is in a batch with probability q, whatever its size, and pairs with q^2; 0.9 q and 1.1 q would be noticed."""
    present = [{OF[examples[0]] for examples in batch} for batch in batches]
    counts = Counter(unit for batch in present for unit in batch)
    for unit in range(len(SIZES)):
        assert within(counts[unit], DRAWS, Q)
    total = sum(counts.values())
    assert within(total, DRAWS * len(SIZES), Q)
    assert not within(total, DRAWS * len(SIZES), 0.9 * Q)
    assert not within(total, DRAWS * len(SIZES), 1.1 * Q)
    for a in range(len(SIZES)):
        for b in range(a):
            assert within(sum({a, b} <= batch for batch in present), DRAWS, Q * Q)
    again = sum(3 in one and 3 in other for one, other in pairwise(present))
    assert within(again, DRAWS - 1, Q * Q, 6.0)


def test_of_a_unit_any_examples_are_drawn_anew_each_time(batches: list[list[list[int]]]) -> None:
    """A unit has all of its examples in a batch, or k of them, each as often as any other; small units come first."""
    first = sum(SIZES[:3])
    counts: Counter[int] = Counter()
    times = 0
    for batch in batches:
        sizes = [len(examples) for examples in batch]
        assert sizes == sorted(sizes)
        for examples in batch:
            (unit,) = {OF[i] for i in examples}
            assert len(set(examples)) == len(examples) == min(MOST, SIZES[unit])
            if unit == 3:
                times += 1
                counts.update(examples)
    assert set(counts) == set(range(first, first + 9))
    assert all(within(count, times, MOST / 9) for count in counts.values())


@pytest.mark.parametrize(
    ("batch_size", "most", "rate", "q", "expected", "length"),
    [
        (5, None, None, 5 / 20, 5.0, 4),
        (4, 2, None, 4 / 10, 4.0, 3),
        (3, 1, None, 3 / 6, 3.0, 2),
        (20, None, None, 1.0, 20.0, 1),
        (5, 2, 0.25, 0.25, 2.5, 4),
        (5, 100, None, 5 / 20, 5.0, 4),
    ],
)
def test_the_rate_is_such_that_the_batch_size_is_the_expected_number_of_examples(
    batch_size: int, most: int | None, rate: float | None, q: float, expected: float, length: int
) -> None:
    """``q = batch_size / (examples that can be in a batch)``; batches of a pass, the divisor and the report follow from it."""
    scope = private(loader_over(EXAMPLES, batch_size), privacy_unit=OF, max_examples_per_unit=most, sample_rate=rate)
    with scope as (opt, own):
        assert own.sample_rate == pytest.approx(q, rel=1e-12)
        assert opt.expected_batch_size == pytest.approx(expected, rel=1e-12)
        assert len(own) == length
        sizes = [len(batch) for _ in range(600) for batch in own]
    large = sum(min(most or 9, size) ** 2 for size in SIZES)
    assert abs(sum(sizes) / len(sizes) - expected) <= 5 * math.sqrt(q * (1 - q) * large / len(sizes)) + 1e-12
    report = scope.report()
    assert (report.units, report.sample_rate, report.dataset_size) == (6, pytest.approx(q), 20)
    assert report.expected_units == pytest.approx(6 * q)
    assert "one unit with all of its examples" in report.relation
    assert f"{'all' if most is None else f'at most {most}'} of the examples of each" in str(report)
    assert report.max_examples_per_unit == most  # as asked for: what the largest unit has is not told


def test_parts_hold_whole_units() -> None:
    """A unit is never in two parts, no part is too large, and what the optimizer knows of each are the units in it."""
    loader = DataLoader(list(range(EXAMPLES)), batch_size=12, generator=drawn(3), collate_fn=as_numbers)
    options = {"privacy_unit": OF, "max_examples_per_unit": 4, "max_physical_batch_size": 5}
    with private(loader, **options, check_collate=False) as (opt, own):
        seen: dict[int, list[set[int]]] = {}
        for batch in own:
            part = opt.physical_batch
            assert len(batch) == part.size == sum(part.units) <= 5
            examples, cut = batch.tolist(), []
            for size in part.units:
                cut.append({OF[i] for i in examples[:size]})
                examples = examples[size:]
            assert all(len(units) == 1 for units in cut)
            seen.setdefault(part.logical, []).extend(cut)
        for units in seen.values():
            assert len(units) == len(set().union(*units))
    assert max(map(len, seen.values())) > 1


def as_numbers(examples: list[int]) -> Tensor:
    return torch.tensor(examples)


def test_the_same_generator_draws_the_same_units_as_examples_that_are_units() -> None:
    """With one example in each unit batches are those of single examples, to the last one."""
    plain, units = (
        indices(batches_of(loader_over(40, 10, generator=drawn(5)), 3, **more)) for more in ({}, {"privacy_unit": range(40)})
    )
    assert plain == units


def test_loader_workers_are_told_which_rows_are_of_a_unit() -> None:
    """Batches that workers fetch ahead come with their own units."""
    options = {"privacy_unit": OF, "max_examples_per_unit": 2}
    with private(loader_over(EXAMPLES, 8, num_workers=2), **options) as (opt, own):
        for batch in own:
            rows = [OF[int(row) - 1] for row in batch[:, 0]]
            assert [rows.count(unit) for unit in dict.fromkeys(rows)] == list(opt.physical_batch.units)


REFUSED: dict[str, tuple[dict[str, Any], type[DPHooksError], str]] = {
    "by order": ({"poisson_sampling": False}, InvalidArgumentError, "poisson_sampling=False.*privacy_unit"),
    "a part too small": ({"max_physical_batch_size": 8}, InvalidArgumentError, "max_physical_batch_size=8.*9 examples"),
    "a batch too large": ({"max_examples_per_unit": 1}, InvalidArgumentError, "batch_size=8.*6 units has 6 examples"),
    "a ledger": ({"ledger": "ledger.jsonl"}, InvalidArgumentError, "ledger=.*privacy_unit"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_had_with_units_is_refused_before_anything_is_spent(what: str, tmp_path: Any, monkeypatch: Any) -> None:
    """Each is an error that names the argument and the remedy."""
    monkeypatch.chdir(tmp_path)
    options, error, message = REFUSED[what]
    with pytest.raises(error, match=message):
        private(loader_over(EXAMPLES, 8), **{"privacy_unit": OF, **options})
    assert not list(tmp_path.iterdir())


def test_streams_and_loaders_that_draw_examples_are_refused() -> None:
    """Of a stream no unit can be drawn, and a rate of examples is none of units."""
    from opacus.data_loader import DPDataLoader

    class Stream(IterableDataset):
        def __iter__(self) -> Any:
            return iter([torch.zeros(3)])

    with pytest.raises(InvalidArgumentError, match="IterableDataset"):
        private(DataLoader(Stream(), batch_size=2), privacy_unit=[0])
    loader = DPDataLoader.from_data_loader(loader_over(EXAMPLES, 5))
    with pytest.raises(InvalidArgumentError, match="draws examples at a rate of its own"):
        private(loader, privacy_unit=OF)


def test_another_loader_that_would_cut_units_is_refused() -> None:
    """Opacus's BatchMemoryManager cuts batches anywhere."""
    from opacus.utils.batch_memory_manager import BatchMemoryManager

    with (
        private(loader_over(EXAMPLES, 8), privacy_unit=OF) as (opt, own),
        pytest.raises(ScopeError, match="max_physical_batch_size"),
        BatchMemoryManager(data_loader=own, max_physical_batch_size=4, optimizer=opt) as cut,
    ):
        next(iter(cut))


def in_another_order(examples: Any) -> Tensor:
    return as_tensor(sorted(examples, key=lambda example: -float(example[0][0])))


def shuffled(examples: Any) -> Tensor:
    return as_tensor(examples)[torch.randperm(len(examples))]


@pytest.mark.parametrize("collate", [in_another_order, shuffled])
def test_a_collate_function_that_moves_rows_is_refused(collate: Any) -> None:
    """Rows are told to be of a unit by their places; single examples can be in any order."""
    loader = loader_over(EXAMPLES, 8, collate_fn=collate)
    with private(loader):
        pass
    with pytest.raises(InvalidArgumentError, match="another order"), private(loader, privacy_unit=OF):
        pass
