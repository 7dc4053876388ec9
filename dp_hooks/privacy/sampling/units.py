"""DatasetUnits: which examples of a dataset belong to which protected unit: a user, a patient, an author, a device."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..._no_randomness import generators_kept, undisturbed_generators
from ..._validate import bad, positive_int

_HOW = (
    "Pass the unit of each example (a list, an array or a tensor with one label for each), the name or the number of a field of "
    "the examples, or a function that returns the unit of an example."
)


class DatasetUnits:
    """The units of a dataset, and how many examples of each are in a batch.

    Attributes:
        name: what a unit is, if that is known: the name of a field.
        count: U, how many units there are.
        most: k, how many examples of a unit are in a batch at most; no more than the largest has.
        limit: the same as it was asked for, which says nothing of the data; None: all are.
        in_play: ``sum of min(k, its number of examples) over the units``: that many examples a batch of all units has.
    """

    def __init__(self, of_examples: Tensor, most: int | None, name: str = "") -> None:
        """Example i belongs to the unit ``of_examples[i]``, numbers from 0 on, each of some example; ``most`` None: all."""
        sizes = of_examples.bincount()
        self.name, self.limit = name, most
        self.count = len(sizes)
        self.most = int(sizes.max()) if most is None else min(most, int(sizes.max()))
        self.in_play = int(sizes.clamp(max=self.most).sum())
        self._examples = of_examples.argsort(stable=True)
        self._ends = [0, *sizes.cumsum(0).tolist()]

    def drawn_from(self, unit: int, generator: torch.Generator) -> list[int]:
        """At most k examples of a unit: any k of them are as likely as any others, whatever was drawn before."""
        own = self._examples[self._ends[unit] : self._ends[unit + 1]]
        if len(own) > self.most:
            with undisturbed_generators():  # the user's generator may be one of PyTorch's own
                order = torch.randperm(len(own), generator=generator, device=generator.device)
            own = own[order[: self.most].sort().values.cpu()]
        return own.tolist()


def read_units(privacy_unit: object, dataset: Any, most: object) -> DatasetUnits:
    """Find out which example of ``dataset`` belongs to which unit, as the arguments of a scope say.

    Raises:
        InvalidArgumentError: an argument cannot be used; an example has no unit, or there is another number of labels than of
            examples.
    """
    if privacy_unit is None:
        raise bad("max_examples_per_unit", most, "it is about units; pass privacy_unit= with it, or leave it out.")
    if most is not None:
        positive_int("max_examples_per_unit", most, "pass a whole number of 1 or more; None takes all examples of a unit.")
    assert most is None or isinstance(most, int)
    examples = len(dataset)
    if isinstance(privacy_unit, Tensor) and privacy_unit.dim() == 1 and not privacy_unit.is_floating_point():
        _check_length(privacy_unit, len(privacy_unit), examples)
        return DatasetUnits(privacy_unit.detach().cpu().unique(return_inverse=True)[1], most)
    labels, name = _labels(privacy_unit, dataset, examples)
    numbers: dict[Any, int] = {}
    of_examples = [numbers.setdefault(_key(label, i), len(numbers)) for i, label in enumerate(labels)]
    _check_length(privacy_unit, len(of_examples), examples)
    return DatasetUnits(torch.tensor(of_examples, dtype=torch.long, device="cpu"), most, name)


def _labels(privacy_unit: Any, dataset: Any, examples: int) -> tuple[Iterable[Any], str]:
    """One label for each example, and what they are called."""
    if isinstance(privacy_unit, (str, int)) and not isinstance(privacy_unit, bool):
        if privacy_unit in (getattr(dataset, "column_names", None) or ()):  # of a table: no example has to be read for it
            return dataset[privacy_unit], str(privacy_unit)
        name = privacy_unit if isinstance(privacy_unit, str) else f"field {privacy_unit}"
        return _read(dataset, examples, lambda example: _field(example, privacy_unit)), name
    if callable(privacy_unit):
        return _read(dataset, examples, privacy_unit), ""
    sized = hasattr(privacy_unit, "__len__") and hasattr(privacy_unit, "__iter__")
    if not sized or isinstance(privacy_unit, (bytes, Mapping, set, frozenset)) or len(getattr(privacy_unit, "shape", [0])) != 1:
        given = type(privacy_unit).__name__ if hasattr(privacy_unit, "__len__") else privacy_unit
        raise bad("privacy_unit", given, _HOW)
    return (privacy_unit.tolist() if hasattr(privacy_unit, "tolist") else privacy_unit), ""


def _read(dataset: Any, examples: int, unit_of: Any) -> list[Any]:
    found = []
    with generators_kept():  # examples may be augmented at random
        for i in range(examples):
            example = dataset[i]
            try:
                found.append(unit_of(example))
            except Exception as error:
                remedy = f"of example {i} it gives no unit ({type(error).__name__}: {error}). {_HOW}"
                raise bad("privacy_unit", unit_of if not hasattr(unit_of, "__name__") else unit_of.__name__, remedy) from error
    return found


def _field(example: Any, name: str | int) -> Any:
    if isinstance(name, str) and not isinstance(example, Mapping) and hasattr(example, name):
        return getattr(example, name)
    return example[name]


def _key(label: Any, i: int) -> Any:
    """What tells a unit from others."""
    if hasattr(label, "item") and math.prod(getattr(label, "shape", ())) == 1:  # a number in a tensor or an array
        label = label.item()
    try:
        hash(label)
        unlike = bool(label != label)  # NaN
    except (TypeError, ValueError, RuntimeError):
        unlike = True
    if label is None or unlike or isinstance(label, Tensor):
        remedy = f"that is the unit of example {i}, and tells no unit: every example needs one, a number, a string or the like."
        raise bad("privacy_unit", label, remedy)
    return label


def _check_length(privacy_unit: object, labels: int, examples: int) -> None:
    if labels != examples:
        remedy = f"it has {labels} labels, and the dataset {examples} examples. {_HOW}"
        raise bad("privacy_unit", type(privacy_unit).__name__, remedy)
