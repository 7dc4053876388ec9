"""CanaryNoise: puts canaries into the clipped sum before the noise, and looks for them in what was released."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._validate import bad
from ..privacy.accounting.history import History, add_charge
from ..privacy.noise.noise import Noise
from .canaries import Canaries, log_ratio
from .canary_slots import CanarySlots
from .draws_seen import DrawsSeen
from .noise_seen import NoiseSeen
from .user_loop import number_of_batch


class CanaryNoise:
    """The noise of a run, with canaries.

    The rest of the clipped sum is known to who looks for them, as it is to the attacker that differential privacy is about: it is
    taken off before.

    Attributes:
        canaries: what is put in, ``reach`` times as long as the sensitivity.
        slots: whose places they take.
        scores: ``[m]``, the logarithm of the likelihood ratio for each canary, over all steps so far.
        releases: how many there were.
        history: noise multiplier, rate and number of the releases: what they cost.
    """

    def __init__(
        self, noise: Noise, canaries: Canaries, slots: CanarySlots, names: Sequence[str], rate: float, reach: float
    ) -> None:
        """Stand in front of ``noise``. A canary's norm is the sensitivity times ``reach``; ``rate`` is that of the sampling."""
        self._noise = noise
        self.canaries = canaries
        self.slots = slots
        self._rate = rate
        self.reach = reach
        self._optimizer: Any = None
        self._expected: tuple[int, list[Tensor], float, float] | None = None
        self.random_numbers, self.is_secure, self.is_repeatable = noise.random_numbers, noise.is_secure, noise.is_repeatable
        self.scores = torch.zeros(len(canaries), dtype=torch.float64, device="cpu")
        self.noise_seen = NoiseSeen(names)
        self.draws_seen = DrawsSeen(len(canaries))
        self.releases = 0
        self.missing = 0  # parameters without noise, in the worst step
        self.history: History = []

    def watch(self, optimizer: Any) -> None:
        """Look at what ``optimizer``, the private one, releases."""
        self._optimizer = optimizer
        optimizer.attach_step_hook(self._read)

    def check_devices(self, devices: set[torch.device]) -> None:
        """Those of the noise itself."""
        self._noise.check_devices(devices)

    def add_(self, totals: Sequence[Tensor], std: float, scale: float = 1.0, *, sensitivity: float) -> bool:
        """Add canaries to the sums of a step, before their noise; other sums just get theirs."""
        if self._expected is None or self._expected[0] != self._number:
            if len(self._params) != len(self.noise_seen.names):
                raise bad("train", "a loop", "it froze parameters on the way: canaries are in those that were trained at first.")
            self.missing = max(self.missing, len(self._params) - len(totals))
            times = torch.bincount(self.slots.drawn(self._number), minlength=len(self.canaries)).double()
            before = [total.detach().clone() for total in totals]
            norm = float(self._optimizer.sensitivity)
            if self.missing == 0:
                self.canaries.put(totals, times, self.reach * norm)
                self.draws_seen.add(times)
            self._expected = self._number, before, norm, scale
            self._sent = times * self.canaries.coins * self.reach
        return self._noise.add_(totals, std, scale, sensitivity=sensitivity)

    @property
    def _number(self) -> int:
        return number_of_batch(self._optimizer)

    @property
    def _params(self) -> list[Tensor]:
        return [p for p in self._optimizer.params if p.requires_grad]

    def _read(self, optimizer: Any) -> None:
        """Take what was released apart: the rest of the sum is taken off, and canaries and noise are left."""
        self.releases += 1
        sigma = optimizer.noise_multiplier
        add_charge(self.history, sigma, self._rate)
        if self._expected is None or self._expected[0] != self._number or self.missing:
            return
        _, before, norm, scale = self._expected
        released = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._params]
        left = [(grad.to(total.dtype) / scale - total) / norm for grad, total in zip(released, before, strict=True)]
        seen = self.canaries.read(left)
        if sigma > 0:
            self.scores += log_ratio(seen, sigma, self._rate)
            self.canaries.put(left, -self._sent, 1.0)
            self.noise_seen.add([noise / sigma for noise in left])
