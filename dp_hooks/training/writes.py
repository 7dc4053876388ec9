"""Writes to parameters between private steps, by whatever it was."""

from collections.abc import Sequence

from torch import nn


class Writes:
    """Counts the private steps before which trained parameters were written to by something else.

    Projections and swapped averages do that, and are no fault; so does an average with a copy of the model that was trained on
    private data without noise, which nothing here accounts for. Writes past autograd's counters (``.data``) are not seen.

    Attributes:
        steps: how many such steps there were.
    """

    def __init__(self, params: Sequence[nn.Parameter]) -> None:
        """Watch ``params``."""
        self._params = params
        self._versions: list[int] | None = None
        self.steps = 0

    def before_step(self) -> None:
        """Compare with what was there after the step before."""
        if self._versions is not None and self._versions != [p._version for p in self._params]:
            self.steps += 1

    def after_step(self) -> None:
        """What is there now was made by a private step, or on public data."""
        self._versions = [p._version for p in self._params]
