"""The upper bound of epsilon that stands in where an accountant takes too long, and what is rounded before it is asked."""

import math
import warnings

import pytest
from opacus.accountants import PRVAccountant

from dp_hooks.errors import InvalidArgumentError
from dp_hooks.privacy.accounting.opacus import epsilon_of, spent_by
from dp_hooks.privacy.accounting.upper_bound import _ORDERS, _renyi_epsilon, epsilon_bound, gathered, gaussian_epsilon

from ...training.helpers import backward, train
from .helpers import DELTA, ELSEWHERE, Charged, accountant_with

pytestmark = pytest.mark.filterwarnings("ignore:GDP accounting is experimental", "ignore:Optimal order")

GRID = [
    # noise multiplier, sampling rate, steps
    (0.6, 0.01, 1000),
    (1.0, 0.001, 10_000),
    (1.0, 0.01, 1),
    (1.0, 0.01, 1000),
    (1.0, 0.5, 20),
    (2.0, 0.1, 200),
    (4.0, 0.02, 3000),
]


def rdp(history: list[tuple[float, float, int]]) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return accountant_with(history, "rdp").get_epsilon(DELTA)


@pytest.mark.parametrize("charge", GRID, ids=str)
def test_the_bound_is_not_below_the_truth_and_close_to_renyi_accounting(charge: tuple[float, float, int]) -> None:
    """Epsilon is at least what numerical accounting gives less its error, and at most 1.5 times that of Renyi orders."""
    prv = PRVAccountant()
    prv.history = [charge]
    error, bound = 0.01, epsilon_bound([charge], DELTA)
    assert prv.get_epsilon(DELTA, eps_error=error) - 2 * error <= bound <= 1.5 * rdp([charge])


@pytest.mark.parametrize("charge", GRID, ids=str)
def test_renyi_orders_give_what_renyi_accounting_gives_of_them(charge: tuple[float, float, int]) -> None:
    """The bound by integer orders is Opacus's of the same orders, to the last digits: neither of another delta nor of sigma."""
    accountant = accountant_with([charge], "rdp")
    expected = accountant.get_epsilon(DELTA, alphas=[float(a) for a in _ORDERS])
    assert _renyi_epsilon([charge], DELTA) == pytest.approx(expected, rel=1e-9)
    assert epsilon_bound([charge], DELTA) == pytest.approx(expected, rel=1e-9)  # the others are larger here


@pytest.mark.parametrize("sigma", [0.05, 0.3, 1.0, 5.0, 50.0])
@pytest.mark.parametrize("steps", [1, 30])
def test_without_sampling_the_bound_is_exact(sigma: float, steps: int) -> None:
    """At rate 1 it is the curve of one Gaussian release with the noise divided by the root of their number."""
    mu = math.sqrt(steps) / sigma
    exact = epsilon_bound([(sigma, 1.0, steps)], DELTA)
    curve = [0.5 * math.erfc(-x / math.sqrt(2)) for x in (mu / 2 - exact / mu, -mu / 2 - exact / mu)]
    if curve[1] > 1e-200:
        assert curve[0] - math.exp(exact) * curve[1] == pytest.approx(DELTA, rel=1e-5)
    assert exact == pytest.approx(gaussian_epsilon(mu, DELTA))


@pytest.mark.parametrize("rate", [1e-4, 0.01, 0.3])
def test_little_noise_is_not_free(rate: float) -> None:
    """With next to no noise epsilon is about that of the likely number of uses of an example, and at least that of one."""
    history = [(0.01, rate, 10_000)]
    uses = rate * 10_000
    assert gaussian_epsilon(100.0 * math.sqrt(uses), 0.5) <= epsilon_bound(history, DELTA) < math.inf
    assert epsilon_bound(history, DELTA) <= gaussian_epsilon(100.0 * math.sqrt(uses + 8 * math.sqrt(uses) + 20), DELTA / 2)


def test_nothing_costs_nothing_and_more_costs_more() -> None:
    """No steps spend nothing; more steps, higher rates, and less noise spend more."""
    assert epsilon_bound([], DELTA) == epsilon_bound([(1.0, 0.1, 0)], DELTA) == 0
    base = epsilon_bound([(1.0, 0.1, 10)], DELTA)
    for more in ([(1.0, 0.1, 11)], [(1.0, 0.12, 10)], [(0.9, 0.1, 10)], [(1.0, 0.1, 10), (3.0, 0.01, 50)]):
        assert epsilon_bound(more, DELTA) > base


# ---------------------------------------------------------------- fewer charges


def drifting(count: int) -> list[tuple[float, float, int]]:
    """A noise schedule: every step has another sigma, and rates change."""
    return [(0.8 + 0.5 * i / count, 0.01 + 0.005 * (i % 7) / 7, 1) for i in range(count)]


@pytest.mark.parametrize("groups", [4, 9, 16])
def test_gathered_charges_spend_as_much_or_a_little_more(groups: int) -> None:
    """At most so many are left, all steps are in them, and none is less revealing than what it stands for."""
    history = drifting(40)
    fewer = gathered(history, groups)
    assert len(fewer) <= groups
    assert sum(steps for *_, steps in fewer) == 40
    assert rdp(history) <= rdp(fewer) <= 3.0 * rdp(history)
    assert min(s for s, *_ in fewer) <= min(s for s, *_ in history)
    assert max(q for _, q, _ in fewer) >= max(q for _, q, _ in history)


def test_equal_charges_are_counted_together_and_stay_exact() -> None:
    """Where few kinds are left, no number is rounded."""
    history = [(1.1, 0.01, 3), (0.9, 0.02, 1), (1.1, 0.01, 4)]
    assert sorted(gathered(history, 4)) == [(0.9, 0.02, 1), (1.1, 0.01, 7)]


# ---------------------------------------------------------------- answers of the accountants


HARD = [
    ("prv", [(0.01, 0.04, 200)], 1e4),
    ("rdp", [(0.01, 0.04, 200)], 1e4),
    ("prv", [(0.05, 0.04, 200)], 150),
    ("pld", [(0.01, 0.04, 200)], 1e4),
    ("pld", [(1.0, 0.001, 1_000_000)], 3),
    ("pld", [(0.5, 0.5, 1_000_000)], 1000),
    ("prv", [(1.0, 0.001, 1_000_000)], 3),
    ("prv", [(0.5, 0.5, 1_000_000)], 1000),
]


@pytest.mark.parametrize(("name", "history", "at_least"), HARD)
def test_every_history_gets_an_answer(name: str, history: list[tuple[float, float, int]], at_least: float) -> None:
    """Little noise and a million steps have a finite epsilon, large enough, with a word where a bound stands in."""
    spent = spent_by(accountant_with(history, name), DELTA)
    assert at_least < spent.epsilon <= epsilon_bound(history, DELTA) * 1.001
    if spent.remark:
        assert "an upper bound" in spent.remark
        with pytest.warns(UserWarning, match="an upper bound, since the"):
            assert epsilon_of(accountant_with(history, name), DELTA) == spent.epsilon
    else:
        assert min(sigma for sigma, *_ in history) > 0.2


@pytest.mark.parametrize(("name", "history", "at_least"), HARD)
def test_the_report_has_an_answer_too(name: str, history: list[tuple[float, float, int]], at_least: float) -> None:
    """What a scope reports after many steps or with little noise is that answer, with the word about the bound (N6)."""
    run = Charged(accountant=name).after()
    run.scope.accountant.history = history
    spent = spent_by(accountant_with(history, name), DELTA)
    report = run.scope.report(DELTA)
    assert at_least < report.epsilon == spent.epsilon
    assert ("an upper bound" in str(report)) == bool(spent.remark)


@pytest.mark.parametrize("name", ["pld", "prv", "rdp"])
def test_ten_thousand_different_charges_get_an_answer(name: str) -> None:
    """A schedule with another noise at every step costs between the cheapest and the dearest of its steps, all along."""
    history = drifting(10_000)
    low, high = ([(sigma, rate, 10_000)] for sigma, rate in ((1.3, 0.01), (0.8, 0.015)))
    assert epsilon_bound(low, DELTA) / 1.3 < spent_by(accountant_with(history, name), DELTA).epsilon < epsilon_bound(high, DELTA)


def test_a_usual_history_is_left_to_the_accountant() -> None:
    """Where the accountant can answer, its answer is taken as it is, without a remark."""
    for name in ("pld", "prv", "rdp"):
        accountant = accountant_with([(1.0, 0.01, 1000), (2.0, 0.01, 10)], name)
        assert spent_by(accountant, DELTA).epsilon == accountant.get_epsilon(DELTA)
        assert spent_by(accountant, DELTA).remark == ""


def test_the_central_limit_is_no_bound_with_poisson_sampling() -> None:
    """It is refused for a budget, warns where it is asked, and the report has a remark; at rate 1 it is one."""
    with pytest.raises(InvalidArgumentError, match=r"accountant='gdp'.*too little"):
        Charged(accountant="gdp", target_epsilon=3.0, epochs=3)
    run = Charged(accountant="gdp").after()
    with pytest.warns(UserWarning, match="true epsilon may be larger"):
        run.scope.get_epsilon(DELTA)
    assert "gdp (the central limit" in str(run.scope.report())
    run = Charged(accountant="gdp", poisson_sampling=False).after()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*epsilon may be larger")
        spent = run.scope.get_epsilon(DELTA)
    assert spent >= gaussian_epsilon(1.0, DELTA)
    assert "central limit" not in str(run.scope.report())


# ---------------------------------------------------------------- budgets that something else is charged to


@pytest.mark.filterwarnings("ignore:a step was taken on a batch", "ignore:the privacy budget is used up")
@pytest.mark.parametrize("before", [0, 3])
def test_releases_left_are_worked_out_anew_after_a_foreign_step(before: int) -> None:
    """After a step on a batch from elsewhere as many loader batches are left as fit, not one more, not much fewer."""
    run = Charged(60, 6, target_epsilon=8.0, epochs=3, accountant="rdp", self_check=False)
    kind = (run.scope.noise_multiplier, 0.1)
    with run as (model, opt, loader):
        own = train(model, opt, loader, stop=before) if before else 0
    again = Charged(60, 6, target_epsilon=8.0, epochs=3, accountant="rdp", self_check=False)
    again.scope.accountant.history = list(run.history)
    with again as (model, opt, loader):
        backward(model, *ELSEWHERE)
        opt.step()
        while more := train(model, opt, loader):
            own += more
    assert 1 < own < 30
    assert again.epsilon <= 8.0
    assert rdp([(kind[0], 1.0, 1), (*kind, own + 1)]) > 8.0
