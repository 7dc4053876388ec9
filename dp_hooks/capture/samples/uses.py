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
    """Where the samples are in one use of shared tensors, or in one call of a module."""

    inputs: tuple[SampleAxis | None, ...] = ()  # the sample axis of each tensor that is not tracked, or None
    outputs: tuple[SampleAxis | None, ...] | None = ()  # the same for results
    shared: bool = False  # whether no tensor has one, so that the results are shared as well
    reason: str | None = None  # why samples cannot be told apart
    name: str = field(default="", compare=False)  # the parameters or the module, for messages
    ratios: tuple[float, ...] = field(default=(), compare=False)  # rows per sample, and what else has to be the same in two probes
    # The calls of modules that it was made in during the probe, outermost first.
    frames: tuple[Any, ...] = field(default=(), compare=False)
    # The parameters behind the shared tensors that a custom autograd function got.
    params: tuple[nn.Parameter, ...] = field(default=(), compare=False)

    @property
    def is_routed(self) -> bool:
        """Whether running the module around it on each sample alone would tell the samples apart."""
        return self.reason in (ROUTED, UNCLEAR, UNSTEADY, BYPASSED)

    def covers(self, other: "UseLayout") -> bool:
        """Whether what is so for ``other`` is so here, too."""
        own, others = ((*use.inputs, *(use.outputs or ())) for use in (self, other))
        same = (self.reason, self.shared, len(self.inputs)) == (other.reason, other.shared, len(other.inputs))
        alike = (a == b or (a is not None and a.covers(b)) for a, b in zip(own, others, strict=False))
        return same and len(own) == len(others) and all(alike)


Seen = Mapping[Any, list[UseLayout]]  # what one probe saw of every use, by key


@dataclass(eq=False)
class SampleAxes:
    """What probes have shown, kept for the lifetime of the controller."""

    # The uses in a forward pass by key, in order; a single one where all are alike, as in a loop over samples.
    known: dict[Any, list[UseLayout]] = field(default_factory=dict)
    _told: set[Any] = field(default_factory=set)

    def find(self, key: Any, count: int) -> UseLayout | None:
        """Use number ``count`` of ``key`` in a forward pass; None if no probe has shown it."""
        uses = self.known.get(key, ())
        if len(uses) == 1:
            return uses[0]
        return uses[count] if count < len(uses) else None

    def differ(self, key: Any) -> bool:
        """Whether the uses of ``key`` in one forward pass are not all alike."""
        return len(self.known.get(key, ())) > 1

    def learn(self, probes: Sequence[Seen], *, two_distinct: bool) -> None:
        """Take over what two probes agree on, where it is not at odds with what earlier ones have told."""
        for key, agreed in merged(probes).items():
            if key in self._told:
                if not two_distinct:
                    continue
                agreed = agreed and _joined(self.known[key], agreed)
            if not agreed:
                longest = max((probe.get(key, []) for probe in probes), key=len)
                agreed = [replace(use, reason=use.reason or UNSTEADY, shared=False) for use in longest]
            self.known[key] = _once(agreed)
            if two_distinct:
                self._told.add(key)


def merged(probes: Sequence[Seen]) -> dict[Any, list[UseLayout] | None]:
    """For every use, what two probes saw of it, with the same ratios; None where no two agree."""
    out: dict[Any, list[UseLayout] | None] = {}
    for key in {key for probe in probes for key in probe}:
        seen = [_once(probe[key]) for probe in probes if key in probe]
        told = [[(use, use.ratios) for use in uses] for uses in seen]
        out[key] = next((uses for i, uses in enumerate(seen) if told[i] in told[i + 1 :]), None)
    return out


def _once(uses: list[UseLayout]) -> list[UseLayout]:
    return uses[:1] if all(use == uses[0] for use in uses) else uses


def _joined(old: list[UseLayout], new: list[UseLayout]) -> list[UseLayout] | None:
    """Layouts that hold for both, or None."""

    def wider(a: SampleAxis | None, b: SampleAxis | None) -> SampleAxis | None:
        return a if a is not None and a.covers(b) else b

    if 1 in (len(old), len(new)):  # that one holds for any number
        old, new = old * len(new), new * len(old)
    out = []
    for a, b in zip(old, new, strict=False):
        outputs = tuple(map(wider, a.outputs or (), b.outputs or ()))
        out.append(replace(b, inputs=tuple(map(wider, a.inputs, b.inputs)), outputs=outputs))
    fit = len(old) == len(new) and all(use.covers(a) and use.covers(b) for use, a, b in zip(out, old, new, strict=True))
    return out if fit else None


def guessed(tensor: Tensor, axis: int, rows: int) -> SampleAxis | None:
    """For what no probe has shown: the declared axis, if it has as many rows as there are samples."""
    return SampleAxis(axis) if tensor.dim() > axis and tensor.shape[axis] == rows else None
