"""What is asked of a source of noise."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class Noise(Protocol):
    """Adds normal noise to what is released.

    Attributes:
        random_numbers: in words, where they are from, for the report.
        is_repeatable: whether it is drawn from a generator of the user's.
        is_secure: whether nobody can predict them or read anything off the digits of the released numbers.
    """

    @property
    def random_numbers(self) -> str: ...  # noqa: D102

    @property
    def is_repeatable(self) -> bool: ...  # noqa: D102

    @property
    def is_secure(self) -> bool: ...  # noqa: D102

    def check_devices(self, devices: set[torch.device]) -> None:
        """Raise ``InvalidArgumentError`` unless noise can be made on all ``devices``."""

    def add_(self, totals: Sequence[Tensor], std: float, scale: float = 1.0, *, sensitivity: float) -> bool:
        """Replace each of ``totals`` by ``scale * (total + noise)``, in place, and return whether all can be released: are finite.

        Args:
            totals: sums that together change by at most ``sensitivity`` in Euclidean norm.
            std: the standard deviation of the noise that a sum of exact numbers needs; 0: none.
            scale: what the noised sum is multiplied by.
            sensitivity: of ``totals``, greater than 0.
        """
        ...
