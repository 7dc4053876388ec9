"""Epsilon of many releases together, from the distributions of their privacy losses: an upper bound, close to the truth."""

import math
from collections.abc import Sequence

import numpy as np

from .privacy_loss import Array, Loss, OnGrid

# The share of epsilon that the grid may add, by estimate; the powers of two that its size may be; how many cells in all.
_GRID_SHARE, _SMALLEST, _LARGEST, _MOST_CELLS = 1e-3, 13, 22, 1_000_000
_BEYOND = math.log(1e-8)  # of the tilted probability on each side of the window
_RAISED = math.log(1e-9)  # of the tilted probability, by raising the smallest losses
_UNIT = np.finfo(np.float64).eps
_MOST_NOISE = 1e-3  # the share of rounding in delta beyond which another tilt is tried
_NEGLIGIBLE = math.log(1e-40)  # of the transform of the tilted sum, which is 1 at its largest
_STEP_ROUNDING = 1e-13  # relative, of the probabilities of one release: quadrature, exponentials, sums

Composed = Sequence[tuple[Loss, int]]


def composed_epsilon(releases: Composed, delta: float) -> float:
    """Return an epsilon that ``releases``, each so many times, do not exceed at ``delta``, in the direction that they are of.

    The distribution of the sum of all losses is tilted: multiplied by ``e^(t loss)``, with the t that puts epsilon in the midst
    of it (a saddle point). So what a Fourier transform rounds off is small beside what is looked for, however small delta is;
    and only a window about epsilon has to be held. Accounted for, all to the side of a larger epsilon:

    - the grid, by :meth:`Loss.on_grid`, and what lies outside of it, as losses without bound;
    - the window: sums that wrap around it from below only add; those above it are bounded by Chernoff's inequality;
    - rounding in the transforms: a norm-wise bound (Higham, Accuracy and Stability of Numerical Algorithms, Theorem 24.2),
      through the power and the sums that follow.

    Returns infinity where delta is too small for all this to leave anything of it.
    """
    window = _Window(releases, delta=delta)
    epsilon, noise = _bound(releases, delta, window)
    for _ in range(2):
        if math.isinf(epsilon) or epsilon == 0 or (noise < _MOST_NOISE and window.is_fine_for(epsilon)):
            break
        window = _Window(releases, epsilon=epsilon)
        finer, noise = _bound(releases, delta, window)
        if finer > (1 - 1e-3) * epsilon:
            return min(finer, epsilon)
        epsilon = finer
    return epsilon


def _bound(releases: Composed, delta: float, window: "_Window") -> tuple[float, float]:
    """Return the bound that a window gives, and the share that rounding in the transforms may have in delta."""
    grids = [(loss.on_grid(window.spacing, least), count) for (loss, count), least in zip(releases, window.least, strict=True)]
    outside = sum(loss.outside * count for loss, count in releases)
    above = sum(count * grid.log_moment(window.s) for grid, count in grids) - window.s * window.high
    left = delta - outside - math.exp(min(0.0, above))
    if left <= 0:
        return math.inf, 1.0
    return _Sum(grids, window).epsilon(left)


class _Window:
    """Where the sum of the losses is looked at: the tilt t, the window from ``low`` to ``high``, and the grid in it."""

    def __init__(self, releases: Composed, *, delta: float = 1.0, epsilon: float | None = None) -> None:
        """Look about ``epsilon``, or where Renyi divergences put it at ``delta``."""
        self._nodes = [(*loss.nodes(), count) for loss, count in releases]
        low, high = math.log(1e-15), math.log(1e15)
        for _ in range(30):
            t = math.exp((low + high) / 2)
            moment, mean, _ = self._cumulants(t)
            below = mean < epsilon if epsilon is not None else t * mean - moment + math.log1p(t) < -math.log(delta)
            low, high = (math.log(t), high) if below else (low, math.log(t))
        self.t = t = math.exp(high)
        moment, mean, variance = self._cumulants(t)
        deviation = math.sqrt(variance)
        tilts = np.geomspace(0.3, 60, 16) / deviation
        upper = [((self._cumulants(t + y)[0] - moment - _BEYOND) / y, t + y) for y in tilts]
        lower = [(self._cumulants(t - y)[0] - moment - _BEYOND) / -y for y in tilts]
        (top, self.s), bottom = min(upper), max(lower)
        self.least = [self._negligible_below(*nodes) for nodes in self._nodes]
        smallest = [max(least, nodes[0][0]) for least, nodes in zip(self.least, self._nodes, strict=True)]
        finest = sum(loss.largest - least for (loss, _), least in zip(releases, smallest, strict=True)) / _MOST_CELLS
        about = max(0.1 * deviation, mean - math.log1p(1 / t)) if epsilon is None else max(2e-4 * deviation, epsilon)
        for power in range(_SMALLEST, _LARGEST + 1):
            self.size = 2**power
            self.spacing = max((top - bottom) / (self.size - 2), finest)
            if self.spacing == finest or self.is_fine_for(about / 2):
                break
        self.first = math.floor(bottom / self.spacing)
        self.high = (self.first + self.size) * self.spacing

    def is_fine_for(self, epsilon: float) -> bool:
        """Whether the grid adds little to such an epsilon: in all steps together, and in the cell where epsilon is."""
        return self._added(self.spacing) < _GRID_SHARE * epsilon and self.spacing < epsilon / 50

    def _cumulants(self, t: float) -> tuple[float, float, float]:
        """Return ``log E[e^(t sum)]`` and its first two derivatives in t: mean and variance of the tilted sum."""
        total = np.zeros(3)
        for loss, log_probability, count in self._nodes:
            tilted = log_probability + t * loss
            largest = tilted.max()
            weights = np.exp(tilted - largest)
            mass = weights.sum()
            mean = (weights @ loss) / mass
            total += count * np.array([largest + math.log(mass), mean, (weights @ (loss - mean) ** 2) / mass])
        return float(total[0]), float(total[1]), float(total[2])

    def _negligible_below(self, loss: Array, log_probability: Array, count: int) -> float:
        """Return a loss to which all smaller ones can be raised without changing anything in the tilted sum."""
        tilted = log_probability + self.t * loss
        moment = tilted.max() + math.log(np.exp(tilted - tilted.max()).sum())
        with np.errstate(divide="ignore"):
            raised = np.log(np.cumsum(np.exp(log_probability))) + self.t * loss - moment + math.log(count)
        negligible = np.flatnonzero(raised < _RAISED)
        return float(loss[negligible[-1]]) if len(negligible) else -math.inf

    def _added(self, spacing: float) -> float:
        """Estimate what a grid adds to epsilon: to second order, the variance within its cells."""
        added = 0.0
        for loss, log_probability, count in self._nodes:
            tilted = log_probability + self.t * loss
            weights = np.exp(tilted - tilted.max())
            part = loss / spacing - np.floor(loss / spacing)
            added += count * float((weights @ (part * (1 - part))) / weights.sum())
        return added * (self.t + 1) / 2 * spacing**2


class _Sum:
    """The distribution of the sum of all losses, tilted, in a window."""

    def __init__(self, grids: Sequence[tuple[OnGrid, int]], window: _Window) -> None:
        self._window, size = window, window.size
        logarithm, offset, self._log_scale = np.zeros(size // 2 + 1, complex), 0, 0.0
        kept = np.arange(size // 2 + 1)  # frequencies at which the transform of the sum is not negligible: often few
        of_one = 4 * _UNIT * math.log2(size)  # of a transform, relative, in the Euclidean norm
        of_transforms, growth, of_powers = 0.0, 0.0, np.full(size // 2 + 1, 4 * _UNIT)
        for grid, count in grids:
            moment = grid.log_moment(window.t)
            probability = np.exp(grid.log_tilted(window.t) - moment)
            mode = int(probability.argmax())
            offset += count * (grid.first + mode)
            self._log_scale += count * (moment + _STEP_ROUNDING)
            circle = np.bincount((np.arange(len(probability)) - mode) % size, probability, size)
            likeliest, circle[0] = circle[0], 0.0  # transformed without error, however much more likely than the rest
            one = np.fft.rfft(circle)[kept] + likeliest
            with np.errstate(divide="ignore"):
                large = logarithm.real + count / 2 * np.log(one.real**2 + one.imag**2) > _NEGLIGIBLE
            kept, one, logarithm, of_powers = kept[large], one[large], logarithm[large], of_powers[large]
            log_one = np.log(one)
            logarithm += count * log_one
            error = of_one * float(np.linalg.norm(circle))
            of_transforms += count * error
            growth += count * error * math.sqrt(size)
            of_powers += count * 2 * _UNIT * (1 + np.abs(log_one))
        transform = np.zeros(size // 2 + 1, complex)
        transform[kept] = np.exp(logarithm)
        density = np.fft.irfft(transform, size)
        self._error = of_transforms * math.exp(min(growth, 100.0)) + of_one * float(np.linalg.norm(density))
        self._error += float(np.linalg.norm(np.abs(transform[kept]) * of_powers)) * math.sqrt(2 / size)
        self._error += 2 * math.exp(_NEGLIGIBLE)
        self._density: Array = np.roll(np.maximum(density, 0.0), (offset - window.first) % size)
        steps = window.spacing * np.arange(size)
        self._kernel: Array = np.exp(-window.t * steps) * -np.expm1(-steps)
        self._kernel_norms: Array = np.sqrt(np.cumsum(self._kernel**2))

    def epsilon(self, delta: float) -> tuple[float, float]:
        """Return the epsilon, 0 or more, at which delta is reached, and the share of rounding in that."""
        window = self._window
        low, high = max(0, -window.first), window.size - 1
        if low > high:
            return 0.0, 0.0
        if self._delta(low) <= delta:
            return float((window.first + low) * window.spacing), 0.0
        if self._delta(high) > delta:
            return math.inf, 1.0
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self._delta(middle) <= delta else (middle, high)
        above, below = self._delta(low), self._delta(high)  # between them delta is linear in e^epsilon
        part = (above - delta) / (above - below)
        epsilon = (window.first + low) * window.spacing + math.log1p(part * math.expm1(window.spacing))
        whole = self._inside(low) + self._noise(low)
        return float(epsilon), self._noise(low) / whole if whole else 1.0

    def _delta(self, i: int) -> float:
        """Return an upper bound of delta, of the losses in the window, at the epsilon of number ``i``."""
        scale = self._log_scale - self._window.t * (self._window.first + i) * self._window.spacing
        return math.exp(min(0.0, scale + math.log(max(self._inside(i) + self._noise(i), 1e-300))))

    def _inside(self, i: int) -> float:
        return float(self._density[i:] @ self._kernel[: self._window.size - i])

    def _noise(self, i: int) -> float:
        return float(self._error * self._kernel_norms[self._window.size - i - 1])
