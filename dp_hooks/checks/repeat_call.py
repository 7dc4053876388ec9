"""RepeatedCall: runs a recorded call again, whole and on single samples, and makes a loss of what comes out."""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .._tree import one_sample, outputs_of
from ..capture.calls.recorded_call import RecordedCall
from ..capture.controller import HookController
from ..capture.samples.axis import SampleAxis
from ..errors import SelfCheckError
from .compare import tolerance


class RepeatedCall:
    """A call of the model on ``samples`` samples that is compared with the same call on one of them."""

    def __init__(self, call: RecordedCall, controller: HookController, samples: int) -> None:
        """The whole call has to be run first."""
        self._call = call
        self._controller = controller
        self._samples = samples
        self._what = f"{call.name or 'the model'} ({type(call.module).__name__})"
        # How each output enters the loss: its sample axis, "rows", "scalar", or "left out". Found in the whole run.
        self._plan: list[int | str] = []
        # What the whole run returned, to compare with what samples return alone.
        self._outputs: list[Tensor] = []

    def __len__(self) -> int:
        """How many outputs the whole run had."""
        return len(self._outputs)

    def loss(self, alone: int | None) -> Tensor:
        """Run the call again, on the batch or on sample ``alone``, and weight its outputs: a loss for the check.

        Args:
            alone: the number of a sample; None: all of them, which has to come first.

        Raises:
            SelfCheckError: an output that the loss uses cannot be compared, or is another one for the sample alone.
        """
        call, controller, samples = self._call, self._controller, self._samples
        axis, args, kwargs = controller.axis, call.args, call.kwargs
        if alone is not None:
            args, kwargs = one_sample((args, kwargs), alone, samples, axis)
        with call.context.restored(), self._taken_out() as inside:
            outputs = outputs_of(call.module(*args, **kwargs)) + call.left
        outputs = [t for t in outputs if t.is_floating_point()]
        count, outputs = len(outputs), outputs + inside
        if alone is None:
            self._plan = [self._role(i, out) for i, out in enumerate(outputs[:count])]
            self._plan += [_axis_of(out, samples, axis, "left out") for out in inside]
            self._outputs = [out.detach() for out in outputs]
        total = torch.zeros(())
        last = max((k for k, role in enumerate(self._plan) if role != "left out"), default=-1)
        if len(outputs) <= last:
            raise self._mixed(alone or 0, f"are {len(self._plan)} tensors, and {len(outputs)} for that sample alone")
        used = slice(last + 1)  # behind that there may be a list with one for each sample
        for out, role, whole in zip(outputs[used], self._plan[used], self._outputs[used], strict=True):
            if role == "left out":
                continue
            term = out.sum()  # a loss that the model computes itself
            if role != "scalar":
                weights = _cotangents(whole.shape).to(out.device, out.dtype) / max(1.0, (whole.numel() / samples) ** 0.5)
                if alone is not None:
                    weights = self._matching(whole, out.detach(), weights, role, alone)
                term = (out * weights).sum()
                if controller.loss_reduction == "mean" and alone is None:
                    term = term / samples
            total = total.to(term.device, torch.promote_types(total.dtype, term.dtype)) + term
        return total

    def _matching(self, whole: Tensor, out: Tensor, weights: Tensor, role: int | str, i: int) -> Tensor:
        """The weights for the rows of sample ``i``, which are those where the whole output is its output alone."""
        samples = self._samples
        if isinstance(role, int):
            self._same_output(whole.narrow(role, i, 1), out, i)
            return weights.narrow(role, i, 1)
        fitting = [d for d, size in enumerate(out.shape) if whole.dim() == out.dim() and whole.shape[d] == size * samples]
        fitting = [d for d in fitting if math.prod(whole.shape) == samples * out.numel()]
        if not fitting:
            raise self._mixed(i, f"has shape {tuple(whole.shape)}, and {tuple(out.shape)} for that sample alone")
        ways = [sample_axis for d in fitting for sample_axis in (SampleAxis(d, 1, None), SampleAxis(d, None, 1))]
        best = min(ways, key=lambda sample_axis: _difference(sample_axis.samples(whole, samples)[i], out))
        self._same_output(best.samples(whole, samples)[i], out, i)
        return best.samples(weights, samples)[i]

    def _same_output(self, batched: Tensor, single: Tensor, i: int) -> None:
        # Needed besides the gradients: a module without a rule is run on single samples by the engine as well.
        off = _difference(batched, single)
        if off > tolerance(self._outputs[0].dtype, coarse=self._call.context.autocast is not None):
            raise self._mixed(i, f"is off by {off:.1e} from its output for that sample alone")

    def _mixed(self, i: int, how: str) -> SelfCheckError:
        return SelfCheckError(
            f"{self._what}: its output for sample {i} of the batch {how}; nothing was "
            "released. Samples mix inside it (batch statistics, attention over the batch axis), or it draws random "
            "numbers other than dropout and noise. Remedy: replace what mixes them, or freeze and .eval() it."
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
                if module is not self._call.module:
                    stack.callback(module.register_forward_hook(collect).remove)
            yield found

    def _role(self, index: int, out: Tensor) -> int | str:
        samples, axis, reached = self._samples, self._controller.axis, self._call.reached
        if reached and index not in reached:
            return "left out"
        along = _axis_of(out, samples, axis, "scalar" if out.numel() == 1 else "")
        if along != "":
            return along
        if not reached or out.numel() == 0:
            return "left out"
        if any(size % samples == 0 for size in out.shape):
            return "rows"
        raise SelfCheckError(
            f"{self._what}: the loss depends on an output of shape "
            f"{tuple(out.shape)}, which has no row for each of the {samples} samples (statistics of the batch? chosen tokens?), "
            "so it could not be compared; nothing was released. Remedy: leave it out of the loss, or train with a @dp_step "
            "function that returns per-sample losses, which is checked whole."
        )


def _axis_of(out: Tensor, samples: int, axis: int, otherwise: str) -> int | str:
    # Outputs may count samples along another axis than inputs do (a head that flattens a time-first sequence).
    along = next((d for d in (axis, 1 - axis) if out.dim() > d and out.shape[d] == samples), None)
    return along if along is not None and out.numel() > 0 else otherwise


def _difference(batched: Tensor, single: Tensor) -> float:
    batched, single = batched.double().nan_to_num(), single.double().nan_to_num()
    return float((batched - single).norm() / single.norm().clamp(min=1e-12))


def _cotangents(shape: Sequence[int]) -> Tensor:
    """Return numbers in (-1, 1) without pattern, the same in every run; not drawn, since draws are replaced here."""
    index = torch.arange(math.prod(shape), dtype=torch.float64)
    return ((index * 12.9898 + 1.0).sin() * 43758.5453).frac().reshape(tuple(shape))
