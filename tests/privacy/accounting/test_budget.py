"""How a budget is calibrated, and how it ends a run (trap P3)."""

import math
from typing import Any

import pytest
import torch
from opacus.accountants import RDPAccountant
from opacus.schedulers import StepNoise

from dp_hooks.errors import BudgetExhaustedError, InvalidArgumentError, ScopeError

from ...models import equal_trees
from ...training.helpers import backward, train
from .helpers import ACCOUNTANTS, DELTA, ELSEWHERE, Charged, accountant_with

pytestmark = pytest.mark.filterwarnings("ignore:GDP accounting is experimental")


def train_until_used_up(model: Any, opt: Any, loader: Any, passes: int) -> None:
    """Some passes, in one of which the budget ends."""
    with pytest.warns(UserWarning, match="the privacy budget is used up"):  # noqa: PT031
        for _ in range(passes):
            train(model, opt, loader)


BUDGETS = [
    # examples, batch, epochs, steps: 225 batches is where "epochs / q" is truncated to 224 steps elsewhere
    (225, 1, 1, 225),
    (100, 7, 3, 45),
    (1000, 300, 2, 8),
    (49, 1, 1, 49),
    (29, 3, 1.5, 15),
    (10, 3, 2.2, 9),
    (5, 5, 1, 1),
]


@pytest.mark.parametrize(("examples", "batch", "epochs", "steps"), BUDGETS)
def test_exactly_the_calibrated_steps_are_run(examples: int, batch: int, epochs: float, steps: int) -> None:
    """All epochs together run the calibrated number of steps, within the target and close to it; then nothing goes."""
    target, run = 2.0, Charged(examples, batch, target_epsilon=2.0, epochs=epochs)
    sigma, rate = run.scope.noise_multiplier, batch / examples
    with run as (model, opt, loader):
        ran = sum(train(model, opt, loader) for _ in range(math.ceil(epochs)))
        assert ran == run.scope.steps == steps
        assert run.history == [(sigma, rate, steps)]
        assert 0.9 * target < run.epsilon <= target
        before = run.state()
        with pytest.warns(UserWarning, match="budget"):
            assert list(loader) == []
        with pytest.raises(BudgetExhaustedError, match=r"epsilon=2\.0 at delta=1e-05"):
            opt.step()
        assert equal_trees(before, run.state())
    more = accountant_with([(sigma, rate, max(steps + 1, int(steps * 1.1)))], "rdp")
    assert more.get_epsilon(DELTA) > target or steps == 1


@pytest.mark.parametrize("epochs", [1, 3, 2.5])
def test_budget_without_poisson_sampling_counts_passes(epochs: float) -> None:
    """Without Poisson sampling a budget lasts for the calibrated passes; then the loader is empty."""
    run = Charged(poisson_sampling=False, target_epsilon=4.0, epochs=epochs)
    with run as (model, opt, loader):
        for _ in range(math.ceil(epochs)):
            assert train(model, opt, loader) == 3
        with pytest.warns(UserWarning, match="budget"):
            assert train(model, opt, loader) == 0
    assert run.history == [(run.scope.noise_multiplier, 1.0, math.ceil(epochs))]
    assert 0.9 * 4.0 < run.epsilon <= 4.0


@pytest.mark.parametrize("accountant", ACCOUNTANTS)
def test_budget_with_every_accountant(accountant: str) -> None:
    """Each accountant calibrates to its own epsilon: within the target at the end, and above nine tenths of it."""
    poisson = accountant != "gdp"
    run = Charged(target_epsilon=3.0, epochs=3, accountant=accountant, poisson_sampling=poisson).after(passes=3)
    assert run.scope.steps == 9
    assert 0.9 * 3.0 < run.epsilon <= 3.0
    wanted = accountant_with([(run.scope.noise_multiplier, *((4 / 12, 9) if poisson else (1.0, 3)))], accountant)
    assert run.epsilon == wanted.get_epsilon(DELTA)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_step_beyond_the_budget_touches_nothing(optimizer: Any) -> None:
    """The step after the last raises with parameters, momentum, gradients, history and the closure untouched."""
    run = Charged(4, 4, optimizer=lambda m: optimizer(m.parameters(), lr=0.1), target_epsilon=2.0, epochs=1)
    calls: list[int] = []
    with run as (model, opt, loader):
        assert train(model, opt, loader) == 1
        opt.zero_grad()
        backward(model, *ELSEWHERE)
        before = run.state()
        with pytest.raises(BudgetExhaustedError, match="used up after 1 steps"):
            opt.step()
        with pytest.raises(BudgetExhaustedError):
            opt.step(lambda: calls.append(1))
        assert calls == []
        assert equal_trees(before, run.state())
        assert all(p.grad is None for p in model.parameters())
        assert run.scope.steps == 1


def test_iterators_opened_early_cannot_outlive_the_budget() -> None:
    """Two iterators opened while the whole budget was left still share it: the surplus step is refused."""
    run = Charged(8, 4, target_epsilon=2.0, epochs=1)
    with run as (model, opt, loader):
        one, two = iter(loader), iter(loader)
        for batches in (one, one):
            backward(model, *next(batches))
            opt.step()
        backward(model, *next(two))
        with pytest.raises(BudgetExhaustedError):
            opt.step()
    assert run.history == [(run.scope.noise_multiplier, 0.5, 2)]


def test_foreign_step_beyond_the_budget_is_refused() -> None:
    """Under a budget a foreign step that alone would exceed it raises before anything is touched."""
    run = Charged(target_epsilon=1.0, epochs=1)
    with run as (model, opt, _):
        backward(model, *ELSEWHERE)
        before = run.state()
        with pytest.raises(BudgetExhaustedError, match="did not come from the private loader"):
            opt.step()
        assert equal_trees(before, run.state())
        assert all(p.grad is None for p in model.parameters())


@pytest.mark.filterwarnings("ignore:a step was taken on a batch")
def test_foreign_steps_and_loader_steps_together_stay_within_the_budget() -> None:
    """What a foreign step spent is missing for the loader's batches: epsilon never passes the target."""
    target, run = 8.0, Charged(12, 8, target_epsilon=8.0, epochs=3)
    with run as (model, opt, loader):
        backward(model, *ELSEWHERE)
        opt.step()
        assert 0.1 * target < run.epsilon < target
        train_until_used_up(model, opt, loader, 5)
    assert run.epsilon <= target


def test_budget_needs_an_accountant_without_charges() -> None:
    """Calibrating for an accountant that already holds charges is refused, since they would be left out."""
    used = RDPAccountant()
    used.history = [(1.0, 0.1, 5)]
    with pytest.raises(InvalidArgumentError, match=r"target_epsilon=2\.0.*already holds"):
        Charged(target_epsilon=2.0, epochs=1, accountant=used)
    assert used.history == [(1.0, 0.1, 5)]


def test_noise_multiplier_is_fixed_under_a_budget() -> None:
    """With ``target_epsilon`` neither the attribute nor a noise scheduler can change sigma; the same value may be set."""
    with Charged(target_epsilon=2.0, epochs=1) as (_, opt, _):
        sigma = opt.noise_multiplier
        for value in (0.0, sigma / 2, 2 * sigma):
            with pytest.raises(ScopeError, match="noise_multiplier="):
                opt.noise_multiplier = value
        opt.noise_multiplier = sigma
        scheduler = StepNoise(opt, step_size=1, gamma=0.5)
        with pytest.raises(ScopeError, match="target_epsilon"):
            scheduler.step()
        assert opt.noise_multiplier == sigma


@pytest.mark.parametrize("accountant", ACCOUNTANTS)
@pytest.mark.parametrize("target", [0.2, 1.0, 8.0, 60.0])
def test_calibration_uses_the_budget_and_no_more(target: float, accountant: str) -> None:
    """For small and large targets epsilon of the calibrated run is below the target, and close to it."""
    scope = Charged(accountant=accountant, target_epsilon=target, epochs=3, poisson_sampling=accountant != "gdp").scope
    history = [(scope.noise_multiplier, scope.plan.charged_rate, scope.plan.releases(3))]
    assert 0.99 * target <= accountant_with(history, accountant).get_epsilon(DELTA) <= target


@pytest.mark.parametrize(("target", "accountant"), [(0.005, "prv"), (0.05, "rdp"), (1e4, "prv"), (1e4, "rdp")])
def test_a_budget_that_no_noise_can_meet_or_that_means_nothing_is_refused(target: float, accountant: str) -> None:
    """Targets below an accountant's resolution, or absurdly large, are errors at once instead of an endless search."""
    with pytest.raises(InvalidArgumentError, match="target_epsilon="):
        Charged(accountant=accountant, target_epsilon=target, epochs=3)
