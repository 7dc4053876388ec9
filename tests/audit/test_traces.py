"""An audit leaves nothing behind: no step, no charge, no drawn number."""

import copy
import random
import warnings
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import StepLR

from dp_hooks import Ledger, audit, private_training
from dp_hooks.privacy.accounting.opacus import make_accountant

from ..models import drawn
from ..snapshot import Snapshot
from .runs import loop, made, step

SETTINGS: dict[str, Any] = {"noise_multiplier": 1.0, "max_grad_norm": 1.0}


def schedule(model: nn.Module, opt: Any, loader: Any) -> None:
    """Trains with a schedule of its own, sets attributes, and draws from all generators."""
    schedule = StepLR(opt, 1, 0.5)
    for x, y in loader:
        opt.zero_grad()
        model.seen = random.random() + numpy.random.rand() + float(torch.rand(()))
        nn.functional.cross_entropy(model(x), y).backward()
        opt.step()
        schedule.step()
        opt.param_groups[0]["weight_decay"] = 0.5


def after_a_step() -> Any:
    """A run that has begun: there is momentum, and gradients are in their places."""
    model, optimizer, loader = made(60, 12)
    x, y = loader.dataset.tensors
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    return model, optimizer, loader


@pytest.mark.parametrize("train", [schedule, step, loop(passes=2)], ids=["schedule", "step", "loop"])
@pytest.mark.parametrize("which", [audit.sensitivity, audit.one_run])
def test_everything_is_as_it_was(which: Any, train: Any) -> None:
    """Parameters, gradients, momentum, groups, attributes and generators: the same objects with the same values."""
    model, optimizer, loader = after_a_step()
    before = Snapshot(model, optimizer)
    values = [(p, p.detach().clone(), p.grad, p.grad.clone()) for p in model.parameters()]
    state = copy.deepcopy(optimizer.state_dict())
    held = {id(t): t for entry in optimizer.state.values() for t in entry.values()}
    attributes, groups = dict(vars(optimizer)), [dict(group) for group in optimizer.param_groups]
    noise = drawn(7)
    generators = [torch.get_rng_state(), loader.generator.get_state(), noise.get_state(), random.getstate()]
    arrays = numpy.random.get_state()[1].copy()
    which(train, model, optimizer, loader, noise_generator=noise, **SETTINGS)
    assert before.differences() == []
    for p, value, grad, numbers in values:
        assert torch.equal(p, value)
        assert p.grad is grad
        assert torch.equal(grad, numbers)
    assert {id(t) for entry in optimizer.state.values() for t in entry.values()} == held.keys()
    assert str(optimizer.state_dict()) == str(state)
    assert vars(optimizer) == attributes
    assert optimizer.param_groups == groups
    assert all(map(torch.equal, generators[:3], [torch.get_rng_state(), loader.generator.get_state(), noise.get_state()]))
    assert random.getstate() == generators[3]
    assert (numpy.random.get_state()[1] == arrays).all()
    assert not hasattr(model, "seen")


@pytest.mark.parametrize("which", [audit.sensitivity, audit.one_run])
def test_the_run_after_it_is_the_run_without_it(which: Any) -> None:
    """With seeded noise and batches, a training after an audit ends in the same weights, to the bit."""
    ends = []
    for audits in (False, True):
        model, optimizer, loader = after_a_step()
        noise = drawn(7)
        if audits:
            which(loop(), model, optimizer, loader, noise_generator=noise, **SETTINGS)
        with private_training(model, optimizer, loader, noise_generator=noise, **SETTINGS) as (opt, private_loader):
            loop()(model, opt, private_loader)
        ends.append([p.detach().clone() for p in model.parameters()])
    assert all(map(torch.equal, *ends))


@pytest.mark.parametrize("which", [audit.sensitivity, audit.one_run])
def test_nothing_is_charged(which: Any, tmp_path: Path) -> None:
    """Neither an accountant of the user's nor a ledger learns of it."""
    accountant, path = make_accountant("rdp"), tmp_path / "spent.jsonl"
    which(loop(), *after_a_step(), accountant=accountant, ledger=Ledger(path), **SETTINGS)
    assert accountant.history == []
    assert not path.exists()


@pytest.mark.parametrize("which", [audit.sensitivity, audit.one_run])
def test_an_error_in_the_loop_leaves_nothing_either(which: Any) -> None:
    """It comes through as it is, and everything is put back."""
    model, optimizer, loader = after_a_step()
    before, values = Snapshot(model, optimizer), [p.detach().clone() for p in model.parameters()]

    def train(model: nn.Module, opt: Any, loader: Any) -> None:
        for count, (x, y) in enumerate(loader):
            opt.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            opt.step()
            if count == 1:
                raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        which(train, model, optimizer, loader, **SETTINGS)
    assert before.differences() == []
    assert all(map(torch.equal, values, model.parameters()))


def test_nothing_of_a_sum_is_released_while_sensitivity_is_measured() -> None:
    """What the loop sees of a step is zeros: its gradients, and parameters that do not move."""
    model, optimizer, loader = after_a_step()
    start, seen = [p.detach().clone() for p in model.parameters()], []

    def train(model: nn.Module, opt: Any, loader: Any) -> None:
        for x, y in loader:
            opt.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            opt.step()
            seen.append(all(not bool(p.grad.any()) for p in model.parameters()))
            assert all(map(torch.equal, start, model.parameters()))

    audit.sensitivity(train, model, optimizer, loader, **SETTINGS)
    assert len(seen) > 20
    assert all(seen)


@pytest.mark.parametrize("which", [audit.sensitivity, audit.one_run])
def test_no_warnings_come_of_it(which: Any) -> None:
    """A loop that is right runs in silence."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        which(loop(), *made(60, 12), accountant="pld", **SETTINGS)


def test_it_says_that_it_is_not_private() -> None:
    """In words, and in what is for logs."""
    for which in (audit.sensitivity, audit.one_run):
        found = which(loop(), *made(60, 12), accountant="pld", **SETTINGS)
        assert "not to be published" in str(found)
        assert "not to be published" in found.as_dict()["remark"]
        assert not [value for value in found.as_dict().values() if isinstance(value, tuple) and len(value) > 10]  # no scores
