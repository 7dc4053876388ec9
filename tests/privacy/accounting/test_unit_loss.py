"""Epsilon of users with several examples where single examples are drawn: mixtures of Gaussians."""

import math

import numpy as np
import pytest

from dp_hooks.errors import InvalidArgumentError
from dp_hooks.privacy.accounting.opacus import make_accountant
from dp_hooks.privacy.accounting.pld import pld_epsilon
from dp_hooks.privacy.accounting.privacy_loss import PrivacyLoss
from dp_hooks.privacy.accounting.unit_loss import UnitLoss, unit_epsilon
from dp_hooks.privacy.accounting.upper_bound import gaussian_epsilon

from ...training.helpers import Run

# By dp_accounting 0.6, PLD.from_mixture_gaussian_mechanism(sigma, range(k + 1), binomial probabilities,
# value_discretization_interval=h, log_mass_truncation_bound=log(1e-4 delta / steps)), h from 1e-3 to 5e-3: optimistic (by
# rounding), and pessimistic (connect the dots).
KNOWN = [
    ((1.0, 0.01, 4, 100, 1e-5), 3.146744, 3.210414),
    ((2.0, 0.05, 8, 200, 1e-5), 15.696824, 18.231794),
    ((4.0, 0.001, 32, 1000, 1e-6), 0.600781, 1.114269),
    ((0.7, 0.02, 3, 50, 1e-5), 9.375051, 9.436227),
    ((8.0, 0.2, 5, 300, 1e-5), 10.851437, 11.222671),
    ((10.0, 0.5, 10, 100, 1e-6), 35.300414, 36.154911),
    ((1.0, 0.3, 2, 1, 1e-5), 6.521750, 6.522250),
]


def delta_of_one_release(sigma: float, rate: float, examples: int, epsilon: float, *, removed: bool) -> float:
    """By a sum over many points: ``integral of max(0, p - e^epsilon p')``."""
    x = np.linspace(-12 * sigma, examples + 12 * sigma, 40_001)
    weights = [math.comb(examples, j) * rate**j * (1 - rate) ** (examples - j) for j in range(examples + 1)]
    densities = [np.exp(-0.5 * ((x - j) / sigma) ** 2) / (sigma * math.sqrt(2 * math.pi)) for j in range(examples + 1)]
    mixture, plain = sum(w * d for w, d in zip(weights, densities, strict=True)), densities[0]
    p, other = (mixture, plain) if removed else (plain, mixture)
    return float(np.maximum(p - math.exp(epsilon) * other, 0).sum() * (x[1] - x[0]))


@pytest.mark.parametrize(("setting", "least", "most"), KNOWN)
def test_epsilon_is_that_of_dp_accounting(setting: tuple[float, float, int, int, float], least: float, most: float) -> None:
    """Between the optimistic value and a thousandth above the pessimistic one; not that of single examples, nor k times it."""
    sigma, rate, examples, steps, delta = setting
    found = unit_epsilon(((sigma, rate, steps),), examples, delta)
    assert least <= found <= 1.001 * most
    single = pld_epsilon(((sigma, rate, steps),), delta)
    assert found > 1.1 * single
    assert unit_epsilon(((sigma, rate, steps),), examples - 1, delta) < found if examples > 2 else single < found


@pytest.mark.parametrize("setting", [(1.0, 0.3, 2), (0.5, 0.01, 7), (3.0, 0.9, 5), (1.5, 1e-3, 12)])
def test_one_release_is_exact_in_the_larger_direction(setting: tuple[float, float, int]) -> None:
    """Delta at the epsilon found is what it was asked for, a little less, by a plain sum over the densities."""
    sigma, rate, examples = setting
    for delta in (1e-3, 1e-6):
        epsilon = unit_epsilon(((sigma, rate, 1),), examples, delta)
        deltas = [delta_of_one_release(sigma, rate, examples, epsilon, removed=removed) for removed in (True, False)]
        assert max(deltas) <= delta * (1 + 1e-5)
        if epsilon > 0:
            nearer = max(delta_of_one_release(sigma, rate, examples, epsilon * 0.995, removed=r) for r in (True, False))
            assert nearer > delta


def test_known_ends() -> None:
    """One example per unit: the accountant "pld"; rate 1 or nearly: a Gaussian of sensitivity k; no noise: infinite; no step: 0."""
    assert unit_epsilon(((1.0, 0.01, 1000),), 1, 1e-5) == pld_epsilon(((1.0, 0.01, 1000),), 1e-5)
    whole = gaussian_epsilon(3 * math.sqrt(50) / 20, 1e-5)
    assert unit_epsilon(((20.0, 1.0, 50),), 3, 1e-5) == pytest.approx(whole, rel=1e-9)
    assert whole * 0.99 < unit_epsilon(((20.0, 0.999, 50),), 3, 1e-5) <= whole
    assert unit_epsilon(((0.0, 0.5, 1),), 3, 1e-5) == math.inf
    assert unit_epsilon((), 3, 1e-5) == 0.0
    assert unit_epsilon(((0.01, 0.5, 1),), 3, 1e-5) == gaussian_epsilon(300.0, 1e-5)
    mixed = unit_epsilon(((4.0, 0.01, 100), (20.0, 1.0, 5)), 3, 1e-5)
    parts = [unit_epsilon(((4.0, 0.01, 100),), 3, 1e-5), unit_epsilon(((20.0, 1.0, 5),), 3, 1e-5)]
    assert max(parts) < mixed < sum(parts)


@pytest.mark.parametrize("removed", [True, False])
@pytest.mark.parametrize("setting", [(1.0, 0.01, 4), (0.3, 1e-4, 100), (6.0, 0.7, 12)])
def test_losses_are_found_again_where_they_are(setting: tuple[float, float, int], removed: bool) -> None:
    """The inverse of the loss is one, over its whole range, to rounding; what is left out of the mixture is accounted for."""
    sigma, rate, examples = setting
    loss = UnitLoss(sigma, rate, examples, removed=removed, outside=1e-15)
    x = np.linspace(loss._low, loss._high, 4001)
    values = loss._loss(x)
    again = loss._where(values)
    steep = np.abs(np.gradient(values, x)) > 1e-6  # where it is flat, rounding of the loss is large in x
    assert np.abs(again - x)[steep].max() < 1e-6 * (1 + examples)
    assert loss._where(np.array([-1e9 if removed else 1e9]))[0] == -np.inf
    total = math.exp(loss.on_grid(1e-3).log_moment(0.0))
    assert 1 - loss.outside - 1e-12 <= total <= 1 + 1e-12


def test_a_scope_tells_it_of_what_was_spent() -> None:
    """``get_epsilon(delta, examples_per_unit=k)`` grows with k, is that of the history, and is refused where units are drawn."""
    run = Run(poisson_sampling=True, accountant="rdp", noise_multiplier=2.0, self_check=False).trained(passes=3)
    found = [run.scope.get_epsilon(1e-5, examples_per_unit=k) for k in (1, 2, 3)]
    assert found == sorted(found)
    assert found[1] == unit_epsilon(((2.0, 1.0, 3),), 2, 1e-5)
    for k in (0, 1.5, True, None):
        if k is None:
            assert run.scope.get_epsilon(1e-5) >= found[0]
            continue
        with pytest.raises(InvalidArgumentError, match="examples_per_unit"):
            run.scope.get_epsilon(1e-5, examples_per_unit=k)  # type: ignore[arg-type]
    units = Run(poisson_sampling=True, accountant=make_accountant("rdp"), privacy_unit=[0, 0, 1, 1, 2, 2])
    with pytest.raises(InvalidArgumentError, match=r"examples_per_unit=2.*privacy_unit"):
        units.scope.get_epsilon(1e-5, examples_per_unit=2)


@pytest.mark.parametrize("removed", [True, False])
@pytest.mark.parametrize("setting", [(1.0, 0.01), (0.4, 1e-5), (5.0, 0.9)])
def test_of_one_example_the_distribution_is_that_of_single_examples(setting: tuple[float, float], removed: bool) -> None:
    """The mixture of two is what the accountant "pld" works with, mass by mass."""
    one, plain = (
        made(*setting, *more, removed=removed, outside=1e-14).on_grid(1e-3)  # type: ignore[operator]
        for made, more in ((UnitLoss, (1,)), (PrivacyLoss, ()))
    )
    assert (one.first, len(one.mass)) == (plain.first, len(plain.mass))
    assert np.abs(one.mass - plain.mass).max() < 1e-12
