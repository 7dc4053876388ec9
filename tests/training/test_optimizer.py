"""The private optimizer is a torch optimizer to everyone who uses it, and the one underneath takes no step of its own."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import lr_scheduler

from dp_hooks.errors import ScopeError

from ..models import COPIES, assert_same, build, charges, each_mode, examples, expected_move, in_order, moved, values
from .helpers import POISSON, Run, backward, step, train

Make = Callable[[nn.Module], torch.optim.Optimizer]


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=0.1)


def with_momentum(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.5)


def test_it_is_a_torch_optimizer_with_the_groups_of_the_original() -> None:
    """``isinstance`` holds, and parameter groups, state and defaults are the wrapped optimizer's own objects."""
    groups = [lambda m: {"params": m[0].parameters(), "lr": 0.2}, lambda m: {"params": m[2].parameters()}]
    run = Run(optimizer=lambda m: torch.optim.Adam([group(m) for group in groups]))
    with run as (model, opt, loader):
        assert isinstance(opt, torch.optim.Optimizer)
        assert opt.param_groups is run.original.param_groups
        assert opt.defaults is run.original.defaults
        assert [group["lr"] for group in opt.param_groups] == [0.2, 1e-3]
        train(model, opt, loader)
        assert opt.state is run.original.state
        assert len(opt.state) == 4
        assert "Adam" in repr(opt)
        with pytest.raises(ScopeError, match="before entering"):
            opt.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})


@each_mode
@pytest.mark.parametrize("moment", ["before backward", "before step", "after step"])
def test_a_deep_copy_is_an_ordinary_optimizer(moment: str, mode: str) -> None:
    """A copy has class, groups and state of the original, steps freely, and leaves the private one working."""
    with Run(optimizer=with_momentum, grad_sample_mode=mode) as (model, opt, loader):
        class_step = torch.optim.SGD.step  # PyTorch itself wraps it when the first optimizer of a process is made
        x, y = next(iter(loader))
        copied = copy.deepcopy(opt) if moment == "before backward" else None
        backward(model, x, y)
        copied = copy.deepcopy(opt) if moment == "before step" else copied
        opt.step()
        copied = copy.deepcopy(opt) if moment == "after step" else copied
        assert type(copied) is torch.optim.SGD
        assert torch.optim.SGD.step is class_step
        copies = copied.param_groups[0]["params"]
        assert not any(vars(p) for p in copies)
        assert not {id(p) for p in copies} & {id(p) for p in model.parameters()}
        present = values(model)
        copied.zero_grad()
        for p in copies:
            p.grad = torch.ones_like(p)
        copied.step()
        assert_same(values(model), present)
        train(model, opt, loader)
    assert any((a != b).any() for a, b in zip(present, values(model), strict=True))


@each_mode
@pytest.mark.parametrize("way", ["pickle", "torch.save"])
def test_a_pickle_is_an_ordinary_optimizer_without_sample_gradients(way: str, mode: str) -> None:
    """A pickle made between backward and step holds the wrapped optimizer and no gradient of a sample."""
    with Run(grad_sample_mode=mode) as (model, opt, loader):
        backward(model, *next(iter(loader)))
        loaded = COPIES[way](opt)
    assert type(loaded) is torch.optim.SGD
    assert_same([p.detach() for p in loaded.param_groups[0]["params"]], values(model))
    assert not any(vars(p) for p in loaded.param_groups[0]["params"])


def test_a_state_dict_goes_round() -> None:
    """A state dict of the private optimizer is the original's, and loads into private and ordinary ones alike."""
    run = Run(optimizer=adam)
    with run as (model, opt, loader):
        train(model, opt, loader)
        saved = copy.deepcopy(opt.state_dict())
        torch.testing.assert_close(saved, run.original.state_dict())
        train(model, opt, loader)
        opt.load_state_dict(saved)
        torch.testing.assert_close(opt.state_dict(), saved)
    other = torch.optim.Adam(build("mlp").parameters())
    other.load_state_dict(saved)
    assert [s["step"] for s in other.state.values()] == [1, 1, 1, 1]
    assert other.param_groups[0]["lr"] == 0.1


HOOKED = {
    "step": lambda opt: opt.step(),
    "state_dict": lambda opt: opt.state_dict(),
    "load_state_dict": lambda opt: opt.load_state_dict(opt.state_dict()),
}


@pytest.mark.parametrize("when", ["pre", "post"])
@pytest.mark.parametrize("method", list(HOOKED))
def test_optimizer_hooks_registered_on_it_run(method: str, when: str) -> None:
    """Every hook kind of ``torch.optim.Optimizer`` can be registered on the private optimizer and runs once."""
    ran = []
    with Run() as (model, opt, loader):
        getattr(opt, f"register_{method}_{when}_hook")(lambda *_: ran.append(method))
        backward(model, *next(iter(loader)))
        HOOKED[method](opt)
    assert ran == [method]


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "lambda": lambda opt: lr_scheduler.LambdaLR(opt, lambda step: 0.5**step),
    "one cycle": lambda opt: lr_scheduler.OneCycleLR(opt, max_lr=1.0, total_steps=6),
    "plateau": lambda opt: lr_scheduler.ReduceLROnPlateau(opt, factor=0.5, patience=0),
}


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("kind", list(SCHEDULERS))
def test_learning_rate_schedulers_work(kind: str, inside: bool, recwarn: pytest.WarningsRecorder) -> None:
    """Schedulers made on the original before, or on the private optimizer inside, set the rates of an ordinary run."""
    run, make = Run(optimizer=with_momentum, loader=in_order(6, 2)), SCHEDULERS[kind]
    plain = with_momentum(build("mlp"))
    reference = make(plain)
    scheduler = None if inside else make(run.original)
    with run as (model, opt, loader):
        scheduler = scheduler or make(opt)
        for x, y in loader:
            before, rate = values(model), opt.param_groups[0]["lr"]
            step(model, opt, x, y)
            plain.step()
            for s in (scheduler, reference):
                s.step(1.0) if kind == "plateau" else s.step()
            found, wanted = opt.param_groups[0], plain.param_groups[0]
            assert (found["lr"], found["momentum"]) == (wanted["lr"], wanted["momentum"])
            momentum = [run.original.state[p]["momentum_buffer"] for p in model.parameters()]
            assert_same(moved(before, model), [rate * m for m in momentum])
    assert run.original.param_groups[0]["lr"] == plain.param_groups[0]["lr"] != 1.0
    assert not [w for w in recwarn if "lr_scheduler.step()" in str(w.message)]


OPTIMIZERS: dict[str, Make] = {
    "foreach Adam": lambda m: torch.optim.Adam(m.parameters(), lr=0.1, foreach=True),
    "fused Adam": lambda m: torch.optim.Adam(m.parameters(), lr=0.1, fused=True),
    "fused SGD": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, fused=True),
    "AdamW": lambda m: torch.optim.AdamW(m.parameters(), lr=0.1, amsgrad=True),
    "RMSprop": lambda m: torch.optim.RMSprop(m.parameters(), lr=0.1),
}


@each_mode
@pytest.mark.parametrize("kind", list(OPTIMIZERS))
def test_optimizers_of_all_kinds_get_the_clipped_mean(kind: str, mode: str) -> None:
    """Three private steps equal three steps of the plain optimizer with hand-clipped gradients."""
    twin = build("mlp")
    plain = OPTIMIZERS[kind](twin)
    run = Run(optimizer=OPTIMIZERS[kind], grad_sample_mode=mode).trained(passes=3)
    for _ in range(3):
        for p, g in zip(twin.parameters(), expected_move(twin), strict=True):
            p.grad = g
        plain.step()
    assert_same(values(run.model), values(twin), 1e-7)


@each_mode
def test_a_closure_is_evaluated_once(mode: str) -> None:
    """``opt.step(closure)`` runs the closure once, with gradients on, and returns its loss."""
    run, losses = Run(grad_sample_mode=mode), []
    with run as (model, opt, loader):
        x, y = next(iter(loader))

        def closure() -> Tensor:
            opt.zero_grad()
            losses.append(F.cross_entropy(model(x), y))
            losses[-1].backward()
            return losses[-1]

        with torch.no_grad():
            returned = opt.step(closure)
    assert len(losses) == 1
    assert returned is losses[0]
    run.assert_moved()


def test_the_two_steps_of_sharpness_aware_minimisation_are_refused() -> None:
    """Two evaluations for one batch, with a step after each, are refused at the second."""
    run = Run(**POISSON)
    with run as (model, opt, loader):
        x, y = next(iter(loader))
        step(model, opt, x, y)
        after_one = values(model)
        backward(model, x, y)
        with pytest.raises(ScopeError, match="second"):
            opt.step()
    assert_same(values(model), after_one)
    assert charges(run.scope) == 1


@each_mode
@pytest.mark.parametrize("after_backward", [True, False])
def test_stepping_the_original_optimizer_inside_is_an_error(after_backward: bool, mode: str) -> None:
    """The original optimizer refuses to step inside the scope, and steps again after it."""
    run = Run(grad_sample_mode=mode)
    with run as (model, opt, loader):
        x, y = next(iter(loader))
        if after_backward:
            backward(model, x, y)
        with pytest.raises(ScopeError, match="original optimizer"):
            run.original.step()
        assert_same(values(model), run.start)
        train(model, opt, loader)
        with pytest.raises(ScopeError, match="original optimizer"):
            run.original.step()
    run.assert_moved()
    run.original.step()


def test_stepping_after_the_end_is_an_error() -> None:
    """After the scope, the private optimizer refuses to step; ``zero_grad`` is harmless."""
    with Run() as (model, opt, loader):
        train(model, opt, loader)
    after = values(model)
    backward(model, *examples())
    with pytest.raises(ScopeError, match="after the end"):
        opt.step()
    opt.zero_grad()
    assert_same(values(model), after)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("rate", [0.25, 0.75])
def test_the_mean_is_over_the_expected_number_of_examples_which_need_not_be_whole(rate):
    """With ``sample_rate`` given the clipped sum is divided by ``q N`` (1.5 or 4.5 of six examples), never by a rounded number."""
    run = Run(poisson_sampling=True, accountant="rdp", sample_rate=rate)
    with run as (model, opt, loader):
        x, y = next(batch for _ in range(50) for batch in loader if len(batch[1]))
        opt.zero_grad()
        backward(model, x, y)
        opt.step()
    run.assert_moved(run.rows(x, y), divided_by=6 * rate)
