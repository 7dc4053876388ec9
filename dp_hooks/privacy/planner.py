"""What a private run will cost, before it is begun: noise, steps, epsilon by epoch, and what other sizes would buy."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .._validate import bad, fraction, positive, positive_int
from ..errors import InvalidArgumentError
from .accounting.calibrate import Budget, calibrate, check_epsilon
from .accounting.opacus import DELTA, asked, epsilon_for
from .plots import draw_plan
from .sampling.plan import POISSON, SamplingPlan, plan_of_sizes, sampling_of

_MOST_EPOCHS_LISTED = 10
_WEAK = 10.0
_OTHERS = (("batch x 2", 2, 1.0), ("batch x 4", 4, 1.0), ("half the epochs", 1, 0.5), ("epochs x 2", 1, 2.0))


@dataclass(frozen=True)
class AfterEpoch:
    """What is spent after ``epoch`` passes over the data."""

    epoch: float
    steps: int
    epsilon: float


@dataclass(frozen=True)
class Choice:
    """Sizes of a run, and the noise that they need; ``noise_to_batch_ratio`` is sigma / B."""

    name: str
    batch_size: int
    epochs: float
    steps: int
    noise_multiplier: float
    noise_to_batch_ratio: float


@dataclass(frozen=True)
class PrivacyPlan:
    """A private run as it would be; ``print(plan)`` shows a table, :meth:`as_dict` is for programs.

    ``noise_to_batch_ratio`` is sigma / B, the standard deviation of the noise on the mean gradient in units of the clipping
    bound: of all settings of the mechanism it is what utility hangs on (McKenna et al., "Scaling Laws for Differentially Private
    Language Models", 2025, arXiv:2501.18914). ``alternatives`` reach the same epsilon with other sizes.
    """

    n: int
    batch_size: int
    epochs: float
    delta: float
    accountant: str
    epsilon: float
    noise_multiplier: float
    noise_to_batch_ratio: float
    sample_rate: float
    steps: int
    by_epoch: tuple[AfterEpoch, ...]
    alternatives: tuple[Choice, ...]
    warnings: tuple[str, ...]
    sampling: str = POISSON
    max_batch_size: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return all fields as a plain dictionary, which ``json.dumps`` takes."""
        return asdict(self)

    def plot(self, path: str | Path) -> None:
        """Draw epsilon by steps, and noise against signal by choice, into a file of a format that matplotlib knows.

        Raises:
            DPHooksError: matplotlib is not installed; it is in the extra "plot".
        """
        draw_plan(self.as_dict(), path)

    def _way(self) -> str:
        most = "" if self.max_batch_size is None else f", at most {self.max_batch_size:,} in a batch"
        return ("Poisson" if self.sampling == POISSON else self.sampling) + most

    def __str__(self) -> str:
        """Lay the plan out as tables."""
        rows = [
            ("epsilon, delta", f"{self.epsilon:.4f} at {self.delta:g}, by {self.accountant!r}"),
            ("examples, batch", f"{self.n:,}, {self.batch_size:,} expected per batch"),
            ("sample rate q", f"{self.sample_rate:.6g}, {self._way()}"),
            ("epochs, steps", f"{self.epochs:g}, {self.steps:,}"),
            ("noise multiplier", f"{self.noise_multiplier:.6g}"),
            ("noise / batch", f"{self.noise_to_batch_ratio:.4g}, in units of C: the noise on the mean gradient"),
            *(("warning", warning) for warning in self.warnings),
        ]
        lines = ["Privacy plan", *(f"  {name:<16}  {value}" for name, value in rows)]
        lines += ["", f"  {'after epoch':>12}  {'steps':>10}  {'epsilon':>9}"]
        lines += [f"  {spent.epoch:>12g}  {spent.steps:>10,}  {spent.epsilon:>9.4f}" for spent in self.by_epoch]
        if self.alternatives:
            columns = ("batch", "epochs", "steps", "noise multiplier", "noise / batch")
            lines += ["", "  The same epsilon with", f"  {'':<16}" + "".join(f"  {column:>16}" for column in columns)]
            for other in self.alternatives:
                ratio = f"{other.noise_to_batch_ratio:.4g} ({other.noise_to_batch_ratio / self.noise_to_batch_ratio:.2f} x)"
                cells = (f"{other.batch_size:,}", f"{other.epochs:g}", f"{other.steps:,}", f"{other.noise_multiplier:.5g}", ratio)
                lines.append(f"  {other.name:<16}" + "".join(f"  {cell:>16}" for cell in cells))
        return "\n".join(lines)


def plan(
    *,
    n: int,
    batch_size: int,
    epochs: float,
    delta: float,
    epsilon: float | None = None,
    noise_multiplier: float | None = None,
    accountant: str = "pld",
    sampling: str = POISSON,
    max_batch_size: int | None = None,
) -> PrivacyPlan:
    """Return what a run of :func:`~dp_hooks.private_training` with these sizes would spend, or how much noise it would need.

    Steps, rate and noise come from the code that the run itself uses.

    Args:
        n: examples in the dataset.
        batch_size: expected size of a logical batch, at most ``n``.
        epochs: passes over the data.
        delta: between 0 and 1, and well below ``1 / n``.
        epsilon: what may be spent; the noise is calculated. Either this or
        noise_multiplier: sigma, greater than 0; epsilon is calculated.
        accountant: "pld", "prv" or "rdp".
        sampling: as in a run.
        max_batch_size: as in a run; of other batch sizes it is the default.

    Raises:
        InvalidArgumentError: a value that a run would refuse, or both or neither of ``epsilon`` and ``noise_multiplier``.
    """
    if (epsilon is None) == (noise_multiplier is None):
        given = "neither" if epsilon is None else "both"
        raise bad("epsilon", epsilon, f"{given} of epsilon and noise_multiplier={noise_multiplier!r} given; pass exactly one.")
    delta, epochs = fraction("delta", delta, DELTA), positive("epochs", epochs, "pass a number of epochs greater than 0.")
    way = sampling_of(sampling, None)
    drawn = _sampling(positive_int("n", n), positive_int("batch_size", batch_size), way, max_batch_size)
    if accountant == "gdp":
        raise bad("accountant", accountant, "it is no bound with Poisson sampling. Pass one of 'pld', 'prv', 'rdp'.")
    if drawn.needs_pld and accountant != "pld":
        raise bad("accountant", accountant, f"it cannot tell what sampling={way!r} spends. Pass 'pld'.")
    kind, rate, releases = asked(accountant), drawn.charged_rate, drawn.releases(epochs)

    def spent(count: int) -> float:
        return epsilon_for(kind, [(sigma, rate, count)], delta)

    if epsilon is not None:
        epsilon = check_epsilon("epsilon", epsilon)
        sigma = calibrate(kind, Budget(epsilon, delta, epochs), rate, releases)
    else:
        sigma = positive("noise_multiplier", noise_multiplier, "pass the standard deviation of the noise in units of C.")
    reached = spent(releases)
    target = reached if epsilon is None else epsilon
    others: list[Choice] = []
    warnings = [f"delta={delta:g} is not below 1 / n: one example may simply be published"] if delta >= 1 / n else []
    if reached > _WEAK:
        warnings.append(f"epsilon={reached:.4g} is above {_WEAK:g}: the proof promises little")
    for name, larger, longer in _OTHERS:
        if batch_size * larger > n:
            warnings.append(f"{name} is left out: a batch above n={n}")
            continue
        other = _sampling(n, batch_size * larger, way)
        count, size = other.releases(epochs * longer), other.expected_batch_size
        try:
            noise = calibrate(kind, Budget(check_epsilon("epsilon", target), delta, epochs * longer), other.charged_rate, count)
        except InvalidArgumentError:  # of an epsilon of 0 or above all budgets, or below what the accountant can tell
            warnings.append(f"{name} is left out: the accountant cannot work out noise for epsilon={target:.4g}")
        else:
            others.append(Choice(name, batch_size * larger, epochs * longer, _steps(other, epochs * longer), noise, noise / size))
    return PrivacyPlan(
        n=n,
        batch_size=batch_size,
        epochs=epochs,
        delta=delta,
        accountant=kind.mechanism(),
        epsilon=reached,
        noise_multiplier=sigma,
        noise_to_batch_ratio=sigma / drawn.expected_batch_size,
        sample_rate=drawn.sample_rate,
        steps=_steps(drawn, epochs),
        by_epoch=tuple(AfterEpoch(epoch, _steps(drawn, epoch), spent(drawn.releases(epoch))) for epoch in _epochs(epochs)),
        alternatives=tuple(others),
        warnings=tuple(warnings),
        sampling=way,
        max_batch_size=drawn.max_batch_size,
    )


def _sampling(n: int, batch_size: int, sampling: str, max_batch_size: int | None = None) -> SamplingPlan:
    if batch_size > n:
        raise bad("batch_size", batch_size, f"it is larger than the dataset of n={n} examples.")
    return plan_of_sizes(n, batch_size, -(-n // batch_size), sampling=sampling, max_batch_size=max_batch_size)


def _steps(sampling: SamplingPlan, epochs: float) -> int:
    """Batches of so many epochs: of a pass that is charged as a whole, all."""
    return sampling.releases(epochs) * (sampling.batches_per_pass if sampling.per_pass else 1)


def _epochs(epochs: float) -> Iterator[float]:
    """Yield whole epochs, at most ten of them, and the end."""
    stride = max(1, math.ceil(epochs / _MOST_EPOCHS_LISTED))
    yield from range(stride, math.ceil(epochs), stride)
    yield int(epochs) if epochs == int(epochs) else epochs
