"""SpotCheck: later batches that are checked anew, at random, since values alone may make samples mix at any time."""

import random
from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import SelfCheckError

# From the operating system: a seed would tell which batches are not looked at.
_ENTROPY: random.Random = random.SystemRandom()
# How many samples of a batch a spot check runs on.
_ROWS = 8


class SpotCheck:
    """Draws which batches are looked at anew, and on which of their samples; knows how many steps nobody has looked at.

    Attributes:
        now: whether the present batch is one of them.
    """

    def __init__(self, rate: float, steps: Callable[[], int]) -> None:
        """``rate`` is the probability for each batch; ``steps`` says how many were released so far."""
        self._rate = rate
        self._steps = steps
        self._passed: int | None = None
        self.now = False

    def saw_batch(self, *, wanted: bool) -> None:
        """A batch is handed out; it is not drawn unless ``wanted``, since it is checked anyway."""
        self.now = wanted and _ENTROPY.random() < self._rate

    def rows(self, samples: int) -> Tensor | None:
        """The samples to run on; None: all."""
        if not self.now or samples <= _ROWS:
            return None
        return torch.tensor(sorted(_ENTROPY.sample(range(samples), _ROWS)), device="cpu")

    def passed(self) -> None:
        """A check has found nothing in the step that is under way."""
        self._passed = self._steps() + 1

    def complete(self, error: SelfCheckError) -> None:
        """Say in ``error`` which steps were released since a check has last passed."""
        if self._passed is None or self._steps() <= self._passed:
            return
        first, last = self._passed + 1, self._steps()
        which = f"step {first} was" if first == last else f"steps {first} to {last} were"
        error.args = (
            f"{error} The last check that passed was that of step {self._passed}; {which} released without one, and may depend on "
            "single examples more than epsilon says.",
        )
