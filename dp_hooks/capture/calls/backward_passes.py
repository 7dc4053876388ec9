"""Backward passes between two boundaries: all over the same samples, and no gradient beside what was captured."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from ..._precision import full_precision, rounds
from ..._rerun import autocast_dtype, without_autocast
from ...errors import ScopeError, UnsupportedModelError, bullets, some_of
from ...gradients.terms import Term


@dataclass(eq=False)
class Refusals:
    """Why a model cannot be trained, each reason once, with the module or the parameters that it is about."""

    errors: list[tuple[UnsupportedModelError, str]] = field(default_factory=list)

    def add(self, error: UnsupportedModelError, where: str) -> None:
        """Keep ``error``, which is about ``where``."""
        if str(error) not in (str(known) for known, _ in self.errors):
            self.errors.append((error, where))

    def raise_all(self) -> None:
        """Raise them as one error, if there are any."""
        if len(self.errors) == 1:
            raise self.errors[0][0]
        if self.errors:
            listing = bullets([str(error) for error, _ in self.errors])
            raise UnsupportedModelError(f"the model cannot be trained privately, for {len(self.errors)} reasons:\n{listing}")


@dataclass(eq=False)
class BackwardPass:
    """A backward pass that has not come to its end; ``batch_number`` is that of the batch its forward pass was on."""

    batch_number: int
    found: list[Term] = field(default_factory=list)
    sizes: set[tuple[str, int]] = field(default_factory=set)
    refusals: Refusals = field(default_factory=Refusals)
    _plain: dict[str, bool] = field(default_factory=dict)  # per kind of device, whether nothing rounds in this pass

    def full_precision(self, device: str) -> AbstractContextManager[Any]:
        """Return a context in which nothing rounds: ``backward()`` may be called in autocast, which is not for sums."""
        if device not in self._plain:  # asked once for all layers
            self._plain[device] = autocast_dtype(device) is None and not rounds()
        return nullcontext() if self._plain[device] else _full_precision(device)


@contextmanager
def _full_precision(device: str) -> Iterator[None]:
    with without_autocast(device), full_precision():
        yield


@dataclass(eq=False)
class BackwardPasses:
    """What the backward passes since the last boundary brought."""

    # Passes that have not come to their end, by the number autograd gave them.
    open: dict[int, BackwardPass] = field(default_factory=dict)
    leaks: set[str] = field(default_factory=set)  # names of parameters to which autograd delivered a gradient summed over the batch
    samples: int | None = None  # how many samples finished passes were over; None if there are none
    batch_number: int = 0  # that of the batch finished passes belonged to

    def running(self, batch_number: int, at_end: Callable[[int], None]) -> BackwardPass:
        """The backward pass that is running; ``at_end`` is called with its number when it is over."""
        task = torch._C._current_graph_task_id()
        if task not in self.open:
            self.open[task] = BackwardPass(batch_number)
            torch.autograd.Variable._execution_engine.queue_callback(lambda: at_end(task))
        return self.open[task]

    def check_batch_number(self, opened: BackwardPass, batch_number: int) -> None:
        """Refuse what belongs to another batch than the pass it came in, or than what is waiting."""
        if batch_number != opened.batch_number or (self.samples is not None and batch_number != self.batch_number):
            raise ScopeError(
                "gradients of an earlier logical batch are still waiting: they cannot be accumulated over batches. "
                "Call opt.step() for every batch, or opt.zero_grad() to drop them. For large batches set a larger "
                "batch_size in the loader and max_physical_batch_size in the scope."
            )

    def take_leaks(self) -> tuple[UnsupportedModelError, str] | None:
        """Return the error about gradients that arrived past all hooks, once, with the names of the parameters."""
        if not self.leaks:
            return None
        names = ", ".join(sorted(self.leaks))
        self.leaks = set()
        error = UnsupportedModelError(
            f"{names}: used where no hook saw it, so its gradient arrived summed over the batch. It was dropped, and "
            "nothing was released. This happens when a weight is used outside its module's forward "
            "(F.linear(h, other.weight)) in a way that could not be followed, or by a penalty on the weights in the loss. "
            "Remedy: use the weight through its module, or freeze it; in place of a penalty use weight_decay of the optimizer, "
            "or shrink the weights after opt.step()."
        )
        return error, names

    def close(self, finished: BackwardPass) -> int | None:
        """A pass is over: return the number of samples; None if nothing was captured."""
        sizes = {samples for _, samples in finished.sizes}
        if self.samples is not None:
            sizes.add(self.samples)
        if len(sizes) > 1:
            listing = some_of(sorted(f"{name or 'the model'}: {n}" for name, n in finished.sizes))
            raise ScopeError(
                f"different numbers of samples ({sorted(sizes)}) met in one step ({listing}). Backward passes between two "
                "steps must be over the same samples, one row each: generated rows beside those of the loader have to be as many "
                "as the batch has, and a batch that was cut by hand needs max_physical_batch_size instead. Else call opt.step() or "
                "opt.zero_grad() in between (discard() of a HookController that is used alone)."
            )
        if sizes:
            self.samples, self.batch_number = sizes.pop(), finished.batch_number
        return self.samples
