"""``@dp_step`` on batches of any nesting: the step is that of single samples, or a refusal says what is in the way."""

import dataclasses
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import BatchEncoding

from dp_hooks import dp_step
from dp_hooks.errors import SelfCheckError

from ..models import assert_same, charges, each_mode, examples, values
from .helpers import NOISY, POISSON, Run

Pair = namedtuple("Pair", ["x", "y"])


class Named(NamedTuple):
    x: Tensor
    y: Tensor
    split: str = "train"


class Custom:
    """What loaders of many projects yield: tensors as attributes, and ``to``."""

    def __init__(self, x: Any, y: Any, **more: Any) -> None:
        self.x, self.y = x, y
        vars(self).update(more)

    def to(self, device: str) -> "Custom":
        return Custom(self.x.to(device), self.y.to(device))


class Slots:
    __slots__ = ("x", "y")

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y


@dataclasses.dataclass(frozen=True)
class Frozen:
    x: Tensor
    y: Tensor
    mask: None = None


@dataclasses.dataclass
class Slotted:
    __slots__ = ("x", "y")
    x: Tensor
    y: Tensor


def words(y: Tensor) -> list[str]:
    return [f"class {int(label)}" for label in y]


def labels(texts: Any) -> Tensor:
    return torch.tensor([int(text.split()[1]) for text in texts])


Unpack = Callable[[Any], tuple[Any, Any]]
# From inputs and labels to a batch, and back.
CASES: dict[str, tuple[Callable[[Tensor, Tensor], Any], Unpack]] = {
    "batch encoding": (lambda x, y: BatchEncoding({"x": x, "y": y}), lambda b: (b["x"], b["y"])),
    "None": (lambda x, y: {"x": x, "mask": None, "y": y}, lambda b: (b["x"], b["y"])),
    "a string": (lambda x, y: {"x": x, "split": "train", "y": y}, lambda b: (b["x"], b["y"])),
    "strings": (lambda x, y: {"x": x, "y": words(y)}, lambda b: (b["x"], labels(b["y"]))),
    "tuple of strings": (lambda x, y: (x, tuple(words(y))), lambda b: (b[0], labels(b[1]))),
    "numbers": (lambda x, y: [x, y.tolist()], lambda b: (b[0], torch.tensor(b[1]))),
    "list of rows": (lambda x, y: {"x": list(x), "y": y}, lambda b: (torch.stack(b["x"]), b["y"])),
    "list of dicts": (
        lambda x, y: [{"x": a, "y": [c]} for a, c in zip(x, y, strict=True)],
        lambda b: (torch.stack([row["x"] for row in b]), torch.stack([row["y"][0] for row in b])),
    ),
    "numpy": (lambda x, y: (x.numpy(), y.numpy()), lambda b: tuple(map(torch.from_numpy, b))),
    "numpy labels": (lambda x, y: {"x": x, "y": y.numpy()}, lambda b: (b["x"], torch.from_numpy(b["y"]))),
    "object": (lambda x, y: Custom(x, y), lambda b: (b.to("cpu").x, b.y)),
    "object with a dataset": (lambda x, y: Custom(x, y, data=TensorDataset(x, y)), lambda b: (b.x, b.y)),
    "object with lists": (lambda x, y: Custom(x, words(y)), lambda b: (b.x, labels(b.y))),
    "object in a tuple": (lambda x, y: (x, Custom(y, None)), lambda b: (b[0], b[1].x)),
    "objects in a list": (
        lambda x, y: [Custom(a, c) for a, c in zip(x, y, strict=True)],
        lambda b: (torch.stack([row.x for row in b]), torch.stack([row.y for row in b])),
    ),
    "namespace": (lambda x, y: SimpleNamespace(x=x, y=y), lambda b: (b.x, b.y)),
    "frozen dataclass": (Frozen, lambda b: (b.x, b.y)),
    "dataclass with slots": (Slotted, lambda b: (b.x, b.y)),
    "typed named tuple": (Named, lambda b: (b.x, b.y)),
    "ordered": (lambda x, y: OrderedDict(x=x, y=y), lambda b: (b["x"], b["y"])),
    "deep": (
        lambda x, y: {"a": [{"b": (x, None)}, "s"], "c": Pair({"y": words(y)}, [1.0])},
        lambda b: (b["a"][0]["b"][0], labels(b["c"].x["y"])),
    ),
}


def run_of(pack: Callable[..., Any], unpack: Unpack, **options: Any) -> tuple[Run, Any]:
    """Return a run over batches that ``pack`` makes, and a private train function for them."""

    @dp_step
    def step(model: nn.Module, batch: Any) -> Tensor:
        x, y = unpack(batch)
        assert len(x) == len(y)
        return F.cross_entropy(model(x), y, reduction="none")

    def collate(rows: list[tuple[Tensor, Tensor]]) -> Any:
        return pack(*map(torch.stack, zip(*rows, strict=True)))

    return Run(loader=DataLoader(TensorDataset(*examples()), 6, collate_fn=collate), **options), step


@each_mode
@pytest.mark.parametrize("kind", list(CASES))
def test_the_step_is_that_of_single_samples(kind: str, mode: str) -> None:
    """Parameters move by the hand-clipped gradients of single samples, and the self-check saw the loss as well."""
    run, step = run_of(*CASES[kind], grad_sample_mode=mode)
    with run as (model, _, loader):
        for batch in loader:
            step(model, batch)
    run.assert_moved()
    assert run.scope.report().loss_verified


@pytest.mark.parametrize("kind", list(CASES))
def test_a_loss_that_couples_samples_is_found_in_every_structure(kind: str) -> None:
    """The check takes the batch apart: a loss times the mean of all losses is refused, and nothing moves."""
    pack, unpack = CASES[kind]
    run, _ = run_of(pack, unpack)

    @dp_step
    def step(model: nn.Module, batch: Any) -> Tensor:
        x, y = unpack(batch)
        losses = F.cross_entropy(model(x), y, reduction="none")
        return losses * losses.mean()

    with run as (model, _, loader), pytest.raises(SelfCheckError, match="the train function"):
        step(model, next(iter(loader)))
    assert_same(values(run.model), run.start)


@pytest.mark.parametrize("kind", [kind for kind in CASES if kind != "object with a dataset"])
def test_an_empty_batch_of_every_structure_is_a_step_of_noise(kind: str) -> None:
    """Where no example was drawn, noise alone is released and charged."""
    run, step = run_of(*CASES[kind], **NOISY, sample_rate=1e-9)
    with run as (model, _, loader):
        assert float(step(model, next(iter(loader))).sum()) == 0
    run.assert_moved_by_noise()


def test_an_object_that_is_not_looked_into_is_named() -> None:
    """Attributes that cannot be seen are not taken apart: the refusal names the class, and nothing moves or is charged."""
    run, step = run_of(Slots, lambda b: (b.x, b.y), **POISSON)
    with run as (model, _, loader), pytest.raises(SelfCheckError, match="In the batch is a Slots, in which no examples were found"):
        step(model, next(iter(loader)))
    assert_same(values(run.model), run.start)
    assert charges(run.scope) == 0


def test_a_batch_that_the_function_consumes_is_whole_in_the_check() -> None:
    """What a function writes into its batch, an object's attribute or an array, does not reach the runs of the check."""

    def consumed(batch: Any) -> tuple[Tensor, Tensor]:
        x, y = batch.x.clone(), torch.from_numpy(batch.y.copy())
        batch.x.mul_(3)
        batch.y[:] = 0
        return x, y

    run, step = run_of(lambda x, y: Custom(x, y.numpy()), consumed)
    with run as (model, _, loader):
        step(model, next(iter(loader)))
    run.assert_moved()
    assert run.scope.report().loss_verified
