"""Tails of the binomial distribution: against sums in many digits."""

import mpmath
import pytest

from dp_hooks.privacy.accounting.binomial import at_least, exactly, most_drawn

CASES = [
    # successes, trials, rate
    (1, 1, 0.3),
    (0, 5, 0.3),
    (5, 5, 0.3),
    (2, 7, 0.999),
    (8, 60, 0.15),
    (40, 60, 0.15),
    (60, 1000, 0.1),
    (150, 10_000, 0.01),
    (2000, 10_000, 0.01),
    (1200, 10**8, 1e-5),
    (1, 10**8, 1e-12),
    (1000, 10**8, 1e-5),
]


@pytest.mark.parametrize(("least", "trials", "rate"), CASES)
def test_tails_are_right_to_nine_digits(least: int, trials: int, rate: float) -> None:
    """However small they are: by an incomplete beta function in 40 digits."""
    with mpmath.workdps(40):
        tail = mpmath.betainc(least, trials - least + 1, 0, mpmath.mpf(rate), regularized=True) if least else mpmath.mpf(1)
        one = mpmath.binomial(trials, least) * mpmath.mpf(rate) ** least * (1 - mpmath.mpf(rate)) ** (trials - least)
    assert at_least(least, trials, rate) == pytest.approx(float(tail), rel=1e-9, abs=0)
    assert exactly(least, trials, rate) == pytest.approx(float(one), rel=1e-9, abs=0)


def test_the_ends_of_the_range() -> None:
    """More successes than trials are impossible; at rate 1 all trials succeed."""
    assert at_least(6, 5, 0.3) == 0
    assert at_least(5, 5, 1.0) == exactly(5, 5, 1.0) == 1
    assert exactly(4, 5, 1.0) == at_least(6, 5, 1.0) == 0


@pytest.mark.parametrize(
    ("trials", "rate", "probability"), [(1000, 0.1, 1e-6), (10, 0.5, 1e-9), (10**8, 1e-5, 1e-6), (7, 1.0, 0.1)]
)
def test_the_most_that_are_drawn(trials: int, rate: float, probability: float) -> None:
    """It is exceeded with at most that probability, and the number below it is exceeded more often."""
    most = most_drawn(trials, rate, probability)
    assert at_least(most + 1, trials, rate) <= probability
    assert at_least(most, trials, rate) > probability
