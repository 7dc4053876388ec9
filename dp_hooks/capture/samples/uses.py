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
BYPASSED = "it goes into a custom autograd function or a torch.func transform, where it cannot be followed"


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

    @property
    def axes(self) -> tuple[SampleAxis | None, ...]:
        """The sample axes of everything that goes in and comes out."""
        return (*self.inputs, *(self.outputs or ()))

    @property
    def sure(self) -> bool:
        """Whether no other order of the samples fits what was seen."""
        return all(at is None or at.sure for at in self.axes)

    def _pairs(self, other: "UseLayout") -> list[tuple[SampleAxis | None, SampleAxis | None]] | None:
        same = (self.reason, self.shared, len(self.inputs)) == (other.reason, other.shared, len(other.inputs))
        return list(zip(self.axes, other.axes, strict=True)) if same and len(self.axes) == len(other.axes) else None

    def covers(self, other: "UseLayout") -> bool:
        """Whether what is so for ``other`` is so here, too."""
        pairs = self._pairs(other)
        return pairs is not None and all(a == b or (a is not None and (a.covers(b) or a.agrees(b))) for a, b in pairs)

    def agrees(self, other: "UseLayout") -> bool:
        """Whether both are laid out alike, as far as each is sure."""
        pairs = self._pairs(other)
        return pairs is not None and all(a == b or (a is not None and a.agrees(b)) for a, b in pairs)

    def joined(self, other: "UseLayout") -> "UseLayout":
        """The wider of two layouts that do not contradict each other, and the surer."""

        def best(a: SampleAxis | None, b: SampleAxis | None) -> SampleAxis | None:
            if a is None or b is None or a.sure != b.sure:
                return b if a is None or not a.sure else a
            return a if a.covers(b) else b

        outputs = tuple(map(best, self.outputs or (), other.outputs or ()))
        return replace(other, inputs=tuple(map(best, self.inputs, other.inputs)), outputs=outputs)


Seen = Mapping[Any, list[UseLayout]]  # what one probe saw of every use, by key


@dataclass(eq=False)
class SampleAxes:
    """What probes have shown, kept for the lifetime of the controller."""

    # The uses in a forward pass by key, in order; a single one where all are alike, as in a loop over samples.
    known: dict[Any, list[UseLayout]] = field(default_factory=dict)
    unsure: set[Any] = field(default_factory=set)  # the keys of uses that more than one order of samples fits
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

    def learn(self, probes: Sequence[Seen], *, two_distinct: bool, apart: Seen | None = None) -> bool:
        """Take over what two probes agree on, where it is not at odds with what earlier ones have told.

        Args:
            probes: what was seen by probes.
            two_distinct: whether they ran on two samples.
            apart: what one has seen that told samples apart where the others could not.

        Returns:
            Whether a use turned out to be laid out otherwise than was taken for the most likely.
        """
        other = False
        for key, agreed in merged(probes).items():
            if apart is not None and agreed is not None:
                agreed = _settled(agreed, _once(apart.get(key, [])))
            before = self.known.get(key)
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
            other = other or (key in self.unsure and before != self.known[key])
            self.unsure.discard(key)
            if two_distinct and not all(use.sure for use in agreed):
                self.unsure.add(key)
        return other


def merged(probes: Sequence[Seen]) -> dict[Any, list[UseLayout] | None]:
    """For every use, what two probes saw of it, with the same ratios; None where no two agree."""
    out: dict[Any, list[UseLayout] | None] = {}
    for key in {key for probe in probes for key in probe}:
        seen = [_once(probe[key]) for probe in probes if key in probe]
        pairs = ((a, b) for i, a in enumerate(seen) for b in seen[i + 1 :])
        out[key] = next((_surer(a, b) for a, b in pairs if _same_ratios(a, b) and _agree(a, b)), None)
    return out


def doubtful(layouts: Mapping[Any, list[UseLayout] | None]) -> bool:
    """Whether more than one order of the samples fits some of ``layouts``."""
    return any(not use.sure for uses in layouts.values() for use in uses or ())


def _once(uses: list[UseLayout]) -> list[UseLayout]:
    return uses[:1] if all(use == uses[0] and use.sure == uses[0].sure for use in uses) else uses


def _same_ratios(a: list[UseLayout], b: list[UseLayout]) -> bool:
    return [use.ratios for use in a] == [use.ratios for use in b]


def _agree(a: list[UseLayout], b: list[UseLayout]) -> bool:
    return len(a) == len(b) and all(one.agrees(other) for one, other in zip(a, b, strict=True))


def _surer(a: list[UseLayout], b: list[UseLayout]) -> list[UseLayout]:
    return [one.joined(other) for one, other in zip(b, a, strict=True)]


def _settled(uses: list[UseLayout], apart: list[UseLayout]) -> list[UseLayout]:
    """What is surest of layouts and those of a run that told samples apart, if that went the same way."""
    return _surer(uses, apart) if _same_ratios(uses, apart) and _agree(uses, apart) else uses


def _joined(old: list[UseLayout], new: list[UseLayout]) -> list[UseLayout] | None:
    """Layouts that hold for both, or None."""
    if 1 in (len(old), len(new)):  # that one holds for any number
        old, new = old * len(new), new * len(old)
    out = [a.joined(b) for a, b in zip(old, new, strict=False)]
    fit = len(old) == len(new) and all(use.covers(a) and use.covers(b) for use, a, b in zip(out, old, new, strict=True))
    return out if fit else None


def guessed(tensor: Tensor, axis: int, rows: int) -> SampleAxis | None:
    """For what no probe has shown: the declared axis, if it has as many rows as there are samples."""
    return SampleAxis(axis) if tensor.dim() > axis and tensor.shape[axis] == rows else None
