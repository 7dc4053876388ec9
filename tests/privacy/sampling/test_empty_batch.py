"""Batches without examples have the structure of all others, and nothing of any example."""

from collections import UserDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import BatchEncoding

from ..gaussian import NEVER
from .helpers import Rows, as_dict, as_tensor, batches_of, loader_over, private, stack


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


@dataclass
class Record:
    x: Tensor
    ids: Tensor
    scale: float = 1.0


def as_encoding(examples: Any) -> BatchEncoding:
    x, y = stack(examples)
    return BatchEncoding({"input_ids": y[:, None].expand(-1, 4), "attention_mask": x.half()})


def as_lists(examples: Any) -> dict[str, Any]:
    x, y = stack(examples)
    return {"x": x, "names": [f"row {i}" for i in y.tolist()], "rows": len(examples), "nothing": None}


COLLATES: dict[str, Callable[[Any], Any] | None] = {
    "default": None,
    "tensor": as_tensor,
    "list": lambda examples: list(stack(examples)),
    "dict": as_dict,
    "named": lambda examples: Pair(*stack(examples)),
    "record": lambda examples: Record(*stack(examples)),
    "user dict": lambda examples: UserDict(zip("xy", stack(examples), strict=True)),
    "encoding": as_encoding,
    "lists": as_lists,
}
each_collate = pytest.mark.parametrize("collate", COLLATES.values(), ids=list(COLLATES))


def first_empty(loader: DataLoader, **kwargs: Any) -> Any:
    """Return the first batch of a private loader whose batches are all empty."""
    with private(loader, sample_rate=NEVER, **kwargs) as (_, own):
        return next(iter(own))


def leaves(batch: Any) -> list[Any]:
    """Return what a batch consists of."""
    if isinstance(batch, Record):
        batch = vars(batch)
    if isinstance(batch, (dict, UserDict)):
        batch = list(batch.values())
    return [leaf for item in batch for leaf in leaves(item)] if isinstance(batch, (tuple, list)) else [batch]


@each_collate
def test_batches_keep_the_structure_of_the_original_loader(collate: Any) -> None:
    """A Poisson batch that holds every example equals the original loader's batch, types and dtypes included."""
    loader = loader_over(4, 4, collate_fn=collate)
    (expected,), (batch,) = list(loader), batches_of(loader, sample_rate=1.0)
    assert type(batch) is type(expected)
    for ours, theirs in zip(leaves(batch), leaves(expected), strict=True):
        assert type(ours) is type(theirs)
        if isinstance(ours, Tensor):
            assert ours.dtype == theirs.dtype
            assert torch.equal(ours, theirs)
        else:
            assert ours == theirs


@each_collate
def test_first_batch_empty_has_structure_dtypes_and_no_content(collate: Any) -> None:
    """A batch of no example, also the first one, has the usual structure, zero rows and nothing of any example."""
    loader = loader_over(4, 2, collate_fn=collate)
    example, batch = next(iter(loader)), first_empty(loader)
    assert type(batch) is type(example)
    if isinstance(example, (dict, UserDict)):
        assert list(batch) == list(example)
    tensors, full = ([leaf for leaf in leaves(b) if isinstance(leaf, Tensor)] for b in (batch, example))
    assert len(tensors) == len(full)
    assert len(tensors) > 0
    for empty, usual in zip(tensors, full, strict=True):
        assert empty.shape == (0, *usual.shape[1:])
        assert empty.dtype == usual.dtype
    others = [leaf for leaf in leaves(batch) if not isinstance(leaf, Tensor)]
    assert all(leaf is None or leaf == 0 for leaf in others)


def test_empty_batch_of_a_time_first_collate_has_zero_samples_on_that_axis() -> None:
    """The axis that counts examples is found by comparison, not assumed to be the first."""
    loader = loader_over(4, 2, collate_fn=lambda examples: as_tensor(examples).T)
    assert first_empty(loader, batch_first=False).shape == (3, 0)


def shared_mask(examples: Any) -> dict[str, Tensor]:
    x = as_tensor(examples)
    return {"x": x, "mean": x.mean(), "column": x.mean(0)}


def test_empty_batch_blanks_tensors_that_do_not_count_examples() -> None:
    """A tensor without a sample axis keeps its shape in an empty batch, but none of dataset[0]'s content."""
    batch = first_empty(loader_over(4, 2, collate_fn=shared_mask), check_collate=False)  # which refuses such a function
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


def padded(examples: list[Tensor]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(examples, batch_first=True)


def test_empty_batch_of_a_dataset_with_random_lengths_keeps_its_other_axes() -> None:
    """Only the axis of the examples becomes 0, also if two fetches of one example differ in length."""
    empty = first_empty(DataLoader(Growing(), batch_size=2, collate_fn=padded))
    assert empty.shape[0] == 0
    assert empty.shape[1] > 0
    assert empty.shape[2] == 2


def popping(examples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    labels = torch.stack([example.pop("y") for example in examples])
    return {"y": labels, **torch.utils.data.default_collate(examples)}


class Records(Rows):
    def __getitem__(self, i: int) -> Any:
        return {"x": torch.ones(3), "y": torch.tensor(i)}


def test_empty_batch_with_a_collate_function_that_consumes_its_examples() -> None:
    """A collate function that changes the examples it is given does not see an example twice."""
    empty = first_empty(DataLoader(Records(4), batch_size=2, collate_fn=popping))
    assert {key: tuple(value.shape) for key, value in empty.items()} == {"y": (0,), "x": (0, 3)}
