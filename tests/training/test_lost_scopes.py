"""Scopes that are lost, left for a while, met by other optimizers and hooks, or taken into another process."""

import copy
import gc
import importlib.util
import os
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

import dp_hooks
from dp_hooks import PrivacyEngineHookBased, dp_step
from dp_hooks.errors import InvalidArgumentError, ScopeError, UnsupportedModelError

from ..models import COPIES, assert_same, build, charges, drawn, each_mode, examples, has_hooks, in_order, moved, scope_over, values
from .helpers import NOISY, POISSON, Run, backward, sgd, step, train

# ---------------------------------------------------------------- lost scopes


def engine_over(model: nn.Module, mode: str) -> tuple[Any, Any, Any]:
    """Make ``model`` private with an engine; return engine, optimizer and loader."""
    engine = PrivacyEngineHookBased(accountant="rdp")
    options = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, "grad_sample_mode": mode}
    _, opt, *_, loader = engine.make_private(module=model, optimizer=sgd(model), data_loader=in_order(), **options)
    return engine, opt, loader


@each_mode
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("kind", ["engine", "scope"])
def test_a_model_whose_scope_is_lost_is_freed(kind: str, steps: int, mode: str) -> None:
    """When nothing refers to model, optimizer, loader and engine any more, the garbage collector frees them all."""

    def lost() -> list[weakref.ref[Any]]:
        model = build("mlp")
        if kind == "engine":
            keeper, opt, loader = engine_over(model, mode)
        else:
            keeper = scope_over(model, grad_sample_mode=mode, **POISSON)
            opt, loader = keeper.__enter__()
        for _ in range(steps):
            train(model, opt, loader)
        return [weakref.ref(thing) for thing in (model, opt, loader, keeper)]

    found = lost()
    gc.collect()
    assert [ref() is None for ref in found] == [True] * 4


@each_mode
@pytest.mark.parametrize("kept", ["optimizer", "loader"])
def test_whoever_can_train_keeps_the_scope_open(kept: str, mode: str) -> None:
    """The optimizer or the loader alone keeps hooks on the model; without it the model is an ordinary one again."""
    model = build("mlp")
    engine, opt, loader = engine_over(model, mode)
    things = {"optimizer": opt, "loader": loader}
    del engine, opt, loader
    keeper = things[kept]
    things.clear()
    gc.collect()
    assert has_hooks(model)
    if kept == "optimizer":
        before = values(model)
        backward(model, *examples())
        with pytest.warns(UserWarning, match="did not come from the private loader"):
            keeper.step()
        assert any(d.any() for d in moved(before, model))
    del keeper
    gc.collect()
    assert not has_hooks(model)


@each_mode
def test_a_model_of_a_lost_engine_can_be_made_private_again(mode: str) -> None:
    """A notebook cell that is run twice: the first engine is collected when the second claims the model."""
    model = build("mlp")
    engine, opt, loader = engine_over(model, mode)
    train(model, opt, loader)
    del engine, opt, loader
    engine, opt, loader = engine_over(model, mode)
    before = values(model)
    assert train(model, opt, loader) == 1
    assert any(d.any() for d in moved(before, model))
    engine.cleanup()
    assert not has_hooks(model)


def test_release_ends_the_scope_of_whoever_holds_it() -> None:
    """``dp_hooks.release(model)`` leaves an ordinary model; optimizer and loader of the scope refuse to go on."""
    run = Run(**POISSON)
    model, opt, loader = run.__enter__()
    with pytest.raises(ScopeError, match=r"dp_hooks\.release\(model\)"):
        scope_over(model).__enter__()
    assert dp_hooks.release(model[0]) is True
    assert not has_hooks(model)
    assert not run.scope.is_open
    assert dp_hooks.release(model) is False
    with pytest.raises(ScopeError, match="after the end"):
        opt.step()
    with pytest.raises(ScopeError):
        next(iter(loader))
    with scope_over(model):
        pass
    with pytest.raises(InvalidArgumentError):
        dp_hooks.release("model")  # type: ignore[arg-type]


# ---------------------------------------------------------------- public steps in between


@each_mode
def test_public_steps_in_a_pause_are_ordinary_and_private_ones_go_on(mode: str) -> None:
    """In ``scope.paused()`` any optimizer takes ordinary steps; afterwards a private step is right, and charged once."""
    run = Run(**POISSON, grad_sample_mode=mode)
    twin = copy.deepcopy(run.model)
    with run as (model, opt, loader):
        with run.scope.paused():
            for each, public in ((model, sgd(model)), (twin, sgd(twin))):
                step(each, public, *examples(4))
            assert_same(values(model), values(twin))
            with pytest.raises(ScopeError, match="while the scope is paused"):
                opt.step()
        assert charges(run.scope) == 0
        assert all(p.grad is None for p in model.parameters())
        run.first, run.start = twin, values(twin)
        assert train(model, opt, loader) == 1
    assert charges(run.scope) == 1
    run.assert_moved()


@pytest.mark.parametrize("leftover", ["after backward", "of a physical part"])
def test_gradients_that_wait_for_their_step_forbid_a_pause(leftover: str) -> None:
    """With gradients of private samples captured, or summed up, a pause is refused; ``zero_grad`` drops what was captured."""
    run = Run(**POISSON, max_physical_batch_size=3)
    with run as (model, opt, loader):
        backward(model, *next(iter(loader)))
        if leftover == "of a physical part":
            opt.step()
        with pytest.raises(ScopeError, match="gradients of private samples are waiting"), run.scope.paused():
            pass
        run.assert_untouched()
        if leftover == "after backward":
            opt.zero_grad()
            with run.scope.paused():
                pass


def test_a_pause_outside_of_the_scope_is_refused() -> None:
    """Before entering and after the end there is nothing to pause; an error in the block ends the pause."""
    run = Run(**POISSON)
    with pytest.raises(ScopeError, match="outside of the scope"), run.scope.paused():
        pass
    with run as (model, opt, loader):
        with pytest.raises(KeyError), run.scope.paused():
            raise KeyError
        train(model, opt, loader)
    run.assert_moved()
    with pytest.raises(ScopeError, match="outside of the scope"), run.scope.paused():
        pass


@each_mode
@pytest.mark.parametrize("which", ["all", "one"])
def test_another_optimizer_over_the_same_parameters_is_refused(which: str, mode: str) -> None:
    """In the scope only the private optimizer may move its parameters; one over other parameters is left alone."""
    run, other = Run(**POISSON, grad_sample_mode=mode), nn.Linear(2, 2).double()
    with run as (model, _, _):
        second = torch.optim.Adam(model.parameters() if which == "all" else [*other.parameters(), model[0].bias])
        for p in other.parameters():
            p.grad = torch.ones_like(p)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        with pytest.raises(ScopeError, match=r"another optimizer \(Adam\).*scope\.paused\(\)"):
            second.step()
        assert_same(values(model), run.start)
        before = values(other)
        sgd(other).step()
        assert_same(moved(before, other), [torch.ones_like(p) for p in other.parameters()])


def test_a_trainable_parameter_that_the_optimizer_does_not_hold_is_refused() -> None:
    """It would get no gradient in the scope: it is named on entering, with the remedy."""
    model = build("mlp")
    with pytest.raises(InvalidArgumentError, match=r"0\.weight, 0\.bias can be trained, but the optimizer does not hold"):
        scope_over(model, optimizer=sgd(model[2]))
    model[0].requires_grad_(False)
    with scope_over(model, optimizer=sgd(model[2])):
        pass


# ---------------------------------------------------------------- hooks of the user


HOOKS: dict[str, Callable[[Tensor], Any]] = {
    "register_hook": lambda p: p.register_hook(lambda grad: grad * 0),
    "register_post_accumulate_grad_hook": lambda p: p.register_post_accumulate_grad_hook(lambda p: None),  # type: ignore[attr-defined]
}


@each_mode
@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_on_gradients_of_parameters_are_refused_by_name(kind: str, mode: str) -> None:
    """They would see gradients without noise, or none; after removal the scope opens."""
    model = build("mlp")
    handle = HOOKS[kind](model[2].weight)
    with pytest.raises(UnsupportedModelError, match=r"2\.weight.*a hook on its gradient") as refused:
        scope_over(model, grad_sample_mode=mode).__enter__()
    assert "0.weight" not in str(refused.value)
    handle.remove()
    with scope_over(model, grad_sample_mode=mode):
        pass


def doubled(_: nn.Module, args: Any, out: Tensor) -> Tensor:
    return out * 2


class KeepsHandle(nn.Module):
    """Keeps the handle of a hook that it put on its own layer, as ``enable_input_require_grads`` does."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.handle = self.layer.register_forward_hook(doubled)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


@pytest.mark.parametrize("mode", ["ghost", "hooks"])
@pytest.mark.parametrize("way", COPIES)
def test_a_model_that_keeps_the_handle_of_a_hook_is_copied(way: str, mode: str) -> None:
    """Copies of a model in a scope have the user's hook, whose handle removes it, and nothing of the scope's."""
    run, (x, y) = Run(KeepsHandle().double(), grad_sample_mode=mode), examples()
    with run as (model, opt, loader):
        backward(model, *next(iter(loader)))
        other = COPIES[way](model)
        opt.step()
    run.assert_moved(run.rows(x, y))
    assert list(vars(other)) == list(vars(run.first))
    assert torch.equal(other(x), run.first(x))
    assert not any(key in vars(m) for m in other.modules() for key in ("__getstate__", "__deepcopy__"))
    assert [p.grad for p in other.parameters()] == [None, None]
    if way == "deepcopy":
        other.handle.remove()
        assert torch.equal(2 * other(x), run.first(x))


# ---------------------------------------------------------------- scaled losses


@pytest.mark.parametrize("divided", [1, 4])
@each_mode
def test_a_loss_scaled_by_a_grad_scaler_is_refused(divided: int, mode: str) -> None:
    """Clipping would meet gradients that are too large by the scale; the model does not move."""
    run, scaler = Run(**POISSON, grad_sample_mode=mode), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    with run as (model, _, loader):
        x, y = next(iter(loader))
        with pytest.raises(ScopeError, match="scaled by a GradScaler"):
            scaler.scale(F.cross_entropy(model(x), y) / divided).backward()
        run.assert_untouched()


def a_lost_scaler() -> None:
    """A scaler that has scaled something, and that only the garbage collector can free."""
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    scaler.itself = scaler


def a_scaler_switched_off() -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", enabled=False)


@each_mode
@pytest.mark.parametrize("beside", [lambda: None, a_lost_scaler, a_scaler_switched_off], ids=["none", "lost", "switched off"])
def test_a_loss_times_a_constant_is_fine_without_a_scaler(mode: str, beside: Callable[[], Any]) -> None:
    """A weight on the loss is part of the loss, also while there is a scaler that can scale nothing."""
    run = Run(**POISSON, grad_sample_mode=mode)

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return 0.1 * F.cross_entropy(model(x), y)

    gc.disable()  # else it may come by before the step
    try:
        kept = beside()
        run.trained(by=lambda model, opt, x, y: (loss(model, x, y).backward(), opt.step()))
    finally:
        gc.enable()
    assert kept is None or not kept.is_enabled()
    run.assert_moved(run.rows(loss=loss))


# ---------------------------------------------------------------- processes


def in_child(work: Callable[[], Any]) -> tuple[Any, Any]:
    """Return what ``work()`` gives in a forked process and here; an error of the child's comes as its text."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            answer = work()
        except BaseException as error:  # noqa: BLE001
            answer = f"{type(error).__name__}: {error}"
        os.write(writer, pickle.dumps(answer))
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        there = pickle.loads(pipe.read())
    os.waitpid(child, 0)
    return there, work()


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")


@needs_fork
@pytest.mark.filterwarnings("ignore:This process")
@pytest.mark.parametrize("secure", [False, True])
def test_a_forked_process_draws_other_noise_and_other_batches(secure: bool) -> None:
    """Inside a scope that was forked, neither noise nor batches of the two processes are the same."""
    model, torch_state = build("mlp"), torch.get_rng_state()
    loader = DataLoader(range(400), batch_size=200)  # type: ignore[arg-type]
    options: dict[str, Any] = {"poisson_sampling": True, "noise_multiplier": 1.0, "accountant": "rdp", "secure_mode": secure}
    scope = scope_over(model, loader=loader, **options)
    with scope as (opt, private):
        next(iter(private))
        opt.step_empty()

        def work() -> Any:
            before = values(model)
            drawn_examples = next(iter(private)).tolist()
            opt.step_empty()
            return drawn_examples, [d.tolist() for d in moved(before, model)]

        there, here = in_child(work)
    assert not isinstance(there, str), there
    assert there[0] != here[0]
    assert all(a != b for a, b in zip(there[1], here[1], strict=True))
    torch.set_rng_state(torch_state)


@needs_fork
@pytest.mark.filterwarnings("ignore:This process")
def test_a_generator_of_the_user_is_refused_in_a_forked_process() -> None:
    """It would draw the same noise in both, so that the difference of their releases has none."""
    run = Run(**NOISY, noise_generator=drawn(5))
    with run as (_, opt, loader):
        next(iter(loader))

        def work() -> Any:
            opt.step_empty()
            return "stepped"

        there, here = in_child(work)
    assert there.startswith("ScopeError: noise_generator= was given before this process was forked")
    assert here == "stepped"


# ---------------------------------------------------------------- accelerate


def test_the_private_loader_says_that_it_is_prepared() -> None:
    """``accelerator.prepare`` leaves alone what has this attribute; it would build another loader from its parts."""
    with Run(**POISSON) as (_, _, loader):
        assert loader._is_accelerate_prepared is True


@pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="accelerate is not installed")
def test_accelerate_prepares_model_optimizer_and_loader() -> None:
    """A loop over what ``prepare`` returns is charged as one over the private loader."""
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    run = Run(**POISSON)
    with run as parts:
        model, opt, loader = accelerator.prepare(*parts)
        for x, y in loader:
            opt.zero_grad()
            accelerator.backward(F.cross_entropy(model(x), y))
            opt.step()
    assert run.scope.accountant.history == [(0.0, 1.0, 1)]
    assert run.scope.report().foreign_steps == 0
    run.assert_moved()


# ---------------------------------------------------------------- checks that the user's code can notice


def test_checking_tells_runs_of_the_self_check_from_training() -> None:
    """``dp_hooks.checking()`` is False in the one run whose gradients are released, and True in all runs beside it."""
    seen: list[bool] = []

    @dp_step
    def function(model: nn.Module, batch: Any) -> Tensor:
        seen.append(dp_hooks.checking())
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    assert not dp_hooks.checking()
    with Run(**POISSON) as (model, _, loader):
        for batch in (*loader,):
            function(model, batch)
        first, seen[:] = list(seen), []
        for batch in (*loader,):
            function(model, batch)
    assert first.count(False) == 1
    assert first.count(True) >= 2
    assert seen == [False]
    assert not dp_hooks.checking()
