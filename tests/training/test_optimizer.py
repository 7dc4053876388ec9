"""The private optimizer: a torch optimizer to everyone who uses it, and never a step that was not clipped and charged."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, TensorDataset

from dp_hooks import HookController, PrivateTraining, private_training
from dp_hooks.errors import InvalidArgumentError, ScopeError, UnsupportedModelError
from dp_hooks.privacy.clipping import FlatClipping

from .models import (
    BOUND,
    BUILDERS,
    assert_same,
    build,
    charges,
    clipped_sum,
    each_mode,
    examples,
    expected_move,
    in_order,
    moved,
    norm_of,
    sample_gradients,
    scope_over,
    values,
)


def backward(model: nn.Module, x: Tensor, y: Tensor) -> None:
    """Back-propagate the ordinary loss."""
    F.cross_entropy(model(x), y).backward()


def train(model: nn.Module, opt: torch.optim.Optimizer, loader: DataLoader[Any]) -> None:
    """Run one ordinary pass."""
    for x, y in loader:
        opt.zero_grad()
        backward(model, x, y)
        opt.step()


def poisson(model: nn.Module, **options: Any) -> PrivateTraining:
    """Return a scope with Poisson sampling at rate 1: every batch holds all six examples, every step is one charge."""
    return scope_over(model, poisson_sampling=True, accountant="rdp", **options)


# ---------------------------------------------------------------- the clipped sum


@each_mode
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("clipping", ["flat", "per_layer"])
@pytest.mark.parametrize("name", list(BUILDERS))
def test_a_step_moves_by_the_sum_of_clipped_gradients(name: str, clipping: str, reduction: str, mode: str) -> None:
    """Without noise, a step of size 1 is the sum of hand-clipped per-sample gradients, divided by 6 for "mean"."""
    model, start = build(name), values(build(name))
    rows = sample_gradients(build(name), *examples())
    bound = BOUND if clipping == "flat" else [0.05 * (k + 1) for k in range(len(start))]
    norms = [float(norm_of(row)) for row in rows]
    assert max(norms) > BOUND / 2
    options = {"clipping": clipping, "max_grad_norm": bound, "loss_reduction": reduction, "grad_sample_mode": mode}
    with scope_over(model, **options) as (opt, loader):
        for x, y in loader:
            F.cross_entropy(model(x), y, reduction=reduction).backward()
            opt.step()
    denominator = 6 if reduction == "mean" else 1
    assert_same(moved(start, model), [g / denominator for g in clipped_sum(rows, bound)])


@each_mode
@pytest.mark.parametrize("clipping", ["flat", "per_layer"])
@pytest.mark.parametrize("name", list(BUILDERS))
def test_one_sample_moves_the_model_by_exactly_the_sensitivity(name: str, clipping: str, mode: str) -> None:
    """A sample with a very large gradient contributes the declared sensitivity: neither more nor, as for half of it, less."""
    model, start = build(name), values(build(name))
    bound = BOUND if clipping == "flat" else [0.05 * (k + 1) for k in range(len(start))]
    options = {"clipping": clipping, "max_grad_norm": bound, "grad_sample_mode": mode, "loader": in_order(1)}
    with scope_over(model, **options) as (opt, loader):
        for x, y in loader:
            (1e6 * F.cross_entropy(model(x), y)).backward()
            opt.step()
    contribution = float(norm_of(moved(start, model)))
    # A bias that softmax or a projection cancels has no gradient: what is missing from the sensitivity per layer is its bound.
    rows = sample_gradients(build(name), *examples(1), lambda m, a, b: 1e6 * F.cross_entropy(m(a), b))
    reached = float(norm_of(clipped_sum(rows, bound)))
    assert contribution <= opt.sensitivity * (1 + 1e-9)
    assert contribution == pytest.approx(reached, rel=1e-9)
    assert clipping == "per_layer" or contribution == pytest.approx(BOUND, rel=1e-9)


@each_mode
def test_a_gradient_below_the_bound_is_left_alone(mode: str) -> None:
    """Samples whose norm is below C enter the sum as they are."""
    model, start = build("mlp"), values(build("mlp"))
    with scope_over(model, max_grad_norm=1e3, grad_sample_mode=mode) as (opt, loader):
        train(model, opt, loader)
    rows = sample_gradients(build("mlp"), *examples())
    assert_same(moved(start, model), [torch.stack(column).mean(0) for column in zip(*rows, strict=True)])


@each_mode
@pytest.mark.parametrize("scale", [1.0, 1e6])
def test_replacing_one_example_moves_the_sum_by_at_most_the_bound(scale: float, mode: str) -> None:
    """Clipped sums with and without one example differ by at most C in norm, for every example."""

    def clipped(x: Tensor, y: Tensor) -> list[Tensor]:
        model, start = build("tied"), values(build("tied"))
        with scope_over(model, loss_reduction="sum", grad_sample_mode=mode) as (opt, loader):
            next(iter(loader))
            (scale * F.cross_entropy(model(x), y, reduction="sum")).backward()
            opt.step()
        return moved(start, model)

    x, y = examples()
    whole = clipped(x, y)
    for i in range(len(x)):
        keep = torch.arange(len(x)) != i
        rest = clipped(x[keep], y[keep])
        change = float(norm_of([a - b for a, b in zip(whole, rest, strict=True)]))
        assert change <= BOUND * (1 + 1e-9)
        assert change > BOUND / 2


@each_mode
def test_physical_parts_add_up_to_the_logical_batch(mode: str) -> None:
    """Parts of 1, 2, 4 or 6 examples give the same step as one batch of 6, in one release."""
    for size in (1, 2, 4, 6):
        model, start = build("mlp"), values(build("mlp"))
        scope = scope_over(model, max_physical_batch_size=size, grad_sample_mode=mode)
        with scope as (opt, loader):
            train(model, opt, loader)
        assert scope.steps == 1
        assert_same(moved(start, model), expected_move(build("mlp")))


def test_only_parameters_of_the_optimizer_count_and_move() -> None:
    """With an optimizer over the last layer, the norm is that layer's alone and nothing else moves."""
    model, start = build("mlp"), values(build("mlp"))
    with scope_over(model, optimizer=torch.optim.SGD(model[2].parameters(), lr=1.0)) as (opt, loader):
        train(model, opt, loader)
        assert all(p.grad is None for p in model[0].parameters())
    rows = [row[2:] for row in sample_gradients(build("mlp"), *examples())]
    zeros = [torch.zeros_like(p) for p in start[:2]]
    assert_same(moved(start, model), zeros + [g / 6 for g in clipped_sum(rows, BOUND)])


# ---------------------------------------------------------------- P9: nothing without noise in p.grad


@each_mode
@pytest.mark.parametrize("name", list(BUILDERS))
def test_p_grad_is_none_until_the_step(name: str, mode: str) -> None:
    """After ``backward`` no parameter has a gradient; after ``step`` each has the released one."""
    model = build(name)
    with scope_over(model, grad_sample_mode=mode, noise_multiplier=1.0) as (opt, loader):
        for x, y in loader:
            assert all(p.grad is None for p in model.parameters())
            loss = F.cross_entropy(model(x), y)
            assert all(p.grad is None for p in model.parameters())
            loss.backward()
            assert all(p.grad is None for p in model.parameters())
            assert float(nn.utils.clip_grad_norm_(model.parameters(), 1.0)) == 0
            before = values(model)
            opt.step()
            assert_same(moved(before, model), [p.grad for p in model.parameters()])


# ---------------------------------------------------------------- L7: a torch optimizer


def test_it_is_a_torch_optimizer_with_the_groups_of_the_original() -> None:
    """``isinstance`` holds, and parameter groups, state and defaults are the wrapped optimizer's own objects."""
    model = build("mlp")
    original = torch.optim.Adam([{"params": model[0].parameters(), "lr": 0.2}, {"params": model[2].parameters()}])
    with scope_over(model, optimizer=original) as (opt, loader):
        assert isinstance(opt, torch.optim.Optimizer)
        assert opt.param_groups is original.param_groups
        assert opt.defaults is original.defaults
        assert [group["lr"] for group in opt.param_groups] == [0.2, 1e-3]
        train(model, opt, loader)
        assert opt.state is original.state
        assert len(opt.state) == 4
        assert "Adam" in repr(opt)
        with pytest.raises(ScopeError, match="before entering"):
            opt.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})


@each_mode
@pytest.mark.parametrize("moment", ["before backward", "before step", "after step"])
def test_a_deep_copy_is_an_ordinary_optimizer(moment: str, mode: str) -> None:
    """A copy has class, groups and state of the original, steps freely, and leaves the private one working."""
    model = build("mlp")
    original = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.5)
    class_step = torch.optim.SGD.step
    with scope_over(model, optimizer=original, grad_sample_mode=mode) as (opt, loader):
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
    model = build("mlp")
    with scope_over(model, grad_sample_mode=mode) as (opt, loader):
        backward(model, *next(iter(loader)))
        if way == "pickle":
            loaded = pickle.loads(pickle.dumps(opt))
        else:
            buffer = io.BytesIO()
            torch.save(opt, buffer)
            buffer.seek(0)
            loaded = torch.load(buffer, weights_only=False)
    assert type(loaded) is torch.optim.SGD
    assert_same([p.detach() for p in loaded.param_groups[0]["params"]], values(model))
    assert not any(vars(p) for p in loaded.param_groups[0]["params"])


def test_a_state_dict_goes_round() -> None:
    """A state dict of the private optimizer is the original's, and loads into private and ordinary ones alike."""
    model = build("mlp")
    original = torch.optim.Adam(model.parameters(), lr=0.1)
    with scope_over(model, optimizer=original) as (opt, loader):
        train(model, opt, loader)
        saved = copy.deepcopy(opt.state_dict())
        torch.testing.assert_close(saved, original.state_dict())
        train(model, opt, loader)
        opt.load_state_dict(saved)
        torch.testing.assert_close(opt.state_dict(), saved)
    other = torch.optim.Adam(build("mlp").parameters())
    other.load_state_dict(saved)
    assert [s["step"] for s in other.state.values()] == [1, 1, 1, 1]
    assert other.param_groups[0]["lr"] == 0.1


HOOKS = {
    "register_step_pre_hook": lambda opt: opt.step(),
    "register_step_post_hook": lambda opt: opt.step(),
    "register_state_dict_pre_hook": lambda opt: opt.state_dict(),
    "register_state_dict_post_hook": lambda opt: opt.state_dict(),
    "register_load_state_dict_pre_hook": lambda opt: opt.load_state_dict(opt.state_dict()),
    "register_load_state_dict_post_hook": lambda opt: opt.load_state_dict(opt.state_dict()),
}


@pytest.mark.parametrize("method", list(HOOKS))
def test_optimizer_hooks_registered_on_it_run(method: str) -> None:
    """Every hook kind of ``torch.optim.Optimizer`` can be registered on the private optimizer and runs once."""
    model, ran = build("mlp"), []
    with scope_over(model) as (opt, loader):
        getattr(opt, method)(lambda *_: ran.append(method))
        backward(model, *next(iter(loader)))
        HOOKS[method](opt)
    assert ran == [method]


def lambda_lr(opt: torch.optim.Optimizer) -> Any:
    """Halve the rate at every step."""
    return lr_scheduler.LambdaLR(opt, lambda step: 0.5**step)


def one_cycle(opt: torch.optim.Optimizer) -> Any:
    """Cycle rate and momentum."""
    return lr_scheduler.OneCycleLR(opt, max_lr=1.0, total_steps=6)


def plateau(opt: torch.optim.Optimizer) -> Any:
    """Halve the rate as soon as the metric does not get better."""
    return lr_scheduler.ReduceLROnPlateau(opt, factor=0.5, patience=0)


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("make", [lambda_lr, one_cycle, plateau])
def test_learning_rate_schedulers_work(
    make: Callable[[torch.optim.Optimizer], Any], inside: bool, recwarn: pytest.WarningsRecorder
) -> None:
    """Schedulers made on the original before, or on the private optimizer inside, set the rates of an ordinary run."""
    model = build("mlp")
    original = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)
    plain = torch.optim.SGD(build("mlp").parameters(), lr=1.0, momentum=0.9)
    reference = make(plain)
    scheduler = None if inside else make(original)
    with scope_over(model, optimizer=original, loader=in_order(6, 2)) as (opt, loader):
        scheduler = scheduler or make(opt)
        for x, y in loader:
            opt.zero_grad()
            backward(model, x, y)
            before, rate = values(model), opt.param_groups[0]["lr"]
            opt.step()
            plain.step()
            for s in (scheduler, reference):
                s.step(1.0) if make is plateau else s.step()
            found, wanted = opt.param_groups[0], plain.param_groups[0]
            assert (found["lr"], found["momentum"]) == (wanted["lr"], wanted["momentum"])
            momentum = [original.state[p]["momentum_buffer"] for p in model.parameters()]
            assert_same(moved(before, model), [rate * m for m in momentum])
    assert original.param_groups[0]["lr"] == plain.param_groups[0]["lr"] != 1.0
    assert not [w for w in recwarn if "lr_scheduler.step()" in str(w.message)]


# ---------------------------------------------------------------- L10: kinds of optimizers and closures

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "foreach Adam": lambda p: torch.optim.Adam(p, lr=0.1, foreach=True),
    "fused Adam": lambda p: torch.optim.Adam(p, lr=0.1, fused=True),
    "fused SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.1),
}


@each_mode
@pytest.mark.parametrize("kind", list(OPTIMIZERS))
def test_optimizers_of_all_kinds_get_the_clipped_mean(kind: str, mode: str) -> None:
    """Three private steps equal three steps of the plain optimizer with hand-clipped gradients."""
    model, twin = build("mlp"), build("mlp")
    plain = OPTIMIZERS[kind](twin.parameters())
    with scope_over(model, optimizer=OPTIMIZERS[kind](model.parameters()), grad_sample_mode=mode) as (opt, loader):
        for _ in range(3):
            train(model, opt, loader)
            total = clipped_sum(sample_gradients(twin, *examples()), BOUND)
            for p, g in zip(twin.parameters(), total, strict=True):
                p.grad = g / 6
            plain.step()
    assert_same(values(model), values(twin), 1e-7)


@each_mode
def test_a_closure_is_evaluated_once(mode: str) -> None:
    """``opt.step(closure)`` runs the closure once, with gradients on, and returns its loss."""
    model, start = build("mlp"), values(build("mlp"))
    losses = []
    with scope_over(model, grad_sample_mode=mode) as (opt, loader):
        for x, y in loader:

            def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
                opt.zero_grad()
                loss = F.cross_entropy(model(x), y)
                loss.backward()
                losses.append(loss)
                return loss

            with torch.no_grad():
                returned = opt.step(closure)
    assert len(losses) == 1
    assert returned is losses[0]
    assert_same(moved(start, model), expected_move(build("mlp")))


def test_optimizers_that_evaluate_several_times_are_refused() -> None:
    """LBFGS is refused before anything is attached."""
    model = build("mlp")
    with pytest.raises(InvalidArgumentError, match="LBFGS"):
        scope_over(model, optimizer=torch.optim.LBFGS(model.parameters()))


def test_the_two_steps_of_sharpness_aware_minimisation_are_refused() -> None:
    """Two evaluations for one batch, with a step after each, are refused at the second."""
    model = build("mlp")
    scope = poisson(model)
    with scope as (opt, loader):
        x, y = next(iter(loader))
        backward(model, x, y)
        opt.step()
        after_one = values(model)
        backward(model, x, y)
        with pytest.raises(ScopeError, match="second"):
            opt.step()
    assert_same(values(model), after_one)
    assert charges(scope) == 1


# ---------------------------------------------------------------- L8, L9: what is no step


@each_mode
@pytest.mark.parametrize("after_backward", [True, False])
def test_stepping_the_original_optimizer_inside_is_an_error(after_backward: bool, mode: str) -> None:
    """The original optimizer refuses to step inside the scope, and steps again after it."""
    model = build("mlp")
    original, start = torch.optim.SGD(model.parameters(), lr=1.0), values(build("mlp"))
    with scope_over(model, optimizer=original, grad_sample_mode=mode) as (opt, loader):
        x, y = next(iter(loader))
        if after_backward:
            backward(model, x, y)
        with pytest.raises(ScopeError, match="original optimizer"):
            original.step()
        assert_same(values(model), start)
        train(model, opt, loader)
        with pytest.raises(ScopeError, match="original optimizer"):
            original.step()
    assert_same(moved(start, model), expected_move(build("mlp")))
    original.step()


def test_stepping_after_the_end_is_an_error() -> None:
    """After the scope, the private optimizer refuses to step; ``zero_grad`` is harmless."""
    model = build("mlp")
    with scope_over(model) as (opt, loader):
        train(model, opt, loader)
    after = values(model)
    backward(model, *examples())
    with pytest.raises(ScopeError, match="after the end"):
        opt.step()
    opt.zero_grad()
    assert_same(values(model), after)
    assert all(p.grad is None for p in model.parameters())


@each_mode
@pytest.mark.parametrize("clear", ["opt", "original"])
def test_zero_grad_discards_a_batch_that_is_not_stepped(clear: str, mode: str) -> None:
    """After ``zero_grad`` the next step contains nothing of an earlier backward pass."""
    model = build("mlp")
    original, start = torch.optim.SGD(model.parameters(), lr=1.0), values(build("mlp"))
    with scope_over(model, optimizer=original, grad_sample_mode=mode) as (opt, loader):
        backward(model, *next(iter(loader)))
        for x, y in loader:
            opt.zero_grad()
            (3 * F.cross_entropy(model(-x), y)).backward()
            opt.zero_grad() if clear == "opt" else opt.zero_grad(set_to_none=False)
            backward(model, x, y)
            opt.step()
    assert_same(moved(start, model), expected_move(build("mlp")))


@each_mode
def test_a_batch_left_with_continue_is_neither_released_nor_charged(mode: str) -> None:
    """``continue`` after backward drops that batch: the next step is its own, and there is one charge."""
    model, start = build("mlp"), values(build("mlp"))
    scope = poisson(model, grad_sample_mode=mode)
    with scope as (opt, loader):
        for attempt in range(2):
            for x, y in loader:
                opt.zero_grad()
                backward(model, x, y)
                if attempt == 0:
                    continue
                opt.step()
    assert charges(scope) == 1
    assert_same(moved(start, model), expected_move(build("mlp")))


@each_mode
def test_stale_gradients_of_an_earlier_batch_are_never_released(mode: str) -> None:
    """A step for a batch without a backward pass of its own does not release what an earlier batch left."""
    model, start = build("mlp"), values(build("mlp"))
    scope = poisson(model, grad_sample_mode=mode)
    with scope as (opt, loader):
        backward(model, *next(iter(loader)))
        next(iter(loader))
        with pytest.raises(ScopeError, match="earlier batch"):
            opt.step()
    assert charges(scope) == 0
    assert_same(values(model), start)


@each_mode
def test_a_part_never_counts_twice_in_its_logical_batch(mode: str) -> None:
    """What a second backward pass on a part that was stepped already left is refused at the step of the next part."""
    model, start = build("mlp"), values(build("mlp"))
    with scope_over(model, max_physical_batch_size=3, loss_reduction="sum", grad_sample_mode=mode) as (opt, loader):
        parts = iter(loader)
        x, y = next(parts)
        (1e6 * F.cross_entropy(model(x), y, reduction="sum")).backward()
        opt.step()
        (1e6 * F.cross_entropy(model(x), y, reduction="sum")).backward()
        next(parts)
        with pytest.raises(ScopeError, match="earlier batch"):
            opt.step()
    assert_same(values(model), start)


@each_mode
def test_parts_of_different_logical_batches_never_add_up(mode: str) -> None:
    """Two interleaved passes, by which an example could count twice in one release, are refused."""
    model, start = build("mlp"), values(build("mlp"))
    options = {"max_physical_batch_size": 2, "loss_reduction": "sum", "grad_sample_mode": mode}
    with poisson(model, **options) as (_, loader):
        one, two = iter(loader), iter(loader)
        next(one)
        next(two)
        with pytest.raises(ScopeError, match="interleaved"):
            next(one)
    assert_same(values(model), start)


# ---------------------------------------------------------------- P5, P8: empty batches and other loops


@each_mode
@pytest.mark.parametrize("physical", [None, 2])
@pytest.mark.parametrize("runs_model", [True, False])
def test_an_empty_logical_batch_gets_noise_and_a_charge(runs_model: bool, physical: int | None, mode: str) -> None:
    """A step for a batch that Poisson sampling left empty moves the parameters by noise alone, and is charged."""
    model, start = build("mlp"), values(build("mlp"))
    generator = torch.Generator().manual_seed(5)
    loader = in_order(6)
    scope = poisson(
        model,
        loader=loader,
        sample_rate=1e-9,
        noise_multiplier=2.0,
        loss_reduction="sum",
        noise_generator=generator,
        max_physical_batch_size=physical,
        grad_sample_mode=mode,
    )
    with scope as (opt, private):
        x, y = next(iter(private))
        assert (tuple(x.shape), tuple(y.shape)) == ((0, 4), (0,))
        if runs_model:
            F.cross_entropy(model(x), y, reduction="sum").backward()
        opt.step()
    assert charges(scope) == 1
    replay = torch.Generator().manual_seed(5)
    noise = [torch.empty_like(p).normal_(0.0, 2.0 * BOUND, generator=replay) for p in start]
    assert_same(moved(start, model), noise)


@each_mode
def test_clearing_gradients_through_the_model_works(mode: str) -> None:
    """A loop that calls ``model.zero_grad()`` after every step, as trainers do, takes the same steps."""
    model, twin = build("mlp"), build("mlp")
    with scope_over(model, grad_sample_mode=mode) as (opt, loader):
        for _ in range(3):
            for x, y in loader:
                backward(model, x, y)
                opt.step()
                model.zero_grad()
    with scope_over(twin, grad_sample_mode=mode) as (opt, loader):
        for _ in range(3):
            train(twin, opt, loader)
    assert_same(values(model), values(twin))


# ---------------------------------------------------------------- what is refused, before anything is released


def leaves_untouched(model: nn.Module, scope: PrivateTraining, start: list[Tensor]) -> None:
    """Assert that nothing was released, charged or left in ``p.grad``."""
    assert_same(values(model), start)
    assert charges(scope) == 0
    assert all(p.grad is None for p in model.parameters())


@each_mode
def test_a_step_without_backward_is_refused(mode: str) -> None:
    """A step for a batch that has examples but no gradients is an error, and charges nothing."""
    model = build("mlp")
    scope, start = poisson(model, grad_sample_mode=mode), values(model)
    with scope as (opt, loader):
        for x, _ in loader:
            model(x)
            with pytest.raises(ScopeError, match="no gradients"):
                opt.step()
        leaves_untouched(model, scope, start)


@each_mode
def test_accumulating_over_two_logical_batches_is_refused(mode: str) -> None:
    """Backward passes over two batches of the loader without a step in between are an error, and charge nothing."""
    model = build("mlp")
    scope, start = poisson(model, grad_sample_mode=mode), values(model)
    with scope as (opt, loader):
        backward(model, *next(iter(loader)))
        with pytest.raises(ScopeError, match="cannot be accumulated over batches"):
            backward(model, *next(iter(loader)))
        leaves_untouched(model, scope, start)
        opt.zero_grad()
        train(model, opt, loader)
    assert_same(moved(start, model), expected_move(build("mlp")))


@each_mode
@pytest.mark.parametrize("physical", [None, 3])
def test_more_samples_than_the_loader_handed_out_are_refused(physical: int | None, mode: str) -> None:
    """Augmented copies along the sample axis, by which an example would be clipped several times, are an error."""
    model = build("mlp")
    scope, start = poisson(model, max_physical_batch_size=physical, grad_sample_mode=mode), values(model)
    with scope as (opt, loader):
        x, y = next(iter(loader))
        backward(model, torch.cat([x, -x]), torch.cat([y, y]))
        with pytest.raises(ScopeError, match="one row per example"):
            opt.step()
        leaves_untouched(model, scope, start)


@each_mode
def test_different_numbers_of_samples_in_one_step_are_refused(mode: str) -> None:
    """Two backward passes over different numbers of rows before one step are an error."""
    model = build("mlp")
    scope, start = poisson(model, grad_sample_mode=mode), values(model)
    with scope as (_, loader):
        x, y = next(iter(loader))
        backward(model, x, y)
        with pytest.raises(ScopeError, match="different numbers of samples"):
            backward(model, x[:4], y[:4])
        leaves_untouched(model, scope, start)


@each_mode
def test_a_training_forward_without_backward_changes_nothing(mode: str) -> None:
    """Forward passes in training mode that are never back-propagated leave the step as it is (G13)."""
    model, start = build("mlp"), values(build("mlp"))
    with scope_over(model, grad_sample_mode=mode) as (opt, loader):
        kept = [model(examples(9)[0])]
        for x, y in loader:
            opt.zero_grad()
            kept.append(model(x))
            loss = F.cross_entropy(model(x), y)
            kept.append(model(x[:2]))
            loss.backward()
            kept.append(model(x))
            opt.step()
    assert len(kept) == 4
    assert_same(moved(start, model), expected_move(build("mlp")))


@each_mode
@pytest.mark.parametrize("frozen", ["layer", "bias"])
def test_unfreezing_inside_the_scope_is_refused_by_name(frozen: str, mode: str) -> None:
    """A parameter that becomes trainable after entering is refused at the step, which names it (G14)."""
    model = build("mlp")
    late, name = ([model[0].bias], "bias") if frozen == "bias" else (list(model[0].parameters()), "weight")
    for p in late:
        p.requires_grad_(False)
    scope, start = poisson(model, grad_sample_mode=mode), values(model)
    with scope as (opt, loader):
        x, y = next(iter(loader))
        for p in late:
            p.requires_grad_(True)
        backward(model, x, y)
        with pytest.raises(UnsupportedModelError, match=rf"^0\.{name}.*: became trainable"):
            opt.step()
        assert_same(values(model), start)
        assert charges(scope) == 0


@each_mode
def test_a_raw_gradient_of_a_parameter_unfrozen_for_a_while_is_never_applied(mode: str) -> None:
    """A parameter frozen on entry, trainable during one backward pass and frozen again does not move."""
    model = build("mlp")
    model[0].bias.requires_grad_(False)
    start = model[0].bias.detach().clone()
    with scope_over(model, grad_sample_mode=mode) as (opt, loader):
        x, y = next(iter(loader))
        model[0].bias.requires_grad_(True)
        backward(model, x, y)
        model[0].bias.requires_grad_(False)
        opt.step()
    assert torch.equal(model[0].bias.detach(), start)
    assert model[0].bias.grad is None


@each_mode
def test_freezing_inside_the_scope_is_right(mode: str) -> None:
    """A layer frozen inside does not move, and does not count in the norm any more."""
    model, start = build("mlp"), values(build("mlp"))
    with scope_over(model, grad_sample_mode=mode) as (opt, loader):
        model[0].requires_grad_(False)
        train(model, opt, loader)
    rows = [row[2:] for row in sample_gradients(build("mlp"), *examples())]
    zeros = [torch.zeros_like(p) for p in start[:2]]
    assert_same(moved(start, model), zeros + [g / 6 for g in clipped_sum(rows, BOUND)])


@each_mode
@pytest.mark.parametrize("passes", ["retain_graph", "two losses", "two forwards"])
@pytest.mark.parametrize("name", ["mlp", "tied", "owner"])
def test_two_backward_passes_are_one_contribution(name: str, passes: str, mode: str) -> None:
    """Gradients of two backward passes over the same samples add up per sample before they are clipped (G21)."""
    model, start = build(name), values(build(name))
    with scope_over(model, grad_sample_mode=mode) as (opt, loader):
        for x, y in loader:
            loss = 50 * F.cross_entropy(model(x), y)
            if passes == "retain_graph":
                loss.backward(retain_graph=True)
                loss.backward()
            elif passes == "two losses":
                out = model(x)
                (50 * F.cross_entropy(out, y)).backward(retain_graph=True)
                (50 * F.cross_entropy(out, y)).backward()
            else:
                loss.backward()
                (50 * F.cross_entropy(model(x), y)).backward()
            opt.step()
    assert norm_of(moved(start, model)) <= BOUND
    assert_same(moved(start, model), expected_move(build(name), factor=100.0))


@each_mode
def test_input_gradients_contribute_nothing(mode: str) -> None:
    """``torch.autograd.grad`` with respect to the inputs, as in adversarial training, adds nothing to the step (G22)."""
    model = build("mlp")
    x, y = examples()
    plain_x = x.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(F.cross_entropy(build("mlp")(plain_x), y), plain_x)
    start = values(model)
    with scope_over(model, grad_sample_mode=mode) as (opt, loader):
        for a, b in loader:
            opt.zero_grad()
            a.requires_grad_()
            (found,) = torch.autograd.grad(F.cross_entropy(model(a), b), a)
            adversarial = (a + 0.1 * found.sign()).detach()
            backward(model, adversarial, b)
            opt.step()
    assert_same([found], [wanted])
    rows = sample_gradients(build("mlp"), (x + 0.1 * wanted.sign()).detach(), y)
    assert_same(moved(start, model), [g / 6 for g in clipped_sum(rows, BOUND)])


@each_mode
@pytest.mark.parametrize("call", ["autograd.grad", "backward"])
def test_create_graph_is_refused(call: str, mode: str) -> None:
    """A gradient penalty through managed layers is refused, and nothing is released (G23)."""
    model = build("mlp")
    scope, start = poisson(model, grad_sample_mode=mode), values(model)
    with scope as (_, loader):
        x, y = next(iter(loader))
        x.requires_grad_()
        loss = F.cross_entropy(model(x), y)
        with pytest.raises(UnsupportedModelError, match="create_graph"):  # noqa: PT012
            if call == "backward":
                loss.backward(create_graph=True)
            else:
                torch.autograd.grad(loss, x, create_graph=True)
        leaves_untouched(model, scope, start)


class BorrowingNet(nn.Module):
    """Lends the weight of one layer to the training loop."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


@each_mode
def test_a_weight_used_outside_its_module_is_refused_by_name(mode: str) -> None:
    """A gradient that reaches a weight where no hook saw it is an error that names the weight (G5, G26)."""
    model = BorrowingNet().double()
    scope, start = poisson(model, grad_sample_mode=mode), values(model)
    with scope as (_, loader):
        x, y = next(iter(loader))
        loss = F.cross_entropy(model(x), y) + F.linear(x, model.first.weight).mean()
        with pytest.raises(UnsupportedModelError, match=r"first\.weight"):
            loss.backward()
        leaves_untouched(model, scope, start)


def test_the_charge_comes_before_the_release() -> None:
    """If a step hook raises, the step is charged already and no parameter has moved."""
    model = build("mlp")
    scope, start = poisson(model), values(model)
    with scope as (opt, loader):
        seen = []
        opt.attach_step_hook(lambda _: seen.append(charges(scope)))
        opt.attach_step_hook(lambda _: 1 / 0)
        backward(model, *next(iter(loader)))
        with pytest.raises(ZeroDivisionError):
            opt.step()
    assert seen == [1]
    assert_same(values(model), start)


def test_a_sample_that_is_not_finite_is_left_out() -> None:
    """An example whose gradient is NaN or infinite contributes nothing, and the others as without it."""
    x, y = examples()
    model, start = build("mlp"), values(build("mlp"))
    with scope_over(model, self_check=False) as (opt, loader):
        next(iter(loader))
        bad = x.clone()
        bad[1], bad[4, 2] = float("nan"), float("inf")
        backward(model, bad, y)
        opt.step()
    keep = [0, 2, 3, 5]
    rows = sample_gradients(build("mlp"), x[keep], y[keep])
    assert_same(moved(start, model), [g / 6 for g in clipped_sum(rows, BOUND)])


# ---------------------------------------------------------------- G20: half precision


def sum_of(rows: Tensor, kind: str) -> list[Tensor]:
    """The clipped sum over ``rows``, before noise, read off the move of float32 parameters or off the release."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 4))
    if kind == "bfloat16":
        model = model.bfloat16()
        rows = rows.bfloat16()
    controller = HookController(model, grad_sample_mode="ghost", loss_reduction="sum")
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=kind == "autocast"):
        loss = model(rows).float().square().sum()
    loss.backward()
    found = controller.take()
    assert found is not None
    clipping = FlatClipping(1e-3)
    sums = found.weighted_sums(
        clipping.factors(found.sq_norms(found.params)), torch.ones(found.samples, dtype=torch.bool)
    )
    controller.cleanup()
    return list(sums.values())


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "autocast"])
def test_sums_are_not_rounded_before_the_noise(kind: str) -> None:
    """Taking one of many similar samples away moves the sum by no more than C, in half precision, too."""
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(1, 64, generator=generator)
    rows = base + 0.05 * torch.randn(1024, 64, generator=generator)
    whole, without = sum_of(rows, kind), sum_of(rows[1:], kind)
    assert all(total.dtype == torch.float32 for total in whole)
    assert norm_of([a - b for a, b in zip(whole, without, strict=True)]) <= 1e-3 * 1.001


@pytest.mark.parametrize("kind", ["attention", "owned parameter"])
def test_autocast_reaches_modules_that_are_run_again(kind: str) -> None:
    """Modules without a rule are run again under the autocast that their forward pass had."""
    layer: nn.Module = (
        nn.MultiheadAttention(8, 2, batch_first=True) if kind == "attention" else nn.LSTM(8, 8, batch_first=True)
    )

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.layer, self.last = nn.Linear(8, 8), layer, nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            h = self.layer(h, h, h)[0] if kind == "attention" else self.layer(h)[0]
            return self.last(h.mean(1))

    model = Net()
    loader = DataLoader(TensorDataset(torch.randn(6, 3, 8)), 6)
    scope = private_training(
        model,
        torch.optim.SGD(model.parameters(), 0.1),
        loader,
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        sample_rate=1.0,
    )
    with scope as (opt, private):
        for (x,) in private:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = model(x).float().square().mean(1).mean()
            loss.backward()
            opt.step()
    assert scope.steps == 1
