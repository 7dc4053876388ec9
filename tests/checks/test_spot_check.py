"""Spot checks: later batches are looked at anew at random, since a model may begin to mix samples through values alone."""

import inspect
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dp_hooks import dp_step, errors, private_training
from dp_hooks.checks import spot_check
from dp_hooks.checks.spot_check import SpotCheck

from ..models import Net, assert_same, loader_of, moved, randn, scope_over, values
from ..reference import losses_of

N, D, BATCHES = 20, 4, 6
whole = dp_step(lambda model, x: losses_of(model, x))


def by_loop(model, opt, x):
    opt.zero_grad()
    losses_of(model, x).mean().backward()
    opt.step()


STEPS = {"bare loop": by_loop, "dp_step": lambda model, opt, x: whole(model, x)}
each_step = pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)


def gated():
    """Samples mix as soon as ``gate`` is positive, without any other operation."""

    def forward(s, x):
        h = s.a(x).tanh()
        return s.b(h + F.relu(s.gate) * h.mean(0))

    model = Net(forward, a=nn.Linear(D, 5), b=nn.Linear(5, 3), gate=nn.Parameter(torch.tensor(-1.0), requires_grad=False))
    return model.double()


def scope(model, **options):
    return scope_over(model, loader=loader_of([randn(BATCHES * N, D)], N), max_grad_norm=1.0, **options)


@each_step
def test_samples_that_begin_to_mix_by_values_alone_are_found(step):
    """With a rate of 1 the very step is refused, before anything is released; the model stays as it was."""
    model = gated()
    with scope(model, spot_check_rate=1.0) as (opt, loader):
        for number, (x,) in enumerate(loader):
            model.gate.data.fill_(1.0 if number == 3 else -1.0)
            before = values(model)
            if number < 3:
                step(model, opt, x)
                continue
            with pytest.raises(errors.SelfCheckError, match="mix") as error:
                step(model, opt, x)
            assert "without one" not in str(error.value)  # the step before was
            assert_same(values(model), before)
            break


@each_step
def test_an_error_says_which_steps_nobody_has_looked_at(step, monkeypatch):
    """A finding names the steps that were released between the last check that passed and itself."""
    model = gated()
    drawn = iter([1.0, 1.0, 0.0])  # the second and third batch are not chosen, the fourth is
    monkeypatch.setattr(spot_check._ENTROPY, "random", lambda: next(drawn))
    with scope(model, spot_check_rate=0.5) as (opt, loader):
        for number, (x,) in enumerate(loader):
            if number < 3:
                step(model, opt, x)
                model.gate.data.fill_(1.0)
                continue
            with pytest.raises(errors.SelfCheckError, match="was that of step 1; steps 2 to 3 were released without one"):
                step(model, opt, x)
            break


def test_without_spot_checks_it_is_not_seen():
    """A rate of 0 looks at no later batch: mixing by values passes, which shows that the tests above can fail."""
    model = gated()
    with scope(model, spot_check_rate=0.0) as (opt, loader):
        for x in (x for (x,) in loader):
            by_loop(model, opt, x)
            model.gate.data.fill_(1.0)


@each_step
@pytest.mark.parametrize("mode", ["ghost", "hooks", "functorch"])
def test_being_looked_at_changes_nothing(mode, step):
    """Parameters, dropout masks and buffers of a sound model are those of a run without spot checks, with far fewer rows run."""

    def trained(rate):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(D, 5), nn.Dropout(0.5), nn.LayerNorm(5), nn.Linear(5, 3)).double()
        start, rows = values(model), []
        model.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
        with scope(model, spot_check_rate=rate, grad_sample_mode=mode) as (opt, loader):
            for number, (x,) in enumerate(loader):
                if number == 1:
                    rows.clear()
                torch.manual_seed(number)
                step(model, opt, x)
        return moved(start, model), rows

    (with_checks, seen), (without, plain) = trained(1.0), trained(0.0)
    assert_same(with_checks, without)
    assert plain == [N] * (BATCHES - 1)
    assert seen.count(N) <= 2 * (BATCHES - 1)  # the step itself, and what it kept of its graph
    assert len(seen) > 4 * len(plain)
    assert all(count <= 8 for count in seen if count != N)


@pytest.mark.parametrize(("rate", "least", "most"), [(0.0, 0, 0), (0.05, 70, 130), (1.0, 2000, 2000)])
def test_batches_are_drawn_at_the_rate(rate, least, most, monkeypatch):
    """One batch in ``1 / rate`` is drawn, none that is checked anyway."""
    monkeypatch.setattr(spot_check, "_ENTROPY", random.Random(7))
    spot, drawn = SpotCheck(rate, int), 0
    for _ in range(2000):
        spot.saw_batch(wanted=True)
        drawn += spot.now
    assert least <= drawn <= most
    spot.saw_batch(wanted=False)
    assert not spot.now


def test_the_default_is_one_in_200():
    """Nobody has to ask for spot checks."""
    assert inspect.signature(private_training).parameters["spot_check_rate"].default == 0.005


@pytest.mark.parametrize("decorated", [False, True])
def test_a_batch_as_large_as_a_table_is_looked_at_whole(decorated):
    """Where the batch has a new size that something else has, too, the way looks new, and eight samples would not go it."""
    torch.manual_seed(3)
    model = Net(
        lambda s, x: s.b(s.a(x) + s.codes[(s.a(x)[:, None] - s.codes).square().sum(-1).argmin(1)]),
        a=nn.Linear(4, 4),
        codes=nn.Parameter(torch.randn(9, 4)),
        b=nn.Linear(4, 3),
    ).double()
    x, y = randn(21, 4), torch.arange(21) % 3
    run = scope_over(model, loader=loader_of([x, y], batch_size=12), max_grad_norm=1.0, spot_check_rate=1.0)

    def losses(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    with run as (opt, loader):
        for batch in loader:
            if decorated:
                dp_step(losses)(model, batch)
            else:
                losses(model, batch).mean().backward()
                opt.step()
    assert run.steps == 2
