"""Batches of units: Poisson sampling of users instead of examples, with at most k examples of each that is drawn."""

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler

from ..._validate import bad
from ...errors import ScopeError
from ..noise.entropy import fresh_generator
from .physical import PhysicalBatch, PhysicalSampler
from .plan import POISSON, SEQUENTIAL, SamplingPlan
from .poisson import PoissonSampler
from .units import DatasetUnits, read_units


def plan_units(
    plan: SamplingPlan,
    loader: DataLoader[Any],
    privacy_unit: object,
    most: object,
    *,
    sample_rate: object,
    max_physical_batch_size: int | None,
    ledger: object = None,
) -> SamplingPlan:
    """Return ``plan``, or, if units are to be protected, what becomes of it.

    A batch has ``loader.batch_size = B`` examples expected, as without units: each unit is drawn with probability ``q = B / M``,
    where M is the number of examples that a batch of all units has (``DatasetUnits.in_play``). A pass has ``1 / q`` batches,
    rounded up, so that each unit is expected once. With ``sample_rate`` that is q, and ``q M`` examples are expected.

    Raises:
        InvalidArgumentError: an argument cannot be used, or not with others.
    """
    if privacy_unit is None and most is None:
        return plan
    if plan.sampling != POISSON:
        name, value = ("poisson_sampling", False) if plan.sampling == SEQUENTIAL else ("sampling", plan.sampling)
        raise bad(name, value, "with privacy_unit= units are drawn by Poisson sampling. Leave it out.")
    if ledger is not None:
        raise bad("ledger", ledger, "with privacy_unit= it cannot be kept yet: a ledger adds up what was spent on single examples.")
    if loader.batch_size is None and sample_rate is None:
        what = "it draws examples at a rate of its own, and with privacy_unit= units are drawn. "
        raise bad("loader", type(loader).__name__, what + "Pass the loader that it was made from, or sample_rate=.")
    units = read_units(privacy_unit, loader.dataset, most)
    rate = plan.sample_rate if sample_rate is not None else plan.expected_batch_size / units.in_play
    if rate > 1:
        what = f"a batch of all {units.count} units has {units.in_play} examples, with at most {units.most} of each. "
        raise bad(
            "loader", f"batch_size={loader.batch_size}", what + "Use a smaller batch_size, or a larger max_examples_per_unit."
        )
    if max_physical_batch_size is not None and max_physical_batch_size < units.most:
        what = f"a unit can have {units.most} examples in a batch, and is never split over parts. "
        remedy = f"Pass max_examples_per_unit={max_physical_batch_size} or less, or a larger max_physical_batch_size."
        raise bad("max_physical_batch_size", max_physical_batch_size, what + remedy)
    expected, batches = rate * units.in_play, math.ceil(1 / rate - 1e-9)
    if sample_rate is None:
        expected = plan.expected_batch_size
    return replace(plan, sample_rate=rate, expected_batch_size=expected, batches_per_pass=batches, units=units)


class UnitSampler(Sampler[list[list[int]]]):
    """Draws logical batches of units: for each unit that is drawn the numbers of its examples.

    Each unit is present independently with the rate of ``drawn``, a sampler of units, whatever it holds; what is taken of it
    depends on nothing but that unit. So one unit more or less changes what the other ones add by nothing, and with sums over
    units clipped a step is the Poisson-subsampled Gaussian mechanism over units (McMahan, Ramage, Talwar and Zhang, "Learning
    Differentially Private Recurrent Language Models", ICLR 2018, section 3). Units with fewer examples come first.
    """

    def __init__(self, units: DatasetUnits, drawn: PoissonSampler) -> None:
        """Take the examples of ``units`` that ``drawn`` names."""
        self.units = units
        self._drawn = drawn
        # Which of a unit's examples are taken need not be secret: all of a unit is protected together.
        self._generator = getattr(drawn, "generator", None) or fresh_generator(torch.device("cpu"))

    def __len__(self) -> int:
        """Logical batches in a pass."""
        return len(self._drawn)

    def __iter__(self) -> Iterator[list[list[int]]]:
        """Draw the batches of one pass."""
        for units in self._drawn:
            yield sorted((self.units.drawn_from(unit, self._generator) for unit in units), key=len)


class UnitPhysicalSampler(PhysicalSampler):
    """Splits logical batches of units into physical ones, each of whole units."""

    def __iter__(self) -> Iterator[list[int]]:
        """Begin a pass with a queue of its own."""
        if not self.is_own:
            raise ScopeError(
                "another loader was built of the private loader's sampler (Opacus's BatchMemoryManager does that): it would cut "
                "batches anywhere, and with privacy_unit= the examples of a unit have to be in one part. Set "
                "max_physical_batch_size= in the scope instead."
            )
        return super().__iter__()

    def _parts(self, queue: deque[PhysicalBatch], limit: int | None) -> Iterator[list[int]]:
        if limit == 0:
            return
        for count, units in enumerate(self.logical, start=1):
            self._drawn += 1
            parts = self._packed(units)
            for index, part in enumerate(parts):
                examples = [example for unit in part for example in unit]
                sizes = tuple(map(len, part))
                queue.append(PhysicalBatch(self._drawn, index, len(examples), index == len(parts) - 1, sizes))
                yield examples
            if limit is not None and count >= limit:
                return

    def _packed(self, units: list[list[int]]) -> list[list[list[int]]]:
        """Put as many units into each part as there is room for."""
        parts: list[list[list[int]]] = [[]]
        room = math.inf if self.max_size is None else self.max_size
        left = room
        for unit in units:
            if len(unit) > left:
                parts.append([])
                left = room
            parts[-1].append(unit)
            left -= len(unit)
        return parts
