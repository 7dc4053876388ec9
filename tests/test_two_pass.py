"""``@dp_step(two_pass=True)``: the same step from two backward passes that keep nothing."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from dp_hooks import dp_step
from dp_hooks.errors import InvalidArgumentError, UnsupportedModelError
from dp_hooks.gradients.terms import Deferred

from .models import (
    BUILDERS,
    assert_same,
    build,
    clipped_sum,
    examples,
    in_order,
    moved,
    sample_gradients,
    scope_over,
    values,
)
from .reference import rows_by_backward


class Checkpointed(nn.Module):
    """Two blocks behind checkpoints, one block called twice, and a dropout that does nothing by default."""

    def __init__(self, use_reentrant=False, dropout=0.0, preserve=True):
        super().__init__()
        self.first = nn.Linear(4, 5)
        self.block = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.LayerNorm(5), nn.Dropout(dropout))
        self.last = nn.Linear(5, 3)
        self.how = {"use_reentrant": use_reentrant, "preserve_rng_state": preserve}

    def forward(self, x):
        h = self.first(x)
        for _ in range(2):
            h = checkpoint(self.block, h, **self.how)
        return checkpoint(self.last, h, **self.how)


@dp_step(two_pass=True)
def two_pass_step(model, batch):
    x, y = batch
    return F.cross_entropy(model(x), y, reduction="none")


def steps(model, fn, **options):
    """Run ``fn`` on every batch of a scope without noise, and return by how much the parameters moved."""
    before = values(model)
    with scope_over(model, **options) as (_, loader):
        for batch in loader:
            fn(model, batch)
    return moved(before, model)


@pytest.mark.parametrize("clipping", ["flat", "per_layer"])
@pytest.mark.parametrize("name", BUILDERS)
def test_it_moves_by_the_sum_of_clipped_gradients(name, clipping):
    """For every kind of model the step is the clipped sum of plain autograd on single samples."""
    model = build(name)
    x, y = examples()
    rows = sample_gradients(model, x, y)
    bound = 0.5 if clipping == "flat" else [0.2] * len(rows[0])
    expected = [g / len(x) for g in clipped_sum(rows, bound)]
    found = steps(model, two_pass_step, max_grad_norm=bound, clipping=clipping)
    assert_same(found, expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_models_with_a_block_that_is_called_twice(use_reentrant):
    """Checkpointing runs blocks again in each pass; uses of one parameter are still added before the norm is taken."""
    torch.manual_seed(1)
    model = Checkpointed(use_reentrant).double()
    rows = sample_gradients_by_backward(model)
    expected = [g / len(rows) for g in clipped_sum(rows, 0.5)]
    assert_same(steps(model, two_pass_step), expected)


def sample_gradients_by_backward(model):
    """As ``sample_gradients``, through ``backward()``, which reentrant checkpoints insist on."""
    x, y = examples()
    alone = zip(x.split(1), y.split(1), strict=True)
    return rows_by_backward(model, (F.cross_entropy(model(a.requires_grad_()), b) for a, b in alone))


@pytest.mark.parametrize("physical", [1, 4])
def test_physical_parts_add_up(physical):
    """Each physical part has its two passes, and together they are the logical batch."""
    whole = steps(build("mlp"), two_pass_step)
    assert_same(steps(build("mlp"), two_pass_step, max_physical_batch_size=physical), whole)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_dropout_inside_checkpoints_is_the_same_in_both_passes(use_reentrant):
    """With random numbers restored, as is the default, norms and sums see the same masks: nothing exceeds the bound."""
    torch.manual_seed(1)
    model = Checkpointed(use_reentrant, dropout=0.5).double()
    found = steps(model, two_pass_step, max_grad_norm=1e-3)
    total = torch.cat([m.flatten() for m in found]).norm() * len(examples()[0])
    assert 0 < total <= len(examples()[0]) * 1e-3 * 1.001


def test_passes_that_differ_are_refused():
    """Checkpoints that draw other masks in the second pass: the sums would not be those that were measured."""
    torch.manual_seed(1)
    model = Checkpointed(dropout=0.5, preserve=False).double()
    before = values(model)
    scope = scope_over(model, self_check=False)
    with scope as (_, loader), pytest.raises(UnsupportedModelError, match="preserve_rng_state"):
        two_pass_step(model, next(iter(loader)))
    assert_same(moved(before, model), [torch.zeros_like(p) for p in before], 0.0)
    assert scope.steps == 0


@pytest.mark.parametrize("two_pass", [True, False])
def test_nothing_captured_outlives_its_call(two_pass, monkeypatch):
    """In the first pass each captured call is gone before the next arrives; with one pass it is kept, as the contrast."""
    alive, most = weakref.WeakSet(), [0]
    original = Deferred.__post_init__

    def counting(self):
        original(self)
        gc.collect()
        most[0] = max(most[0], len(alive))
        alive.add(self)

    torch.manual_seed(1)
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(6)), nn.Linear(4, 3)).double()
    fn = two_pass_step if two_pass else dp_step(two_pass_step.__wrapped__)
    with scope_over(model, self_check=False) as (_, loader):
        batch = next(iter(loader))
        monkeypatch.setattr(Deferred, "__post_init__", counting)
        fn(model, batch)
    assert (most[0] <= 3) == two_pass


def test_it_is_only_for_the_mode_that_keeps_no_sample_gradients():
    """In the other modes the flag is refused before anything runs."""
    model = build("mlp")
    with scope_over(model, grad_sample_mode="hooks") as (_, loader):
        batch = next(iter(loader))
        with pytest.raises(InvalidArgumentError, match="two_pass"):
            two_pass_step(model, batch)


def test_the_next_step_is_an_ordinary_one():
    """A two-pass step leaves nothing behind that a step in one pass would notice."""
    model, other = build("mlp"), build("mlp")
    one_pass = dp_step(two_pass_step.__wrapped__)
    loader = in_order(6, 3)
    mixed = iter((two_pass_step, one_pass))
    found = steps(model, lambda m, b: next(mixed)(m, b), loader=loader)
    assert_same(found, steps(other, one_pass, loader=in_order(6, 3)))
