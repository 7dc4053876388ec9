"""How batches will be drawn: which sampling, its rate, and how long a pass; without PyTorch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..._validate import bad, boolean, one_of, positive_int
from ..accounting.binomial import most_drawn
from ..accounting.rates import ALLOCATION, TRUNCATED, Rate, random_allocation, truncated_poisson

if TYPE_CHECKING:
    from .units import DatasetUnits

POISSON, SEQUENTIAL = "poisson", "sequential"
SAMPLINGS = (POISSON, TRUNCATED, ALLOCATION, SEQUENTIAL)
_RARELY = 1e-6  # batches of which examples are dropped, if nothing is said of the largest size


@dataclass(frozen=True)
class SamplingPlan:
    """How batches will be drawn from a loader; made by :func:`plan_sampling` without touching anything.

    Attributes:
        examples: N, the number of examples in the dataset.
        sample_rate: q, the probability of one example to be in one logical batch.
        expected_batch_size: ``q * N``, the denominator of "mean". Not rounded, and not made smaller by examples that are dropped.
        batches_per_pass: logical batches in one pass over the loader.
        sampling: one of :data:`SAMPLINGS`.
        max_batch_size: the most examples that a logical batch can have, with truncated Poisson sampling.
        secure: whether batches are drawn from bits that nobody can predict.
        units: the protected units, where that is more than one example: q is the probability of a unit then.
    """

    examples: int
    sample_rate: float
    expected_batch_size: float
    batches_per_pass: int
    sampling: str = POISSON
    max_batch_size: int | None = None
    secure: bool = False
    units: DatasetUnits | None = None

    @property
    def protected(self) -> int:
        """How many there are of what is protected: units, or examples."""
        return self.examples if self.units is None else self.units.count

    @property
    def expected_protected(self) -> float:
        """How many of them are expected in a logical batch."""
        return self.expected_batch_size if self.units is None else self.sample_rate * self.units.count

    @property
    def per_pass(self) -> bool:
        """Whether a release, which is charged for, is a whole pass; else it is a batch."""
        return self.sampling in (ALLOCATION, SEQUENTIAL)

    def releases(self, epochs: float) -> int:
        """Return how often noise is charged for in ``epochs`` passes."""
        return math.ceil(epochs * (1 if self.per_pass else self.batches_per_pass) - 1e-9)

    @property
    def charged_rate(self) -> Rate:
        """What one release is charged with in the place of a sampling rate."""
        if self.max_batch_size is not None:
            return truncated_poisson(self.sample_rate, self.examples, self.max_batch_size)
        if self.per_pass:
            return random_allocation(self.batches_per_pass) if self.sampling == ALLOCATION else 1.0
        return self.sample_rate

    @property
    def needs_pld(self) -> bool:
        """Whether only the accountant "pld" can tell what is spent."""
        return self.sampling in (TRUNCATED, ALLOCATION)

    @property
    def name(self) -> str:
        """The sampling in words."""
        if self.sampling == TRUNCATED:
            return f"Poisson, truncated: at most {self.max_batch_size} examples in a batch"
        return f"random allocation: every example in one of {self.batches_per_pass} batches of a pass, which is charged as a whole"


def sampling_of(sampling: object, poisson_sampling: object) -> str:
    """Return the sampling that is meant by two arguments, of which the second is the older name of two values of the first.

    Raises:
        InvalidArgumentError: neither knows such a value, or they contradict each other.
    """
    older = None
    if poisson_sampling is not None:
        older = POISSON if boolean("poisson_sampling", poisson_sampling) else SEQUENTIAL
    if sampling is None:
        return older or POISSON
    found = one_of("sampling", sampling, SAMPLINGS)
    if older not in (None, found):
        raise bad("sampling", sampling, f"poisson_sampling={poisson_sampling} means {older!r}. Leave poisson_sampling out.")
    return found


def plan_of_sizes(
    examples: int, batch_size: int, batches: int, *, sampling: str = POISSON, max_batch_size: object = None, secure: bool = False
) -> SamplingPlan:
    """Return the plan for a loader with a ``batch_size``, of which a pass has so many ``batches``."""
    rate = 1 / batches if sampling == ALLOCATION else batch_size / examples
    size = examples / batches if sampling == ALLOCATION else float(batch_size)
    most = largest_batch(sampling, max_batch_size, examples, rate)
    return SamplingPlan(examples, rate, size, batches, sampling, most, secure)


def largest_batch(sampling: str, given: object, examples: int, rate: float) -> int | None:
    """The most examples of a batch, where it is truncated: as given, or so many that more are drawn once in a million batches.

    Raises:
        InvalidArgumentError: it is given for another sampling, or is no such number.
    """
    if sampling != TRUNCATED:
        if given is not None:
            raise bad("max_batch_size", given, f"it goes with sampling={TRUNCATED!r}, and sampling is {sampling!r}.")
        return None
    if given is None:
        return max(1, most_drawn(examples, rate, _RARELY))
    return positive_int("max_batch_size", given, "pass the largest number of examples that a batch can have, 1 or more.")
