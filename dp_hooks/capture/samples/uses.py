"""How each use of parameters was laid out: what probes have shown, kept for the lifetime of the controller."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from .axis import SampleAxis

MIXED = "it met a tensor two axes of which count samples (samples mix)"
ROUTED = "it met rows that were picked or sorted by their values"
UNCLEAR = "it met a tensor whose rows follow no fixed order of the samples"
UNTRIED = "it is used in a way that no run so far has shown (a branch of the model that was taken for the first time)"
UNSTEADY = "it met tensors whose layout changes from run to run"
BYPASSED = "it goes into a custom autograd function, where it cannot be followed"


@dataclass(frozen=True)
class UseLayout:
    """What one use of shared tensors looked like.

    ``inputs`` and ``outputs`` hold the layout of each tensor that is not tracked, or None where it has no sample
    axis; ``shared`` tells that nothing in it has one. ``reason``: why samples cannot be told apart. ``frames``: the calls of
    modules that it was made in, as numbers of the probe. ``params``: the parameters behind the shared tensors.
    """

    inputs: tuple[SampleAxis | None, ...] = ()
    outputs: tuple[SampleAxis | None, ...] | None = ()
    shared: bool = False
    reason: str | None = None
    frames: tuple[int, ...] = field(default=(), compare=False)
    sizes: tuple[float, ...] = field(default=(), compare=False)
    params: tuple[nn.Parameter, ...] = field(default=(), compare=False)

    @property
    def ratios(self) -> tuple[float, ...]:
        """Rows per sample in every tensor that counts samples."""
        return (*(at.ratio for at in (*self.inputs, *(self.outputs or ())) if at is not None), *self.sizes)

    @property
    def is_routed(self) -> bool:
        """Whether running the module around it on each sample alone would tell the samples apart."""
        return self.reason in (ROUTED, UNCLEAR, UNSTEADY, BYPASSED)


# What one probe saw of every use, by key.
Seen = Mapping[Any, list[UseLayout]]


@dataclass(eq=False)
class SampleAxes:
    """What probes have shown, kept for the lifetime of the controller."""

    known: dict[Any, list[UseLayout]] = field(default_factory=dict)
    tried: set[Any] = field(default_factory=set)
    shown: set[Any] = field(default_factory=set)
    _told: set[Any] = field(default_factory=set)

    def find(self, key: Any, count: int) -> UseLayout | None:
        """The entry for use number ``count`` of ``key`` in a forward pass; None if it was never tried."""
        uses = self.known.get(key)
        if not uses:
            return None
        if all(use == uses[0] for use in uses):
            return uses[0]
        return uses[count] if count < len(uses) else None

    def differ(self, key: Any) -> bool:
        """Whether the uses of ``key`` in one forward pass are not all alike."""
        uses = self.known.get(key, [])
        return any(use != uses[0] for use in uses)

    def learn(self, probes: Sequence[Seen], *, two_distinct: bool) -> None:
        """Take over what two probes agree on, where it is not at odds with what earlier ones have told."""
        for key, agreed in self.merged(probes).items():
            longest = max((probe.get(key, []) for probe in probes), key=len)
            unsteady = [replace(e, reason=e.reason or UNSTEADY, shared=False) for e in longest]
            if key in self._told:
                if two_distinct:
                    joined = None if agreed is None else _joined(self.known[key], agreed)
                    self.known[key] = unsteady if joined is None else joined
            else:
                self.known[key] = unsteady if agreed is None else agreed
            if two_distinct:
                self._told.add(key)

    @staticmethod
    def merged(probes: Sequence[Seen]) -> dict[Any, list[UseLayout] | None]:
        """For every use, what two probes saw of it; None where no two agree."""
        out: dict[Any, list[UseLayout] | None] = {}
        for key in {key for probe in probes for key in probe}:
            seen = [probe[key] for probe in probes if key in probe]
            out[key] = next((a for i, a in enumerate(seen) for b in seen[i + 1 :] if _same(a, b)), None)
        return out

    @staticmethod
    def agree(probes: Sequence[Seen]) -> bool:
        """Whether the probes saw the same."""
        return None not in SampleAxes.merged(probes).values()


def _same(one: Sequence[UseLayout], other: Sequence[UseLayout]) -> bool:
    """Whether two probes saw the same layouts, with as many rows per sample: a size that stays the same is no batch."""
    if all(use == one[0] for use in one) and all(use == other[0] for use in other):
        one, other = one[:1], other[:1]  # however often, as in a loop over samples
    return list(one) == list(other) and all(a.ratios == b.ratios for a, b in zip(one, other, strict=True))


def _joined(old: Sequence[UseLayout], new: Sequence[UseLayout]) -> list[UseLayout] | None:
    """Entries that hold for both, or None."""
    if all(use == old[0] for use in old) and all(use == new[0] for use in new):
        old, new = old[:1], new[:1]
    if len(old) != len(new):
        return None
    out: list[UseLayout] = []
    for one, other in zip(old, new, strict=True):
        inputs, outputs = (
            _wider(a, b) for a, b in ((one.inputs, other.inputs), (one.outputs or (), other.outputs or ()))
        )
        same = replace(one, inputs=(), outputs=()) == replace(other, inputs=(), outputs=())
        if not same or inputs is None or outputs is None:
            return None
        out.append(replace(other, inputs=inputs, outputs=outputs))
    return out


def _wider(
    one: Sequence[SampleAxis | None], other: Sequence[SampleAxis | None]
) -> tuple[SampleAxis | None, ...] | None:
    """Layouts that hold for both: rows of one sample after the other are also those of samples with one row."""
    if len(one) != len(other):
        return None
    out: list[SampleAxis | None] = []
    for a, b in zip(one, other, strict=True):
        if a == b:
            out.append(a)
        elif a is None or b is None or a.axis != b.axis or not (a.is_plain or b.is_plain):
            return None
        else:
            wide = b if a.is_plain else a
            if (wide.outer, wide.inner) not in ((1, None), (None, 1)):
                return None
            out.append(wide)
    return tuple(out)


def guessed(tensor: Tensor, axis: int, rows: int) -> SampleAxis | None:
    """For what was never tried: the declared axis, if it has as many rows as there are samples."""
    return SampleAxis(axis) if tensor.dim() > axis and tensor.shape[axis] == rows else None
