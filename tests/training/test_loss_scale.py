"""A GradScaler in a private scope: small gradients survive float16, and the bound C means what it says."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dp_hooks import dp_step, private_training
from dp_hooks.errors import InvalidArgumentError, ScopeError

from ..models import (
    BOUND,
    MODES,
    assert_same,
    build,
    clipped_sum,
    each_mode,
    examples,
    in_order,
    loader_of,
    moved,
    sample_gradients,
    values,
)
from .helpers import sgd

SCALE = 2.0**14


def scaler_of(scale: float = SCALE, **options: Any) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=scale, **options)


Losses = Callable[[nn.Module, Tensor, Tensor], Tensor]


def losses(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y, reduction="none")


def by_hand(scope: Any, scaler: torch.amp.GradScaler, of: Losses) -> None:
    """Train one pass as the documentation of ``GradScaler`` has it, gradient clipping included."""
    with scope as (opt, loader):
        for x, y in loader:
            opt.zero_grad()
            scaler.scale(of(scope.model, x, y).mean()).backward()
            scaler.unscale_(opt)
            nn.utils.clip_grad_norm_(scope.model.parameters(), 1e-9)
            scaler.step(opt)
            scaler.update()


def by_step(scope: Any, scaler: torch.amp.GradScaler, of: Losses, **options: Any) -> None:
    """Train one pass by a decorated function, which the step scales the loss of."""
    train = dp_step(lambda model, batch: of(model, *batch), **options)
    with scope as (_, loader):
        for x, y in loader:
            torch.testing.assert_close(train(scope.model, (x, y)), of(scope.model, x, y).detach(), rtol=1, atol=10)


def in_two_passes(scope: Any, scaler: torch.amp.GradScaler, of: Losses) -> None:
    by_step(scope, scaler, of, two_pass=True)


WAYS = {"by hand": by_hand, "dp_step": by_step, "two passes": in_two_passes}
each_way = pytest.mark.parametrize("way", WAYS)


def scope_with(model: nn.Module, scaler: Any, data: Any = None, **options: Any) -> Any:
    """Return a scope without noise, in which a step of size 1 moves the parameters by the clipped sum, over six."""
    options = {"noise_multiplier": 0.0, "max_grad_norm": BOUND, "accountant": "rdp", "poisson_sampling": False, **options}
    return private_training(model, sgd(model), data or in_order(), grad_scaler=scaler, **options)


@pytest.mark.parametrize("bound", [BOUND, 1e3], ids=["clipped", "not clipped"])
@pytest.mark.parametrize("parts", [None, 4])
@pytest.mark.parametrize(("way", "mode"), [(w, m) for w in WAYS for m in MODES if w != "two passes" or m == "ghost"])
def test_the_scale_is_undone_before_clipping(way, mode, parts, bound):
    """In float64 a step with a scaler is the step without, to the last digits; the scaler is as it was before."""
    model, scaler = build("mlp"), scaler_of()
    start, held = values(model), dict(vars(scaler))
    wanted = clipped_sum(sample_gradients(model, *examples()), bound)
    WAYS[way](scope_with(model, scaler, max_grad_norm=bound, grad_sample_mode=mode, max_physical_batch_size=parts), scaler, losses)
    assert_same(moved(start, model), [g / 6 for g in wanted])
    assert vars(scaler).keys() == held.keys()
    assert scaler.get_scale() == SCALE


TINY = 1e-7


def small(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Losses under float16, of which the gradients are too small for it."""
    with torch.autocast("cpu", torch.float16):
        out = model(x)
    return TINY * F.cross_entropy(out.float(), y, reduction="none")


@pytest.mark.parametrize("way", [None, *WAYS])
def test_small_gradients_survive_float16(way):
    """Scaled they come out right, and clipped to a C of their size; unscaled most of them are zero."""
    model, data = build("mlp", torch.float32), examples(dtype=torch.float32)
    start, scaler = values(model), None if way is None else scaler_of()
    wanted = clipped_sum(sample_gradients(model, *data), BOUND)
    optimizer = torch.optim.SGD(model.parameters(), lr=1 / TINY)
    options = {"noise_multiplier": 0.0, "max_grad_norm": TINY * BOUND, "accountant": "rdp", "poisson_sampling": False}
    scope = private_training(model, optimizer, loader_of(data), grad_scaler=scaler, self_check=way is not None, **options)
    WAYS[way or "by hand"](scope, scaler or scaler_of(enabled=False), small)
    off = torch.cat([(a - b / 6).flatten() for a, b in zip(moved(start, model), wanted, strict=True)]).norm()
    off /= torch.cat([g.flatten() for g in wanted]).norm() / 6
    assert float(off) > 0.3 if way is None else float(off) < 5e-3


@each_way
def test_a_sample_that_overflows_is_left_out_alone(way):
    """The step is taken, with all other samples; the scale does not follow, as it would tell of that sample."""
    model, (x, y) = build("mlp", torch.float32), examples(dtype=torch.float32)
    scaler, start = scaler_of(), values(model)

    def one_is_large(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.float16):
            out = model(x)
        return F.cross_entropy(out.float(), y, reduction="none") * (1 + 1e4 * (x[:, 0] == large))

    large = x[2, 0]
    wanted = clipped_sum([row for i, row in enumerate(sample_gradients(model, x, y)) if i != 2], BOUND)
    WAYS[way](scope_with(model, scaler, loader_of((x, y)), self_check=False), scaler, one_is_large)
    assert_same(moved(start, model), [g / 6 for g in wanted], tolerance=2e-3)
    assert scaler.get_scale() == SCALE


def summed_outside(scaler: Any, loss: Tensor) -> Tensor:
    return scaler.scale(loss) + loss


@pytest.mark.parametrize(
    "of",
    [lambda scaler, loss: loss, lambda scaler, loss: scaler.scale(loss) / 4, summed_outside],
    ids=["not scaled", "divided", "a sum"],
)
@each_mode
def test_a_loss_that_is_not_scaled_as_a_whole_is_refused(of, mode):
    """The scale would be taken off what it was never on; nothing is released."""
    model, scaler = build("mlp"), scaler_of()
    start = values(model)
    scope = scope_with(model, scaler, grad_sample_mode=mode)
    with scope as (_, loader):
        x, y = next(iter(loader))
        with pytest.raises(ScopeError, match=r"did not come from scaler\.scale"):
            of(scaler, losses(model, x, y).mean()).backward()
    assert_same(values(model), start)


@each_way
@pytest.mark.parametrize("scale", [0.5, 1.0, 4.0])
def test_a_scale_may_be_smaller_than_the_batch(scale, way):
    """One that has backed off, say: the check of a train function looks at losses of a size of their own."""
    model, scaler = build("mlp"), scaler_of(scale)
    start = values(model)
    wanted = clipped_sum(sample_gradients(model, *examples()), BOUND)
    WAYS[way](scope_with(model, scaler), scaler, losses)
    assert_same(moved(start, model), [g / 6 for g in wanted])


def test_steps_of_other_optimizers_need_a_scaler_of_their_own():
    """The scale is the scope's; the error says so, and nothing of the other model moves."""
    other = nn.Linear(2, 2)
    before, scaler, public = values(other), scaler_of(), sgd(other)
    with scope_with(build("mlp"), scaler), pytest.raises(ScopeError, match="scaler of its own"):
        scaler.step(public)
    assert_same(values(other), before)


@pytest.mark.parametrize(("wrong", "said"), [(1024.0, "GradScaler"), (scaler_of(0.0), "positive init_scale")])
def test_what_is_no_scaler_is_refused(wrong, said):
    """By name, before anything is changed."""
    with pytest.raises(InvalidArgumentError, match=f"grad_scaler=.*{said}"):
        scope_with(build("mlp"), wrong)


def test_a_scaler_that_is_switched_off_is_none_at_all():
    """Loops that can do without one run as they are."""
    model, scaler = build("mlp"), scaler_of(enabled=False)
    start = values(model)
    wanted = clipped_sum(sample_gradients(model, *examples()), BOUND)
    by_hand(scope_with(model, scaler), scaler, losses)
    assert_same(moved(start, model), [g / 6 for g in wanted])


def test_the_criterion_is_verified_under_a_scale():
    """The scale is the same in every step, so what arrives is the criterion's own, times a constant."""
    model, scaler, criterion = build("mlp"), scaler_of(), nn.CrossEntropyLoss()
    scope = scope_with(model, scaler, in_order(6, 3), criterion=criterion)
    by_hand(scope, scaler, lambda model, x, y: criterion(model(x), y))
    assert scope.report(1e-5).loss_verified


def test_weights_of_rows_and_the_scale_go_together():
    """Each row's gradient is multiplied by its weight, and freed of the scale, before it is clipped."""
    model, scaler = build("mlp"), scaler_of()
    start, weights = values(model), torch.tensor([0.5, 1.0, 2.0, 0.0, 3.0, 0.1], dtype=torch.float64)
    rows = [[w * g for g in row] for w, row in zip(weights, sample_gradients(model, *examples()), strict=True)]
    with scope_with(model, scaler) as (opt, loader):
        for x, y in loader:
            opt.weigh_rows(weights)
            scaler.scale(losses(model, x, y).mean()).backward()
            scaler.step(opt)
    assert_same(moved(start, model), [g / 6 for g in clipped_sum(rows, BOUND)])
