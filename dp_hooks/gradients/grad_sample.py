"""``p.grad_sample``: the one attribute that is put on the user's parameters."""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from .sample_gradients import SampleGradients
from .sinks import Sink
from .terms import Deferred, Instantiated, Term


class GradSamples(Sink):
    """Modes "hooks" and "functorch": writes ``p.grad_sample`` (``[n, *p.shape]``), and knows what is to be handed over."""

    def __init__(self, params: Sequence[nn.Parameter]) -> None:
        """Nothing is written yet on ``params``, a list that may be filled later."""
        self._params = params
        self._consumed = False
        # Zeros on what the loss did not reach, to be told from what a user puts there.
        self._unreached: dict[nn.Parameter, Tensor] = {}
        # Called with the gradients before anything can be read; may raise to refuse them.
        self.before_write: Callable[[SampleGradients], None] | None = None

    def receive(self, term: Term) -> Sequence[Term]:
        """Write out the gradients of all samples."""
        written = term.all_grads() if isinstance(term, Deferred) else {p: term.grads(p, slice(None)) for p in term.params}
        return [Instantiated(written, term.samples, term.name)]

    def finish(self, samples: int, found: Sequence[Term]) -> None:
        """Write the sum over all uses in a backward pass, adding to what earlier passes left there."""
        fresh = SampleGradients(samples, found)
        if self.before_write is not None:
            self.before_write(fresh)
        if self._consumed:
            self.discard()
        for param in fresh.params:
            earlier = vars(param).get("grad_sample")
            grads = fresh.grads(param)
            _store(param, grads if earlier is None else earlier + grads)
        for param in self._params:  # what the loss does not reach has a gradient, too: zero, in one place of memory
            if param.requires_grad and "grad_sample" not in vars(param):
                self._unreached[param] = param.new_zeros(()).expand(samples, *param.shape)
                _store(param, self._unreached[param])

    def peek(self, samples: int) -> SampleGradients:
        """What is written."""
        unreached = self._unreached
        stored = {p: g for p in self._params if isinstance(g := vars(p).get("grad_sample"), Tensor) and g is not unreached.get(p)}
        return SampleGradients(samples, [Instantiated(stored, samples, "")])

    def take(self, samples: int) -> SampleGradients:
        """Hand over what is written; it stays on the parameters until the next backward pass."""
        found = self.peek(samples)
        self._consumed, self._unreached = True, {}
        return found

    def discard(self) -> None:
        """Take everything off the parameters."""
        self._consumed = False
        self._unreached = {}
        for param in self._params:
            clear(param)

    @contextmanager
    def aside(self) -> Iterator[Sink]:
        """Begin with nothing; what was written before is back, unchanged, afterwards."""
        kept = (self._consumed, self._unreached, self.before_write)
        written = {p: vars(p)["grad_sample"] for p in self._params if "grad_sample" in vars(p)}
        for p in written:
            clear(p)
        self._consumed, self._unreached, self.before_write = False, {}, None
        try:
            yield self
        finally:
            self._consumed, self._unreached, self.before_write = kept
            for p, grads in written.items():
                _store(p, grads)


def clear(param: nn.Parameter) -> None:
    """Take ``grad_sample`` off ``param``."""
    vars(param).pop("grad_sample", None)
    vars(param).pop("__getstate__", None)


def _store(param: nn.Parameter, grads: Tensor) -> None:
    """Set ``param.grad_sample``, and see to it that it does not travel along when ``param`` is pickled."""
    vars(param)["grad_sample"] = grads
    vars(param)["__getstate__"] = functools.partial(_state_without_gradients, param)


def _state_without_gradients(param: nn.Parameter) -> dict[str, Any]:
    return {key: value for key, value in vars(param).items() if key not in ("grad_sample", "__getstate__")}
