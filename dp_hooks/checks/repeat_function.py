"""RepeatedFunction: runs a train function again, on all samples of its batch or some."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..capture.controller import HookController
from ..errors import SelfCheckError
from .compare import ValuesDiffer, value_tolerance, values_off


class Parts:
    """A loss over a batch has to be made up of the losses over its two halves."""

    def __init__(self, whole: Tensor, samples: int, reduction: str) -> None:
        """``whole`` is the loss over all ``samples``."""
        self._whole, self._samples, self._reduction = whole, samples, reduction
        self._found: dict[frozenset[int], Tensor] = {}

    def off(self, loss: Tensor, rows: Tensor) -> float:
        """Take the loss over samples; how far its sum with that over all others is off, once both are there."""
        mine = frozenset(rows.tolist())
        others = frozenset(range(self._samples)) - mine
        self._found[mine] = loss.detach()
        if others not in self._found:
            return 0.0
        shares = [len(part) / self._samples if self._reduction == "mean" else 1.0 for part in (mine, others)]
        terms = [share * self._found[part].double().sum() for share, part in zip(shares, (mine, others), strict=True)]
        whole = self._whole.double().sum()
        scale = torch.stack([whole.abs(), *(term.abs() for term in terms)]).max().clamp(min=1e-12)
        return float(((terms[0] + terms[1] - whole) / scale).nan_to_num().abs())


def declared(scalar: bool, controller: HookController) -> str:
    """Return a sentence for errors about a loss that is one number for the whole batch."""
    return f" Or loss_reduction={controller.loss_reduction!r} is not how the loss is reduced." if scalar else ""


class RepeatedFunction:
    """A train function on ``samples`` samples that is compared with the same function on some of them.

    It returns losses ``[n]``, or a scalar reduced as the controller says.
    """

    def __init__(
        self, run: Callable[[Tensor | None], Tensor], controller: HookController, samples: int, *, coarse: bool = False
    ) -> None:
        """``run`` is given the numbers of the samples to run on (None: all); ``coarse``: it computes in half precision."""
        self._run = run
        self.coarse, self.rounding = coarse, 0.0
        self._controller = controller
        self.samples = samples
        self.among = torch.arange(samples, device="cpu")  # which samples of the batch this is about
        self._loss, self._ran = torch.zeros((), device="cpu"), False
        self._parts = Parts(self._loss, samples, "sum")

    def on(self, rows: Tensor) -> "RepeatedFunction":
        """The same function on some of the samples only; nothing of it has been run."""

        def run(part: Tensor | None) -> Tensor:
            return self._run(rows if part is None else rows[part])

        other = RepeatedFunction(run, self._controller, len(rows), coarse=self.coarse)
        other.among = self.among[rows]
        return other

    def __len__(self) -> int:
        return 0

    @property
    def has_rows(self) -> bool:
        """Whether there is a loss for each sample."""
        return self._loss.dim() == 1

    @property
    def has_scalar(self) -> bool:
        """Whether there is one loss only."""
        return self._loss.dim() == 0

    @property
    def is_finite(self) -> bool:
        """Whether the whole run came to its end, and gave numbers."""
        return self._ran and bool(torch.isfinite(self._loss).all())

    def keep(self) -> Tensor:
        """Run it on all samples; keep what comes out to compare with, and return it."""
        loss = self._run(None)
        self._loss, self._ran = loss.detach(), True
        self._parts = Parts(self._loss, self.samples, self._controller.loss_reduction)
        return loss

    def whole(self) -> Tensor:
        """The same; the loss of all samples, reduced."""
        return self._reduced(self.keep())

    def weighted(self, factors: Tensor) -> Tensor:
        """The sum of all losses, each times its factor: 1 where there is one loss only."""
        loss = self._run(None)
        if self.has_scalar and self._controller.loss_reduction == "mean":
            return loss * self.samples
        return (loss * factors.to(loss.device, loss.dtype)).sum() if self.has_rows else loss

    def alone(self, i: int, *, compared: bool = True) -> Tensor:
        """The loss of sample ``i``; it is not ``compared`` here, as the outputs of a call are."""
        return self._reduced(self._run(torch.tensor([i], device="cpu")))

    def compare(self, rows: Tensor) -> None:
        """The losses of some samples have to be what they were in the batch.

        Raises:
            SelfCheckError: they are not.
        """
        loss = self._run(rows).detach()
        if self._loss.dim() == 0:
            if (error := self._parts.off(loss, rows)) > self._tolerance():
                halves = f"and of the others, in two halves, is off by {error:.1e} from the loss of the whole batch"
                raise self._mixed(int(rows[0]), halves, ValuesDiffer)
            return
        if loss.shape != rows.shape:
            raise self._mixed(int(rows[0]), f"has shape {tuple(loss.shape)} for {len(rows)} samples")
        off = values_off(self._loss[:, None], rows.to(loss.device), loss[:, None])
        if float(off.max()) > self._tolerance():
            which = int(rows[int(off.argmax())])
            raise self._mixed(which, f"is off by {float(off.max()):.1e} from its loss with {len(rows)} samples", ValuesDiffer)

    def measure_rounding(self) -> None:
        """Run it on all samples once more, with rounded parameters: by how much that changes the losses is tolerated."""
        whole, loss = (t.reshape(-1, 1) for t in (self._loss, self._run(None)))
        self.rounding = max(1e-300, float(values_off(whole, slice(None), loss).max()))

    def _tolerance(self) -> float:
        return value_tolerance(self._loss.dtype, coarse=self.coarse, rounding=self.rounding)

    def outputs(self, rows: Tensor | None) -> list[Tensor]:
        """Run it on some samples (None: all); return the loss, with its history."""
        return [self._run(rows)]

    def _reduced(self, loss: Tensor) -> Tensor:
        return loss if loss.dim() == 0 else loss.mean() if self._controller.loss_reduction == "mean" else loss.sum()

    def _mixed(self, i: int, how: str, kind: type[SelfCheckError] = SelfCheckError) -> SelfCheckError:
        return kind(
            f"the train function: its loss for sample {i} of the batch {how}; nothing was released. Samples mix in it (a "
            "threshold or a mean over the batch, hardest samples only, batch statistics), or random numbers decide for all of "
            f"them.{declared(self.has_scalar, self._controller)} Remedy: let the loss of a sample depend on that sample alone."
        )
