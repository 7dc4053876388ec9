"""DrawsSeen: whether the canaries' examples were drawn as often, and as independently, as is charged."""

import math

import torch
from torch import Tensor

from .noise_seen import LIMIT


class DrawsSeen:
    """Counts how often each of m examples was in a batch."""

    def __init__(self, count: int) -> None:
        """Of ``count`` examples."""
        self._of_each = torch.zeros(count, dtype=torch.float64, device="cpu")
        self._of_steps: list[float] = []

    def add(self, times: Tensor) -> None:
        """Take down one logical batch: how often each was in it, ``[m]``."""
        self._of_each += times
        self._of_steps.append(float(times.sum()))

    @property
    def rate(self) -> float:
        """Their share in a batch, on average."""
        return float(self._of_each.sum()) / max(1, len(self._of_each) * len(self._of_steps))

    @property
    def most(self) -> float:
        """How often the one was drawn that was drawn most often."""
        return float(self._of_each.max())

    def findings(self, charged: float) -> list[str]:
        """What is wrong with Poisson sampling at the rate that is ``charged``, in words."""
        steps, count = len(self._of_steps), len(self._of_each)
        deviation = math.sqrt(max(charged * (1 - charged), 1e-12) * steps * count)
        found = []
        if float(self._of_each.sum()) - charged * steps * count > LIMIT * deviation + 0.5:
            found.append(f"examples are in a batch with probability {self.rate:.4g}, and {charged:.4g} is charged")
            return found
        for counts, trials, what in (
            (self._of_each, steps, "some examples are drawn much more often than others"),
            (torch.tensor(self._of_steps, dtype=torch.float64, device="cpu"), count, "examples are drawn together"),
        ):
            if _dispersion(counts, trials) > LIMIT:
                found.append(f"{what}: draws are not independent")
        return found


def _dispersion(counts: Tensor, trials: int) -> float:
    """By how many standard deviations counts out of so many trials vary more than binomial ones with their mean."""
    n, rate = len(counts), float(counts.mean()) / max(1, trials)
    if n < 2 or not 0 < rate < 1:
        return 0.0
    variance = trials * rate * (1 - rate)
    square = float((counts - counts.mean()).square().sum()) / variance
    kurtosis = max(0.0, (1 - 6 * rate * (1 - rate)) / variance)
    return (square - (n - 1)) / math.sqrt((n - 1) * (2 + kurtosis))
