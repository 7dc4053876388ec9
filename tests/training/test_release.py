"""What a step releases: the clipped sum of its own batch, whatever the loop does besides, or a clear error and nothing."""

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dp_hooks import dp_step
from dp_hooks.errors import InvalidArgumentError, ScopeError, UnsupportedModelError
from dp_hooks.training.clipped_sum import ClippedSum

from ..models import BOUND, BUILDERS, Net, assert_same, charges, clipped_sum, each_mode, examples, moved, norm_of, values
from .helpers import NOISY, POISSON, Run, backward, sgd, step, train

each_clipping = pytest.mark.parametrize("clipping", ["flat", "per_layer"])
each_model = pytest.mark.parametrize("name", list(BUILDERS))


@each_mode
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("clipping", ["flat", "per_layer"])
@each_model
def test_a_step_moves_by_the_sum_of_clipped_gradients(name: str, clipping: str, reduction: str, mode: str) -> None:
    """Without noise, a step of size 1 is the sum of hand-clipped per-sample gradients, divided by 6 for "mean"."""
    rows = Run(name).rows()
    assert max(float(norm_of(row)) for row in rows) > BOUND / 2
    bound = BOUND if clipping == "flat" else [0.05 * (k + 1) for k in range(len(rows[0]))]
    run = Run(name, clipping=clipping, max_grad_norm=bound, loss_reduction=reduction, grad_sample_mode=mode)
    run.trained(by=lambda model, opt, x, y: (backward(model, x, y, reduction=reduction), opt.step()))
    assert_same(run.moved, [g / (6 if reduction == "mean" else 1) for g in clipped_sum(rows, bound)])


@each_mode
def test_a_gradient_below_the_bound_is_left_alone(mode: str) -> None:
    """Samples whose norm is below C enter the sum as they are."""
    run = Run(max_grad_norm=1e3, grad_sample_mode=mode).trained()
    assert_same(run.moved, [torch.stack(column).mean(0) for column in zip(*run.rows(), strict=True)])


@each_mode
def test_physical_parts_add_up_to_the_logical_batch(mode: str) -> None:
    """Parts of 1, 2, 4 or 6 examples give the same step as one batch of 6, in one release."""
    for size in (1, 2, 4, 6):
        run = Run(max_physical_batch_size=size, grad_sample_mode=mode).trained()
        assert run.scope.steps == 1
        run.assert_moved()


@each_mode
@each_clipping
@pytest.mark.parametrize("parts", [1, 2, 6])
def test_weights_multiply_gradients_before_they_are_clipped(parts: int, clipping: str, mode: str) -> None:
    """The sum has ``clip(w g)`` of each example, in whatever parts the batch comes; weights are gone after the step."""
    weights = torch.tensor([0.0, 0.01, 0.3, 1.0, 2.0, 50.0], dtype=torch.float64)
    rows = Run().rows()
    bound = BOUND if clipping == "flat" else [0.05 * (k + 1) for k in range(len(rows[0]))]
    run = Run(clipping=clipping, max_grad_norm=bound, max_physical_batch_size=parts, grad_sample_mode=mode)
    left = weights

    def weighed(model: nn.Module, opt: Any, x: Tensor, y: Tensor) -> None:
        nonlocal left
        opt.zero_grad()
        opt.weigh_rows(left[: len(y)])
        left = left[len(y) :]
        backward(model, x, y)
        opt.step()

    run.trained(by=weighed)
    weighted = [[w * g for g in row] for w, row in zip(weights, rows, strict=True)]
    assert_same(run.moved, [g / 6 for g in clipped_sum(weighted, bound)])


@pytest.mark.parametrize(
    "weights", [torch.ones(5), torch.ones(6, 1), torch.ones(6).long(), -torch.ones(6), torch.ones(6) / 0, [1.0] * 6]
)
def test_weights_that_are_none_are_refused(weights: Any) -> None:
    """One number for each row is needed, of 0 or more; nothing moves."""

    def weighed(model: nn.Module, opt: Any, x: Tensor, y: Tensor) -> None:
        with pytest.raises(InvalidArgumentError, match="weights="):
            opt.weigh_rows(weights)

    run = Run().trained(by=weighed)
    assert run.scope.steps == 0


def test_a_report_says_that_parameters_were_written_to_between_steps() -> None:
    """What was averaged into the model, or projected, is not covered by epsilon; a public step in a pause is another matter."""
    run = Run(**POISSON)
    public = torch.optim.SGD(run.model.parameters(), lr=0.1)
    with run as (model, opt, loader):
        for k in range(4):
            train(model, opt, loader)
            if k == 0:
                with run.scope.paused():
                    backward(model, *examples())
                    public.step()
            if k == 1:
                assert run.scope.report().written_steps == 0
                with torch.no_grad():
                    model[0].weight.mul_(0.5)
    assert run.scope.report().written_steps == 1
    assert "written to" in str(run.scope.report())


@each_mode
@pytest.mark.parametrize("way", ["frozen before, in no optimizer", "frozen before", "frozen inside"])
def test_only_parameters_that_are_trained_count_and_move(way: str, mode: str) -> None:
    """A layer frozen before the scope or inside it neither moves nor counts in the norm."""
    run = Run(
        grad_sample_mode=mode,
        prepare=lambda m: m[0].requires_grad_(way == "frozen inside"),
        optimizer=(lambda m: sgd(m[2])) if way.endswith("no optimizer") else sgd,
    )
    with run as (model, opt, loader):
        model[0].requires_grad_(False)
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
    run.assert_moved(run.rows(x[keep], y[keep]))


def raw_matmul() -> nn.Module:
    return Net(lambda m, x: m.head(torch.tanh(x @ m.w)), w=nn.Parameter(torch.randn(4, 5)), head=nn.Linear(5, 3)).double()


def einsum() -> nn.Module:
    return Net(lambda m, x: torch.einsum("ni,io->no", x, m.w), w=nn.Parameter(torch.randn(4, 3))).double()


def convolution() -> nn.Module:
    return Net(lambda m, x: F.conv1d(x[:, None], m.w).flatten(1), w=nn.Parameter(torch.randn(1, 1, 2))).double()


def transposed_convolution() -> nn.Module:
    return Net(
        lambda m, x: F.conv_transpose2d(x.view(-1, 1, 2, 2), m.w).flatten(1), w=nn.Parameter(torch.randn(1, 1, 2, 2))
    ).double()


def by_loop(model: nn.Module, opt: Any, x: Tensor, y: Tensor) -> None:
    backward(model, x, y)
    opt.step()


@dp_step(two_pass=True)
def two_pass(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


BY: dict[str, Callable[..., Any]] = {"loop": by_loop, "two_pass": lambda model, opt, x, y: two_pass(model, (x, y))}


@pytest.mark.parametrize("by", BY)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "model", ["attention", "weight_norm", "owner", "lstm", "conv", raw_matmul, einsum, convolution, transposed_convolution]
)
def test_one_record_that_is_not_finite_leaves_the_sums_of_the_others_exact(model: Any, bad: float, by: str) -> None:
    """Whatever way a parameter is used, the bad record's share is left out, not multiplied by zero (N1)."""
    (x, y), others = examples(), [0, 1, 3, 4, 5]
    x[2] = bad
    run = Run(model if isinstance(model, str) else model(), self_check=False)
    with run as (net, opt, loader):
        next(iter(loader))
        BY[by](net, opt, x, y)
    run.assert_moved(run.rows(x[others], y[others]))


@each_mode
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_releases_no_gradients(bad: float, mode: str) -> None:
    """With a bad weight no sample has a finite gradient: the step is an error or adds nothing, and never NaN."""
    run = Run(**POISSON, grad_sample_mode=mode, self_check=False)
    with run as (model, opt, loader):
        with torch.no_grad():
            model[2].weight[0, 0] = bad
        with suppress(ScopeError):
            train(model, opt, loader)
        left = torch.cat([p.detach().flatten() for p in model.parameters()])
        assert int((~torch.isfinite(left)).sum()) == 1


@pytest.mark.parametrize("sigma", [0.0, 1.0])
def test_a_sum_that_is_not_finite_is_not_released(sigma: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last guard: whatever went wrong before, NaN in the clipped sum is an error that names the parameter."""
    take = ClippedSum.take

    def spoiled(self: ClippedSum) -> Any:
        sums, statistic = take(self)
        next(iter(sums.values()))[0] = float("nan")
        return sums, statistic

    monkeypatch.setattr(ClippedSum, "take", spoiled)
    run = Run(**POISSON, noise_multiplier=sigma)
    with run as (model, opt, loader):
        with pytest.raises(ScopeError, match=r"clipped sum of 0\.weight is not finite"):
            train(model, opt, loader)
        run.assert_untouched()


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
    return partial(backward, model, torch.cat([x, -x]), torch.cat([y, y]))


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
    (augmented_copies, {}, ScopeError, "augmented copies"),
    (augmented_copies, {"max_physical_batch_size": 3}, ScopeError, "augmented copies"),
    (other_number_of_rows, {}, ScopeError, "on 4 rows, but the private loader handed out 6"),
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


@each_mode
def test_a_step_hook_sees_the_noised_gradient_before_it_is_applied(mode: str) -> None:
    """What is in ``p.grad`` then is what the parameters are about to move by; it was charged before."""
    run, seen = Run(**NOISY, grad_sample_mode=mode), []
    with run as (model, opt, loader):
        opt.attach_step_hook(
            lambda _: seen.append(([p.grad.clone() for p in model.parameters()], values(model), charges(run.scope)))
        )
        train(model, opt, loader, stop=1)
    ((grads, before, charged),) = seen
    assert_same(before, run.start)
    assert_same(run.moved, grads)
    assert charged == 1
