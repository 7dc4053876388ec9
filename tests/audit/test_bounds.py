"""The statistics of the audits: exact where exact numbers are known, and wrong as seldom as is said."""

import math
from collections.abc import Callable

import pytest
import torch
from scipy.stats import beta, binom, norm

from dp_hooks.audit.binomial import at_least, lower_bound, upper_bound
from dp_hooks.audit.canaries import Canaries, log_ratio
from dp_hooks.audit.draws_seen import DrawsSeen
from dp_hooks.audit.guesses import epsilon_from_guesses
from dp_hooks.audit.noise_seen import NoiseSeen
from dp_hooks.audit.trade_off import Rates, noise_at_most
from dp_hooks.privacy.accounting.upper_bound import gaussian_epsilon

from ..models import drawn


@pytest.mark.parametrize(("k", "n"), [(0, 10), (1, 10), (7, 10), (10, 10), (3, 2500), (1250, 2500), (2499, 2500)])
def test_binomial_bounds_are_those_of_clopper_and_pearson(k: int, n: int) -> None:
    """They are quantiles of beta distributions, and 0 and 1 at the ends."""
    assert at_least(k, n, 0.3) == pytest.approx(binom.sf(k - 1, n, 0.3), rel=1e-9, abs=1e-15)
    for error in (0.05, 1e-4):
        assert lower_bound(k, n, error) == pytest.approx(beta.ppf(error, k, n - k + 1) if k else 0.0, abs=1e-9)
        assert upper_bound(k, n, error) == pytest.approx(beta.isf(error, k + 1, n - k) if k < n else 1.0, abs=1e-9)


@pytest.mark.parametrize("epsilon", [0.5, 2.0, 4.0])
@pytest.mark.parametrize("guesses", [10, 300])
def test_guesses_of_randomised_response_exceed_its_epsilon_as_seldom_as_is_said(guesses: int, epsilon: float) -> None:
    """Of the mechanism that is worst without delta: over all counts that can be, in at most 5 % more than its epsilon comes out."""
    p = 1 / (1 + math.exp(-epsilon))
    wrong = sum(
        binom.pmf(v, guesses, p) for v in range(guesses + 1) if epsilon_from_guesses(1000, guesses, v, 0.0, 0.05) > epsilon + 1e-9
    )
    assert wrong <= 0.05


def test_delta_makes_guesses_say_less() -> None:
    """A mechanism may give itself away with probability delta: with many canaries little is left, and never more than without."""
    bounds = [
        epsilon_from_guesses(m, 200, 195, delta, 0.05) for m, delta in ((1000, 0.0), (1000, 1e-5), (1000, 1e-4), (100_000, 1e-4))
    ]
    assert bounds == sorted(bounds, reverse=True)
    assert bounds[0] > bounds[2] > bounds[3] == 0.0
    # All canaries are given away with probability delta, else one half of the guesses is right.
    for delta in (0.001, 0.01):
        chance = delta + (1 - delta) * binom.sf(99, 100, 0.5)
        assert epsilon_from_guesses(100, 100, 100, delta, 0.9 * chance) < 1e-3


@pytest.mark.parametrize("mu", [0.5, 1.6, 3.0])
@pytest.mark.parametrize("at", [-0.7, 0.3, 1.0])
def test_a_gaussian_that_is_known_exactly_has_the_noise_that_it_has(mu: float, at: float) -> None:
    """Rates without any error, of the best test at any threshold, say no more noise than there is, and nearly as much."""
    true, false = norm.sf(at - mu / 2), norm.sf(at + mu / 2)
    tangent = true - math.exp(mu * at) * false if at > 0 else (1 - false) - math.exp(-mu * at) * (1 - true)
    factor = noise_at_most(Rates(true, false), [(1 / mu, 1.0, 1)], [0.5 * tangent, tangent])
    assert 1 - 1e-9 <= factor < 1.01
    for delta in (1e-5, tangent):
        assert Rates(true, false).epsilon(delta) <= gaussian_epsilon(mu, delta) + 1e-9
    assert math.isinf(noise_at_most(Rates(0.4, 0.5), [(1 / mu, 1.0, 1)], [tangent]))


def test_rates_are_wrong_as_seldom_as_is_said() -> None:
    """Both bounds hold together in all but 5 % of the counts that can be."""
    rates = [Rates.of(k, 40, k, 40, 0.05) for k in range(41)]
    right_true = sum(binom.pmf(k, 40, 0.7) for k in range(41) if rates[k].true <= 0.7)
    right_false = sum(binom.pmf(k, 40, 0.2) for k in range(41) if rates[k].false >= 0.2)
    assert 0.95 <= right_true * right_false < 0.99


def test_the_score_is_the_logarithm_of_the_likelihood_ratio() -> None:
    """Of a normal number that is moved by 1 with some probability, or not."""
    for sigma, rate in ((0.5, 1.0), (2.0, 0.25), (0.3, 0.01)):
        seen = torch.linspace(-3, 4, 50, dtype=torch.float64)
        ratio = rate * norm.pdf(seen, 1, sigma) / norm.pdf(seen, 0, sigma) + 1 - rate
        torch.testing.assert_close(log_ratio(seen, sigma, rate).exp(), torch.tensor(ratio), rtol=1e-9, atol=0)


@pytest.mark.parametrize("count", [2, 7, 50, 333, 1000])
def test_canaries_are_put_and_found_in_places_of_their_own(count: int) -> None:
    """Each parameter has some, no two share a number, and what was put is what is read, in any memory layout."""
    params = [torch.zeros(30, 20).T, torch.zeros(()), torch.zeros(5, dtype=torch.bfloat16), torch.zeros(3, 0), torch.zeros(40, 10)]
    canaries = Canaries(params, count, drawn(1))
    assert len(canaries) == min(count, 1006)
    times = torch.arange(len(canaries), dtype=torch.float64) % 3
    canaries.put(params, times, 2.0)
    assert torch.equal(canaries.read(params), 2.0 * times * canaries.coins)
    assert sum(int((p != 0).sum()) for p in params) == int(((times > 0) & canaries.coins).sum())
    if count >= 50:
        canaries.put(params, -times, 2.0)
        canaries.put(params, torch.ones(len(canaries)), 1.0)
        assert [bool(p.any()) for p in params] == [True, bool(params[1].any()), True, False, True]
        assert not any(bool((p > 1).any()) for p in params)


def test_half_of_the_canaries_are_in_by_fair_coins() -> None:
    """Of 4,000, within four standard deviations."""
    coins = Canaries([torch.zeros(100, 100)], 4000, drawn(2)).coins
    assert abs(int(coins.sum()) - 2000) < 4 * 1000**0.5
    assert abs(float((coins[1:] == coins[:-1]).double().mean()) - 0.5) < 4 * 0.5 / 4000**0.5


def many(changed: Callable[[list[torch.Tensor]], list[torch.Tensor]] = lambda noise: noise, runs: int = 1) -> list[list[str]]:
    """What is found of runs of 30 steps with noise on three parameters, which was changed."""
    found = []
    for seed in range(runs):
        generator, seen = drawn(seed), NoiseSeen(["a", "b", "c"])
        for _ in range(30):
            seen.add(changed([torch.randn(*shape, generator=generator) for shape in ((40, 20), (20,), (3, 7))]))
        found.append(seen.findings())
    return found


def test_right_noise_is_not_found_fault_with() -> None:
    """In none of 200 runs: at six standard deviations a wrong alarm has a chance of some 1e-8 in each."""
    assert many(runs=200) == [[]] * 200


def test_wrong_noise_is_named() -> None:
    """A parameter with too little of it, or with that of another one."""
    (found,) = many(lambda noise: [noise[0], 0.5 * noise[1], noise[2]])
    assert found == ["the noise on b has 0.503 of the standard deviation that is charged"] or "the noise on b" in found[0]
    (found,) = many(lambda noise: [noise[0], noise[1], noise[2].flatten()[:20].lerp(noise[1], 0.9)])
    assert "of different parameters" in found[-1]
    (found,) = many(lambda noise: [1.2 * n for n in noise])
    assert found == []  # more than is charged is no fault of privacy


def test_poisson_draws_are_not_found_fault_with() -> None:
    """In none of 200 runs, at several rates; draws that are more, the same, or together are."""
    for seed in range(200):
        generator, rate = drawn(seed), (0.005, 0.1, 0.5, 1.0)[seed % 4]
        seen = DrawsSeen(300)
        for _ in range(50):
            seen.add((torch.rand(300, generator=generator) < rate).double())
        assert seen.findings(rate) == []
        assert rate < 0.1 or seen.findings(rate / 2) != []
