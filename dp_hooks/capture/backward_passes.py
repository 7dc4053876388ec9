"""Backward passes between two boundaries: all over the same samples, and no gradient beside what was captured."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from ..errors import ScopeError, UnsupportedModelError
from ..gradients.terms import Term


@dataclass(eq=False)
class BackwardPass:
    """A backward pass that has not come to its end; ``batch_number`` tells the logical part its forward belonged to."""

    batch_number: int
    found: list[Term] = field(default_factory=list)
    sizes: set[tuple[str, int]] = field(default_factory=set)
    refusals: list[UnsupportedModelError] = field(default_factory=list)

    def refuse(self, error: UnsupportedModelError) -> None:
        """Raise ``error`` at the end of the pass, together with all others."""
        if str(error) not in map(str, self.refusals):
            self.refusals.append(error)

    def raise_refusals(self) -> None:
        """Raise what was refused, if anything was."""
        if len(self.refusals) == 1:
            raise self.refusals[0]
        if self.refusals:
            listing = "\n".join(f"  - {error}" for error in self.refusals)
            raise UnsupportedModelError(
                f"the model cannot be trained privately, for {len(self.refusals)} reasons:\n{listing}"
            )


@dataclass(eq=False)
class BackwardPasses:
    """What the backward passes since the last boundary brought.

    Attributes:
        open: passes that have not come to their end, by the number autograd gave them.
        leaks: parameters to which autograd delivered a gradient summed over the batch.
        pending: what finished passes captured.
        samples: how many samples finished passes were over; None if there are none.
        serial: the logical part that finished passes belonged to.
    """

    open: dict[int, BackwardPass] = field(default_factory=dict)
    leaks: list[nn.Parameter] = field(default_factory=list)
    pending: list[Term] = field(default_factory=list)
    samples: int | None = None
    batch_number: int = 0

    def running(self, batch_number: int, at_end: Callable[[int], None]) -> BackwardPass:
        """The backward pass that is running; ``at_end`` is called with its number when it is over."""
        task = torch._C._current_graph_task_id()
        if task not in self.open:
            self.open[task] = BackwardPass(batch_number)
            torch.autograd.Variable._execution_engine.queue_callback(lambda: at_end(task))
        return self.open[task]

    def check_batch_number(self, opened: BackwardPass, batch_number: int) -> None:
        """Refuse what belongs to another logical part than the pass it came in, or than what is waiting."""
        if batch_number != opened.batch_number or (self.samples is not None and batch_number != self.batch_number):
            raise ScopeError(
                "gradients of an earlier logical batch are still waiting: they cannot be accumulated over batches. "
                "Call opt.step() for every batch, or opt.zero_grad() to drop them. For large batches set a larger "
                "batch_size in the loader and max_physical_batch_size in the scope."
            )

    def finish(
        self,
        task: int,
        name_of: Callable[[nn.Parameter], str],
        refuse: Callable[[BackwardPass, UnsupportedModelError, str], None],
    ) -> tuple[int, list[Term]] | None:
        """A pass is over: return the number of samples and what was captured; None if it was not ours."""
        finished = self.open.pop(task, None)
        if finished is None:
            return None
        if self.leaks:
            leaks, self.leaks = self.leaks, []
            names = ", ".join(sorted({name_of(p) for p in leaks}))
            leaked = UnsupportedModelError(
                f"{names}: used where no hook saw it, so its gradient arrived summed over the batch. It was dropped, and "
                "nothing was released. This happens when a weight is used outside its module's forward "
                "(F.linear(h, other.weight)) in a way that could not be followed. Remedy: use the weight through its module, or "
                "freeze it."
            )
            refuse(finished, leaked, names)
        finished.raise_refusals()
        sizes = {samples for _, samples in finished.sizes}
        if self.samples is not None:
            sizes.add(self.samples)
        if len(sizes) > 1:
            listing = ", ".join(sorted(f"{name or 'the model'}: {n}" for name, n in finished.sizes)[:8])
            raise ScopeError(
                f"different numbers of samples ({sorted(sizes)}) met in one step ({listing}). Backward passes between two "
                "steps must be over the same samples, one row each. Call opt.step() or opt.zero_grad() in between."
            )
        if not sizes:
            return None
        self.samples, self.batch_number = sizes.pop(), finished.batch_number
        return self.samples, finished.found
