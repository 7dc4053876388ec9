"""Models are run aside to find out about them: nothing of that is left in them."""

import dataclasses
import itertools
import random
import weakref
from contextlib import suppress

import numpy
import pytest
import torch
from torch import nn

from dp_hooks import HookController, explain
from dp_hooks.capture.calls.undisturbed import undisturbed
from dp_hooks.rules import linear, registry

from .. import models


class Counting(nn.Module):
    """Counts its forward passes in a frozen parameter, a buffer, an attribute and a list."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3, dtype=torch.float64)
        self.frozen = nn.Parameter(torch.zeros(1), requires_grad=False)
        self.register_buffer("buffer", torch.zeros(1, dtype=torch.long))
        self.number, self.listed = 0, []

    def forward(self, x):
        with torch.no_grad():
            self.frozen += 1
            self.buffer += 1
        self.number += 1
        self.listed.append(self.number)
        return self.layer(x)

    def counts(self):
        return (int(self.frozen), int(self.buffer), self.number, len(self.listed))


@pytest.mark.parametrize("mode", models.MODES)
def test_a_model_that_counts_its_forward_passes_counts_those_of_the_user_only(mode):
    """Without the self-check two steps are two forward passes, wherever a model counts them."""
    model = Counting()
    scope = models.scope_over(model, grad_sample_mode=mode, self_check=False)
    with scope as (opt, loader):
        for step in (1, 2):
            for x, y in loader:
                opt.zero_grad()
                nn.functional.cross_entropy(model(x), y).backward()
                opt.step()
            assert model.counts() == (step, step, step, step)


def test_nothing_is_left_of_what_runs_undisturbed():
    """Values, gradients, attributes of parameters and all generators are back, also after an error."""
    model = Counting()
    weight = model.layer.weight
    weight.grad, weight.mark = torch.ones_like(weight), "mine"
    before = (torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].copy())
    with suppress(KeyError), undisturbed(model):
        model(models.randn(2, 4)).sum().backward()
        random.random()
        numpy.random.rand()
        weight.mark = "other"
        model.new = 1
        raise KeyError
    assert model.counts() == (0, 0, 0, 0)
    assert weight.mark == "mine"
    assert torch.equal(weight.grad, torch.ones_like(weight))
    assert not hasattr(model, "new")
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    assert (before[2] == numpy.random.get_state()[1]).all()


@pytest.mark.usefixtures("nothing_is_small")
def test_the_factors_of_a_layer_are_made_once_in_a_step(monkeypatch):
    """Norms and sums of a deferred layer come from the same factors."""
    made = []
    own = linear.outer_products

    def counting(call):
        made.append((call.name, call.names))
        return own(call)

    monkeypatch.setattr("dp_hooks.gradients.terms._GENEROSITY", 0)
    monkeypatch.setitem(registry._RULES, nn.Linear, dataclasses.replace(linear.LINEAR, outer_products=counting))
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    controller = HookController(model, grad_sample_mode="ghost")
    model(torch.randn(6, 4, dtype=torch.float64)).square().mean().backward()
    found = controller.take()
    norms = found.sq_norms(found.params)
    found.weighted_sums(norms, torch.ones(6, dtype=torch.bool))
    controller.cleanup()
    assert len(made) == len(set(made)) == 4  # weight and bias of two layers


@pytest.mark.parametrize("make", [torch.eye(3).to_sparse, lambda: torch.ones(3, device="meta")], ids=["sparse", "meta"])
def test_frozen_parameters_of_any_layout_are_no_obstacle(make):
    """A frozen parameter that cannot be compared number by number leaves gradients and marks of the others alone."""
    model = nn.Sequential(nn.Linear(4, 3))
    model.register_parameter("odd", nn.Parameter(make(), requires_grad=False))
    weight = model[0].weight
    weight.grad = torch.ones_like(weight)
    controller = HookController(model)
    model(torch.randn(5, 4)).sum().backward()
    assert weight.grad_sample.shape == (5, 3, 4)
    controller.cleanup()
    assert torch.equal(weight.grad, torch.ones_like(weight))
    assert not explain(model, torch.randn(4, 4)).refusals
    assert torch.equal(weight.grad, torch.ones_like(weight))


@pytest.mark.parametrize("mode", models.MODES)
def test_batches_are_let_go_after_their_step(mode):
    """After a step nothing holds the inputs of its batch, in the first step, which is checked, or later."""
    model = models.build("mlp")
    with models.scope_over(model, grad_sample_mode=mode) as (opt, loader):
        for _ in range(3):
            for x, y in loader:
                x = x.clone()  # the loader holds its own until the next one
                held = weakref.ref(x)
                nn.functional.cross_entropy(model(x), y).backward()
                opt.step()
                opt.zero_grad()
                del x
                assert held() is None


class Keeping(nn.Module):
    """Keeps its last hidden state, with its history."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head, self.hidden = nn.Linear(4, 5), nn.Linear(5, 3), None

    def forward(self, x):
        self.hidden = self.layer(x)
        return self.head(self.hidden)


def test_what_a_model_keeps_of_a_batch_is_no_chain_to_earlier_ones():
    """A model that stores a tensor with history in an attribute holds one batch at a time, not all of them."""
    model, held = Keeping().double(), []
    with models.scope_over(model) as (opt, loader):
        for _ in range(4):
            for x, y in loader:
                x = x.clone()
                held.append(weakref.ref(x))
                nn.functional.cross_entropy(model(x), y).backward()
                opt.step()
                del x
    assert sum(reference() is not None for reference in held) <= 1


class Stopping(nn.Module):
    """Uses the weight of one module in another way, too; may stop in the middle, once."""

    stops = False  # of the class: attributes of a module that is run aside are put back

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        if Stopping.stops:
            Stopping.stops = False
            raise KeyboardInterrupt
        return nn.functional.linear(self.layer(x), self.layer.weight)


def test_probes_that_were_interrupted_are_made_again():
    """After an interruption in the middle of the first step the next one finds out what the first could not."""
    model = Stopping().double()
    scope = models.scope_over(model)
    with scope as (opt, loader):
        Stopping.stops = True
        for x, y in itertools.chain(loader, loader):
            with suppress(KeyboardInterrupt):
                nn.functional.cross_entropy(model(x), y).backward()
                opt.step()
    assert scope.steps == 1


def test_hooks_that_are_added_again_find_out_again():
    """A controller whose hooks were removed and added knows of weights used outside their module as before."""
    model, x = Stopping().double(), models.randn(5, 4)
    controller = HookController(model)
    found = []
    for _ in range(2):
        model(x).sum().backward()
        found.append(model.layer.weight.grad_sample.clone())
        controller.cleanup()
        controller.add_hooks()
    controller.cleanup()
    assert torch.equal(*found)
