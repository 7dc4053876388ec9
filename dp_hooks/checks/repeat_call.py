"""RepeatedCall: runs a recorded call again, on all samples or some, and makes a loss of what comes out."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .._tree import outputs_of, rows_of, tensors_of, tree_map
from ..capture.calls.recorded_call import RecordedCall
from ..capture.controller import HookController
from ..capture.samples.axis import SampleAxis
from ..capture.samples.rows_of_inputs import counted_otherwise
from ..errors import SelfCheckError
from .compare import ValuesDiffer, value_tolerance, values_off
from .repeat_function import Parts, declared
from .without_pattern import without_pattern

# How an output enters the loss beside rows of samples; where these are may have to be found when some of them are run.
SCALAR, LEFT_OUT, TO_BE_FOUND = "scalar", "left out", ""


class RepeatedCall:
    """A call of the model on ``samples`` samples that is compared with the same call on some of them."""

    def __init__(self, call: RecordedCall, controller: HookController, samples: int) -> None:
        """Of so many ``samples``; the whole call has to be run first."""
        self.call = call
        self._controller = controller
        # Samples of the call, and which of them this is about: where others are is told by what counts all of them.
        self._whole, self._among = samples, torch.arange(samples, device="cpu")
        self.samples = samples
        self._what = f"{call.name or 'the model'} ({type(call.module).__name__})"
        # How each output enters the loss: where its samples are, or one of the above.
        self._plan: list[SampleAxis | str] = []
        self._outputs: list[Tensor] = []  # what the whole run returned
        self._parts: list[Parts] = []
        self.rounding = 0.0  # by how much rounding of the parameters changes the outputs, relative, if that was measured

    def on(self, rows: Tensor) -> "RepeatedCall":
        """The same call on some of the samples only; nothing of it has been run."""
        other = RepeatedCall(self.call, self._controller, len(rows))
        other._whole, other._among, other._plan = self._whole, self._among[rows], list(self._plan)
        return other

    @property
    def among(self) -> Tensor:
        """Which samples of the batch this is about."""
        return self._among

    def __len__(self) -> int:
        """How many outputs the whole run had."""
        return len(self._outputs)

    @property
    def is_finite(self) -> bool:
        """Whether the whole run came to its end, and gave numbers."""
        return bool(self._outputs) and all(bool(torch.isfinite(out).all()) for out in self._outputs)

    @property
    def has_rows(self) -> bool:
        """Whether an output has rows of samples."""
        return any(role not in (SCALAR, LEFT_OUT) for role in self._plan)

    @property
    def has_scalar(self) -> bool:
        """Whether an output is a loss that the model computes itself."""
        return SCALAR in self._plan

    def take_layout(self, other: "RepeatedCall") -> None:
        """Samples are where those of ``other`` were found, the same call on more of them, which lets go of what came out."""
        known = [*other._plan, *self._plan[len(other._plan) :]]  # of fewer samples there may be fewer outputs, one for each
        self._plan = [theirs if mine == TO_BE_FOUND else mine for mine, theirs in zip(self._plan, known, strict=False)]
        other._outputs, other._parts = [], []

    def keep(self) -> list[Tensor]:
        """Run the call again on all samples; keep what comes out to compare with, and return it."""
        outputs, count = self._run(None)
        if len(self._plan) != len(outputs):  # of a call on some samples it is that of the call on all of them
            self._plan = [self._role(i, out) for i, out in enumerate(outputs[:count])]
            self._plan += [self._axis_of(out, LEFT_OUT) for out in outputs[count:]]
        self._outputs = [out.detach() for out in outputs]
        self._parts = [Parts(out, self.samples, self._controller.loss_reduction) for out in self._outputs]
        return outputs

    def whole(self) -> Tensor:
        """The same, with numbers without pattern as gradients of its outputs: a loss for the check."""
        outputs = self.keep()
        scale = 1 / self.samples if self._controller.loss_reduction == "mean" else 1.0
        return self._total(outputs, lambda out, role: (out * _cotangents(out, self.samples)).sum() * scale, scalars=True)

    def weighted(self, factors: Tensor) -> Tensor:
        """Run it on all samples once more; the sum of losses, each times its factor, which is 1 where there are scalars."""
        share = self.samples if self._controller.loss_reduction == "mean" else 1
        if self.has_scalar:
            return self.whole() * share

        def term(out: Tensor, role: SampleAxis | str) -> Tensor:
            if not isinstance(role, SampleAxis):
                return out.sum() * 0
            return (out * _cotangents(out, self.samples) * role.spread(factors.to(out.device, out.dtype), out)).sum()

        return self._total(self._run(None)[0], term, scalars=False)

    def alone(self, i: int, *, compared: bool = True) -> Tensor:
        """Run it on sample ``i`` alone; its part of the loss. Outputs are ``compared``, unless parameters are not what they were.

        Raises:
            SelfCheckError: an output that the loss uses is another one than in the batch, or cannot be compared.
        """
        rows = torch.tensor([i], device="cpu")
        outputs = self._compared(rows, self._run(rows)[0]) if compared else self._used(self._run(rows)[0], i)

        def term(out: Tensor, role: SampleAxis | str, whole: Tensor) -> Tensor:
            assert isinstance(role, SampleAxis)
            weights = role.samples(_cotangents(whole, self.samples), self.samples)[i]
            return (role.samples(out, 1)[0] * weights).sum()

        return self._total(outputs, term, scalars=True, whole=True)

    def compare(self, rows: Tensor) -> None:
        """Run it on some samples: their outputs have to be what they were in the batch.

        Raises:
            SelfCheckError: they are not, or cannot be compared.
        """
        self._compared(rows, self._run(rows)[0])

    def outputs(self, rows: Tensor | None) -> list[Tensor]:
        """Run it on some samples (None: all); return all that comes out, with its history."""
        return self._run(rows)[0]

    def _run(self, rows: Tensor | None) -> tuple[list[Tensor], int]:
        """Return the outputs, behind them what modules with hooks of the user gave out, and the number of the former."""
        call = self.call
        args, kwargs = tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, (call.args, call.kwargs))
        chosen = self._among if rows is None else self._among[rows]
        if rows is not None or len(chosen) < self._whole:
            args, kwargs = rows_of((args, kwargs), chosen, self._whole, self._controller.axis)
        with call.context.restored(), self._taken_out() as inside:
            outputs = outputs_of(call.module(*args, **kwargs)) + call.left
        outputs = [t for t in outputs if t.is_floating_point()]
        return outputs + inside, len(outputs)

    def _used(self, outputs: list[Tensor], first: int) -> list[Tensor]:
        last = max((k for k, role in enumerate(self._plan) if role != LEFT_OUT), default=-1)
        if len(outputs) <= last:
            raise self._mixed(first, f"are {len(self._plan)} tensors, and {len(outputs)} for that sample alone")
        return outputs[: last + 1]  # behind that there may be a list with one for each sample

    def _total(self, outputs: list[Tensor], term: Any, *, scalars: bool, whole: bool = False) -> Tensor:
        total = torch.zeros((), device="cpu")
        for k, out in enumerate(self._used(outputs, 0)):
            role = self._plan[k]
            if role == LEFT_OUT or (role == SCALAR and not scalars):
                continue
            value = out.sum() if role == SCALAR else term(out, role, *([self._outputs[k]] if whole else []))
            total = total.to(value.device, torch.promote_types(total.dtype, value.dtype)) + value
        return total

    def _compared(self, rows: Tensor, outputs: list[Tensor]) -> list[Tensor]:
        outputs = self._used(outputs, int(rows[0]))
        for k, out in enumerate(outputs):
            role, whole = self._plan[k], self._outputs[k]
            if role == SCALAR and (off := self._parts[k].off(out, rows)) > self._tolerance():
                halves = f"and of the others, in two halves, is off by {off:.1e} from that of the whole batch"
                raise self._mixed(int(rows[0]), halves, ValuesDiffer)
            if role in (SCALAR, LEFT_OUT):
                continue
            if role == TO_BE_FOUND:
                role = self._plan[k] = self._layout(whole, out.detach(), rows)
            assert isinstance(role, SampleAxis)
            if not role.fits(out, len(rows)):
                raise self._mixed(int(rows[0]), _shapes(whole, out))
            self._same_output(role.samples(whole, self.samples), role.samples(out.detach(), len(rows)), rows)
        return outputs

    def _layout(self, whole: Tensor, out: Tensor, rows: Tensor) -> SampleAxis:
        """Where the samples are in an output with several rows for each: as in the output for some samples."""
        n, k = self.samples, len(rows)
        axes = [d for d in range(out.dim()) if whole.dim() == out.dim() and whole.shape[d] * k == out.shape[d] * n]
        axes = [d for d in axes if out.numel() * n == whole.numel() * k]
        if not axes:
            raise self._mixed(int(rows[0]), _shapes(whole, out))
        ways = [way for d in axes for way in (SampleAxis(d, 1, None), SampleAxis(d, None, 1))]
        at = rows.to(whole.device)
        return min(ways, key=lambda way: _difference(way.samples(whole, n)[at], way.samples(out, k)))

    def _same_output(self, batch: Tensor, apart: Tensor, rows: Tensor) -> None:
        if batch.shape[1:] != apart.shape[1:]:
            raise self._mixed(int(rows[0]), _shapes(batch[0], apart[0]))
        off = values_off(batch, rows.to(batch.device), apart)
        worst = int(off.argmax())
        if float(off[worst]) > self._tolerance():
            where = "for that sample alone" if len(rows) == 1 else f"with {len(rows)} of the {self.samples} samples"
            raise self._mixed(int(rows[worst]), f"is off by {float(off[worst]):.1e} from its output {where}", ValuesDiffer)

    def measure_rounding(self) -> None:
        """Run it on all samples once more, with rounded parameters: by how much that changes the outputs is tolerated."""
        self.rounding = 1e-300
        for role, whole, out in zip(self._plan, self._outputs, self._run(None)[0], strict=False):
            if isinstance(role, SampleAxis) and role.fits(out, self.samples):
                before, now = (role.samples(t.detach(), self.samples) for t in (whole, out))
            elif role == SCALAR:
                before, now = (t.detach().reshape(1, -1) for t in (whole, out))
            else:
                continue
            self.rounding = max(self.rounding, float(values_off(before, slice(None), now).max()))

    def _tolerance(self) -> float:
        coarse = self.call.context.autocast is not None
        return value_tolerance(self._outputs[0].dtype, coarse=coarse, rounding=self.rounding)

    def _mixed(self, i: int, how: str, kind: type[SelfCheckError] = SelfCheckError) -> SelfCheckError:
        hint = counted_otherwise(tensors_of((self.call.args, self.call.kwargs)), self._controller.axis)
        return kind(
            f"{self._what}: its output for sample {i} of the batch {how}; nothing was released. Samples mix inside it (batch "
            f"statistics, attention over the batch axis{hint}), or it draws random numbers other than dropout and noise."
            f"{declared(self.has_scalar, self._controller)} Remedy: replace what mixes them, or freeze and .eval() it."
        )

    @contextmanager
    def _taken_out(self) -> Iterator[list[Tensor]]:
        """What modules with hooks of the user give out: a loss may use it without any output of the model."""
        found: list[Tensor] = []
        hooked = self._controller.hooked_by_others()

        def collect(module: nn.Module, args: Any, output: Any) -> None:
            found.extend(t for t in outputs_of(output) if t.is_floating_point())

        with ExitStack() as stack:
            for module in hooked:
                if module is not self.call.module:
                    stack.callback(module.register_forward_hook(collect).remove)
            yield found

    def _role(self, index: int, out: Tensor) -> SampleAxis | str:
        samples, reached = self.samples, self.call.reached
        if reached and index not in reached:
            return LEFT_OUT
        if samples == 1 and out.numel() > 1:
            return SampleAxis(0, 1, None)
        along = self._axis_of(out, SCALAR if out.numel() == 1 else LEFT_OUT)
        if along != LEFT_OUT:
            return along
        if not reached or out.numel() == 0:
            return LEFT_OUT
        if any(size % samples == 0 for size in out.shape):
            return TO_BE_FOUND
        raise SelfCheckError(
            f"{self._what}: the loss depends on an output of shape {tuple(out.shape)}, which has no row for each of the "
            f"{samples} samples (statistics of the batch? chosen tokens?), so it could not be compared; nothing was released. "
            "Remedy: leave it out of the loss, or train with a @dp_step function that returns per-sample losses, which is "
            "checked whole."
        )

    def _axis_of(self, out: Tensor, otherwise: str) -> SampleAxis | str:
        """Where samples are in an output, or ``otherwise``; several axes may be as long, one of which a smaller batch will tell."""
        # Outputs may count samples along another axis than inputs do (a head that flattens a time-first sequence).
        axis = self._controller.axis
        along = [d for d in (axis, 1 - axis) if out.numel() and out.dim() > d and out.shape[d] == self.samples]
        if len(along) == 2 and self.samples > 1:
            return TO_BE_FOUND
        return SampleAxis(along[0]) if along else otherwise


def _shapes(whole: Tensor, out: Tensor) -> str:
    return f"has shape {tuple(whole.shape)}, and {tuple(out.shape)} for fewer samples"


def _difference(batched: Tensor, apart: Tensor) -> float:
    batched, apart = batched.double().nan_to_num(), apart.double().nan_to_num()
    return float((batched - apart).norm() / apart.norm().clamp(min=1e-12))


def _cotangents(like: Tensor, samples: int) -> Tensor:
    """Numbers without pattern in the shape of ``like``, the same in every run; not drawn, since draws are replaced here."""
    scale: float = max(1.0, (like.numel() / samples) ** 0.5)
    return without_pattern(like.shape, dtype=like.dtype).to(like.device).div_(scale)
