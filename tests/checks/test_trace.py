"""What was checked on one batch holds for the operations of that batch; a model that takes another way is looked at anew."""

import functools
import itertools
import random
from collections import UserDict

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from dp_hooks import dp_step, errors
from dp_hooks.checks.comparison import Comparison

from ..cases.coins import COINS, SWITCHES, ChangingCriterion, Roll
from ..models import MODES, Net, loader_of, moved, randn, scope_over, values
from ..reference import sample_grads

N, T, D = 6, 4, 5
STYLES = ("bare loop", "dp_step")
WAYS = [*itertools.product(MODES, STYLES), ("ghost", "two passes")]


def losses_of(model, x):
    return model(x).square().mean(1)


def net(forward, **parts):
    """A network over two layers, not switched yet."""
    model = Net(forward, **{"a": nn.Linear(D, D), "b": nn.Linear(D, 3), **parts}).double()
    model.switch = False
    return model


def switching(name):
    return net(SWITCHES[name], child=Roll())


def enter(model, mode="ghost", **options):
    """Open a scope with six batches."""
    return scope_over(model, loader=loader_of([randn(6 * N, T, D)], N), max_grad_norm=1.0, grad_sample_mode=mode, **options)


def stepper(style, losses=losses_of):
    """Return ``step(model, opt, x)``."""
    whole = dp_step(two_pass=style == "two passes")(lambda model, x: losses(model, x))

    def step(model, opt, x):
        if style != "bare loop":
            whole(model, x)
            return
        opt.zero_grad()
        stepped(losses(model, x).mean(), opt)

    return step


def stepped(loss, opt):
    loss.backward()
    opt.step()


def still(before, model):
    return not any(bool(m.any()) for m in moved(before, model))


@pytest.fixture
def checks(monkeypatch):
    """A list that grows with every comparison of the self-check."""
    seen = []
    compare = Comparison.run
    monkeypatch.setattr(Comparison, "run", lambda self, *args: (seen.append(1), compare(self, *args))[1])
    return seen


@pytest.mark.parametrize(("mode", "style"), WAYS)
@pytest.mark.parametrize("name", SWITCHES)
def test_a_switch_after_the_first_batches_is_noticed(name, mode, style):
    """A model that is turned into one that mixes or reorders samples, shapes unchanged, is refused at that very step."""
    model, step = switching(name), stepper(style)
    with enter(model, mode) as (opt, loader):
        for index, (x,) in enumerate(loader):
            model.switch = index >= 2
            before = values(model)
            if model.switch:
                with pytest.raises(errors.UnsupportedModelError):
                    step(model, opt, x)
                assert still(before, model)
                assert not any(hasattr(p, "grad_sample") for p in model.parameters())
                break
            step(model, opt, x)
            assert not still(before, model)


@pytest.mark.parametrize("mode", MODES)
def test_a_loss_that_couples_samples_later_is_noticed(mode):
    """A train function that adds a term over the whole batch from the third step on is refused there."""
    model, late = switching("a factor that was zero"), []
    step = stepper("dp_step", lambda m, x: (out := m(x)).square().mean(1) + (out.mean(0).square().sum() if late else 0))
    with enter(model, mode) as (opt, loader):
        batches = iter(loader)
        step(model, opt, *next(batches))
        step(model, opt, *next(batches))
        late.append(True)
        before = values(model)
        with pytest.raises(errors.SelfCheckError, match="train function"):
            step(model, opt, *next(batches))
        assert still(before, model)


class PerSample(nn.Module):
    def forward(self, out):
        return out.square().mean(1)


@pytest.mark.parametrize("mode", MODES)
def test_a_criterion_that_couples_samples_later_is_noticed(mode):
    """A loss module given as criterion is checked again when it does something else; a train function covers its own."""
    model, criterion = switching("a factor that was zero"), ChangingCriterion()
    with enter(model, mode, criterion=criterion) as (opt, loader):
        for index, (x,) in enumerate(loader):
            criterion.late = index == 2
            before = values(model)
            loss = criterion(model(x))
            if criterion.late:
                with pytest.raises(errors.SelfCheckError, match="criterion"):
                    stepped(loss, opt)
                assert still(before, model)
                break
            stepped(loss, opt)
    model, criterion = switching("a factor that was zero"), PerSample()
    step = dp_step(lambda m, x: criterion(m(x)))
    with enter(model, mode, criterion=criterion) as (opt, loader):
        for (x,) in loader:
            step(model, x)


@pytest.mark.filterwarnings("ignore:the loss did not reach g")
@pytest.mark.parametrize(("mode", "style"), WAYS)
def test_a_sound_branch_costs_one_more_check(mode, style, checks):
    """A branch that is taken later and is right is checked when it is taken first, and never again."""

    def forward(s, x):
        h = s.a(x)
        return s.b((h * s.g).sigmoid().mean(1) if s.switch else h.mean(1))

    model = net(forward, g=nn.Parameter(torch.ones(D)))
    step, counts = stepper(style), []
    with enter(model, mode) as (opt, loader):
        for index, (x,) in enumerate(loader):
            model.switch = index in (2, 4)
            step(model, opt, x)
            counts.append(len(checks))
    assert counts == [1, 1, 2, 2, 2, 2]


@pytest.mark.filterwarnings("ignore:a step was taken on a batch that did not come from")
def test_what_changes_from_batch_to_batch_is_no_other_way(checks):
    """Other numbers of samples and tokens, and another learning rate or temperature, cause no further check."""
    model = Net(lambda s, x: s.b((s.a(x) * s.heat).flatten(0, 1)).view(*x.shape[:2], -1).mean(1))
    model.a, model.b, model.heat = nn.Linear(D, D).double(), nn.Linear(D, 3).double(), 0.7
    with enter(model) as (opt, _):
        for index, (n, t) in enumerate([(6, 4), (8, 4), (7, 9), (12, 1), (9, 9), (4, 7), (6, 4)]):
            model.heat = 1.5 + index
            losses_of(model, randn(n, t, D)).mean().backward()
            opt.step()
    assert len(checks) == 1


def _tossing(s, x):
    if s.coin():
        x = x.flip(-1) * s.g
    for block in s.blocks:
        if not s.coin():
            x = block(x)
    return s.b(F.dropout(x, 0.2, s.training).mean(1))


def _tossing_model(coin):
    blocks = nn.ModuleList(
        Net(lambda s, x: (s.a(x) * s.g).tanh(), a=nn.Linear(D, D), g=nn.Parameter(torch.ones(D))) for _ in range(3)
    )
    model = Net(_tossing, blocks=blocks, b=nn.Linear(D, 3), g=nn.Parameter(torch.ones(D))).double()
    model.coin = COINS[coin]
    return model


@pytest.mark.filterwarnings("ignore:the loss did not reach")
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("mode", ["ghost", "hooks"])
@pytest.mark.parametrize("coin", COINS)
def test_models_that_skip_layers_at_random_are_right(coin, mode, style):
    """Branches and layers that are taken by the toss of a coin are learned and checked as they come."""
    random.seed(0)
    numpy.random.seed(0)
    model = _tossing_model(coin)
    step = stepper(style, lambda m, x: losses_of(m, x.flip(1) if model.coin() else x))
    with enter(model, mode) as (opt, loader):
        for _ in range(3):
            for (x,) in loader:
                step(model, opt, x)


@pytest.mark.parametrize("coin", COINS)
def test_checks_draw_nothing_from_the_users_generators(coin):
    """With and without the self-check a training that tosses coins goes the same ways and ends at the same weights."""
    ends = []
    for self_check in (True, False):
        torch.manual_seed(1)
        random.seed(1)
        numpy.random.seed(1)
        model = Net(
            lambda s, x: s.b((s.a(x).tanh() if s.coin() else s.a(x).relu()).mean(1)), a=nn.Linear(D, D), b=nn.Linear(D, 3)
        ).double()
        model.coin = COINS[coin]
        with enter(model, self_check=self_check) as (opt, loader):
            for (x,) in loader:
                losses_of(model, x).mean().backward()
                opt.step()
        ends.append([p.detach() for p in model.parameters()])
    torch.testing.assert_close(*ends)


@functools.cache
def _remembered(n, t):
    return torch.ones(n, t, 1, dtype=torch.float64).cumsum(1)


def _cached(s, h):
    n, t, _ = h.shape
    if s.kind == "attribute":
        if s.longest < t:
            s.codes, s.longest = torch.arange(64.0, dtype=h.dtype).cos()[:, None], t
        return h * s.codes[:t]
    if s.kind == "dictionary":
        if t not in s.known:
            s.known[t] = (torch.arange(t, dtype=h.dtype)[:, None] * s.rate).sin()
        return h * s.known[t]
    if s.kind == "function":
        return h * _remembered(n, t)
    s.calls += 1
    return h.tanh() if s.calls % 3 == 0 else h


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("mode", ["ghost", "hooks"])
@pytest.mark.parametrize("kind", ["attribute", "dictionary", "function", "counter"])
def test_caches_and_counters_of_a_model_are_no_reason_to_refuse(kind, mode, style):
    """What a model keeps from its first pass, or does at every third, does not look as if the check went another way."""
    _remembered.cache_clear()
    model = Net(lambda s, x: s.b(_cached(s, s.a(x)).mean(1)), a=nn.Linear(D, D), b=nn.Linear(D, 3)).double()
    model.register_buffer("rate", torch.rand(D, dtype=torch.float64))
    model.kind, model.longest, model.known, model.calls, step = kind, 0, {}, 0, stepper(style)
    with enter(model, mode) as (opt, loader):
        for (x,) in loader:
            step(model, opt, x)


def test_a_pass_that_cannot_be_repeated_is_refused():
    """A model that goes another way whenever it is run on the same batch cannot be checked, and is not released."""

    def forward(s, x):
        calls.append(1)
        h = s.a(x)
        return s.b((h.tanh() if len(calls) == late else h.relu()).mean(1))

    calls, late = [], -1
    model = net(forward)
    with enter(model) as (opt, loader):
        batches = iter(loader)
        losses_of(model, *next(batches)).mean().backward()
        opt.step()
        late = len(calls) + 1
        losses_of(model, *next(batches)).mean().backward()
        with pytest.raises(errors.SelfCheckError, match="did not do the same as before"):
            opt.step()


class _Counting(TorchFunctionMode):
    calls = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        return func(*args, **(kwargs or {}))


def _inside_a_mode(model, x):
    with _Counting():
        losses_of(model, x)


def test_nothing_is_left_on_the_stack_of_function_modes():
    """Interrupted passes leave no mode behind, modes of the user stay where they are, and closed scopes follow nothing."""

    def forward(s, x):
        if s.switch:
            raise KeyboardInterrupt
        return s.b(s.a(x).mean(1))

    model = net(forward)
    model.switch = False
    with _Counting() as mine:
        with enter(model) as (opt, loader):
            for index, (x,) in enumerate(loader):
                model.switch = index == 1
                if model.switch:
                    with pytest.raises(KeyboardInterrupt):
                        losses_of(model, x)
                    opt.zero_grad()
                    assert _get_current_function_mode_stack() == [mine]
                    continue
                losses_of(model, x).mean().backward()
                assert _get_current_function_mode_stack() == [mine]
                opt.step()
            model.switch = True
            with pytest.raises(KeyboardInterrupt):
                _inside_a_mode(model, x)
        assert _get_current_function_mode_stack() == [mine]
    assert mine.calls > 0
    assert _get_current_function_mode_stack() == []


@pytest.mark.parametrize("mode", ["hooks", "functorch"])
@pytest.mark.parametrize("reading", ["mixed inside", "mixed by a loss of the model", "sound"])
def test_grad_sample_is_checked_before_it_can_be_read(reading, mode):
    """In the modes that write ``p.grad_sample``, ``backward()`` itself refuses what a step would refuse."""

    def forward(s, x):
        h = s.a(x)
        if reading == "mixed inside":
            h = h - h.mean(0)
        out = s.b(h.mean(1))
        return (out.softmax(0) if "loss" in reading else out).square().mean()

    model = net(forward)
    scope = enter(model, mode)
    with scope as (opt, loader):
        (x,) = next(iter(loader))
        if reading != "sound":
            with pytest.raises(errors.SelfCheckError):
                model(x).backward()
            assert all(not hasattr(p, "grad_sample") for p in model.parameters())
            with pytest.raises(errors.ScopeError, match="no gradients"):
                opt.step()
            return
        model(x).backward()
        got = {name: p.grad_sample for name, p in model.named_parameters()}
        opt.zero_grad()
        scope.controller.disable_hooks()
        torch.testing.assert_close(got, sample_grads(model, lambda m, part: m(part), x))


def _two_outputs(s, x):
    e = s.b(s.a(x).mean(1))
    return UserDict(embeddings=e, logits=e @ e.mT)


@pytest.mark.parametrize("mode", MODES)
def test_outputs_that_the_loss_does_not_use_may_mix_samples(mode):
    """A model that also returns similarities of all pairs can be trained on its embeddings, but not on those."""
    model = net(_two_outputs)
    with enter(model, mode) as (opt, loader):
        batches = iter(loader)
        for _ in range(2):
            model(*next(batches))["embeddings"].square().mean(1).mean().backward()
            opt.step()
        before = values(model)
        logits = model(*next(batches))["logits"]
        with pytest.raises(errors.SelfCheckError):
            stepped(F.cross_entropy(logits, torch.arange(N)), opt)
        assert still(before, model)


@pytest.mark.parametrize("time_first", [False, True])
@pytest.mark.parametrize("mixed", [False, True])
def test_outputs_with_several_rows_per_sample_are_compared(mixed, time_first):
    """Rows of all samples flattened into one axis, in either order, are compared like any other output."""

    def forward(s, x):
        h = s.a(x)
        h = h - h.mean(0) if mixed else h
        return s.b((h.transpose(0, 1) if time_first else h).flatten(0, 1))

    model = net(forward)
    with enter(model) as (opt, loader):
        model(*next(iter(loader))).square().mean().backward()
        if mixed:
            with pytest.raises(errors.SelfCheckError):
                opt.step()
        else:
            opt.step()


@pytest.mark.parametrize("flat_first", [False, True])
def test_a_part_called_with_and_without_flattened_frames_is_right(flat_first):
    """A part that gets frames flattened into the batch from the model, and single frames from the loop, stays right."""
    encoder = Net(lambda s, x: (s.a(x) * s.g).tanh(), a=nn.Linear(D, D), g=nn.Parameter(torch.ones(D)))
    model = Net(lambda s, x: s.b(s.encoder(x.flatten(0, 1)).view(*x.shape[:2], -1).mean(1)), b=nn.Linear(D, 3))
    model.encoder = encoder
    model.double()
    scope = enter(model, "hooks")
    with scope as (opt, loader):
        for index, (x,) in enumerate(loader):
            flat = (index % 2 == 0) == flat_first

            def losses(m, x, flat=flat):
                return (m(x) if flat else m.encoder(x[:, 0])).square().mean(1)

            losses(model, x).mean().backward()
            got = {name: p.grad_sample.clone() for name, p in model.named_parameters()}
            opt.zero_grad()
            scope.controller.disable_hooks()
            expected = sample_grads(model, losses, x)
            scope.controller.enable_hooks()
            torch.testing.assert_close(got, expected)
            losses(model, x).mean().backward()
            opt.step()
