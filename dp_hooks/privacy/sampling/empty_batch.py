"""Batches of no example, with the structure that other batches have."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..._tree import attributes_of, tree_map, with_attributes
from ...errors import DPHooksError


class EmptyAwareCollate:
    """A collate function that also makes batches of no example, with the structure that other batches have.

    The structure is learnt by collating the first example of the dataset once alone and once twice: every axis whose
    size differs counts examples and becomes 0. Nothing of the example's content is kept: what remains are zeros. It
    works in loader workers, and when the very first batch is empty.
    """

    def __init__(self, collate_fn: Callable[..., Any], dataset: Any, made: Callable[[Any, int], None] | None = None) -> None:
        """Wrap ``collate_fn``; ``made`` is told each batch and its number of examples, except in copies, which workers have."""
        self.collate_fn = collate_fn
        self.dataset = dataset
        self._made = made

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_made": None}

    def __call__(self, examples: list[Any]) -> Any:
        """Collate ``examples``; an empty list gives a batch with zero rows."""
        batch = self.collate_fn(examples) if len(examples) > 0 else self._empty()
        if self._made is not None:
            self._made(batch, len(examples))
        return batch

    def _empty(self) -> Any:
        example = self.dataset[0]
        # Copies, since collate functions may consume what they are given.
        one = self.collate_fn([copy.deepcopy(example)])
        two = self.collate_fn([copy.deepcopy(example), copy.deepcopy(example)])
        return tree_map(_no_rows, one, two)


def _no_rows(one: Any, two: Any) -> Any:
    if isinstance(one, Tensor):
        shape = [0 if a != b else a for a, b in zip(one.shape, two.shape, strict=True)]
        return torch.zeros(shape, dtype=one.dtype, device=one.device)
    if hasattr(one, "shape") and hasattr(one, "dtype"):  # numpy and friends, without importing them
        blank = one[tuple(slice(0 if a != b else None) for a, b in zip(one.shape, two.shape, strict=True))].copy()
        blank.fill(0)
        return blank
    if isinstance(one, (list, tuple)):  # of different lengths: one entry per example
        return type(one)()
    if one is None or (isinstance(one, bool) and one == two):
        return one
    if isinstance(one, (int, float, str, bytes)):
        return type(one)()
    if attributes_of(one):
        return with_attributes(one, tree_map(_no_rows, attributes_of(one), attributes_of(two)))
    raise DPHooksError(
        f"cannot make an empty batch: collate_fn returned a {type(one).__name__} in it. Let collate_fn return tensors, "
        "lists, tuples, mappings, dataclasses or attributes of them."
    )
