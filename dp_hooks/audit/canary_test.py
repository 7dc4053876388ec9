"""CanaryTest: how canaries are told from nothing, fixed by what the run says of itself, before anything of it is looked at."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..privacy.accounting.history import History
from ..privacy.accounting.rates import number
from .canaries import log_ratio
from .trade_off import scaled_epsilon

_DRAWS, _MOST_NUMBERS = 20_000, 40_000_000
_THRESHOLDS = 9
_SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


@dataclass(frozen=True)
class CanaryTest:
    """A test of single canaries, and how many coins to guess.

    Attributes:
        threshold: a canary counts as in if its score is above.
        guesses: how many coins are guessed: those with the highest scores as in, as many with the lowest as out.
        deltas: where the trade-off of the stated mechanism has its tangents about that threshold.
    """

    threshold: float
    guesses: int
    deltas: tuple[float, ...]

    @classmethod
    def for_run(cls, history: History, canaries: int, error: float, generator: torch.Generator) -> "CanaryTest":
        """Draw scores as the stated mechanism gives them, and take what tells most of so many ``canaries``, with that ``error``."""
        steps = sum(count for _, _, count in history)
        draws = max(500, min(_DRAWS, _MOST_NUMBERS // max(1, 2 * steps)))
        inside, outside = (_scores(history, draws, present, generator) for present in (True, False))
        levels = torch.linspace(0.04, 0.96, _THRESHOLDS, dtype=torch.float64, device="cpu")
        least, threshold, delta = math.inf, 0.0, 0.5
        for candidate in torch.cat([inside, outside]).quantile(levels).tolist():
            true, false = float((inside > candidate).double().mean()), float((outside > candidate).double().mean())
            for more, less, slope in ((true, false, candidate), (1 - false, 1 - true, -candidate)):
                tangent = more - math.exp(min(slope, 700.0)) * less
                loss = _loss(more, less, tangent, canaries / 2, error, history)
                if loss < least:
                    least, threshold, delta = loss, candidate, tangent
        deltas = tuple(part * delta for part in (0.05, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2) if 0 < part * delta < 1)
        return cls(threshold, _guesses(inside, outside, canaries), deltas)


def _loss(more: float, less: float, delta: float, count: float, error: float, history: History) -> float:
    """Estimate by how much, in logarithms, the noise will seem more than it is, since rates are known from counts."""
    if not (1e-9 < delta < more and less > 0):
        return math.inf
    wide = -float(torch.special.ndtri(torch.tensor(error / 2, dtype=torch.float64, device="cpu"))) / math.sqrt(count)
    more_low = more - wide * math.sqrt(more * (1 - more)) - wide**2 / 2
    less_high = less + wide * math.sqrt(less * (1 - less)) + wide**2 / 2
    if more_low <= delta:
        return math.inf
    # The accountant's epsilon is that of the worse direction, which the test need not be able to see.
    stated = scaled_epsilon(1.0, history, delta)
    change = scaled_epsilon(0.9, history, delta) - stated
    lost = stated - math.log((more_low - delta) / less_high)
    return lost * math.log(1 / 0.9) / change if 0 < change < math.inf else math.inf


def _guesses(inside: Tensor, outside: Tensor, canaries: int) -> int:
    """How many guesses make the largest epsilon, where nothing but their number counts."""
    scores, order = torch.cat([inside, outside]).sort()
    is_in = order < len(inside)
    most, found = -math.inf, canaries
    for share in _SHARES:
        one_side = max(1, int(share * len(scores) / 2))
        right = float(is_in[-one_side:].sum() + (~is_in[:one_side]).sum()) / (2 * one_side)
        guesses = max(2, 2 * round(share * canaries / 2))
        wrong = guesses * (1 - right)
        at_most = (wrong + 3 * math.sqrt(wrong) + 4) / guesses  # about what a bound of the share of wrong guesses will be
        epsilon = math.log((1 - at_most) / at_most) if at_most < 1 else -math.inf
        if epsilon > most:
            most, found = epsilon, min(guesses, canaries)
    return found


def _scores(history: History, draws: int, present: bool, generator: torch.Generator) -> Tensor:
    total = torch.zeros(draws, dtype=torch.float64, device="cpu")
    for sigma, sampled, steps in history:
        rate = number(sampled)
        for _ in range(steps):
            seen = sigma * torch.randn(draws, dtype=torch.float64, generator=generator, device="cpu")
            if present:
                seen += torch.rand(draws, dtype=torch.float64, generator=generator, device="cpu") < rate
            total += log_ratio(seen, sigma, rate)
    return total
