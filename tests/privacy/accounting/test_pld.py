"""Accountant "pld": never below the truth, and close to it; each test also shows that it would notice a wrong number."""

import copy
import json
import math
import time
from typing import Any

import mpmath
import numpy as np
import pytest
from opacus.accountants import create_accountant

from dp_hooks.errors import InvalidArgumentError
from dp_hooks.privacy.accounting import pld
from dp_hooks.privacy.accounting.calibrate import Budget, calibrate, calibrated
from dp_hooks.privacy.accounting.composition import composed_epsilon
from dp_hooks.privacy.accounting.opacus import spent_by
from dp_hooks.privacy.accounting.pld import pld_epsilon
from dp_hooks.privacy.accounting.pld_accountant import PLDAccountant
from dp_hooks.privacy.accounting.privacy_loss import PrivacyLoss
from dp_hooks.privacy.accounting.upper_bound import epsilon_bound, gaussian_epsilon

from .exact import Charge, Truth, root
from .helpers import DELTA, accountant_with
from .pld_reference import FILE, bounds, within_limits

ROWS = json.loads(FILE.read_text())
CLOSE = 1.005  # how far above the truth epsilon may be


def added_or_removed(sigma: float, rate: float, steps: int, delta: float, *, removed: bool) -> float:
    """Epsilon in one direction."""
    return pld._one_direction([(sigma, rate, steps)], delta, removed=removed)


# ---------------------------------------------------------------- against dp_accounting


@pytest.mark.parametrize("row", ROWS[::4], ids=lambda row: str(row["setting"]))
def test_epsilon_is_between_the_truth_and_one_percent_above_dp_accounting(row: dict[str, Any]) -> None:
    """For every fourth of 200 settings: within the bounds, in less than three seconds. All: see ``pld_reference``."""
    *charge, delta = row["setting"]
    low, high = bounds(row)
    start = time.process_time()
    assert low <= pld_epsilon.__wrapped__((tuple(charge),), delta) <= high
    assert time.process_time() - start < 3


def test_the_reference_says_something_of_most_settings() -> None:
    """There are 200 settings; at least 190 have bounds from both sides, and most of them are dp_accounting's own."""
    assert len(ROWS) == 200
    assert sum(math.isfinite(bounds(row)[1]) for row in ROWS) >= 190
    assert sum(within_limits(row) for row in ROWS) >= 150


# ---------------------------------------------------------------- against the truth, of one or two releases


def exact_delta(epsilon: Any, sigma: float, rate: float, *, removed: bool) -> Any:
    """Delta of one release, in closed form with 30 digits; epsilon may be negative."""
    s, q, e = mpmath.mpf(sigma), mpmath.mpf(rate), mpmath.exp(epsilon)

    def beyond(x: Any) -> Any:
        return mpmath.erfc(x / mpmath.sqrt(2)) / 2

    if removed:
        if e <= 1 - q:
            return 1 - e
        x = s**2 * mpmath.log((e - (1 - q)) / q) + 0.5
        return q * beyond((x - 1) / s) + (1 - q - e) * beyond(x / s)
    if 1 / e <= 1 - q:
        return mpmath.mpf(0)
    x = s**2 * mpmath.log((1 / e - (1 - q)) / q) + 0.5
    return beyond(-x / s) - e * (q * beyond((1 - x) / s) + (1 - q) * beyond(-x / s))


def exact_delta_of_two(epsilon: float, sigma: float, rate: float, *, removed: bool) -> Any:
    """Delta of two releases: the mean, over the loss of one, of delta of the other at what is left of epsilon."""
    s, q = mpmath.mpf(sigma), mpmath.mpf(rate)

    def integrand(x: Any) -> Any:
        loss = mpmath.log(1 - q + q * mpmath.exp((x - 0.5) / s**2))
        density = mpmath.npdf(x, 0, s)
        if removed:
            return density * mpmath.exp(loss) * exact_delta(epsilon - loss, sigma, rate, removed=True)
        return density * exact_delta(epsilon + loss, sigma, rate, removed=False)

    return mpmath.quad(integrand, mpmath.linspace(-12 * s, 12 * s + 1, 25))


FEW = [
    # noise multiplier, sampling rate, delta
    (0.3, 1e-6, 1e-12),
    (0.3, 0.5, 1e-3),
    (0.7, 0.01, 1e-5),
    (0.7, 0.999, 1e-9),
    (1.0, 1e-3, 1e-8),
    (3.0, 0.2, 1e-12),
    (20.0, 0.01, 1e-6),
]


@pytest.mark.parametrize("removed", [True, False])
@pytest.mark.parametrize("setting", FEW, ids=str)
def test_epsilon_of_one_release_is_exact(setting: tuple[float, float, float], removed: bool) -> None:
    """At least the closed form, at most 0.1 % more, in each direction; with sigma or the rate off by 5 % it is not that."""
    sigma, rate, delta = setting
    with mpmath.workdps(30):
        high = 2.0
        while exact_delta(high, sigma, rate, removed=removed) > delta:
            high *= 2
        truth = root(lambda epsilon: exact_delta(epsilon, sigma, rate, removed=removed), delta, 0.0, high)
    assert truth <= added_or_removed(sigma, rate, 1, delta, removed=removed) <= 1.001 * truth
    if not removed and truth > -0.98 * math.log1p(-rate):
        return  # the largest loss that there can be, whatever sigma is
    assert added_or_removed(1.05 * sigma, rate, 1, delta, removed=removed) < truth
    assert added_or_removed(0.95 * sigma, rate, 1, delta, removed=removed) > 1.001 * truth
    assert added_or_removed(sigma, 0.95 * rate, 1, delta, removed=removed) < truth


@pytest.mark.parametrize("removed", [True, False])
@pytest.mark.parametrize("setting", [FEW[2], FEW[5]], ids=str)
def test_epsilon_of_two_releases_is_that_of_an_integral(setting: tuple[float, float, float], removed: bool) -> None:
    """Delta at that epsilon is at most the one asked for, and above it at an epsilon that is 0.2 % smaller."""
    sigma, rate, delta = setting
    epsilon = added_or_removed(sigma, rate, 2, delta, removed=removed)
    assert exact_delta_of_two(epsilon, sigma, rate, removed=removed) <= delta
    assert exact_delta_of_two(0.998 * epsilon, sigma, rate, removed=removed) > delta
    assert exact_delta_of_two(added_or_removed(1.05 * sigma, rate, 2, delta, removed=removed), sigma, rate, removed=removed) > delta


@pytest.mark.parametrize(("sigma", "steps", "delta"), [(0.3, 1, 1e-12), (1.0, 1000, 1e-5), (20.0, 10**6, 1e-12), (20.0, 1, 1e-3)])
def test_full_batches_have_the_closed_form(sigma: float, steps: int, delta: float) -> None:
    """At rate 1 epsilon is that of one Gaussian release; the distributions, which are not needed there, agree."""
    exact = gaussian_epsilon(math.sqrt(steps) / sigma, delta)
    assert pld_epsilon(((sigma, 1.0, steps),), delta) == exact
    for removed in (True, False):
        assert exact * (1 - 1e-12) <= added_or_removed(sigma, 1.0, steps, delta, removed=removed) <= 1.001 * exact


# ---------------------------------------------------------------- against the truth, of many releases

MANY: list[tuple[list[Charge], float]] = [
    ([(1.0, 0.01, 1000)], 1e-5),
    ([(0.5, 0.004, 2500)], 1e-6),
    ([(1.0, 0.01, 100_000)], 1e-12),
    ([(5.0, 0.1, 1_000_000)], 1e-3),
    ([(1.0, 0.01, 1000), (0.7, 0.01, 300)], 1e-5),
    ([(1.0, 1.0, 3), (2.0, 0.05, 200)], 1e-7),
    ([(0.8, 0.02, 400), (3.0, 1.0, 5), (1.5, 0.3, 20), (9.0, 1.0, 40)], 1e-9),
]
each_history = pytest.mark.parametrize(("history", "delta"), MANY, ids=str)


@each_history
def test_epsilon_of_many_releases_is_not_below_the_truth_and_close(history: list[Charge], delta: float) -> None:
    """For histories of one kind and of several, in each direction and in all: at least an inverse Laplace transform's epsilon."""
    truths = [Truth(history, delta, removed).epsilon(delta) for removed in (True, False)]
    for truth, removed in zip(truths, (True, False), strict=True):
        losses = [(PrivacyLoss(s, q, removed=removed, outside=1e-15 * delta), k) for s, q, k in history]
        assert truth * (1 - 1e-10) <= composed_epsilon(losses, delta) <= CLOSE * truth
    assert max(truths) * (1 - 1e-10) <= pld_epsilon(tuple(history), delta) <= CLOSE * max(truths)


@each_history
def test_other_noise_another_rate_and_a_missing_charge_would_be_noticed(history: list[Charge], delta: float) -> None:
    """With 5 % more noise, a 5 % lower rate or one charge less, epsilon is below the truth; with less noise clearly above."""
    truth = max(Truth(history, delta, removed).epsilon(delta) for removed in (True, False))

    def epsilon(sigma: float = 1.0, rate: float = 1.0, rest: int = 0) -> float:
        return pld_epsilon(tuple((sigma * s, min(1.0, rate * q), k) for s, q, k in history[rest:]), delta)

    assert epsilon(sigma=1.05) < truth
    assert epsilon(sigma=0.95) > CLOSE * truth
    assert epsilon(rate=0.95) < truth
    assert len(history) == 1 or epsilon(rest=1) < truth


def test_the_larger_direction_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Epsilon is that of the direction that reveals more, whichever it is."""
    charge = (2.0, 0.2, 50)
    removed, added = (added_or_removed(*charge, DELTA, removed=direction) for direction in (True, False))
    assert added < 0.99 * removed
    assert pld_epsilon.__wrapped__((charge,), DELTA) == pytest.approx(removed, rel=1e-6)
    real = pld._one_direction
    monkeypatch.setattr(pld, "_one_direction", lambda kinds, delta, *, removed: real(kinds, delta, removed=not removed))
    assert pld_epsilon.__wrapped__((charge,), DELTA) == pytest.approx(removed, rel=1e-6)


def test_losses_that_are_left_out_count_as_without_bound() -> None:
    """Where much is left out of the grid epsilon is still no less than the truth; forgetting that part would be noticed."""
    history, delta = [(1.0, 0.3, 20)], 1e-4
    truth = Truth(history, delta, removed=True).epsilon(delta)
    loss = PrivacyLoss(1.0, 0.3, removed=True, outside=0.6 * delta / 20)
    assert composed_epsilon([(loss, 20)], delta) >= truth
    loss.outside = 0.0
    assert composed_epsilon([(loss, 20)], delta) < truth


def test_rounding_in_the_transforms_is_accounted_for() -> None:
    """Where what transforms round off is of the size of delta, epsilon is larger for it, not smaller."""
    loss = PrivacyLoss(0.587, 5.94e-06, removed=True, outside=1e-25)
    known = composed_epsilon([(loss, 176_784)], 7.24e-12)
    assert 0.9935 <= known <= 1.01  # 0.9935 by four other tilts and grids, rounding left aside
    assert known < epsilon_bound([(0.587, 5.94e-06, 176_784)], 7.24e-12)


@pytest.mark.parametrize("removed", [True, False])
def test_the_distribution_on_the_grid_dominates(removed: bool) -> None:
    """Delta of what is on the grid is exact at the grid's epsilons, and above the exact one between them; nothing gets lost."""
    sigma, rate = 0.8, 0.1
    loss = PrivacyLoss(sigma, rate, removed=removed, outside=1e-14)
    grid = loss.on_grid(0.05)
    assert grid.mass.min() >= 0
    assert 1 - 2e-14 <= grid.mass.sum() <= 1 + 1e-12
    losses = grid.spacing * np.arange(grid.first, grid.first + len(grid.mass))

    def delta(epsilon: float) -> float:
        return float((grid.mass * -np.expm1(np.minimum(epsilon - losses, 0.0))).sum())

    for place in (-2, 0, 1, 5, 20):
        at, between = grid.spacing * place, grid.spacing * (place + 0.5)
        assert delta(at) == pytest.approx(float(exact_delta(at, sigma, rate, removed=removed)), rel=1e-9, abs=1e-13)
        assert delta(between) >= float(exact_delta(between, sigma, rate, removed=removed)) - 1e-14


# ---------------------------------------------------------------- the accountant


def test_opacus_knows_it() -> None:
    """``create_accountant("pld")`` gives it; equal steps are counted together; state goes through ``state_dict``."""
    accountant = create_accountant("pld")
    assert isinstance(accountant, PLDAccountant)
    assert accountant.mechanism() == "pld"
    assert accountant.get_epsilon(DELTA) == 0
    for sigma, count in ((1.0, 3), (0.9, 1), (1.0, 2)):
        for _ in range(count):
            accountant.step(noise_multiplier=sigma, sample_rate=0.1)
    assert accountant.history == [(1.0, 0.1, 3), (0.9, 0.1, 1), (1.0, 0.1, 2)]
    assert len(accountant) == 3
    again = create_accountant("pld")
    again.load_state_dict(copy.deepcopy(accountant.state_dict()))
    assert again.get_epsilon(DELTA) == accountant.get_epsilon(DELTA) == pld_epsilon(((1.0, 0.1, 5), (0.9, 0.1, 1)), DELTA)
    with pytest.raises(ValueError, match="mechanism"):
        create_accountant("prv").load_state_dict(accountant.state_dict())


@pytest.mark.parametrize("delta", [0, 1, -1e-5, math.nan, "1e-5", None])
def test_an_impossible_delta_is_refused(delta: Any) -> None:
    """Also where nothing was charged."""
    with pytest.raises(InvalidArgumentError, match="delta="):
        create_accountant("pld").get_epsilon(delta)


EXTREME: list[tuple[list[Charge], float, float, float]] = [
    # history, delta, epsilon at least, at most
    ([(0.0, 0.1, 1)], 1e-5, math.inf, math.inf),
    ([(1.0, 0.1, 5), (0.0, 0.1, 1)], 1e-5, math.inf, math.inf),
    ([(1.0, 0.1, 0)], 1e-5, 0.0, 0.0),
    ([(1.0, 1e-12, 5)], 1e-5, 0.0, 0.0),
    ([(1e4, 0.01, 1000)], 1e-5, 1e-6, 1e-5),
    ([(0.01, 0.04, 200)], 1e-5, 1e4, 1e6),
    ([(0.05, 0.04, 200)], 1e-5, 150.0, 1e4),
    ([(0.5, 0.5, 10**9)], 1e-5, 1e6, 1e10),
    ([(1.0, 1 - 1e-12, 100)], 1e-5, 90.0, gaussian_epsilon(10.0, 1e-5)),
    ([(1.0, 0.01, 1000)], 1e-100, 10.0, 100.0),
    ([(1.0, 0.01, 1000)], 0.9, 0.0, 0.0),
]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("history", "delta", "low", "high"), EXTREME, ids=str)
def test_extremes_have_an_answer(history: list[Charge], delta: float, low: float, high: float) -> None:
    """No noise, next to none, a billion steps, tiny and huge deltas: an epsilon that can be, and no warning from inside."""
    assert low <= accountant_with(history, "pld").get_epsilon(delta) <= high


def test_ten_thousand_different_charges_are_an_upper_bound_not_far_above() -> None:
    """Charges that are rounded to fewer kinds spend no less than unrounded ones, and at most 5 % more."""
    history = [(0.9 + 0.2 * i / 10_000, 0.01, 1) for i in range(10_000)]
    best = [(s, q, 500) for s, q, _ in history[499::500]]  # 500 at a time, with the largest sigma of each
    worst = [(s, q, 500) for s, q, _ in history[::500]]
    epsilon = spent_by(accountant_with(history, "pld"), DELTA).epsilon
    assert pld_epsilon(tuple(best), DELTA) <= epsilon <= 1.05 * pld_epsilon(tuple(worst), DELTA)


@pytest.mark.parametrize(
    ("target", "delta", "rate", "steps"),
    [(3.0, 1e-5, 0.01024, 980), (1.0, 1e-6, 1e-3, 10_000), (0.005, 1e-5, 0.3, 9), (60.0, 1e-5, 0.3, 9), (3.0, 1e-7, 1e-5, 10**5)],
)
def test_calibration_is_tight_and_takes_two_seconds_at_most(target: float, delta: float, rate: float, steps: int) -> None:
    """The noise for a budget is found within two seconds, uses it up, and is a little less than "prv" needs."""
    pld_epsilon.cache_clear()
    calibrated.cache_clear()
    start = time.process_time()
    sigma = calibrate(PLDAccountant(), Budget(target, delta, 1), rate, steps)
    assert time.process_time() - start < 2
    assert 0.999 * target <= pld_epsilon(((sigma, rate, steps),), delta) <= target
    assert pld_epsilon.cache_info().misses <= 20
