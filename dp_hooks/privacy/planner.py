"""What a private run will cost, before it is begun: noise, steps, epsilon by epoch, and what other sizes would buy."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from torch.utils.data import DataLoader

from .._validate import bad, fraction, positive, positive_int
from ..errors import InvalidArgumentError
from .accounting.calibrate import Budget, calibrate, check_epsilon
from .accounting.opacus import DELTA, epsilon_for, make_accountant
from .plots import draw_plan
from .sampling.scheme import SamplingPlan, plan_sampling

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

    def as_dict(self) -> dict[str, Any]:
        """Return all fields as a plain dictionary, which ``json.dumps`` takes."""
        return asdict(self)

    def plot(self, path: str | Path) -> None:
        """Draw epsilon by steps, and noise against signal by choice, into a file of a format that matplotlib knows.

        Raises:
            DPHooksError: matplotlib is not installed; it is in the extra "plot".
        """
        draw_plan(self.as_dict(), path)

    def __str__(self) -> str:
        """Lay the plan out as tables."""
        rows = [
            ("epsilon, delta", f"{self.epsilon:.4f} at {self.delta:g}, by {self.accountant!r}"),
            ("examples, batch", f"{self.n:,}, {self.batch_size:,} expected per batch"),
            ("sample rate q", f"{self.sample_rate:.6g}, Poisson"),
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
) -> PrivacyPlan:
    """Return what a run of :func:`~dp_hooks.private_training` with these sizes would spend, or how much noise it would need.

    Steps, rate and noise come from the code that the run itself uses, with Poisson sampling.

    Args:
        n: examples in the dataset.
        batch_size: expected size of a logical batch, at most ``n``.
        epochs: passes over the data.
        delta: between 0 and 1, and well below ``1 / n``.
        epsilon: what may be spent; the noise is calculated. Either this or
        noise_multiplier: sigma, greater than 0; epsilon is calculated.
        accountant: "pld", "prv" or "rdp".

    Raises:
        InvalidArgumentError: a value that a run would refuse, or both or neither of ``epsilon`` and ``noise_multiplier``.
    """
    if (epsilon is None) == (noise_multiplier is None):
        given = "neither" if epsilon is None else "both"
        raise bad("epsilon", epsilon, f"{given} of epsilon and noise_multiplier={noise_multiplier!r} given; pass exactly one.")
    delta, epochs = fraction("delta", delta, DELTA), positive("epochs", epochs, "pass a number of epochs greater than 0.")
    sampling = _sampling(positive_int("n", n), positive_int("batch_size", batch_size))
    if accountant == "gdp":
        raise bad("accountant", accountant, "it is no bound with Poisson sampling. Pass one of 'pld', 'prv', 'rdp'.")
    kind, rate, steps = make_accountant(accountant), sampling.charged_rate, sampling.releases(epochs)

    def spent(count: int) -> float:
        return epsilon_for(kind, [(sigma, rate, count)], delta)

    if epsilon is not None:
        epsilon = check_epsilon("epsilon", epsilon)
        sigma = calibrate(kind, Budget(epsilon, delta, epochs), rate, steps)
    else:
        sigma = positive("noise_multiplier", noise_multiplier, "pass the standard deviation of the noise in units of C.")
    reached = spent(steps)
    target = reached if epsilon is None else epsilon
    others: list[Choice] = []
    warnings = [f"delta={delta:g} is not below 1 / n: one example may simply be published"] if delta >= 1 / n else []
    if reached > _WEAK:
        warnings.append(f"epsilon={reached:.4g} is above {_WEAK:g}: the proof promises little")
    for name, larger, longer in _OTHERS:
        if batch_size * larger > n:
            warnings.append(f"{name} is left out: a batch above n={n}")
            continue
        other = _sampling(n, batch_size * larger)
        count, size = other.releases(epochs * longer), other.expected_batch_size
        try:
            noise = calibrate(kind, Budget(check_epsilon("epsilon", target), delta, epochs * longer), other.charged_rate, count)
        except InvalidArgumentError:  # of an epsilon of 0 or above all budgets, or below what the accountant can tell
            warnings.append(f"{name} is left out: the accountant cannot work out noise for epsilon={target:.4g}")
        else:
            others.append(Choice(name, batch_size * larger, epochs * longer, count, noise, noise / size))
    return PrivacyPlan(
        n=n,
        batch_size=batch_size,
        epochs=epochs,
        delta=delta,
        accountant=kind.mechanism(),
        epsilon=reached,
        noise_multiplier=sigma,
        noise_to_batch_ratio=sigma / sampling.expected_batch_size,
        sample_rate=sampling.sample_rate,
        steps=steps,
        by_epoch=tuple(AfterEpoch(epoch, sampling.releases(epoch), spent(sampling.releases(epoch))) for epoch in _epochs(epochs)),
        alternatives=tuple(others),
        warnings=tuple(warnings),
    )


def _sampling(n: int, batch_size: int) -> SamplingPlan:
    if batch_size > n:
        raise bad("batch_size", batch_size, f"it is larger than the dataset of n={n} examples.")
    return plan_sampling(DataLoader(cast(Any, range(n)), batch_size=batch_size), poisson=True)


def _epochs(epochs: float) -> Iterator[float]:
    """Yield whole epochs, at most ten of them, and the end."""
    stride = max(1, math.ceil(epochs / _MOST_EPOCHS_LISTED))
    yield from range(stride, math.ceil(epochs), stride)
    yield int(epochs) if epochs == int(epochs) else epochs
