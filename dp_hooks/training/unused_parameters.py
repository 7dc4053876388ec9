"""Trainable parameters that the loss does not reach: said once of each."""

import warnings
from collections.abc import Callable, Sequence

from torch import nn

from ..errors import some_of


class UnusedParameters:
    """Warns of parameters that got no gradient of any sample.

    They get noise all the same: which were used can depend on the data.
    """

    def __init__(self, name_of: Callable[[nn.Parameter], str]) -> None:
        """``name_of`` says what a parameter is called."""
        self._name_of = name_of
        self._mentioned: set[nn.Parameter] = set()

    def mention(self, unused: Sequence[nn.Parameter]) -> None:
        """Name those of ``unused`` that were not named before; the warning points at the line of the step."""
        new = [p for p in unused if p not in self._mentioned]
        if new:
            self._mentioned.update(new)
            warnings.warn(
                f"the loss did not reach {some_of([self._name_of(p) for p in new])}: such parameters get noise but no signal. "
                "Freeze them with requires_grad_(False) before entering the scope.",
                stacklevel=5,
            )
