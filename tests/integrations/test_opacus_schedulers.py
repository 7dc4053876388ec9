"""Opacus's schedulers of noise and clipping bound over the private optimizer: what a step uses is what is charged."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from opacus.schedulers import ExponentialGradClip, ExponentialNoise, LambdaGradClip, LambdaNoise, StepGradClip, StepNoise
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dp_hooks.errors import InvalidArgumentError, ScopeError

from ..models import BOUND, assert_same, build, clipped_sum, drawn, examples, moved, sample_gradients, scope_over, values
from ..training.helpers import POISSON, step

NOISE: dict[str, tuple[Callable[[Any], Any], list[float]]] = {
    "exponential": (lambda opt: ExponentialNoise(opt, gamma=0.5), [4.0, 2.0, 1.0, 0.5]),
    "lambda": (lambda opt: LambdaNoise(opt, noise_lambda=lambda epoch: 1 + epoch), [4.0, 8.0, 12.0, 16.0]),
    "step": (lambda opt: StepNoise(opt, step_size=2, gamma=0.5), [4.0, 4.0, 2.0, 2.0]),
}


def noise_of(sigma: float, replay: torch.Generator, like: list[Tensor]) -> list[Tensor]:
    """Draw what one release without examples moves the parameters by."""
    flat = torch.empty(sum(p.numel() for p in like), dtype=like[0].dtype)
    flat.normal_(0.0, sigma * BOUND, generator=replay)  # all are small: one draw
    return [part.view_as(p) for part, p in zip(flat.split([p.numel() for p in like]), like, strict=True)]


@pytest.mark.parametrize("managed", [False, True], ids=["", "BatchMemoryManager"])
@pytest.mark.parametrize("kind", NOISE)
def test_the_noise_of_a_step_is_what_it_is_charged_with(kind: str, managed: bool) -> None:
    """Every step of a noise scheduler counts for the next release: its noise has that size, and that is what is charged."""
    make, sigmas = NOISE[kind]
    model, replay = build("mlp"), drawn(5)
    options = {**POISSON, "loss_reduction": "sum", "noise_multiplier": 4.0, "noise_generator": drawn(5)}
    scope = scope_over(model, **options, sample_rate=1e-9)
    with scope as (opt, own):
        if managed:
            with BatchMemoryManager(data_loader=own, max_physical_batch_size=2, optimizer=opt) as cut:
                own = cut
        schedule = make(opt)
        for sigma, _ in zip(sigmas, own, strict=False):
            before = values(model)
            opt.step_empty()
            schedule.step()
            assert_same(moved(before, model), noise_of(sigma, replay, before))
    spent = [(sigma, 1e-9) for sigma, _, count in scope.accountant.history for _ in range(count)]
    assert spent == [(sigma, 1e-9) for sigma in sigmas]


def test_without_poisson_sampling_the_noise_changes_between_passes_alone() -> None:
    """A pass is charged at its beginning: less noise in the middle is refused by name, and counts from the next pass on."""
    scope = scope_over(build("mlp"), noise_multiplier=4.0, accountant="rdp")
    with scope as (opt, own):
        schedule = ExponentialNoise(opt, gamma=0.5)
        for _ in range(2):
            for x, y in own:
                step(scope.model, opt, x, y)
            schedule.step()
        assert scope.accountant.history == [(4.0, 1.0, 1), (2.0, 1.0, 1)]
        x, y = next(iter(own))
        schedule.step()
        with pytest.raises(ScopeError, match="lower the noise between passes"):
            step(scope.model, opt, x, y)
        assert scope.steps == 2


CLIP: dict[str, tuple[Callable[[Any], Any], list[float]]] = {
    "exponential": (lambda opt: ExponentialGradClip(opt, gamma=0.5), [0.5, 0.25, 0.125]),
    "lambda": (lambda opt: LambdaGradClip(opt, scheduler_function=lambda epoch: 1 + epoch), [0.5, 1.0, 1.5]),
    "step": (lambda opt: StepGradClip(opt, step_size=2, gamma=0.5), [0.5, 0.5, 0.25]),
}


@pytest.mark.parametrize("kind", CLIP)
def test_the_bound_of_a_step_is_what_the_scheduler_says(kind: str) -> None:
    """Each step moves by gradients that are clipped to the bound of the moment; the charge does not depend on it."""
    make, bounds = CLIP[kind]
    model = build("mlp")
    scope = scope_over(model, **POISSON, loader=DataLoader(TensorDataset(*examples()), batch_size=6))
    with scope as (opt, own):
        schedule = make(opt)
        for bound in bounds:
            before, expected = values(model), clipped_sum(sample_gradients(copy.deepcopy(model), *examples()), bound)
            for x, y in own:
                step(model, opt, x, y)
            assert_same(moved(before, model), [g / 6 for g in expected])
            schedule.step()
    assert scope.accountant.history == [(0.0, 1.0, len(bounds))]


def test_a_bound_cannot_change_amid_a_logical_batch() -> None:
    """A scheduler that steps between two parts is refused; the batch keeps its bound."""
    model = build("mlp")
    before, expected = values(model), clipped_sum(sample_gradients(model, *examples()), BOUND)
    with scope_over(model) as (opt, own), BatchMemoryManager(data_loader=own, max_physical_batch_size=2, optimizer=opt) as cut:
        schedule = ExponentialGradClip(opt, gamma=0.5)
        for x, y in cut:
            step(model, opt, x, y)
            if not opt.physical_batch.last:
                with pytest.raises(ScopeError, match="middle of a logical batch"):
                    schedule.step()
    assert_same(moved(before, model), [g / 6 for g in expected])


def test_a_budget_keeps_its_noise() -> None:
    """What was calculated for a target cannot be scheduled, up or down, nor is it changed by trying; a factor of 1 does nothing."""
    model: nn.Module = build("mlp")
    budget = {"noise_multiplier": None, "target_epsilon": 5.0, "target_delta": 1e-5, "epochs": 3}
    scope = scope_over(model, **{**POISSON, **budget})
    with scope as (opt, own):
        sigma = opt.noise_multiplier
        for gamma in (0.5, 2.0):
            schedule = ExponentialNoise(opt, gamma=gamma)
            with pytest.raises(ScopeError, match="calculated for target_epsilon"):
                schedule.step()
        constant = ExponentialNoise(opt, gamma=1.0)
        for _ in range(3):
            for x, y in own:
                step(model, opt, x, y)
            constant.step()
    assert scope.accountant.history == [(sigma, 1.0, 3)]
    assert scope.get_epsilon(1e-5) <= 5.0


@pytest.mark.parametrize("factor", [-1.0, float("nan"), float("inf")])
def test_noise_that_is_no_noise_is_refused(factor: float) -> None:
    """A scheduler that comes to a number that cannot be a noise multiplier is refused, and the one before stays."""
    with scope_over(build("mlp"), **POISSON, noise_multiplier=2.0) as (opt, _):
        with pytest.raises(InvalidArgumentError, match="noise_multiplier"):
            LambdaNoise(opt, noise_lambda=lambda epoch: factor)
        assert opt.noise_multiplier == 2.0
