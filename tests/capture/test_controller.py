"""HookController on its own: the life of its hooks, and what it captures."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dp_hooks import HookController, errors

from .. import laws
from ..cases import N
from ..models import Net, randn
from ..reference import losses_of, sample_grads

T = 5
each_mode = pytest.mark.parametrize("mode", laws.MODES, ids=str)


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
    expected = sample_grads(model, losses_of, x)["0.weight"].sum(0)
    losses_of(model, x).sum().backward()
    torch.testing.assert_close(model[0].weight.grad, expected)
    assert not hasattr(model[0].weight, "grad_sample")
    controller.enable_hooks()
    model.zero_grad()
    losses_of(model, x).mean().backward()
    assert model[0].weight.grad is None
    assert model[0].weight.grad_sample.shape == (N, 3, 4)
    controller.cleanup()


def test_batch_norm_switched_to_training_later_is_refused():
    """A frozen BatchNorm in eval mode passes; its first forward in training mode raises, naming it."""
    model = model_of(nn.Linear(4, 3), nn.BatchNorm1d(3).eval().requires_grad_(False))
    controller = HookController(model)
    losses_of(model, randn(N, 4)).mean().backward()
    model.train()
    with pytest.raises(errors.UnsupportedModelError, match=r"^1 \(BatchNorm1d\)"):
        model(randn(N, 4))
    controller.cleanup()


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

    def losses():
        found = losses_of(model, x)
        with torch.set_grad_enabled(with_gradients):
            losses_of(model, randn(rows, 3, 4))
        return found

    with laws.attached(model, mode) as controller:
        laws.agrees(controller, mode, losses, expected)


@each_mode
def test_the_first_batch_names_everything_that_is_in_the_way(mode):
    """Parts that can only be refused when they run are listed together, each with its reason and remedy."""

    def pairs():
        return Net(lambda s, x: (x @ x.mT * s.heat) @ x, heat=nn.Parameter(torch.ones(())))

    model = Net(lambda s, x: s.b(s.second(s.first(s.a(x)))), a=nn.Linear(4, 4), b=nn.Linear(4, 2)).double()
    model.first, model.second = pairs().double(), pairs().double()
    with (
        laws.attached(model, mode) as controller,
        pytest.raises(errors.UnsupportedModelError, match="for 2 reasons") as caught,
        laws.captured(controller, mode, lambda: losses_of(model, randn(N, 4))),
    ):
        pass
    lines = str(caught.value).splitlines()[1:]
    assert [line.split(":")[0] for line in lines] == ["  - second.heat", "  - first.heat"]
    assert all("samples mix" in line and "Remedy" in line for line in lines)
    assert not any(hasattr(p, "grad_sample") for p in model.parameters())


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


@each_mode
def test_an_input_that_was_shared_once_stays_shared(mode):
    """A module without a rule keeps apart what samples share, also when a batch has just that many samples."""

    class Bias(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(4, dtype=torch.float64))

        def forward(self, x, positions):
            return x + self.scale * positions

    positions = randn(T, 4)
    model = Net(lambda s, x: s.b(x, positions), b=Bias())
    batches = [randn(rows, T, 4) for rows in (T + 1, T, T - 1)]
    expected = [sample_grads(model, losses_of, x) for x in batches]
    with laws.attached(model, mode) as controller:
        for x, wanted in zip(batches, expected, strict=True):
            laws.agrees(controller, mode, lambda x=x: losses_of(model, x), wanted)
