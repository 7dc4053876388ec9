"""Clipping with a second backward pass instead of captured tensors: memory for the price of time."""

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .._precision import wide_dtype
from ..errors import UnsupportedModelError
from ..rules import sum_of_squares
from .joined import Joined
from .sample_gradients import SampleGradients
from .sinks import DeferredSink
from .terms import Deferred, Sums, Term

_SAME = 1e-3  # largest relative difference between the two passes in what a call got, by its squared norms


@dataclass(eq=False)
class TwoPass(DeferredSink):
    """Receives the same calls twice: from the first pass come norms, from the second, which ``again`` runs, weighted sums.

    Nothing captured outlives its call, except for parameters that are used several times, whose uses have to be known
    together before a norm can be taken: those wait for the end of the first pass.

    Guarantee: sums are made of the gradients whose norms were taken. That both passes gave the same is checked call by call.
    """

    again: Callable[[], None]
    uses: "Counter[nn.Parameter]" = field(default_factory=Counter)
    norms: Sums = field(default_factory=dict)
    factors: Sums | None = None
    finite: Tensor | None = None
    sums: Sums = field(default_factory=dict)
    _seen: dict[str, list[Tensor]] = field(default_factory=dict)
    _again: "Counter[str]" = field(default_factory=Counter)

    def used(self, params: Collection[nn.Parameter]) -> None:
        """A use of these parameters is to be expected in the backward pass."""
        self.uses.update(params)

    def defers(self, term: Term) -> bool:
        """What comes is needed at once, to be compared with what comes again."""
        return False

    def receive(self, term: Term) -> Sequence[Term]:
        """Take what is needed of ``term`` and return what has to be kept."""
        if self.factors is None:
            self._seen.setdefault(term.name, []).append(_fingerprint(term))
            return self._first(term)
        self._check_same(term)
        self._second(term)
        return []

    def peek(self, samples: int) -> SampleGradients:
        """The norms, and what it takes to get at the sums."""
        return TwoPassGradients(samples, self.pending, self)

    def _first(self, term: Term) -> Sequence[Term]:
        params = term.params
        if any(p in self.norms for p in params):
            raise _differs("a parameter of it was used again after its norm had been taken")
        if not isinstance(term, Deferred) or any(self.uses[p] > 1 for p in params):
            self.uses.update(dict.fromkeys(params, 2))  # whatever else comes of them has to be kept, too
            return super().receive(term)
        self.norms.update(SampleGradients(term.samples, [term]).sq_norms(params))
        return []

    def _second(self, term: Term) -> None:
        assert self.factors is not None
        assert self.finite is not None
        wanted = {p: self.factors[p] for p in term.params if p in self.factors}
        found = SampleGradients(len(self.finite), [term]).weighted_sums(wanted, self.finite, consume=True)
        for p, total in found.items():
            self.sums[p] = self.sums[p].add_(total) if p in self.sums else total

    def _check_same(self, term: Term) -> None:
        name, now = term.name, _fingerprint(term)
        at, before = self._again[name], self._seen.get(name, [])
        self._again[name] += 1
        if at >= len(before) or before[at].shape != now.shape or not _same(before[at], now):
            raise _differs(f"{name or 'the model'} got other inputs or output gradients in the second one")

    def check_complete(self) -> None:
        """Raise unless the second pass has repeated every call of the first."""
        missing = [name for name, before in self._seen.items() if self._again[name] != len(before)]
        if missing:
            raise _differs(f"{missing[0] or 'the model'} was not reached in the second one")


def _fingerprint(term: Term) -> Tensor:
    """``[k, n]``: squared norms, per sample, of what the term was made of."""
    if not isinstance(term, Deferred):
        return torch.stack([sum_of_squares(term.grads(p, slice(None))) for p in term.params[:1]])
    call = term.call
    axis = call.batch_dim
    tensors = [t for t in (*call.inputs, *call.grads) if t is not None and t.is_floating_point()]
    rows = [t.movedim(axis, 0) for t in tensors if t.dim() > axis and t.shape[axis] == call.samples]
    return torch.stack([sum_of_squares(t) for t in rows])


def _same(a: Tensor, b: Tensor) -> bool:
    return bool(torch.isclose(a, b, rtol=_SAME, atol=1e-30, equal_nan=True).all())


def _differs(what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"two_pass: the two backward passes were not alike ({what}), so the sums would not be those that norms were taken "
        "of; nothing was released. This happens with checkpointing that does not restore random numbers "
        "(preserve_rng_state=False). Remedy: restore them, or train with two_pass=False."
    )


class TwoPassGradients(SampleGradients):
    """The gradients of a part whose norms are known, and whose weighted sums take another backward pass."""

    def __init__(self, samples: int, kept: Sequence[Term], passes: TwoPass) -> None:
        """``kept`` are the uses of parameters used several times."""
        super().__init__(samples, kept)
        self._passes = passes

    @property
    def params(self) -> list[nn.Parameter]:
        """The parameters that got a gradient."""
        return [*super().params, *self._passes.norms]

    def _join(self, params: Sequence[nn.Parameter]) -> list[Joined]:
        return []  # nothing is kept

    def sq_norms(self, wanted: Sequence[nn.Parameter]) -> Sums:
        """Return ``[samples]`` squared norms, as taken during the first pass."""
        known = self._passes.norms
        return {**super().sq_norms([p for p in wanted if p not in known]), **{p: known[p] for p in wanted if p in known}}

    def weighted_sums(self, factors: Sums, finite: Tensor, *, consume: bool = False) -> Sums:
        """Run the second pass, and return the sums it gave."""
        self._terms = {}
        self._passes.factors, self._passes.finite = factors, finite
        with torch.enable_grad():
            self._passes.again()
        self._passes.check_complete()
        left = [p for p in factors if p not in self._passes.sums]  # no sample at all
        return self._passes.sums | {p: torch.zeros_like(p, dtype=wide_dtype(p.dtype)) for p in left}
