"""What a step releases: the clipped sum of its own batch, whatever the loop does besides, or a clear error and nothing."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dp_hooks import HookController
from dp_hooks.errors import ScopeError, UnsupportedModelError
from dp_hooks.privacy.clipping import FlatClipping, SampleNorms

from ..models import (
    BOUND,
    BUILDERS,
    assert_same,
    charges,
    clipped_sum,
    drawn,
    each_mode,
    examples,
    in_order,
    loader_of,
    moved,
    norm_of,
    values,
)
from .helpers import NOISY, POISSON, Run, backward, sgd, step, train

each_clipping = pytest.mark.parametrize("clipping", ["flat", "per_layer"])
each_model = pytest.mark.parametrize("name", list(BUILDERS))


def bounded(name: str, clipping: str, **options: Any) -> tuple[Run, Any]:
    """Return a run with one bound or with one for every parameter, and the bounds."""
    count = len(list(BUILDERS[name]().parameters()))
    bound = BOUND if clipping == "flat" else [0.05 * (k + 1) for k in range(count)]
    return Run(name, clipping=clipping, max_grad_norm=bound, **options), bound


@each_mode
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@each_clipping
@each_model
def test_a_step_moves_by_the_sum_of_clipped_gradients(name: str, clipping: str, reduction: str, mode: str) -> None:
    """Without noise, a step of size 1 is the sum of hand-clipped per-sample gradients, divided by 6 for "mean"."""
    run, bound = bounded(name, clipping, loss_reduction=reduction, grad_sample_mode=mode)
    rows = run.rows()
    assert max(float(norm_of(row)) for row in rows) > BOUND / 2
    with run as (model, opt, loader):
        for x, y in loader:
            backward(model, x, y, reduction=reduction)
            opt.step()
    denominator = 6 if reduction == "mean" else 1
    assert_same(run.moved, [g / denominator for g in clipped_sum(rows, bound)])


@each_mode
@each_clipping
@each_model
def test_one_sample_moves_the_model_by_exactly_the_sensitivity(name: str, clipping: str, mode: str) -> None:
    """A sample with a very large gradient contributes the declared sensitivity: neither more nor, as for half of it, less."""
    run, bound = bounded(name, clipping, grad_sample_mode=mode, loader=in_order(1))
    with run as (model, opt, loader):
        for x, y in loader:
            backward(model, x, y, 1e6)
            opt.step()
    contribution = float(norm_of(run.moved))
    # A bias that softmax or a projection cancels has no gradient: what is missing from the sensitivity per layer is its bound.
    rows = run.rows(*examples(1), loss=lambda m, a, b: 1e6 * F.cross_entropy(m(a), b))
    assert contribution <= opt.sensitivity * (1 + 1e-9)
    assert contribution == pytest.approx(float(norm_of(clipped_sum(rows, bound))), rel=1e-9)
    assert clipping == "per_layer" or contribution == pytest.approx(BOUND, rel=1e-9)


@each_mode
def test_a_gradient_below_the_bound_is_left_alone(mode: str) -> None:
    """Samples whose norm is below C enter the sum as they are."""
    run = Run(max_grad_norm=1e3, grad_sample_mode=mode).trained()
    assert_same(run.moved, [torch.stack(column).mean(0) for column in zip(*run.rows(), strict=True)])


@each_mode
@pytest.mark.parametrize("scale", [1.0, 1e6])
def test_replacing_one_example_moves_the_sum_by_at_most_the_bound(scale: float, mode: str) -> None:
    """Clipped sums with and without one example differ by at most C in norm, for every example."""

    def clipped(x: Tensor, y: Tensor) -> list[Tensor]:
        run = Run("tied", loss_reduction="sum", grad_sample_mode=mode)
        with run as (model, opt, loader):
            next(iter(loader))
            backward(model, x, y, scale, "sum")
            opt.step()
        return run.moved

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
        run = Run(max_physical_batch_size=size, grad_sample_mode=mode).trained()
        assert run.scope.steps == 1
        run.assert_moved()


@each_mode
@pytest.mark.parametrize("way", ["no optimizer", "frozen inside"])
def test_only_parameters_that_are_trained_count_and_move(way: str, mode: str) -> None:
    """A layer outside the optimizer, or frozen inside the scope, neither moves nor counts in the norm."""
    run = Run(grad_sample_mode=mode, optimizer=(lambda m: sgd(m[2])) if way == "no optimizer" else sgd)
    with run as (model, opt, loader):
        model[0].requires_grad_(way == "no optimizer")
        train(model, opt, loader)
        assert all(p.grad is None for p in model[0].parameters())
    total = clipped_sum([row[2:] for row in run.rows()], BOUND)
    assert_same(run.moved, [torch.zeros_like(p) for p in run.start[:2]] + [g / 6 for g in total])


@each_mode
@each_model
def test_p_grad_is_none_until_the_step(name: str, mode: str) -> None:
    """After ``backward`` no parameter has a gradient; after ``step`` each has the released one (P9)."""
    with Run(name, grad_sample_mode=mode, noise_multiplier=1.0) as (model, opt, loader):
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


def test_a_sample_that_is_not_finite_is_left_out() -> None:
    """An example whose gradient is NaN or infinite contributes nothing, and the others as without it."""
    (x, y), keep, run = examples(), [0, 2, 3, 5], Run(self_check=False)
    bad = x.clone()
    bad[1], bad[4, 2] = float("nan"), float("inf")
    with run as (model, opt, loader):
        next(iter(loader))
        backward(model, bad, y)
        opt.step()
    run.assert_moved_by(run.rows(x[keep], y[keep]))


@each_mode
@pytest.mark.parametrize("physical", [None, 2])
@pytest.mark.parametrize("runs_model", [True, False])
def test_an_empty_logical_batch_gets_noise_and_a_charge(runs_model: bool, physical: int | None, mode: str) -> None:
    """A step for a batch that Poisson sampling left empty moves the parameters by noise alone, and is charged (P5)."""
    run = Run(**NOISY, sample_rate=1e-9, max_physical_batch_size=physical, grad_sample_mode=mode)
    with run as (model, opt, loader):
        x, y = next(iter(loader))
        assert (tuple(x.shape), tuple(y.shape)) == ((0, 4), (0,))
        if runs_model:
            opt.zero_grad()
            backward(model, x, y, reduction="sum")
        opt.step()
    assert run.scope.steps == 1
    assert run.scope.accountant.history == [(2.0, 1e-9, 1)]
    run.assert_moved_by_noise()


@each_mode
def test_clearing_gradients_through_the_model_works(mode: str) -> None:
    """A loop that calls ``model.zero_grad()`` after every step, as trainers do, takes the same steps (P8)."""

    def cleared_afterwards(model: nn.Module, opt: Any, x: Tensor, y: Tensor) -> None:
        backward(model, x, y)
        opt.step()
        model.zero_grad()

    runs = [Run(grad_sample_mode=mode).trained(passes=3, by=by) for by in (cleared_afterwards, step)]
    assert_same(*[values(run.model) for run in runs])


@each_mode
@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_discards_a_batch_that_is_not_stepped(set_to_none: bool, mode: str) -> None:
    """After ``zero_grad`` the next step contains nothing of an earlier backward pass (L9)."""
    run = Run(grad_sample_mode=mode)
    with run as (model, opt, loader):
        backward(model, *next(iter(loader)))
        for x, y in loader:
            opt.zero_grad()
            backward(model, -x, y, 3.0)
            opt.zero_grad(set_to_none)
            backward(model, x, y)
            opt.step()
    run.assert_moved()


@each_mode
def test_a_batch_left_with_continue_is_neither_released_nor_charged(mode: str) -> None:
    """``continue`` after backward drops that batch: the next step is its own, and there is one charge."""
    run = Run(**POISSON, grad_sample_mode=mode)
    with run as (model, opt, loader):
        for stepped in (False, True, False):
            for x, y in loader:
                opt.zero_grad()
                backward(model, x, y)
                if not stepped:
                    continue
                opt.step()
    assert charges(run.scope) == 1
    run.assert_moved()


@each_mode
def test_a_training_forward_without_backward_changes_nothing(mode: str) -> None:
    """Forward passes in training mode that are never back-propagated leave the step as it is (G13)."""
    run = Run(grad_sample_mode=mode)
    with run as (model, opt, loader):
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
    run.assert_moved()


def retained(model: nn.Module, opt: Any, x: Tensor, y: Tensor) -> None:
    loss = 50 * F.cross_entropy(model(x), y)
    loss.backward(retain_graph=True)
    loss.backward()
    opt.step()


def two_losses(model: nn.Module, opt: Any, x: Tensor, y: Tensor) -> None:
    out = model(x)
    (50 * F.cross_entropy(out, y)).backward(retain_graph=True)
    (50 * F.cross_entropy(out, y)).backward()
    opt.step()


def two_forwards(model: nn.Module, opt: Any, x: Tensor, y: Tensor) -> None:
    loss = 50 * F.cross_entropy(model(x), y)
    loss.backward()
    backward(model, x, y, 50)
    opt.step()


@each_mode
@pytest.mark.parametrize("by", [retained, two_losses, two_forwards])
@pytest.mark.parametrize("name", ["mlp", "tied", "owner"])
def test_two_backward_passes_are_one_contribution(name: str, by: Any, mode: str) -> None:
    """Gradients of two backward passes over the same samples add up per sample before they are clipped (G21)."""
    run = Run(name, grad_sample_mode=mode).trained(by=by)
    assert norm_of(run.moved) <= BOUND
    run.assert_moved(factor=100.0)


@each_mode
def test_input_gradients_contribute_nothing(mode: str) -> None:
    """``torch.autograd.grad`` with respect to the inputs, as in adversarial training, adds nothing to the step (G22)."""

    def input_gradient(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        (found,) = torch.autograd.grad(F.cross_entropy(model(x.requires_grad_()), y), x)
        return found

    run, (x, y) = Run(grad_sample_mode=mode), examples()
    wanted = input_gradient(Run().model, x.clone(), y)
    with run as (model, opt, loader):
        for a, b in loader:
            opt.zero_grad()
            found = input_gradient(model, a, b)
            backward(model, (a + 0.1 * found.sign()).detach(), b)
            opt.step()
    assert_same([found], [wanted])
    run.assert_moved_by(run.rows(x + 0.1 * wanted.sign(), y))


@each_mode
def test_a_raw_gradient_of_a_parameter_unfrozen_for_a_while_is_never_applied(mode: str) -> None:
    """A parameter frozen on entry, trainable during one backward pass and frozen again does not move."""
    run = Run(grad_sample_mode=mode, prepare=lambda m: m[0].bias.requires_grad_(False))
    with run as (model, opt, loader):
        bias = model[0].bias
        x, y = next(iter(loader))
        bias.requires_grad_(True)
        backward(model, x, y)
        bias.requires_grad_(False)
        opt.step()
    assert torch.equal(bias.detach(), run.start[1])
    assert bias.grad is None


# Each of these functions gets as far as is allowed, and returns the call that has to be refused.

Refused = Callable[[], Any]


def no_backward(model: nn.Module, opt: Any, loader: Any) -> Refused:
    model(next(iter(loader))[0])
    return opt.step


def two_logical_batches(model: nn.Module, opt: Any, loader: Any) -> Refused:
    backward(model, *next(iter(loader)))
    return partial(backward, model, *next(iter(loader)))


def stale_gradients(model: nn.Module, opt: Any, loader: Any) -> Refused:
    backward(model, *next(iter(loader)))
    next(iter(loader))
    return opt.step


def part_that_was_stepped(model: nn.Module, opt: Any, loader: Any) -> Refused:
    parts = iter(loader)
    x, y = next(parts)
    backward(model, x, y, 1e6, "sum")
    opt.step()
    backward(model, x, y, 1e6, "sum")
    next(parts)
    return opt.step


def two_passes_at_once(model: nn.Module, opt: Any, loader: Any) -> Refused:
    one, two = iter(loader), iter(loader)
    next(one)
    next(two)
    return partial(next, one)


def parts_of_two_passes(model: nn.Module, opt: Any, loader: Any) -> Refused:
    one, two = iter(loader), iter(loader)
    for parts in (one, two):
        backward(model, *next(parts), reduction="sum")
        opt.step()
    return partial(next, one)


def augmented_copies(model: nn.Module, opt: Any, loader: Any) -> Refused:
    x, y = next(iter(loader))
    backward(model, torch.cat([x, -x]), torch.cat([y, y]))
    return opt.step


def other_number_of_rows(model: nn.Module, opt: Any, loader: Any) -> Refused:
    x, y = next(iter(loader))
    backward(model, x, y)
    return partial(backward, model, x[:4], y[:4])


def second_derivatives(model: nn.Module, opt: Any, loader: Any) -> Refused:
    x, y = next(iter(loader))
    return partial(F.cross_entropy(model(x.requires_grad_()), y).backward, create_graph=True)


def gradient_penalty(model: nn.Module, opt: Any, loader: Any) -> Refused:
    x, y = next(iter(loader))
    loss = F.cross_entropy(model(x.requires_grad_()), y)
    return partial(torch.autograd.grad, loss, x, create_graph=True)


def weight_used_outside(model: nn.Module, opt: Any, loader: Any) -> Refused:
    x, y = next(iter(loader))
    return (F.cross_entropy(model(x), y) + F.linear(x, model[0].weight).mean()).backward


PARTS = {"max_physical_batch_size": 3, "loss_reduction": "sum"}
REFUSED: list[tuple[Callable[..., Refused], dict[str, Any], type[Exception], str]] = [
    (no_backward, {}, ScopeError, "no gradients"),
    (two_logical_batches, {}, ScopeError, "cannot be accumulated over batches"),
    (stale_gradients, {}, ScopeError, "earlier batch"),
    (part_that_was_stepped, PARTS, ScopeError, "earlier batch"),
    (two_passes_at_once, PARTS, ScopeError, "interleaved"),
    (parts_of_two_passes, PARTS, ScopeError, "logical"),
    (augmented_copies, {}, ScopeError, "one row per example"),
    (augmented_copies, {"max_physical_batch_size": 3}, ScopeError, "one row per example"),
    (other_number_of_rows, {}, ScopeError, "different numbers of samples"),
    (second_derivatives, {}, UnsupportedModelError, "create_graph"),  # G23
    (gradient_penalty, {}, UnsupportedModelError, "create_graph"),
    (weight_used_outside, {}, UnsupportedModelError, r"0\.weight"),  # G5, G26
]


@each_mode
@pytest.mark.parametrize(("prepare", "options", "error", "match"), REFUSED, ids=[row[0].__name__ for row in REFUSED])
def test_what_would_be_no_private_step_is_refused(
    prepare: Callable[..., Refused], options: dict[str, Any], error: type[Exception], match: str, mode: str
) -> None:
    """A step that would hold an example twice, unclipped, or not at all is an error that moves and charges nothing."""
    run = Run(**POISSON, **options, grad_sample_mode=mode)
    with run as (model, opt, loader):
        refused = prepare(model, opt, loader)
        with pytest.raises(error, match=match):
            refused()
        run.assert_untouched()
        if "max_physical_batch_size" not in options:
            train(model, opt, loader)
            run.assert_moved()


@each_mode
@pytest.mark.parametrize(("late", "name"), [(lambda m: m[0], "weight"), (lambda m: m[0].bias, "bias")])
def test_unfreezing_inside_the_scope_is_refused_by_name(late: Any, name: str, mode: str) -> None:
    """A parameter that becomes trainable after entering is refused at the step, which names it (G14)."""
    run = Run(**POISSON, grad_sample_mode=mode, prepare=lambda m: late(m).requires_grad_(False))
    with run as (model, opt, loader):
        x, y = next(iter(loader))
        late(model).requires_grad_(True)
        backward(model, x, y)
        with pytest.raises(UnsupportedModelError, match=rf"^0\.{name}.*: became trainable"):
            opt.step()
        assert_same(values(model), run.start)
        assert charges(run.scope) == 0


def sum_of(rows: Tensor, kind: str) -> list[Tensor]:
    """The clipped sum over ``rows``, before noise."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 4))
    if kind == "bfloat16":
        model, rows = model.bfloat16(), rows.bfloat16()
    controller = HookController(model, grad_sample_mode="ghost", loss_reduction="sum")
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=kind == "autocast"):
        loss = model(rows).float().square().sum()
    loss.backward()
    found = controller.take()
    assert found is not None
    factors = FlatClipping(1e-3).factors(SampleNorms(found.sq_norms(found.params)))
    sums = found.weighted_sums(factors, torch.ones(found.samples, dtype=torch.bool))
    controller.cleanup()
    return list(sums.values())


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "autocast"])
def test_sums_are_not_rounded_before_the_noise(kind: str) -> None:
    """Taking one of many similar samples away moves the sum by no more than C, in half precision, too."""
    generator = drawn(1)
    base = torch.randn(1, 64, generator=generator)
    rows = base + 0.05 * torch.randn(1024, 64, generator=generator)
    whole, without = sum_of(rows, kind), sum_of(rows[1:], kind)
    assert all(total.dtype == torch.float32 for total in whole)
    assert norm_of([a - b for a, b in zip(whole, without, strict=True)]) <= 1e-3 * 1.001


class Again(nn.Module):
    """A layer that is run again for its gradients, between two linear ones."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        attention = kind == "attention"
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 2)
        self.layer = nn.MultiheadAttention(8, 2, batch_first=True) if attention else nn.LSTM(8, 8, batch_first=True)
        self.arguments = 3 if attention else 1

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.layer(*[self.first(x)] * self.arguments)[0].mean(1))


@pytest.mark.parametrize("kind", ["attention", "lstm"])
def test_autocast_reaches_modules_that_are_run_again(kind: str) -> None:
    """Modules without a rule are run again under the autocast that their forward pass had."""
    run = Run(Again(kind), loader=loader_of([torch.randn(6, 3, 8)]), poisson_sampling=True, noise_multiplier=1.0)
    with run as (model, opt, loader):
        for (x,) in loader:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = model(x).float().square().mean(1).mean()
            loss.backward()
            opt.step()
    assert run.scope.steps == 1
