"""NoiseSeen: whether the noise that was added is as large as is charged, and new each time."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

# In standard deviations. Under the normal law 6 of them are exceeded with a chance of 1e-9; of as many as a thousand comparisons
# in an audit, one in a run out of a million would be wrong.
LIMIT = 6.0
_MOST = 1 << 20  # numbers of a parameter that are compared with those of others and of other steps


class NoiseSeen:
    """Adds up what is left of each release when all that is known of it is taken off: noise, in units of what is charged."""

    def __init__(self, names: Sequence[str]) -> None:
        """Of parameters of these names."""
        self.names = names
        self._counts = [0] * len(names)
        self._squares = [0.0] * len(names)
        self._products = {"of one step and the next": [0.0, 0.0], "of the first step and later ones": [0.0, 0.0]}
        self._products |= {"of different parameters in a step": [0.0, 0.0], "of numbers side by side": [0.0, 0.0]}
        self._first: list[Tensor] | None = None
        self._last: list[Tensor] | None = None

    def add(self, noise: Sequence[Tensor]) -> None:
        """Take down the noise of one step, of each parameter, divided by the standard deviation that it should have."""
        flat = [(torch.view_as_real(n) if n.is_complex() else n).flatten().double() for n in noise]
        for k, numbers in enumerate(flat):
            self._counts[k] += numbers.numel()
            self._squares[k] += float(numbers.square().sum())
        flat = [numbers[:_MOST] for numbers in flat]
        for numbers in flat:
            self._note("of numbers side by side", numbers[1:], numbers[:-1])
        for one, other in pairwise(sorted(flat, key=torch.Tensor.numel)):
            self._note("of different parameters in a step", one, other)
        if self._last is not None and self._first is not None:
            for name, others in (("of one step and the next", self._last), ("of the first step and later ones", self._first)):
                for one, other in zip(flat, others, strict=True):
                    self._note(name, one, other)
        self._first = flat if self._first is None else self._first
        self._last = flat

    def _note(self, name: str, one: Tensor, other: Tensor) -> None:
        """Add the inner product of two vectors, as far as both reach, and its variance if they are independent."""
        size = min(one.numel(), other.numel())
        one, other = one[:size], other[:size]
        held = self._products[name]
        held[0] += float(one @ other)
        held[1] += float(one.square() @ other.square())

    @property
    def scale(self) -> float:
        """The standard deviation of the noise, in units of what is charged."""
        return math.sqrt(sum(self._squares) / max(1, sum(self._counts)))

    def findings(self) -> list[str]:
        """What is wrong with it, in words: too small, of all parameters or of some, or the same again."""
        found = []
        small = [k for k in range(len(self.names)) if _deviations(self._squares[k], self._counts[k]) < -LIMIT]
        if _deviations(sum(self._squares), sum(self._counts)) < -LIMIT:
            found.append(f"the noise has {self.scale:.3f} of the standard deviation that is charged")
        elif small:
            k = small[0]
            scale = math.sqrt(self._squares[k] / self._counts[k])
            more = f", and {len(small) - 1} more parameters" if len(small) > 1 else ""
            found.append(f"the noise on {self.names[k]} has {scale:.3f} of the standard deviation that is charged{more}")
        for name, (total, variance) in self._products.items():
            if abs(total) > LIMIT * math.sqrt(variance) > 0:
                found.append(f"the noise {name} is correlated ({total / math.sqrt(variance):+.0f} standard deviations)")
        return found


def _deviations(square: float, count: int) -> float:
    """How far a sum of ``count`` squares of standard normal numbers is from what it should be: Wilson and Hilferty 1931."""
    if count == 0:
        return 0.0
    return float(((square / count) ** (1 / 3) - (1 - 2 / (9 * count))) / math.sqrt(2 / (9 * count)))
