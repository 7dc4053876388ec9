"""Taps on results of the forward pass: a backward pass that comes by hands over the gradients it brings."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import UnsupportedModelError
from ...gradients.terms import Term
from .session import Session
from .trace import untraced

Grads = list[Tensor | None]
Make = Callable[[list[Tensor], Grads], Sequence[Term]]  # from saved tensors and output gradients: the terms they make


@dataclass(eq=False)
class TappedCall:
    """One watched result of the forward pass, on its way to the backward pass. Holds no tensor for long: autograd does."""

    session: Session  # takes what comes back
    name: str  # the module or the parameters it is about
    inputs: list[Tensor]  # what has to be saved for the backward pass
    make: Make  # turns saved tensors and gradients into terms
    batch_number: int  # which batch it was on
    around: Callable[[], AbstractContextManager[None]]  # entered while terms are made and reduced

    @untraced
    def receive(self, saved: Callable[[], list[Tensor]], grads: Grads) -> None:
        """A backward pass brings ``grads``: make terms of them, and reduce at once what need not be kept as it is."""
        session = self.session
        if not session.enabled:
            return
        if torch.is_grad_enabled():
            raise UnsupportedModelError(
                f"{self.name or 'the model'}: a backward pass with create_graph=True went through a managed layer "
                "(gradient penalty, second derivatives). Its per-sample gradients cannot be captured. Remedy: drop the "
                "penalty, or freeze the layers it goes through."
            )
        if not session.wants_gradients():
            return  # torch.autograd.grad(loss, something else)
        opened = session.running_pass(self.batch_number)
        session.passes.check_batch_number(opened, self.batch_number)
        with self.around():
            try:
                for term in self.make(saved(), [None if g is None else g.detach() for g in grads]):
                    opened.sizes.add((term.name, term.samples))
                    if session.sink.defers(term):
                        opened.found.append(term)
                        continue
                    with opened.full_precision(term.params[0].device.type):
                        opened.found.extend(session.sink.receive(term))
            except UnsupportedModelError as error:
                session.refuse(error, self.name, opened)  # go on, so that all that stands in the way is named


def tap(
    session: Session,
    outputs: Sequence[Tensor],
    saved: list[Tensor],
    name: str,
    make: Make,
    around: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> list[Tensor]:
    """Return ``outputs``, watched: ``make`` is called with the tensors saved and the gradients that come back."""
    return list(Tap.apply(session.anchor, TappedCall(session, name, saved, make, session.batch_number, around), *outputs))


class Tap(torch.autograd.Function):
    """Identity on the outputs of a module; its backward hands the output gradients over.

    The outputs are returned as detached aliases: unlike ``mark_dirty`` this leaves their version counter alone (modules
    whose last operation saves its own result), and unlike a view they may be changed in place afterwards. The inputs go through
    ``save_for_backward``, so that a later in-place change of them is PyTorch's own error, and checkpointing can recompute them.
    """

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, call: TappedCall, *outputs: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs; ``anchor`` requires a gradient, so that there is a backward pass."""
        ctx.call = call
        ctx.save_for_backward(*call.inputs)
        call.inputs = []
        ctx.set_materialize_grads(False)
        return tuple(t.detach() for t in outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        """Hand over the gradients, and pass them on."""
        if any(g is not None for g in grads):
            ctx.call.receive(lambda: list(ctx.saved_tensors), list(grads))
        return (None, None, *grads)
