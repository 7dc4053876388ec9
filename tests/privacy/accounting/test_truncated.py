"""Truncated Poisson sampling: never below what concrete datasets spend, and not above dp_accounting's bound."""

import itertools
import math
from typing import Any

import pytest

from dp_hooks.privacy.accounting import truncated_loss as library
from dp_hooks.privacy.accounting.mixed_loss import MixedLoss
from dp_hooks.privacy.accounting.pld import pld_epsilon
from dp_hooks.privacy.accounting.truncated_loss import truncated_loss
from dp_hooks.privacy.accounting.upper_bound import gaussian_epsilon

from .concrete import spent, truncated_cases

Setting = tuple[float, float, int, int, int, float]
# sigma, q, N, B, releases, delta; and what dp_accounting 0.6 says, by the function below with the names that it has there.
REFERENCE: dict[Setting, float] = {
    (1.0, 0.01, 10000, 150, 1000, 1e-05): 1.8311553398583427,
    (1.0, 0.01, 10000, 130, 1000, 1e-05): 3.68429499954572,
    (1.0, 0.01, 10000, 100, 1000, 1e-05): 10.773192056794558,
    (1.0, 0.01, 10000, 80, 1000, 1e-05): 12.366934528601556,
    (2.0, 0.1, 1000, 120, 100, 1e-06): 3.5531079302639665,
    (0.7, 0.001, 100000, 100, 5000, 1e-06): 16.511456539513215,
    (5.0, 0.5, 20, 8, 10, 1e-05): 3.688234367497646,
    (1.0, 0.3, 30, 5, 1, 1e-05): 7.439942966710697,
    (20.0, 0.01, 100000, 1000, 10000, 1e-12): 0.9739429000230861,
    (0.5, 0.001, 1000, 1, 3, 0.0001): 3.950014202792779,
    (1.0, 1.0, 30, 5, 1, 1e-05): 7.529185095175484,
    (1.405, 0.00141, 100000, 146, 66413, 1e-11): 6.207620822027831,
}


def ours(setting: Setting) -> float:
    sigma, rate, examples, most, releases, delta = setting
    return pld_epsilon(((sigma, ("truncated_poisson", rate, examples, most), releases),), delta)


@pytest.mark.parametrize("setting", REFERENCE, ids=str)
def test_epsilon_is_at_most_one_percent_above_the_reference(setting: Setting) -> None:
    """dp_accounting bounds an example that is added or removed; where examples are dropped often, ours is far below it."""
    sigma, rate, _, _, releases, delta = setting
    assert ours(setting) <= 1.01 * REFERENCE[setting]
    plain = pld_epsilon(((sigma, rate, releases),), delta)
    assert ours(setting) >= plain * (1 - 1e-3) or rate == 1


CONCRETE: list[Setting] = [
    (1.0, 0.3, 12, 3, 1, 1e-5),
    (1.0, 0.3, 12, 1, 1, 1e-3),
    (0.6, 0.5, 10, 3, 1, 1e-6),
    (3.0, 0.2, 40, 8, 10, 1e-4),
    (1.5, 0.1, 100, 12, 30, 1e-6),
    (2.0, 0.5, 10, 3, 5, 1e-5),
    (1.0, 0.05, 60, 6, 50, 1e-5),
    (1.0, 0.5, 40, 10, 1, 1e-5),
    (1.0, 1.0, 4, 2, 1, 1e-5),
]


@pytest.mark.parametrize("setting", CONCRETE, ids=str)
def test_epsilon_is_not_below_that_of_any_two_datasets(setting: Setting) -> None:
    """Others with the opposite gradient, with none, half of one and the same: what each pair spends is worked out by hand."""
    sigma, rate, examples, most, releases, delta = setting
    found = [spent(truncated_cases(rate, examples, most, other), sigma, releases, delta) for other in (-1.0, -0.5, 0.0, 0.5, 1.0)]
    assert 0 < max(found) <= ours(setting)


def test_datasets_spend_more_than_poisson_sampling_would_be_charged() -> None:
    """Such a charge would be too little: a pair of datasets spends more, since the example's place is taken from another one."""
    wrong = 0
    for sigma, rate, examples, most, releases, delta in CONCRETE:
        most_spent = max(spent(truncated_cases(rate, examples, most, other), sigma, releases, delta) for other in (-1.0, -0.5))
        plain = pld_epsilon(((sigma, rate, releases),), delta)
        wrong += most_spent > 1.001 * plain
    assert wrong >= 2


def test_rates_given_the_others_are_those_of_all_outcomes() -> None:
    """Every set drawn of six examples, and every part of it that is kept: how often the example is with these others."""
    examples, rate, most = 6, 0.4, 3
    joint: dict[tuple[int, bool], float] = {}
    for drawn in itertools.product((False, True), repeat=examples):
        there = [i for i, one in enumerate(drawn) if one]
        p = rate ** len(there) * (1 - rate) ** (examples - len(there))
        kept = list(itertools.combinations(there, min(len(there), most)))
        for batch in kept:
            key = (len(set(batch) - {0}), 0 in batch)
            joint[key] = joint.get(key, 0.0) + p / len(kept)
    loss: Any = truncated_loss(1.0, rate, examples, most, removed=True, outside=1e-12)
    assert isinstance(loss, MixedLoss)
    (below, plain), (last, taken) = loss.parts
    with_all = joint[most - 1, True] + joint[most - 1, False]
    assert plain.rate == rate
    assert last == pytest.approx(with_all, rel=1e-7)
    assert taken.rate == pytest.approx(joint[most - 1, True] / with_all, rel=1e-7)
    assert loss.at_zero == pytest.approx(joint[most, False], rel=1e-7)
    assert below == pytest.approx(1 - with_all - joint[most, False], rel=1e-6)
    for size in range(most - 1):
        assert joint[size, True] / (joint[size, True] + joint[size, False]) == pytest.approx(rate, rel=1e-9)


@pytest.mark.parametrize("removed", [True, False])
def test_the_second_bound_holds_as_well(removed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where one example is exchanged: the parts have a probability of 1, and divergences are those of the mixtures or larger."""
    examples, rate, most, sigma = 100_000, 0.1, 9900, 3.0
    loss: Any = truncated_loss(sigma, rate, examples, most, removed=removed, outside=1e-14)
    assert len(loss.parts) == 3
    grid = loss.on_grid(1e-3)
    assert float(grid.mass.sum()) == pytest.approx(1.0, abs=1e-7)
    tau, r = loss.parts[0][0], loss.parts[0][1].rate
    other = [(1 - r, -1.0, -1.0), (r, 1.0, 0.0)]  # means with the example and without, given what else there is
    upper = MixedLoss([(1.0, loss.parts[0][1]), (1.0, loss.parts[1][1])], loss.at_zero / tau).on_grid(1e-4)
    for epsilon in (-0.3, -0.05, 0.0, 0.02, 0.2, 1.0):
        ours_is = sum(
            m * max(0.0, -math.expm1(epsilon - (upper.first + k) * upper.spacing)) for k, m in enumerate(upper.mass.tolist())
        )
        assert ours_is >= divergence(other, sigma, epsilon, removed=removed) * (1 - 1e-9)


def divergence(cases: list[tuple[float, float, float]], sigma: float, epsilon: float, *, removed: bool) -> float:
    """The hockey-stick divergence of two mixtures of normal distributions, by a sum."""
    step, total = sigma / 500, 0.0
    for k in range(-6000, 6001):
        x = k * step
        p, q = (sum(case[0] * math.exp(-(((x - case[i]) / sigma) ** 2) / 2) for case in cases) for i in (1, 2))
        p, q = (p, q) if removed else (q, p)
        total += max(0.0, p - math.exp(epsilon) * q) * step / (sigma * math.sqrt(2 * math.pi))
    return total


def test_batches_that_are_never_cut_cost_what_poisson_sampling_does() -> None:
    """With the default of one cut batch in a million epsilon is not 0.01 % more."""
    plain = pld_epsilon(((1.0, 0.01, 1000),), 1e-5)
    assert plain <= ours((1.0, 0.01, 10_000, 151, 1000, 1e-5)) <= 1.0001 * plain


def test_little_noise_and_many_kinds_get_a_bound() -> None:
    """Below the least noise, and for more kinds than are told apart, epsilon is finite and at most that without sampling."""
    tiny = ours((0.03, 0.01, 100, 5, 1, 1e-5))
    assert tiny == gaussian_epsilon(1 / 0.03, 1e-5)
    kinds = tuple((1.0, ("truncated_poisson", 0.01, 1000 + k, 20), 1) for k in range(40))
    assert 0 < pld_epsilon(kinds, 1e-5) <= gaussian_epsilon(math.sqrt(40), 1e-5) * 1.01
    assert library._UP > 1
