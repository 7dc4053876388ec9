"""Loops of all kinds can be audited, and what cannot be is refused with a remedy."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from dp_hooks import audit, dp_step
from dp_hooks.errors import InvalidArgumentError, UnsupportedModelError

from .runs import audited, loop, made, measured, step

SETTINGS: dict[str, Any] = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, "accountant": "pld"}


def one_batch_at_a_time(model: nn.Module, opt: Any, loader: Any) -> None:
    """Takes one batch, and is called again for the next."""
    x, y = next(iter(loader))
    opt.zero_grad()
    F.cross_entropy(model(x), y).backward()
    opt.step()


def forever(model: nn.Module, opt: Any, loader: Any) -> None:
    """Trains until somebody stops it."""
    while True:
        loop()(model, opt, loader)


def with_a_closure(model: nn.Module, opt: Any, loader: Any) -> None:
    """Steps with a closure."""
    for x, y in loader:
        opt.zero_grad()

        def closure(x: Any = x, y: Any = y) -> Any:
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss

        opt.step(closure)


@pytest.mark.parametrize("train", [one_batch_at_a_time, forever, with_a_closure])
def test_loops_are_run_until_all_is_measured(train: Any) -> None:
    """However many batches they take at a time."""
    found = measured(train)
    assert found.holds
    assert found.tried == 8


@dp_step
def in_low_precision(model: nn.Module, batch: list[Tensor]) -> Tensor:
    """Runs the model in bfloat16."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(batch[0])
    return F.cross_entropy(out.float(), batch[1], reduction="none")


def mean_in_low_precision(model: nn.Module, opt: Any, loader: Any) -> None:
    """The same in a plain loop, whose gradients are divided by the number of rows before they are rounded."""
    for x, y in loader:
        opt.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = model(x)
        F.cross_entropy(out.float(), y).backward()
        opt.step()


def test_a_missing_example_does_not_round_the_others_anew() -> None:
    """Of 400 that are alike: a decorated step in bfloat16 adds losses up; the mean of a plain loop moves them all a bit."""
    examples = torch.randn(1, 16) + 0.001 * torch.randn(800, 16)
    loader = DataLoader(TensorDataset(examples, torch.zeros(800, dtype=torch.long)), batch_size=400)
    model = nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    settings = {**SETTINGS, "max_grad_norm": 0.05, "batches": 2, "examples": 8, "seed": 0}
    found = audit.sensitivity(in_low_precision, model, optimizer, loader, **settings)
    assert found.value < 1.001
    found = audit.sensitivity(mean_in_low_precision, model, optimizer, loader, **settings)
    assert found.value > 1.1
    assert not found.holds


class Augmented(Dataset[Any]):
    """Examples that are other ones each time they are asked for."""

    def __init__(self, tensors: Any) -> None:
        self.tensors = tensors

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, index: int) -> Any:
        x, y = (part[index] for part in self.tensors)
        return x.roll(int(torch.randint(6, ()))), y


def test_dropout_and_augmentation_are_held_still() -> None:
    """Random numbers would make two runs of one batch differ: they are taken out, or are the same."""
    model, optimizer, loader = made(60, 12)
    model.norm = nn.Sequential(model.norm, nn.Dropout(0.5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    augmented = DataLoader(Augmented(loader.dataset.tensors), batch_size=12)
    found = audit.sensitivity(loop(), model, optimizer, augmented, examples=8, **SETTINGS)
    assert found.holds
    assert found.coupling < 1e-5


def test_a_loop_that_changes_from_step_to_step_is_told() -> None:
    """What is different in the same batch later is not taken for what an example does."""
    steps: list[None] = []

    def train(model: nn.Module, opt: Any, loader: Any) -> None:
        for x, y in loader:
            opt.zero_grad()
            steps.append(None)
            F.cross_entropy(model(x) * len(steps), y).backward()
            opt.step()

    assert "the same batch gave another sum later" in measured(train).findings[0]


def test_what_the_self_check_refuses_is_measured() -> None:
    """What would end a scope at its first step is a number here; modules that a scope does not begin with are refused as ever."""

    def train(model: nn.Module, opt: Any, loader: Any) -> None:
        for x, y in loader:
            opt.zero_grad()
            out = model(x)
            F.cross_entropy(out - out.mean(0), y).backward()
            opt.step()

    found = measured(train)
    assert found.coupling > 0.3
    model = nn.BatchNorm1d(6)
    with pytest.raises(UnsupportedModelError, match="BatchNorm"):
        audit.sensitivity(loop(), model, torch.optim.SGD(model.parameters(), lr=0.1), made(60, 12)[2], **SETTINGS)


def no_steps(model: nn.Module, opt: Any, loader: Any) -> None:
    """Does nothing with batches."""
    for _ in loader:
        opt.skip_batch()


@pytest.mark.parametrize(
    ("which", "train", "options", "message"),
    [
        (audit.sensitivity, 3, {}, "train=3"),
        (audit.sensitivity, nn.Linear, {}, "train="),
        (audit.sensitivity, no_steps, {}, "it took no step"),
        (audit.sensitivity, loop(), {"batches": 0}, "batches=0"),
        (audit.sensitivity, loop(), {"examples": 1.5}, "examples="),
        (audit.sensitivity, loop(), {"seed": "x"}, "seed="),
        (audit.sensitivity, loop(), {"max_grad_norm": -1.0}, "max_grad_norm="),
        (audit.one_run, "train", {}, "train="),
        (audit.one_run, no_steps, {}, "it took no step"),
        (audit.one_run, loop(), {"canaries": 31}, "canaries=31.*here 30"),
        (audit.one_run, loop(), {"canaries": 1}, "canaries=1"),
        (audit.one_run, loop(), {"canaries": True}, "canaries="),
        (audit.one_run, loop(), {"confidence": 1.0}, "confidence="),
        (audit.one_run, loop(), {"reach": 0}, "reach="),
        (audit.one_run, loop(), {"delta": 2}, "delta="),
        (audit.one_run, loop(), {"seed": 1.0}, "seed="),
        (audit.one_run, loop(), {"noise_multiplier": -1.0}, "noise_multiplier="),
    ],
)
def test_what_cannot_be_audited_is_refused(which: Any, train: Any, options: dict[str, Any], message: str) -> None:
    """The error names the argument and its value."""
    with pytest.raises(InvalidArgumentError, match=message):
        which(train, *made(60, 12), **{**SETTINGS, **options})


def test_a_decorated_step_is_run_for_the_epochs_that_are_planned() -> None:
    """Two epochs of a budget are all its steps; without a budget it is one pass."""
    budget = {"noise_multiplier": None, "target_epsilon": 8.0, "target_delta": 1e-5, "epochs": 2}
    assert audited(step, **budget).releases == 8
    assert audited(step).releases == 4


def test_seeds_repeat_an_audit() -> None:
    """With seeds for noise and batches too, the numbers are the same; other coins give others."""
    full = {"sample_rate": 1.0, "noise_multiplier": 0.8, "train": loop(passes=2)}
    one, same, other = (audited(seed=seed, **full) for seed in (1, 1, 2))
    assert one == same
    assert one.epsilon_lower != other.epsilon_lower
    assert measured().value == measured().value


def test_the_audit_draws(tmp_path: Any) -> None:
    """A picture of scores and bounds, where matplotlib is installed."""
    pytest.importorskip("matplotlib")
    audited(loop()).plot(tmp_path / "audit.svg")
    assert "stated" in (tmp_path / "audit.svg").read_text() or (tmp_path / "audit.svg").stat().st_size > 10_000
    audited(loop(), noise_multiplier=0.0).plot(tmp_path / "infinite.svg")
