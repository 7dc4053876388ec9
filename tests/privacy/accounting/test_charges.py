"""What is charged, and when (traps P1, P2, P5, P13, P14)."""

import copy
import math
from typing import Any

import pytest
import torch
from opacus.accountants import RDPAccountant
from opacus.schedulers import StepNoise

from dp_hooks import PrivacyEngineHookBased
from dp_hooks.errors import InvalidArgumentError, ScopeError
from dp_hooks.privacy.accounting.opacus import epsilon_of

from ...models import equal_trees
from ...training.helpers import backward, train
from .helpers import ACCOUNTANTS, DELTA, ELSEWHERE, Charged, accountant_with

pytestmark = pytest.mark.filterwarnings("ignore:GDP accounting is experimental")

each_accountant = pytest.mark.parametrize("accountant", ACCOUNTANTS)


def gaussian_epsilon(sigma: float, delta: float) -> float:
    """Exact epsilon of one Gaussian mechanism of sensitivity 1 (Balle and Wang, ICML 2018, theorem 8)."""

    def phi(t: float) -> float:
        return 0.5 * math.erfc(-t / math.sqrt(2))

    def spent(epsilon: float) -> float:
        a, b = 0.5 / sigma, epsilon * sigma
        return phi(a - b) - math.exp(epsilon) * phi(-a - b)

    low, high = 0.0, 100.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if spent(middle) > delta else (low, middle)
    return high


@each_accountant
def test_epsilon_of_poisson_steps_equals_a_fresh_opacus_accountant(accountant: str) -> None:
    """Three epochs of Poisson batches cost what Opacus says for nine steps at q = batch_size / N."""
    run = Charged(noise_multiplier=1.3, accountant=accountant).after(passes=3)
    assert run.scope.steps == 9
    assert run.history == [(1.3, 4 / 12, 9)]
    assert run.epsilon == accountant_with([(1.3, 4 / 12, 9)], accountant).get_epsilon(DELTA)
    assert run.scope.report(DELTA).epsilon == run.epsilon


def test_rate_is_batch_size_over_dataset_size_not_one_over_length() -> None:
    """For 1000 examples in batches of 300, a step is charged q = 0.3, not the 0.25 of ``1 / len(loader)``."""
    run = Charged(1000, 300).after()
    assert run.scope.optimizer.expected_batch_size == 300
    assert run.history == [(1.0, 0.3, 4)]
    assert run.epsilon > accountant_with([(1.0, 0.25, 4)]).get_epsilon(DELTA) + 0.1


def test_given_sample_rate_is_charged() -> None:
    """With ``sample_rate`` that rate is used for drawing and for charging."""
    run = Charged(sample_rate=0.2)
    with run as (model, opt, loader):
        assert train(model, opt, loader) == 5
    assert run.history == [(1.0, 0.2, 5)]


@each_accountant
def test_no_noise_means_infinite_epsilon(accountant: str) -> None:
    """With sigma = 0 epsilon is infinite after one step, for every accountant, in scope and report."""
    run = Charged(noise_multiplier=0.0, accountant=accountant)
    with run as (model, opt, loader):
        assert run.epsilon == 0
        train(model, opt, loader, stop=1)
    assert run.epsilon == math.inf
    assert run.scope.report().epsilon == math.inf
    assert "infinite" in str(run.scope.report())


@pytest.mark.parametrize("accountant", ["prv", "rdp"])
def test_one_step_without_noise_among_others_means_infinite_epsilon(accountant: str) -> None:
    """A single release without noise makes epsilon infinite, whatever came before and after."""
    run = Charged(accountant=accountant)
    with run as (model, opt, loader):
        for sigma in (1.0, 0.0, 1.0):
            assert sigma == 1.0 or 0 < run.epsilon < math.inf
            opt.noise_multiplier = sigma
            train(model, opt, loader, stop=1)
    assert [entry[0] for entry in run.history] == [1.0, 0.0, 1.0]
    assert run.epsilon == math.inf


@pytest.mark.parametrize("poisson", [True, False])
@each_accountant
def test_epsilon_is_zero_before_the_first_step(accountant: str, poisson: bool) -> None:
    """Nothing is spent by building a scope, entering it, or running the model."""
    run = Charged(accountant=accountant, poisson_sampling=poisson)
    assert run.epsilon == 0
    with run as (model, opt, _):
        backward(model, *ELSEWHERE)
        opt.zero_grad()
        assert run.epsilon == 0
    assert run.scope.report().epsilon == 0


@pytest.mark.parametrize("delta", [0, 1, -0.1, 2.0, math.nan, "1e-5", None])
def test_epsilon_at_an_impossible_delta_is_refused(delta: Any) -> None:
    """Epsilon of scope and engine, and a report, at a delta outside (0, 1) are refused by name, spent budget or not."""
    scope, engine = Charged().scope, PrivacyEngineHookBased()
    for call in (scope.get_epsilon, engine.get_epsilon, *([] if delta is None else [scope.report])):
        with pytest.raises(InvalidArgumentError, match="delta="):
            call(delta)


def test_a_logical_batch_in_parts_is_charged_once() -> None:
    """Physical parts add up to one charge each logical batch, at the logical rate."""
    run = Charged(12, 6, max_physical_batch_size=2)
    with run as (model, opt, loader):
        assert train(model, opt, loader) > 2
    assert run.history == [(1.0, 0.5, 2)]


def test_first_pass_without_poisson_sampling_is_one_gaussian_mechanism() -> None:
    """One pass in the loader's order costs the exact Gaussian epsilon, 4.377 for sigma = 1, with no amplification."""
    run = Charged(poisson_sampling=False)
    with run as (model, opt, loader):
        assert train(model, opt, loader) == 3
    exact = gaussian_epsilon(1.0, DELTA)
    assert exact == pytest.approx(4.377, abs=5e-4)
    assert exact <= run.epsilon * (1 + 1e-12) <= exact + 0.02
    assert run.history == [(1.0, 1.0, 1)]
    report = run.scope.report()
    assert report.sample_rate == 1.0
    assert "add/remove" in report.sampling


@pytest.mark.parametrize(("stops", "passes"), [([None], 1), ([None, None], 2), ([1], 1), ([1, 1, 1], 3), ([2, None, 1], 3)])
def test_every_started_pass_is_charged(stops: list[int | None], passes: int) -> None:
    """Without Poisson sampling each pass that hands out a batch costs one full-rate release, broken off or not."""
    run = Charged(poisson_sampling=False, noise_multiplier=2.0, accountant="rdp")
    with run as (model, opt, loader):
        for stop in stops:
            train(model, opt, loader, stop=stop)
    assert run.history == [(2.0, 1.0, passes)]


def test_a_pass_is_charged_before_its_first_batch_arrives() -> None:
    """The charge of a pass is there when its first batch is seen; an exception in the first step does not undo it."""
    run = Charged(poisson_sampling=False)
    with run as (_, _, loader):
        with pytest.raises(KeyError):  # noqa: PT012
            for _ in loader:
                assert run.history == [(1.0, 1.0, 1)]
                raise KeyError
        iter(loader)  # handed out nothing
    assert run.history == [(1.0, 1.0, 1)]


def test_interleaved_passes_in_the_loaders_own_order_are_refused() -> None:
    """Without Poisson sampling an older pass cannot go on after a new one has begun, with noise of its own."""
    with Charged(poisson_sampling=False) as (_, _, loader):
        first = iter(loader)
        next(first)
        next(iter(loader))
        with pytest.raises(ScopeError, match="interleaved"):
            next(first)


@pytest.mark.parametrize("poisson", [True, False])
def test_foreign_batches_are_charged_without_amplification_and_reported(poisson: bool, recwarn: pytest.WarningsRecorder) -> None:
    """A step on a batch that the loader did not hand out costs a full-rate release, with a warning and a report line."""
    run = Charged(poisson_sampling=poisson)
    with run as (model, opt, _):
        for _ in range(2):
            backward(model, *ELSEWHERE)
            opt.step()
            assert len([w for w in recwarn if "without amplification" in str(w.message)]) == 1
    assert run.history == [(1.0, 1.0, 2)]
    assert run.scope.report().foreign_steps == 2
    assert "2 steps, charged without amplification" in str(run.scope.report())


@pytest.mark.filterwarnings("ignore:a step was taken on a batch")
@pytest.mark.parametrize("kind", ["foreign batch", "other noise"])
def test_charges_survive_a_gdp_accountant_that_cannot_add_one(kind: str) -> None:
    """Where the GDP accountant cannot mix rates or sigmas, the step fails and what was spent before stays on record."""
    run, spent = Charged(accountant="gdp"), [(1.0, 4 / 12, 1)]
    with run as (model, opt, loader):
        if kind == "foreign batch":
            run.scope.accountant.history = list(spent)
            batch = ELSEWHERE
        else:
            batches = iter(loader)
            backward(model, *next(batches))
            opt.step()
            opt.noise_multiplier = 2.0
            batch = next(batches)
        backward(model, *batch)
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ScopeError, match="the 'gdp' accountant cannot add a step"):
            opt.step()
        assert equal_trees(before, model.state_dict())
    assert run.history == spent
    assert run.epsilon == accountant_with(spent, "gdp").get_epsilon(DELTA)


def test_noise_cannot_be_lowered_amid_a_charged_pass() -> None:
    """Without Poisson sampling sigma may fall only between passes: a step below what was charged is refused."""
    run = Charged(poisson_sampling=False, noise_multiplier=2.0)
    with run as (model, opt, loader):
        before = run.state()
        backward(model, *next(iter(loader)))
        opt.noise_multiplier = 1.0
        with pytest.raises(ScopeError, match=r"noise_multiplier=1\.0"):
            opt.step()
        assert equal_trees(before[:2], run.state()[:2])
        opt.zero_grad()
        train(model, opt, loader)
    assert run.history == [(2.0, 1.0, 1), (1.0, 1.0, 1)]


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf, "1", None, True])
def test_noise_multiplier_cannot_be_set_to_nonsense(value: Any) -> None:
    """Setting an impossible sigma raises and leaves the one in force."""
    with Charged() as (_, opt, _):
        with pytest.raises(InvalidArgumentError, match="noise_multiplier="):
            opt.noise_multiplier = value
        assert opt.noise_multiplier == 1.0


def test_scheduled_noise_is_charged_with_the_value_in_force() -> None:
    """Under a noise scheduler every step is charged with the sigma of its noise."""
    run = Charged(noise_multiplier=4.0)
    with run as (model, opt, loader):
        scheduler = StepNoise(opt, step_size=1, gamma=0.5)
        for _ in range(3):
            train(model, opt, loader, stop=2)
            scheduler.step()
    assert run.history == [(4.0, 4 / 12, 2), (2.0, 4 / 12, 2), (1.0, 4 / 12, 2)]
    assert run.epsilon == accountant_with(run.history, "pld").get_epsilon(DELTA)


class Broken(RDPAccountant):
    """An accountant whose storage fails."""

    def step(self, *, noise_multiplier: float, sample_rate: float) -> None:
        raise OSError("no space left on device")


def test_failing_charge_releases_nothing() -> None:
    """If the charge raises, no parameter and no optimizer state has moved and ``p.grad`` is still None."""
    run = Charged(accountant=Broken())
    with run as (model, opt, loader):
        before = run.state()
        backward(model, *next(iter(loader)))
        with pytest.raises(OSError, match="no space left"):
            opt.step()
        assert all(p.grad is None for p in model.parameters())
        assert equal_trees(before, run.state())
        assert run.scope.steps == 0


def test_failing_charge_hands_out_no_batch() -> None:
    """Without Poisson sampling a pass whose charge raises hands out nothing."""
    with Charged(accountant=Broken(), poisson_sampling=False) as (_, _, loader):
        batches = iter(loader)
        with pytest.raises(OSError, match="no space left"):
            next(batches)


class Failing(torch.optim.SGD):
    """An optimizer that fails after looking at the gradients."""

    def step(self, closure: Any = None) -> None:
        raise ArithmeticError("diverged")


def test_charge_stays_when_the_optimizer_fails() -> None:
    """If the user's optimizer raises, the release it could see is on record."""
    run = Charged(optimizer=lambda model: Failing(model.parameters(), lr=0.1))
    with run as (model, opt, loader):
        backward(model, *next(iter(loader)))
        with pytest.raises(ArithmeticError, match="diverged"):
            opt.step()
    assert run.history == [(1.0, 4 / 12, 1)]


def test_charge_precedes_step_hooks_and_update() -> None:
    """A step hook finds the charge made and the parameters not yet moved; if it raises, both stay so."""
    run, seen = Charged(), []
    with run as (model, opt, loader):
        before = run.state()
        opt.attach_step_hook(lambda _: seen.append((list(run.history), equal_trees(before[:2], run.state()[:2]))))
        train(model, opt, loader, stop=1)
        before = run.state()
        opt.attach_step_hook(lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(model, opt, loader, stop=1)
        assert equal_trees(before[:2], run.state()[:2])
    assert seen == [([(1.0, 4 / 12, 1)], True), ([(1.0, 4 / 12, 2)], True)]


def test_accountant_object_goes_on_with_what_was_spent() -> None:
    """A second scope with the first one's accountant adds to the same history."""
    first = Charged().after()
    second = Charged(accountant=first.scope.accountant)
    with second as (model, opt, loader):
        train(model, opt, loader, stop=2)
    assert second.scope.accountant is first.scope.accountant
    assert second.history == [(1.0, 4 / 12, 5)]


@each_accountant
def test_epsilon_of_an_accountant_object(accountant: str) -> None:
    """The helper agrees with Opacus for noisy histories and is 0 or infinite where Opacus fails or is finite."""
    noisy = accountant_with([(1.1, 0.01, 100)], accountant)
    assert epsilon_of(noisy, DELTA) == noisy.get_epsilon(DELTA)
    assert epsilon_of(accountant_with([], accountant), DELTA) == 0
    assert epsilon_of(accountant_with([(0.0, 0.01, 1)], accountant), DELTA) == math.inf
