"""Sinks: what becomes of the terms that backward passes bring, one sink per mode."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import nn

from .sample_gradients import SampleGradients
from .terms import Deferred, Term


class Sink:
    """Takes terms as they come, and hands over the gradients of a batch."""

    def used(self, params: Sequence[nn.Parameter]) -> None:
        """A module with these parameters is called in a forward pass, or they are used outside their module in one."""

    def receive(self, term: Term) -> Sequence[Term]:
        """Work out at once what is wanted at once; return what has to be kept until the end of the backward pass."""
        raise NotImplementedError

    def finish(self, samples: int, found: Sequence[Term]) -> None:
        """A backward pass over so many samples is over, and brought ``found``."""
        raise NotImplementedError

    def take(self, samples: int) -> SampleGradients:
        """Hand over what the backward passes since the last boundary brought."""
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

    def receive(self, term: Term) -> Sequence[Term]:
        """Write out what takes no more memory afterwards, and let go of what it came from."""
        return term.instantiate_small() if isinstance(term, Deferred) else [term]

    def finish(self, samples: int, found: Sequence[Term]) -> None:
        """Keep it."""
        self.pending.extend(found)

    def take(self, samples: int) -> SampleGradients:
        """Hand over what waits."""
        pending, self.pending = self.pending, []
        return SampleGradients(samples, pending)

    def discard(self) -> None:
        """Drop what waits."""
        self.pending = []
