"""Whether the collate function makes each row of a batch of one example alone: tried on a few examples before training."""

import copy
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from ..._no_randomness import generators_kept, set_seeds
from ..._tree import PaddedField, attributes_of, field_at
from ..._validate import bad

# Examples that are read from the dataset, examples in the batch that is varied, and seeds where the function draws numbers.
_READ, _ROWS, _SEEDS = 8, 4, 3
_CLOSE = 1e-5  # what vectorised arithmetic may differ by from one size of the batch to another


@dataclass(frozen=True)
class CollateFacts:
    """What the probe found: a remark where it could not tell (empty: rows come from one example each), and what is padded."""

    remark: str = ""
    padded: tuple[PaddedField, ...] = ()


class _Unclear(Exception):
    """The probe cannot tell."""


@dataclass(frozen=True)
class _Field:
    """Where the rows of a field are: along ``axis`` of a tensor, one after the other in a list, or nowhere."""

    path: tuple[Any, ...]
    axis: int | None  # None: the entries of a list


Row = dict[tuple[Any, ...], Any]
Rows = list[Row]
Padded = dict[tuple[tuple[Any, ...], int], PaddedField]


def probe_collate(loader: DataLoader[Any], *, in_order: bool = False) -> CollateFacts:
    """Collate a few examples, then the same with one exchanged for another: only the rows of that one may change.

    Longer examples may pad the others; sorted rows are recognised, unless rows have to be ``in_order`` of the examples. Random
    numbers are repeated by their seed. The generators of PyTorch, Python and NumPy are as they were afterwards.

    Raises:
        InvalidArgumentError: a row depends on several examples, or rows do not count examples, or are in another order.
    """
    if loader.collate_fn is default_collate:
        return CollateFacts()
    name = getattr(loader.collate_fn, "__qualname__", type(loader.collate_fn).__name__)
    with generators_kept():
        try:
            probe = _Probe(loader.collate_fn, _examples(loader.dataset), name, in_order=in_order)
            return CollateFacts(padded=probe.run())
        except _Unclear as unclear:
            return CollateFacts(remark=str(unclear))


def _examples(dataset: Any) -> list[Any]:
    count = len(dataset)
    wanted = sorted({round(i * (count - 1) / max(1, _READ - 1)) for i in range(_READ)})
    try:
        return [dataset[i] for i in wanted]
    except Exception as error:  # whatever a dataset that opens its files in loader workers does here
        raise _Unclear(f"an example could not be read in this process ({type(error).__name__}: {error})") from error


class _Probe:
    def __init__(self, collate: Callable[[list[Any]], Any], examples: list[Any], name: str, *, in_order: bool) -> None:
        self.collate, self.name, self.in_order = collate, name, in_order
        # The longest first: it pads what it is exchanged into; the second longest pads the others before.
        self.examples = sorted(examples, key=_length, reverse=True)
        self.draws = False
        self.seed = 0

    def run(self) -> tuple[PaddedField, ...]:
        longest, *others = self.examples
        base, spare = (others[:_ROWS], [longest, *others[_ROWS:]]) if len(others) > 1 else (self.examples, self.examples)
        fields = self._fields([self.examples[:count] for count in sorted({1, min(2, len(base)), len(base)})])
        padded: Padded = {}
        for self.seed in range(_SEEDS):
            before = self._rows(base, fields)
            for i in range(len(base)):
                for other in spare[: 2 if self.seed == 0 else 1]:
                    after = self._rows([*base[:i], other, *base[i + 1 :]], fields)
                    self._compare(before, after, padded, i)
            if not self.draws:
                alone = self._rows(base[:1], fields)
                if not any(_differing(alone[0], row, padded) is None for row in before):
                    self._refuse(_worst(alone[0], before[0]), "is another one when its example is alone in the batch")
                break
        return tuple(padded.values())

    def _collated(self, examples: list[Any]) -> Any:
        set_seeds(self.seed)
        before = _generators()
        try:
            batch = self.collate([copy.deepcopy(example) for example in examples])  # it may consume what it is given
        except Exception as error:
            raise _Unclear(f"it failed on {len(examples)} examples ({type(error).__name__}: {error})") from error
        after = _generators()
        self.draws |= not torch.equal(before[0], after[0]) or before[1:] != after[1:]
        return batch

    # ---------------------------------------------------------------- rows

    def _fields(self, groups: list[list[Any]]) -> list[_Field]:
        """Find what counts examples, in batches of different size."""
        counts = [len(group) for group in groups]
        return list(self._walk((), [self._collated(group) for group in groups], counts))

    def _walk(self, path: tuple[Any, ...], parts: list[Any], counts: list[int]) -> Iterator[_Field]:
        first = parts[0]
        if any(type(part) is not type(first) for part in parts):
            raise _Unclear(f"{_text(path)} is of another type from batch to batch")
        if isinstance(first, Mapping):
            if any(part.keys() != first.keys() for part in parts):
                raise _Unclear(f"{_text(path)} has other keys from batch to batch")
            for key in first:
                yield from self._walk((*path, key), [part[key] for part in parts], counts)
        elif isinstance(first, (list, tuple)):
            sizes = [len(part) for part in parts]
            if sizes == counts and (len(set(counts)) > 1 or isinstance(first, list)):
                yield _Field(path, None)
            elif len(set(sizes)) == 1:
                for i in range(sizes[0]):
                    yield from self._walk((*path, i), [part[i] for part in parts], counts)
            else:
                self._refuse(path, f"has {sizes} entries for {counts} examples")
        elif _tensor(first) is not None:
            shapes = [tuple(part.shape) for part in parts]
            axis = next((d for d in range(len(shapes[0])) if [s[d] for s in shapes if len(s) > d] == counts), None)
            if axis is not None:
                yield _Field(path, axis)
            elif len(set(shapes)) > 1:
                self._refuse(
                    path,
                    f"has no sample axis: its shapes are {shapes} for {counts} examples, which are packed, joined or "
                    "concatenated (as several graphs to one)",
                )
            elif len(set(counts)) > 1 and not all(_same(first, part) for part in parts):
                self._shared(path, first)
        elif isinstance(first, float) and any(part != first for part in parts):
            self._shared(path, first)
        elif attributes_of(first):
            yield from self._walk(path, [attributes_of(part) for part in parts], counts)
        elif not isinstance(first, (int, float, str, bytes, type(None))):
            raise _Unclear(f"{_text(path)} is a {type(first).__name__}")

    def _shared(self, path: tuple[Any, ...], value: Any) -> None:
        tensor = _tensor(value)
        if tensor is not None and not tensor.is_floating_point():
            return  # a count or a length
        self._refuse(path, "is one value for all examples that depends on which they are (a mean, a norm, a sum of weights)")

    def _rows(self, examples: list[Any], fields: Sequence[_Field]) -> Rows:
        batch, rows = self._collated(examples), [{} for _ in examples]  # type: Any, Rows
        for field in fields:
            value, axis = field_at(batch, field.path), field.axis
            whole = _tensor(value)
            for i, row in enumerate(rows):
                try:
                    row[field.path] = value[i] if axis is None or whole is None else whole.select(axis, i)
                except (IndexError, TypeError, RuntimeError, NotImplementedError) as error:
                    raise _Unclear(f"{_text(field.path)} cannot be cut into rows ({error})") from error
        return rows

    def _compare(self, before: Rows, after: Rows, padded: Padded, exchanged: int) -> None:
        """All rows but one have to be there again, in whatever order; or in their own."""
        left, gone = list(after), []
        for i, row in enumerate(before):
            same = next((found for found in left if _differing(row, found, padded) is None), None)
            if same is None:
                gone.append(i)
            else:
                left = [found for found in left if found is not same]
        if len(gone) > 1:
            other = next(i for i in gone if i != exchanged)  # in the exchanged one any field may differ
            self._refuse(_worst(before[other], after[other]), "changes when another example of the batch does")
        others = (i for i in range(len(before)) if i != exchanged)
        if self.in_order and any(_differing(before[i], after[i], padded) is not None for i in others):
            raise bad(
                "loader",
                f"collate_fn={self.name}",
                "it puts rows in another order than that of the examples (sorted by length, shuffled). With privacy_unit= rows are "
                "told to be of one unit by their places. Remedy: leave the order as it is.",
            )

    def _refuse(self, path: tuple[Any, ...], what: str) -> NoReturn:
        raise bad(
            "loader",
            f"collate_fn={self.name}",
            f"{_text(path)} {what}. Every row of a batch has to be made of one example alone, since rows "
            "are what is clipped: else one example moves the sum by more than the bound. Likely causes: MixUp or CutMix, "
            "standardising by the batch's mean, packing or concatenating, sampling negatives. Remedy: do it within each example, "
            "in the dataset or in the model. (check_collate=False takes the function as it is; nothing else will see such a "
            "fault.)",
        )


def _generators() -> tuple[Tensor, Any, Any]:
    numpy = sys.modules.get("numpy")
    return torch.get_rng_state(), random.getstate(), None if numpy is None else numpy.random.get_state()[2]


def _text(path: tuple[Any, ...]) -> str:
    return "batch" + "".join(f"[{key!r}]" for key in path)


def _length(example: Any) -> int:
    """How much there is of an example."""
    if isinstance(example, Mapping):
        return sum(_length(value) for value in example.values())
    if isinstance(example, (list, tuple)):
        return sum(_length(value) for value in example)
    tensor = _tensor(example)
    return len(example) if isinstance(example, (str, bytes)) else 1 if tensor is None else tensor.numel()


def _tensor(value: Any) -> Tensor | None:
    if isinstance(value, Tensor):
        return value.to_dense() if value.layout in (torch.sparse_coo, torch.sparse_csr) else value
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.ndarray) and value.dtype.kind in "biuf":
        return torch.as_tensor(value)
    return None


def _differing(one: Row, other: Row, padded: Padded) -> tuple[Any, ...] | None:
    """The first field in which two rows differ by more than padding; None if there is none."""
    found: list[PaddedField] = []
    for path, value in one.items():
        if not _alike(value, other[path], path, found):
            return path
    for field in found:
        known = padded.setdefault((field.path, field.axis), field)
        if known != field:
            padded[field.path, field.axis] = replace(known, value=None)
    return None


def _worst(one: Row, other: Row) -> tuple[Any, ...]:
    return _differing(one, other, {}) or ()


def _alike(one: Any, other: Any, path: tuple[Any, ...], found: list[PaddedField]) -> bool:
    a, b = _tensor(one), _tensor(other)
    if a is None or b is None:
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            return one.keys() == other.keys() and all(_alike(one[k], other[k], path, []) for k in one)
        if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
            return len(one) == len(other) and all(_alike(x, y, path, []) for x, y in zip(one, other, strict=True))
        if attributes_of(one) and type(one) is type(other):
            return _alike(attributes_of(one), attributes_of(other), path, found)
        if one is not None and type(one).__eq__ is object.__eq__:  # type: ignore[comparison-overlap]
            raise _Unclear(f"in {_text(path)} is a {type(one).__name__}")
        return bool(one == other)
    if a.dim() != b.dim() or a.dtype != b.dtype:
        return False
    if a.shape == b.shape:
        return _same(a, b)
    axes = [d for d in range(a.dim()) if a.shape[d] != b.shape[d]]
    for at_end in (True, False):
        if _same(_cut(a, b.shape, axes, at_end), _cut(b, a.shape, axes, at_end)):
            found += [PaddedField(path, axis, at_end, _filled(a, b, axis, at_end)) for axis in axes]
            return True
    return False


def _filled(a: Tensor, b: Tensor, axis: int, at_end: bool) -> float | None:
    """What the longer of two tensors has where the shorter has nothing, if it is one number."""
    if a.shape[axis] > b.shape[axis]:
        a, b = b, a
    extra = b.shape[axis] - a.shape[axis]
    values = b.narrow(axis, b.shape[axis] - extra if at_end else 0, extra).unique()
    return float(values[0]) if values.numel() == 1 else None


def _cut(tensor: Tensor, shape: Sequence[int], axes: list[int], at_end: bool) -> Tensor:
    for axis in axes:
        size = min(tensor.shape[axis], shape[axis])
        tensor = tensor.narrow(axis, 0 if at_end else tensor.shape[axis] - size, size)
    return tensor


def _same(one: Any, other: Any) -> bool:
    a, b = _tensor(one), _tensor(other)
    assert a is not None
    assert b is not None
    if a.shape != b.shape or not (a.is_floating_point() or a.is_complex()):
        return a.shape == b.shape and bool((a == b).all())
    return torch.allclose(
        a.double() if not a.is_complex() else a, b.double() if not b.is_complex() else b, _CLOSE, 1e-8, equal_nan=True
    )
