"""HookController on its own: the life of its hooks, and what it captures."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from dp_hooks import HookController, errors

from .models import Net, assert_same, each_mode, loader_of, moved, randn, scope_over, values
from .reference import losses_of, sample_grads
from .test_rules import N, assert_captured, assert_close

T = 5


def model_of(*layers):
    return nn.Sequential(*layers).double()


def hook_count(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_every_method_may_be_called_again():
    """add, enable, disable, remove and cleanup do nothing the second time, and hooks can be added anew."""
    model = model_of(nn.Linear(4, 3))
    controller = HookController(model)
    count = hook_count(model)
    assert count > 0
    controller.add_hooks()
    assert hook_count(model) == count
    for method in (controller.disable_hooks, controller.remove_hooks, controller.cleanup):
        method()
        method()
        assert not controller.hooks_enabled
    assert hook_count(model) == 0
    with pytest.raises(errors.ScopeError, match="add_hooks"):
        controller.enable_hooks()
    controller.add_hooks()
    losses_of(model, randn(N, 4)).mean().backward()
    assert model[0].weight.grad_sample.shape == (N, 3, 4)
    controller.cleanup()
    assert not hasattr(model[0].weight, "grad_sample")


def test_disabled_hooks_leave_ordinary_training_alone():
    """While disabled, p.grad is the ordinary gradient and no grad_sample appears; enabling captures again."""
    model, x = model_of(nn.Linear(4, 3)), randn(N, 4)
    controller = HookController(model)
    controller.disable_hooks()
    losses_of(model, x).sum().backward()
    expected = sample_grads(model, losses_of, x)["0.weight"].sum(0)
    torch.testing.assert_close(model[0].weight.grad, expected)
    assert not hasattr(model[0].weight, "grad_sample")
    controller.enable_hooks()
    model.zero_grad()
    losses_of(model, x).mean().backward()
    assert model[0].weight.grad is None
    assert model[0].weight.grad_sample.shape == (N, 3, 4)
    controller.cleanup()


@each_mode
def test_a_graph_that_outlives_the_controller_is_inert(mode):
    """Backward through a graph built before removal records nothing and disturbs no gradient of the input."""
    model = model_of(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    x = randn(N, 4).requires_grad_()
    controller = HookController(model, grad_sample_mode=mode)
    loss = losses_of(model, x).sum()
    controller.remove_hooks()
    loss.backward()
    assert controller.take() is None
    assert not any(hasattr(p, "grad_sample") for p in model.parameters())
    torch.testing.assert_close(x.grad, torch.autograd.grad(losses_of(model, x).sum(), x)[0])


def test_every_module_that_keeps_batch_statistics_is_listed():
    """The refusal names each module that keeps batch statistics; other buffers are no reason to refuse."""

    class Masked(nn.Linear):
        def __init__(self):
            super().__init__(3, 3)
            self.register_buffer("mask", torch.ones(()))

    model = nn.Sequential(Masked(), nn.BatchNorm1d(3), nn.Linear(3, 3), nn.BatchNorm1d(3))
    with pytest.raises(NotImplementedError) as caught:
        HookController(model)
    message = str(caught.value)
    assert all(name in message for name in ("1 (BatchNorm1d)", "3 (BatchNorm1d)"))
    assert "Linear" not in message
    assert "Masked" not in message
    assert hook_count(model) == 0


def test_batch_norm_switched_to_training_later_is_refused():
    """A frozen BatchNorm in eval mode passes; its first forward in training mode raises, naming it."""
    model = model_of(nn.Linear(4, 3), nn.BatchNorm1d(3).eval().requires_grad_(False))
    controller = HookController(model)
    losses_of(model, randn(N, 4)).mean().backward()
    model.train()
    with pytest.raises(errors.UnsupportedModelError, match=r"^1 \(BatchNorm1d\)"):
        model(randn(N, 4))
    controller.cleanup()


@pytest.mark.parametrize("mode", ["ghost", "hooks"])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(use_reentrant, mode):
    """Checkpointed parts, reentrant or not, give the gradients of single samples."""
    model = Net(
        lambda s, x: s.b(checkpoint(s.a, s.first(x), use_reentrant=use_reentrant)),
        first=nn.Linear(4, 4),
        a=nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4)),
        b=nn.Linear(4, 2),
    ).double()
    x = randn(N, 4)
    plain = Net(lambda s, x: s.b(s.a(s.first(x))), first=model.first, a=model.a, b=model.b)
    assert_captured(sample_grads(plain, losses_of, x), model, x, mode=mode)


def _reading_the_owner(use_reentrant):
    """Checkpoints around functions that read parameters of the module around them, once with a layer in between."""

    def part(s, h):
        return s.a(h * s.gain + s.positions).tanh() * s.gain

    def run(function, h):
        return function(h) if use_reentrant is None else checkpoint(function, h, use_reentrant=use_reentrant)

    def forward(s, x):
        h = s.first(x)
        for function in (lambda h: part(s, h), lambda h: h * s.gain, lambda h: part(s, h)):
            h = run(function, h)
        return s.b((h + F.linear(h, s.a.weight)) * s.gain)

    return Net(
        forward,
        first=nn.Linear(4, 4),
        a=nn.Linear(4, 4),
        b=nn.Linear(4, 2),
        gain=nn.Parameter(torch.randn(4)),
        positions=nn.Parameter(torch.randn(3, 4)),
    ).double()


@each_mode
@pytest.mark.parametrize("checked", [False, True])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_functions_may_read_parameters_of_the_module_around_them(use_reentrant, checked, mode):
    """A parameter read inside a checkpoint by closure is right, and the module holds its own parameters afterwards."""
    model, plain, x = _reading_the_owner(use_reentrant), _reading_the_owner(None), randn(N, 3, 4)
    plain.load_state_dict(model.state_dict())
    own = list(model.parameters())
    expected = sample_grads(plain, losses_of, x)
    if checked:
        with scope_over(model, loader=loader_of([x]), grad_sample_mode=mode, max_grad_norm=1e9) as (opt, loader):
            start = values(model)
            losses_of(model, *next(iter(loader))).mean().backward()
            assert all(a is b for a, b in zip(own, model.parameters(), strict=True))
            assert all(p.grad is None for p in own)
            opt.step()
        assert_same(moved(start, model), [expected[n].mean(0) for n, _ in model.named_parameters()])
    else:
        assert_captured(expected, model, x, mode=mode)
    assert all(a is b for a, b in zip(own, model.parameters(), strict=True))


@each_mode
@pytest.mark.parametrize("with_gradients", [True, False])
@pytest.mark.parametrize("rows", [1, 2 * N])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoints_know_their_samples_after_another_forward_pass(use_reentrant, rows, with_gradients, mode):
    """A pass over other samples between forward and backward does not change whose gradients a checkpoint finds."""

    def part(s, h):
        return (s.a(h.flatten(0, 1)) * s.gain).view(h.shape).tanh()

    def forward(s, x):
        h = s.first(x)
        return s.b(checkpoint(lambda h: part(s, h), h, use_reentrant=use_reentrant) if s.saves else part(s, h))

    parts = {"first": nn.Linear(4, 4), "a": nn.Linear(4, 4), "b": nn.Linear(4, 2), "gain": nn.Parameter(torch.randn(4))}
    model, x = Net(forward, **parts).double(), randn(N, 3, 4)
    model.saves = False
    expected = sample_grads(model, losses_of, x)
    model.saves = True
    controller = HookController(model, grad_sample_mode=mode)
    loss = losses_of(model, x).mean()
    with torch.set_grad_enabled(with_gradients):
        losses_of(model, randn(rows, 3, 4))
    loss.backward()
    found = controller.take()
    assert_close({controller.name_of(p): found.grads(p) for p in found.params}, expected)
    controller.cleanup()


@each_mode
def test_the_first_batch_names_everything_that_is_in_the_way(mode):
    """Parts that can only be refused when they run are listed together, each with its reason and remedy."""

    def pairs():
        return Net(lambda s, x: (x @ x.mT * s.heat) @ x, heat=nn.Parameter(torch.ones(())))

    model = Net(lambda s, x: s.b(s.second(s.first(s.a(x)))), a=nn.Linear(4, 4), b=nn.Linear(4, 2)).double()
    model.first, model.second = pairs().double(), pairs().double()
    controller = HookController(model, grad_sample_mode=mode)
    with pytest.raises(errors.UnsupportedModelError, match="for 2 reasons") as caught:
        losses_of(model, randn(N, 4)).mean().backward()
    lines = str(caught.value).splitlines()[1:]
    assert [line.split(":")[0] for line in lines] == ["  - second.heat", "  - first.heat"]
    assert all("samples mix" in line and "Remedy" in line for line in lines)
    assert not any(hasattr(p, "grad_sample") for p in model.parameters())
    controller.cleanup()


@each_mode
def test_keyword_inputs_and_nested_outputs(mode):
    """Modules called with keywords only, and modules that return dictionaries and tuples, are captured whole."""

    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.randn(4, dtype=torch.float64))
            self.linear = nn.Linear(4, 4).double()

        def forward(self, *, x, factor, flag="plus"):
            y = self.linear(input=x) * factor
            return {"sum": y + self.scale, "parts": (y, [x * self.scale]), "flag": flag}

    class Uses(nn.Module):
        def __init__(self):
            super().__init__()
            self.pair = Pair()

        def forward(self, x):
            out = self.pair(x=x, factor=2.0)
            return out["sum"].tanh() + out["parts"][0] * out["parts"][1][0]

    model, x = Uses(), randn(N, 4)
    assert_captured(sample_grads(model, losses_of, x), model, x, mode=mode)


def test_two_passes_over_the_same_samples_add_up_and_other_sizes_are_refused():
    """grad_sample is the sum over passes between boundaries; a pass over another number of samples is an error."""
    model, x = model_of(nn.Linear(4, 3)), randn(N, 4)
    controller = HookController(model)
    losses_of(model, x).mean().backward()
    once = model[0].weight.grad_sample.clone()
    losses_of(model, x).mean().backward()
    torch.testing.assert_close(model[0].weight.grad_sample, 2 * once)
    with pytest.raises(errors.ScopeError, match="different numbers of samples"):
        losses_of(model, x[:1]).mean().backward()
    controller.discard()
    losses_of(model, x).mean().backward()
    torch.testing.assert_close(model[0].weight.grad_sample, once)
    controller.cleanup()


def test_a_weight_used_elsewhere_is_named():
    """A weight read outside the model raises from backward, with its name, and its gradient is dropped."""
    model = Net(lambda s, x: s.a(x), a=nn.Linear(4, 4), b=nn.Linear(4, 2)).double()
    controller = HookController(model)
    with pytest.raises(errors.UnsupportedModelError, match=r"^b\.weight: used where no hook saw it"):
        F.linear(model(randn(N, 4)), model.b.weight).mean().backward()
    assert all(p.grad is None for p in model.parameters())
    controller.cleanup()


@pytest.mark.parametrize("how", ["functional_call", "assign", "new parameter"])
def test_parameters_exchanged_by_the_user_are_refused(how):
    """A forward pass with other parameters than those of the start is an error, never a run with the old ones."""
    model, x = model_of(nn.Linear(4, 3)), randn(N, 4)
    controller = HookController(model)
    with pytest.raises(errors.UnsupportedModelError, match="0: weight"):  # noqa: PT012
        if how == "functional_call":
            torch.func.functional_call(model, {"0.weight": torch.zeros(3, 4, dtype=torch.float64)}, (x,))
        elif how == "assign":
            model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
        else:
            model[0].weight = nn.Parameter(torch.zeros(3, 4, dtype=torch.float64))
        model(x)
    controller.cleanup()


def test_an_input_that_was_shared_once_stays_shared():
    """A module without a rule keeps apart what samples share, also when a batch has just that many samples."""

    class Bias(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(4, dtype=torch.float64))

        def forward(self, x, positions):
            return x + self.scale * positions

    positions = randn(T, 4)
    model = Net(lambda s, x: s.b(x, positions), b=Bias())
    controller = HookController(model)
    for rows in (T + 1, T, T - 1):
        x = randn(rows, T, 4)
        controller.disable_hooks()
        expected = sample_grads(model, losses_of, x)
        controller.enable_hooks()
        losses_of(model, x).mean().backward()
        found = controller.take()
        assert_close({controller.name_of(p): found.grads(p) for p in found.params}, expected)
    controller.cleanup()
