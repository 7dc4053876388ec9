"""The privacy loss of a release that is one of several, and it is known which."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .privacy_loss import Array, Loss, OnGrid


@dataclass(frozen=True)
class MixedLoss:
    """One of several losses, each with its probability, and which one is known; the rest of the probability is a loss of 0."""

    parts: Sequence[tuple[float, Loss]]
    at_zero: float = 0.0
    lost: float = 0.0

    @property
    def outside(self) -> float:
        """The probability that counts as loss without bound."""
        return self.lost + sum(weight * loss.outside for weight, loss in self.parts)

    @property
    def largest(self) -> float:
        """The largest loss but for what is left out."""
        return max(loss.largest for _, loss in self.parts)

    def nodes(self) -> tuple[Array, Array]:
        """Return losses in ascending order, and the logarithms of their probabilities, to estimate integrals by."""
        nodes = [(loss, log + math.log(weight)) for weight, part in self.parts for loss, log in [part.nodes()]]
        if self.at_zero:
            nodes.append((np.zeros(1), np.array([math.log(self.at_zero)])))
        losses, logs = (np.concatenate(values) for values in zip(*nodes, strict=True))
        order = np.argsort(losses, kind="stable")
        return losses[order], logs[order]

    def on_grid(self, spacing: float, least: float = -math.inf) -> OnGrid:
        """Return a distribution of losses on multiples of ``spacing`` that dominates this one; those below ``least`` are raised."""
        grids = [(weight, part.on_grid(spacing, least)) for weight, part in self.parts]
        if self.at_zero:
            grids.append((self.at_zero, OnGrid(math.floor(least / spacing) if least > 0 else 0, np.ones(1), spacing)))
        first = min(grid.first for _, grid in grids)
        mass = np.zeros(max(grid.first + len(grid.mass) for _, grid in grids) - first)
        for weight, grid in grids:
            mass[grid.first - first : grid.first - first + len(grid.mass)] += weight * grid.mass
        return OnGrid(first, mass, spacing)
