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

from ..models import BUILDERS, Net, assert_same, build, clipped_sum, in_order, norm_of, scope_over
from ..training.helpers import POISSON, Run


def dropping(use_reentrant=False, preserve=True):
    """A block with dropout that is called twice, behind checkpoints."""
    how = {"use_reentrant": use_reentrant, "preserve_rng_state": preserve}

    def forward(s, x):
        return s.last(checkpoint(s.block, checkpoint(s.block, s.first(x), **how), **how))

    torch.manual_seed(1)
    block = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.LayerNorm(5), nn.Dropout(0.5))
    return Net(forward, first=nn.Linear(4, 5), block=block, last=nn.Linear(5, 3)).double()


def losses(model, batch):
    x, y = batch
    return F.cross_entropy(model(x), y, reduction="none")


two_pass_step, one_pass_step = dp_step(two_pass=True)(losses), dp_step(losses)


def steps(model, fn, **options):
    """Run ``fn`` on every batch of a scope without noise, and return by how much the parameters moved."""
    return Run(model, **options).trained(by=lambda model, opt, x, y: fn(model, (x, y))).moved


@pytest.mark.parametrize("name", BUILDERS)
def test_it_moves_by_the_sum_of_gradients_clipped_by_layer(name):
    """For every kind of model each parameter's step is the clipped sum of plain autograd on single samples."""
    rows = Run(name).rows()
    bounds = [0.2] * len(rows[0])
    expected = [g / len(rows) for g in clipped_sum(rows, bounds)]
    assert_same(steps(name, two_pass_step, max_grad_norm=bounds, clipping="per_layer"), expected)


@pytest.mark.parametrize("physical", [1, 4])
def test_physical_parts_add_up(physical):
    """Each physical part has its two passes, and together they are the logical batch."""
    whole = steps("mlp", two_pass_step)
    assert_same(steps("mlp", two_pass_step, max_physical_batch_size=physical), whole)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_dropout_inside_checkpoints_is_the_same_in_both_passes(use_reentrant):
    """With random numbers restored, as is the default, norms and sums see the same masks: nothing exceeds the bound."""
    total = norm_of(steps(dropping(use_reentrant), two_pass_step, max_grad_norm=1e-3))
    assert 0 < total <= 1e-3 * 1.001


def test_passes_that_differ_are_refused():
    """Checkpoints that draw other masks in the second pass: the sums would not be those that were measured."""
    run = Run(dropping(preserve=False), **POISSON, self_check=False)
    with run as (model, _, loader), pytest.raises(UnsupportedModelError, match="preserve_rng_state"):
        two_pass_step(model, next(iter(loader)))
    run.assert_untouched()
    assert run.scope.steps == 0


@pytest.mark.usefixtures("nothing_is_small")
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
    with scope_over(model, self_check=False) as (_, loader):
        batch = next(iter(loader))
        monkeypatch.setattr(Deferred, "__post_init__", counting)
        (two_pass_step if two_pass else one_pass_step)(model, batch)
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
    mixed = iter((two_pass_step, one_pass_step))
    found = steps("mlp", lambda m, b: next(mixed)(m, b), loader=in_order(6, 3))
    assert_same(found, steps("mlp", one_pass_step, loader=in_order(6, 3)))
