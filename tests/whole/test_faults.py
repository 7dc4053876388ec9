"""Faults planted in models, losses and layer rules are found before anything is released; what is sound passes."""

import re

import pytest
import torch
from torch import nn

from dp_hooks import dp_step
from dp_hooks.rules import registry

from .. import laws
from ..cases.broken_rules import BROKEN_RULES, norms_times
from ..cases.losses import LOSSES, padding
from ..cases.mixing import MIXING, RANDOM_BUT_SOUND, RANDOM_MIXING, D, N, T, between
from ..cases.sound import SOUND
from ..models import Net, loader_of, randn, scope_over
from ..reference import losses_of, per_sample

each_mode = pytest.mark.parametrize("mode", laws.MODES, ids=str)
unreached = pytest.mark.filterwarnings("ignore:the loss did not reach")


def net():
    """Two sound layers."""
    return between(torch.tanh)().double()


def by_function(losses):
    """Return a step in which a train function computes ``losses(model, *batch)``."""
    train = dp_step(lambda model, batch: losses(model, *batch))
    return lambda model, opt, batch: train(model, batch)


def own_loss(model, opt, batch):
    """Take a step on the loss that the model itself returns."""
    model(*batch)["loss"].backward()
    opt.step()


class Criterion(nn.Module):
    """A loss module around a function."""

    def __init__(self, fn):
        super().__init__()
        self.fn = fn

    def forward(self, out, keep):
        loss = self.fn(out, keep)
        return loss.mean() if loss.dim() else loss


@unreached
@each_mode
@pytest.mark.parametrize("case", MIXING, ids=str)
def test_models_that_mix_samples_are_refused(case, mode):
    """A model in which a sample's output depends on the other samples, or on what it saw before, is refused by name."""
    model, data = case.made()
    error = laws.released(model, data, laws.step_in(mode, losses_of), mode)
    assert error is not None
    assert re.match(r"the model|the train function|\w+ \(\w+\)|[\w.]+\.weight|w\b", str(error)), str(error)


@pytest.mark.parametrize("name", LOSSES)
def test_broken_losses_in_a_train_function_are_refused(name):
    """A train function whose loss is not the mean of losses that depend on one sample each is refused."""
    step = by_function(lambda model, x, keep: LOSSES[name](model(x), keep))
    assert "train function" in str(laws.released(net(), padding(), step))


@pytest.mark.parametrize("name", LOSSES)
def test_broken_criteria_are_refused(name):
    """The same losses are found when they are given as ``criterion``."""
    criterion = Criterion(LOSSES[name])

    def step(model, opt, batch):
        criterion(model(batch[0]), batch[1]).backward()
        opt.step()

    assert laws.released(net(), padding(), step, criterion=criterion) is not None


@pytest.mark.parametrize("name", LOSSES)
def test_broken_losses_of_the_model_are_refused(name):
    """The same losses are found when the model computes them and returns a scalar."""
    criterion = Criterion(LOSSES[name])
    model = Net(lambda s, x, keep: {"loss": criterion(s.inner(x), keep)}, inner=net())
    assert laws.released(model, padding(), own_loss) is not None


def test_mean_for_sum_is_refused():
    """A mean where a sum is declared is refused, in a train function and as the model's own loss."""
    for step, model in (
        (by_function(lambda model, x: losses_of(model, x).mean()), net()),
        (own_loss, Net(lambda s, x: {"loss": per_sample(s.inner(x)).mean()}, inner=net())),
    ):
        assert laws.released(model, [randn(N, T, D)], step, loss_reduction="sum") is not None


# In mode "functorch" no rule is asked, and two passes do not ask for what a rule has to say of a whole batch.
@unreached
@pytest.mark.usefixtures("nothing_is_small")
@pytest.mark.parametrize("name", BROKEN_RULES)
def test_broken_rules_are_refused(name, monkeypatch):
    """A layer rule that is wrong in gradients, norms, sums or factors is refused, naming a parameter."""
    monkeypatch.setitem(registry._RULES, nn.Linear, BROKEN_RULES[name])
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16)).double()  # large enough for factors
    assert re.search("weight|bias", str(laws.released(model, [randn(N, 2, 16)])))


@pytest.mark.parametrize(("factor", "found"), [(0.98, True), (0.99, True), (0.996, True), (0.9999, False)])
def test_the_size_of_what_is_found_in_single_precision(factor, found, monkeypatch):
    """In float32 norms that are too small by half a percent are found; a ten-thousandth is within rounding."""
    monkeypatch.setitem(registry._RULES, nn.Linear, norms_times(factor))
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))
    assert (laws.released(model, [torch.randn(N, 2, 16)]) is not None) == found


@each_mode
@pytest.mark.parametrize("name", RANDOM_MIXING)
def test_samples_mixed_by_random_numbers_are_refused(name, mode):
    """Mixing that noise decides on is found, though checks run without noise first."""
    step = by_function(lambda model, x: losses_of(model, RANDOM_MIXING[name](x)))
    assert "train function" in str(laws.released(net(), [randn(N, D)], step, mode))


@each_mode
@pytest.mark.parametrize("name", RANDOM_BUT_SOUND)
def test_random_numbers_of_each_sample_pass(name, mode):
    """What is drawn for each sample is the same in the batch and for the sample alone, whatever draws it."""
    step = by_function(lambda model, x: losses_of(model, RANDOM_BUT_SOUND[name](x)))
    assert laws.released(net(), [randn(N, D)], step, mode) is None


@pytest.mark.filterwarnings("ignore:.*None of the inputs have requires_grad")
@each_mode
@pytest.mark.parametrize("name", SOUND)
def test_sound_models_pass(name, mode):
    """Models without a fault take their step, whatever they draw, return or are called by."""
    make, losses = SOUND[name]
    assert laws.released(make().double(), [randn(N, T, D)], laws.step_in(mode, losses), mode) is None


@pytest.mark.parametrize("sizes", [(1, 3, 6), (0, 4, 1), (1, 1, 6), (6, 1, 0, 2)])
@pytest.mark.parametrize("by_train_function", [True, False])
def test_sizes_of_the_first_batches_do_not_matter(by_train_function, sizes):
    """Batches of one and of none before and after larger ones take their steps as well."""
    parts = {"inner": net(), "place": nn.Parameter(randn(T, D)), "gain": nn.Parameter(randn(D))}
    model = Net(lambda s, x: s.inner(x + s.place) * s.gain, **parts)
    train = dp_step(lambda model, batch: losses_of(model, *batch))
    if by_train_function:  # batches of none come from the loader only
        sizes = tuple(n for n in sizes if n)
    for first in sizes:
        scope = scope_over(model, loader=loader_of([randn(8, T, D)]), poisson_sampling=True, accountant="rdp")
        with scope as (opt, _):
            for size in (first, *sizes):
                if by_train_function:
                    train(model, [randn(size, T, D)])
                else:
                    losses_of(model, randn(size, T, D)).sum().div(max(1, size)).backward()
                    opt.step()
            assert scope.steps == 1 + len(sizes)
