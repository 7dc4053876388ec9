"""Sinks: what becomes of the terms that backward passes bring, one sink per mode."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .._precision import full_precision
from .._rerun import without_autocast
from ..errors import ScopeError, some_of
from .sample_gradients import SampleGradients
from .stacked import stacked
from .terms import Deferred, Term


class Sink:
    """Takes terms as they come, and hands over the gradients of a batch.

    Attributes:
        count_as: gradients are worked out as for at least so many samples, where the way to do that depends on their number.
    """

    count_as: int = 0

    def used(self, params: Collection[nn.Parameter]) -> None:
        """A module with these parameters is called in a forward pass, or they are used outside their module in one."""

    def defers(self, term: Term) -> bool:
        """Whether nothing is worked out of ``term`` before the end of the backward pass: it is kept as it is."""
        return False

    def receive(self, term: Term) -> Sequence[Term]:
        """Work out at once what is wanted at once; return what has to be kept until the end of the backward pass."""
        raise NotImplementedError

    def finish(self, samples: int, found: Sequence[Term]) -> None:
        """A backward pass over so many samples is over, and brought ``found``."""
        raise NotImplementedError

    def peek(self, samples: int) -> SampleGradients:
        """What the backward passes since the last boundary brought; it stays here."""
        raise NotImplementedError

    def take(self, samples: int) -> SampleGradients:
        """Hand it over."""
        raise NotImplementedError

    def discard(self) -> None:
        """Drop it."""
        raise NotImplementedError

    @contextmanager
    def aside(self) -> "Iterator[Sink]":
        """Put it aside for a block, in which the sink that is returned is used."""
        yield DeferredSink()


@dataclass(eq=False)
class DeferredSink(Sink):
    """Mode "ghost": what is small is written out, the rest waits for the step as it was captured."""

    pending: list[Term] = field(default_factory=list, init=False)
    _versions: list[tuple[str, Tensor, int]] = field(default_factory=list, init=False)  # of what was captured

    def defers(self, term: Term) -> bool:
        """What is small waits for others like it."""
        return isinstance(term, Deferred) and term.waits(self.count_as)

    def receive(self, term: Term) -> Sequence[Term]:
        """Write out what takes no more memory afterwards, and let go of what it came from."""
        return term.instantiate_small(self.count_as) if isinstance(term, Deferred) else [term]

    def finish(self, samples: int, found: Sequence[Term]) -> None:
        """Keep it; what waited for others like it is written out with them."""
        waiting = []
        for term in found:
            if isinstance(term, Deferred) and term.kind is not None:
                waiting.append(term)
                continue
            self.pending.append(term)
            if isinstance(term, Deferred):
                self._versions += [(term.name, t, t._version) for t in term.captured if not t.is_inference()]
        if waiting:
            with without_autocast(waiting[0].params[0].device.type), full_precision(), torch.no_grad():
                self.pending.extend(stacked(waiting))

    def peek(self, samples: int) -> SampleGradients:
        """What waits.

        Raises:
            ScopeError: it was written to since the backward pass.
        """
        changed = [name for name, t, version in self._versions if t._version != version]
        if changed:
            raise ScopeError(
                f"{some_of(changed)}: what it was called with, or the gradient of what it returned, was changed in place after the "
                "backward pass: it is needed until opt.step(). Nothing was released. Remedy: write to it after the step, or copy "
                "it first (x.clone())."
            )
        return SampleGradients(samples, self.pending, self.count_as)

    def take(self, samples: int) -> SampleGradients:
        """Hand over what waits."""
        try:
            return self.peek(samples)
        finally:
            self.discard()

    def discard(self) -> None:
        """Drop what waits."""
        self.pending, self._versions = [], []
