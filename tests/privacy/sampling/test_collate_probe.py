"""Whether a collate function makes each row of one example is tried on entering, on a few examples."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset, default_collate
from transformers import BatchEncoding

from dp_hooks.errors import InvalidArgumentError
from dp_hooks.privacy.sampling.collate_probe import probe_collate

from ...models import drawn
from .helpers import private

Collate = Callable[[list[Any]], Any]


class Items(Dataset):
    """Examples that are given."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> Any:
        return self.items[i]


def vectors() -> list[Any]:
    generator = drawn(3)
    return [(torch.randn(3, generator=generator), i % 2) for i in range(10)]


def texts() -> list[Any]:
    """Token numbers of different lengths, of which some are equal."""
    generator = drawn(4)
    return [(torch.randint(1, 30, (2 + i % 4,), generator=generator), i % 2) for i in range(10)]


def labels(rows: list[Any]) -> Tensor:
    return torch.tensor([y for _, y in rows])


# ---------------------------------------------------------------- rows that hold several examples


def mixed_by_roll(rows: list[Any]) -> Any:
    x, y = default_collate(rows)
    return 0.7 * x + 0.3 * x.roll(1, 0), y


def mixed_at_random(rows: list[Any]) -> Any:
    x, y = default_collate(rows)
    share = float(torch.distributions.Beta(1.0, 1.0).sample())
    return share * x + (1 - share) * x[torch.randperm(len(x))], y


def standardised(rows: list[Any]) -> Any:
    x, y = default_collate(rows)
    return (x - x.mean(0)) / (x.std(0, correction=0) + 1e-3), y


def with_negatives(rows: list[Any]) -> Any:
    x, y = default_collate(rows)
    return {"x": x, "negative": x.roll(1, 0), "y": y}


def packed(rows: list[Any]) -> Any:
    return torch.cat([x for x, _ in rows])[None], labels(rows)


def one_graph(rows: list[Any]) -> Any:
    return {
        "nodes": torch.cat([x for x, _ in rows]),
        "owner": torch.cat([torch.full((len(x),), i) for i, (x, _) in enumerate(rows)]),
    }


def with_mean(rows: list[Any]) -> Any:
    x, y = default_collate(rows)
    return {"x": x, "mean": x.mean(0), "y": y}


def with_norm_as_number(rows: list[Any]) -> Any:
    x, y = default_collate(rows)
    return x, float(x.norm()), y


def pairs(rows: list[Any]) -> Any:
    x, y = default_collate(rows)
    return x.repeat_interleave(2, 0), y


def chunked(rows: list[Any]) -> Any:
    """All tokens one after the other, cut into as many rows as there are examples: some rows hold several, some none."""
    tokens = torch.cat([x for x, _ in rows])
    size = -(-len(tokens) // len(rows))
    return nn.functional.pad(tokens, (0, size * len(rows) - len(tokens))).view(len(rows), size), labels(rows)


def by_turns(rows: list[Any]) -> Any:
    """A row of one example holds it twice, the next one nothing of its own."""
    x, y = default_collate(rows)
    return x[torch.arange(len(x)) // 2 * 2], y


def sorted_inputs_only(rows: list[Any]) -> Any:
    return padded_right(sorted(rows, key=lambda row: -len(row[0])))[0], labels(rows)


MIXING: list[tuple[Collate, Callable[[], list[Any]], str]] = [
    (mixed_by_roll, vectors, r"batch\[0\] changes"),
    (mixed_at_random, vectors, r"batch\[0\] changes"),
    (standardised, vectors, r"batch\[0\] changes"),
    (with_negatives, vectors, r"batch\['negative'\] changes"),
    (packed, texts, r"batch\[0\] has no sample axis"),
    (one_graph, texts, r"batch\['nodes'\] has no sample axis"),
    (with_mean, vectors, r"batch\['mean'\] is one value for all"),
    (with_norm_as_number, vectors, r"batch\[1\] is one value for all"),
    (pairs, vectors, r"batch\[0\] has no sample axis"),
    (chunked, texts, r"batch\[0\] changes"),
    (by_turns, vectors, r"batch\[0\] changes"),
    (sorted_inputs_only, texts, r"batch\[0\] changes"),
]


@pytest.mark.parametrize(("collate", "items", "field"), MIXING, ids=[row[0].__name__ for row in MIXING])
def test_rows_of_several_examples_are_refused_on_entering(collate: Collate, items: Callable[[], list[Any]], field: str) -> None:
    """A row that changes with another example, or a field without rows, is refused by the names of function and field."""
    loader, model = DataLoader(Items(items()), batch_size=4, collate_fn=collate), nn.Linear(3, 1)
    scope = private(loader, model)
    with pytest.raises(InvalidArgumentError, match=rf"collate_fn={collate.__name__}.*{field}"):
        scope.__enter__()
    assert not scope.is_open
    with private(loader, model, check_collate=False) as (_, own):
        assert len(list(own)) == 3


# ---------------------------------------------------------------- rows of one example each


def padded_right(rows: list[Any]) -> Any:
    return pad_sequence([x for x, _ in rows], batch_first=True), labels(rows)


def padded_left(rows: list[Any]) -> Any:
    return pad_sequence([x for x, _ in rows], batch_first=True, padding_side="left"), labels(rows)


def images(rows: list[Any]) -> Any:
    return [x for x, _ in rows], labels(rows)


def sorted_by_length(rows: list[Any]) -> Any:
    return padded_right(sorted(rows, key=lambda row: -len(row[0])))


def augmented(rows: list[Any]) -> Any:
    return torch.stack([x + torch.randn(3) * random.random() + np.random.rand() for x, _ in rows]), labels(rows)


def sparse(rows: list[Any]) -> Any:
    return torch.stack([x for x, _ in rows]).to_sparse(), labels(rows)


def with_longest(rows: list[Any]) -> Any:
    x, y = padded_right(rows)
    return {"x": x, "longest": torch.tensor(x.shape[1]), "as_number": x.shape[1], "y": y}


def with_mask(rows: list[Any]) -> Any:
    x, y = padded_right(rows)
    return {"input_ids": x, "attention_mask": (x != 0).long(), "labels": y}


def arrays(rows: list[Any]) -> Any:
    return np.stack([x.numpy() for x, _ in rows]), np.array([y for _, y in rows])


def consuming(rows: list[Any]) -> Any:
    y = labels(rows)
    return torch.stack([x.mul_(2.0) for x, _ in rows]), y


def with_constant(rows: list[Any]) -> Any:
    x, y = default_collate(rows)
    return x, y, torch.linspace(0.0, 1.0, 7), 0.5, "name"


SOUND: list[tuple[Collate, Callable[[], list[Any]]]] = [
    (padded_right, texts),
    (padded_left, texts),
    (images, texts),
    (sorted_by_length, texts),
    (augmented, vectors),
    (sparse, vectors),
    (with_longest, texts),
    (with_mask, texts),
    (arrays, vectors),
    (consuming, vectors),
    (with_constant, vectors),
]


@pytest.mark.parametrize(("collate", "items"), SOUND, ids=[row[0].__name__ for row in SOUND])
def test_rows_of_one_example_each_are_accepted_and_nothing_is_disturbed(collate: Collate, items: Callable[[], list[Any]]) -> None:
    """Entering draws no random number that the user could notice, and leaves the examples of the dataset as they were."""
    given, wanted = items(), items()

    def states() -> list[Any]:
        return [torch.get_rng_state().tolist(), random.getstate(), repr(np.random.get_state())]

    scope = private(DataLoader(Items(given), batch_size=4, collate_fn=collate))
    before = states()
    with scope:
        assert states() == before, "numbers were drawn"
    assert all(torch.equal(x, kept) and y == label for (x, y), (kept, label) in zip(given, wanted, strict=True))
    report = str(scope.report())
    assert ("verified: a row is made of one example" in report) != ("leaves padding out has not been seen" in report)
    assert ("leaves padding out" in report) == (items is texts and collate is not images)


# ---------------------------------------------------------------- what the probe cannot tell


def not_alone(rows: list[Any]) -> Any:
    return torch.stack([x for x, _ in rows]) / (len(rows) - 1), 1 // (len(rows) - 1)


class Elsewhere(Items):
    def __getitem__(self, i: int) -> Any:
        if torch.utils.data.get_worker_info() is None:
            raise OSError("opened in workers only")
        return super().__getitem__(i)


class Opaque:
    __slots__ = ("x",)

    def __init__(self, x: Tensor) -> None:
        self.x = x


UNCLEAR = [
    (Items, not_alone, "it failed on 1 examples (ZeroDivisionError"),
    (Elsewhere, padded_right, "could not be read in this process (OSError: opened in workers only)"),
    (Items, lambda rows: Opaque(rows[0][0]), "is a Opaque"),
]


@pytest.mark.parametrize(("dataset", "collate", "remark"), UNCLEAR, ids=["fails on one", "unreadable here", "own class"])
def test_what_cannot_be_told_is_a_remark_in_the_report(dataset: Any, collate: Collate, remark: str) -> None:
    """Where the function cannot be tried, the scope opens, and the report says that rows were not verified, and why."""
    scope = private(DataLoader(dataset(vectors()), batch_size=4, num_workers=int(dataset is Elsewhere), collate_fn=collate))
    with scope:
        assert f"not verified: {remark}" in str(scope.report()) or remark in scope.report().collate


def test_the_report_tells_when_nothing_was_tried() -> None:
    """``check_collate=False`` is visible in the report; PyTorch's own function needs no trial."""
    scope = private(DataLoader(Items(vectors()), batch_size=4, collate_fn=augmented), check_collate=False)
    with scope:
        assert scope.report().collate == "not checked"
    scope = private(DataLoader(Items(vectors()), batch_size=4))
    with scope:
        assert scope.report().collate == ""


@pytest.mark.parametrize("count", [1, 2, 3])
def test_tiny_datasets_are_no_obstacle(count: int) -> None:
    """One, two or three examples are enough to enter."""
    with private(DataLoader(Items(texts()[:count]), batch_size=1, collate_fn=padded_right)):
        pass


def test_batches_of_classes_that_are_mappings_are_looked_into():
    """A ``BatchEncoding``, which holds its fields in an attribute as well, is taken apart by its keys; its padding is found."""
    loader = DataLoader(Items(texts()), batch_size=4, collate_fn=as_encoding)
    facts = probe_collate(loader)
    assert facts.remark == ""
    assert [field.path for field in facts.padded] == [("input_ids",)]


def as_encoding(rows: list[Any]) -> BatchEncoding:
    return BatchEncoding({"input_ids": pad_sequence([ids for ids, _ in rows], batch_first=True), "labels": labels(rows)})
