"""A call into the model from outside: run again whole and on single samples, its outputs are compared."""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .._no_randomness import Draws
from .._rerun import AmbientContext, ModuleState
from .._tree import one_sample, outputs_of, tensors_of
from ..capture.controller import HookController
from ..capture.samples.axis import SampleAxis
from ..capture.trace import Transition
from ..errors import SelfCheckError
from .compare import tolerance


@dataclass(eq=False)
class RecordedCall:
    """A call of the model from outside, or of a part of it, with what is needed to run it again."""

    module: nn.Module
    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    context: AmbientContext
    # The state of the model when it was called, and what it was called with, as far as one check covers others.
    key: Any = None
    kind: Any = None
    copied: bool = False
    # Which of its outputs a backward pass came from, by number; operations it went through that no check did.
    reached: set[int] = field(default_factory=set)
    transitions: set[Transition] = field(default_factory=set)
    draws: Draws | None = None
    attributes: ModuleState | None = None
    # How each output enters the loss of the check: its sample axis, "rows", "scalar", or "left out". Found in the whole run.
    plan: list[int | str] = field(default_factory=list)
    # What the whole run returned, to compare with what samples return alone.
    outputs: list[Tensor] = field(default_factory=list)

    @property
    def left(self) -> list[Tensor]:
        """What the last run of the call left in attributes of the model, with its history."""
        return [] if self.attributes is None else self.attributes.made_since()

    def loss(self, controller: HookController, samples: int, alone: int | None) -> Tensor:
        """Run the call again, on the batch or on sample ``alone``, and weight its outputs: a loss for the check.

        Args:
            controller: of the model.
            samples: n.
            alone: the number of a sample; None: all of them, which has to come first.

        Raises:
            SelfCheckError: an output that the loss uses cannot be compared, or is another one for the sample alone.
        """
        axis = controller.axis
        args, kwargs = (self.args, self.kwargs)
        if alone is not None:
            args, kwargs = one_sample((args, kwargs), alone, samples, axis)
        with self.context.restored(), self._taken_out(controller) as inside:
            outputs = outputs_of(self.module(*args, **kwargs)) + self.left
        outputs = [t for t in outputs if t.is_floating_point()]
        count, outputs = len(outputs), outputs + inside
        if alone is None:
            self.plan = [self._role(i, out, samples, axis) for i, out in enumerate(outputs[:count])]
            self.plan += [_axis_of(out, samples, axis, "left out") for out in inside]
            self.outputs = [out.detach() for out in outputs]
        total = torch.zeros(())
        last = max((k for k, role in enumerate(self.plan) if role != "left out"), default=-1)
        if len(outputs) <= last:
            raise self._mixed(alone or 0, f"are {len(self.plan)} tensors, and {len(outputs)} for that sample alone")
        used = slice(last + 1)  # behind that there may be a list with one for each sample
        for out, role, whole in zip(outputs[used], self.plan[used], self.outputs[used], strict=True):
            if role == "left out":
                continue
            term = out.sum()  # a loss that the model computes itself
            if role != "scalar":
                weights = _cotangents(whole.shape).to(out.device, out.dtype) / max(
                    1.0, (whole.numel() / samples) ** 0.5
                )
                if alone is not None:
                    weights = self._matching(whole, out.detach(), weights, role, alone, samples)
                term = (out * weights).sum()
                if controller.loss_reduction == "mean" and alone is None:
                    term = term / samples
            total = total.to(term.device, torch.promote_types(total.dtype, term.dtype)) + term
        return total

    def _matching(self, whole: Tensor, out: Tensor, weights: Tensor, role: int | str, i: int, samples: int) -> Tensor:
        """The weights for the rows of sample ``i``, which are those where the whole output is its output alone."""
        if isinstance(role, int):
            self._same_output(whole.narrow(role, i, 1), out, i)
            return weights.narrow(role, i, 1)
        fitting = [
            d for d, size in enumerate(out.shape) if whole.dim() == out.dim() and whole.shape[d] == size * samples
        ]
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
        if off > tolerance(self.outputs[0].dtype, coarse=self.context.autocast is not None):
            raise self._mixed(i, f"is off by {off:.1e} from its output for that sample alone")

    def _mixed(self, i: int, how: str) -> SelfCheckError:
        return SelfCheckError(
            f"{self.name or 'the model'} ({type(self.module).__name__}): its output for sample {i} of the batch {how}; nothing was "
            "released. Samples mix inside it (batch statistics, attention over the batch axis), or it draws random "
            "numbers other than dropout and noise. Remedy: replace what mixes them, or freeze and .eval() it."
        )

    @contextmanager
    def _taken_out(self, controller: HookController) -> Iterator[list[Tensor]]:
        """What modules with hooks of the user give out: a loss may use it without any output of the model."""
        found: list[Tensor] = []
        hooked = controller.hooked_by_others()

        def collect(module: nn.Module, args: Any, output: Any) -> None:
            found.extend(t for t in outputs_of(output) if t.is_floating_point())

        with ExitStack() as stack:
            for module in hooked:
                if module is not self.module:
                    stack.callback(module.register_forward_hook(collect).remove)
            yield found

    def _role(self, index: int, out: Tensor, samples: int, axis: int) -> int | str:
        if self.reached and index not in self.reached:
            return "left out"
        along = _axis_of(out, samples, axis, "scalar" if out.numel() == 1 else "")
        if along != "":
            return along
        if not self.reached or out.numel() == 0:
            return "left out"
        if any(size % samples == 0 for size in out.shape):
            return "rows"
        raise SelfCheckError(
            f"{self.name or 'the model'} ({type(self.module).__name__}): the loss depends on an output of shape "
            f"{tuple(out.shape)}, which has no row for each of the {samples} samples (statistics of the batch? chosen tokens?), "
            "so it could not be compared; nothing was released. Remedy: leave it out of the loss, or train with a @dp_step "
            "function that returns per-sample losses, which is checked whole."
        )


def kind_of(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What is called, and with what kinds of inputs: a check of a call without a mask shows nothing about one with it."""
    given = frozenset(key for key, value in kwargs.items() if value is not None)
    kinds = frozenset((t.dim(), t.dtype) for t in tensors_of((args, kwargs)))
    return name, tuple(type(arg) for arg in args), given, kinds


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
