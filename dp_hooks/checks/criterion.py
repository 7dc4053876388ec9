"""CriterionCheck: whether a loss module treats the samples of a batch one by one, reduced as declared."""

from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .._no_randomness import NoRandomness
from .._precision import wide_dtype
from .._tree import one_sample, tensors_of, tree_map
from ..capture.calls.call_recorder import LIMIT, CallRecorder
from ..capture.calls.module_state import ModuleState
from ..capture.calls.session import ModelCall
from ..capture.calls.trace import OpTrace, Transition, untraced
from ..capture.calls.undisturbed import undisturbed
from ..capture.controller import HookController
from ..capture.samples.rows_of_inputs import rows_of_inputs
from ..capture.samples.tracked import TrackedTensor
from ..errors import SelfCheckError
from .compare import tolerance
from .lent import Lent, can_be_lent
from .linear_path import is_linear
from .single_samples import nodes_of, not_alone, some_samples

# What part of the gradient may be anything but the criterion's: rounding, under autocast as well.
_OTHER_TERMS = 2e-2
# How much the factor that the loss is multiplied with may change from step to step: it is a constant, and nothing of the batch.
_CHANGE = 1e-5
_AT_ONCE = 64  # how many factors are looked at together
_WHOLE = 10_000  # the largest factor, or part of one, that is taken for a constant where there was one step only
# What may lie between an output of the model and an argument of the criterion: the gradient of the one is that of the other, row
# by row. Anything else could mix samples where neither the model nor the criterion does.
_VIEWS = {"ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0", "ToCopyBackward0"}
_VIEWS |= {"SqueezeBackward0", "SqueezeBackward1", "UnsqueezeBackward0"}

Output = tuple[int, int]  # the call and the number of an output of the model


@dataclass(eq=False)
class _Seen:
    """An output of the model in the present step."""

    call: ModelCall
    node: Any  # where it is in the graph
    number: int
    shape: torch.Size


@dataclass(eq=False)
class _Call:
    """A call of the criterion."""

    given: Any  # its arguments, as they were
    tokens: int  # how many rows of them belong to a sample, one after the other
    reached: bool  # whether a gradient came to its loss
    new: set[Transition]  # what it went through that no check did


class _Factors:
    """What the criterion's loss is multiplied with, call by call of a step: seen where its gradient begins."""

    def __init__(self) -> None:
        self._first: list[Tensor] = []  # of every call of a step: for each number of the loss, and for all together
        self._change: list[Tensor] = []  # by how much both changed since
        self._uneven: Tensor | None = None  # how much the factors of one call differ, at most
        self._waiting: list[tuple[int, Tensor]] = []  # which call of a step it was, and what came: looked at many at a time
        self._at = self._seen = 0

    def new_step(self) -> None:
        """The next call is the first one of a step again."""
        self._at = 0
        if len(self._waiting) >= _AT_ONCE:
            self._look()

    def note(self, grad: Tensor) -> None:
        """The gradient of a loss came: its factor, or one for each of its numbers."""
        self._waiting.append((self._at, grad.detach().to(torch.float64, copy=True).flatten()))
        self._at += 1

    def _look(self) -> None:
        waiting, self._waiting = self._waiting, []
        alike: dict[tuple[int, int], list[Tensor]] = {}
        for at, values in waiting:
            alike.setdefault((at, len(values)), []).append(values)
        for at, count in sorted(alike):
            values = torch.stack(alike[at, count])
            mean = values.mean(1)
            uneven = ((values - mean[:, None]).abs().amax(1) / mean.abs().clamp(min=1e-300)).amax()
            self._uneven = uneven if self._uneven is None else torch.maximum(self._uneven, uneven)
            both = torch.stack([mean, mean * count])
            if at == len(self._first):
                self._first.append(both[:, 0])
                self._change.append(torch.zeros_like(both[:, 0]))
                self._seen -= 1
            first = self._first[at][:, None]
            change = ((both - first).abs() / first.abs().clamp(min=1e-300)).amax(1)
            self._change[at] = torch.maximum(self._change[at], change)
            self._seen += values.shape[0]

    @property
    def constant(self) -> bool:
        """Whether nothing else can have had a part in them."""
        self._look()
        if self._uneven is None or not float(self._uneven) < _CHANGE:
            return False
        if not self._seen:
            return all(_is_whole(float(first[1])) for first in self._first)
        return all(bool(change.min() < _CHANGE) for change in self._change)


def _is_whole(factor: float) -> bool:
    """Whether ``factor`` or its inverse is a whole number."""
    return any(abs(f - round(f)) < _CHANGE and 1 <= abs(round(f)) <= _WHOLE for f in (factor, 1 / factor if factor else 0.0))


def _apart_with_history(leaf: Any) -> Any:
    """A copy of a tensor, which requires a gradient if it has one."""
    return leaf.detach().clone().requires_grad_(leaf.requires_grad) if isinstance(leaf, Tensor) else leaf


def _opaque(arguments: Any) -> set[str]:
    found: set[str] = set()
    plain = (Tensor, int, float, str, type(None))
    tree_map(lambda leaf: None if isinstance(leaf, plain) else found.add(type(leaf).__name__), arguments)
    return found


class CriterionCheck:
    """Compares the gradient of ``criterion`` on the batch with its gradients on single samples."""

    def __init__(self, criterion: nn.Module, controller: HookController, recorder: CallRecorder, *, optional: bool) -> None:
        """``optional``: it may stay unused; the loss is not verified then."""
        self._criterion = criterion
        self._optional = optional
        self._controller = controller
        self._recorder = recorder
        self._trace = OpTrace(keeps_generators=False)
        self._calls: list[_Call] = []  # those of the present step that a check may have to look at
        self._depth = 0  # of calls: a criterion may call itself
        self._lent: Lent | None = None  # what the present call got instead of its arguments
        self._state: ModuleState | None = None  # its attributes before the present call
        self._given: Any = None  # its arguments, in containers of their own: it may write into those it got
        self._checked_rows: int | None = None  # how many samples a check is running it on
        self._tokens = 1  # how many rows of the present call's arguments belong to a sample
        self._is_scalar = True
        self._outputs: dict[Output, _Seen] = {}  # of the model as a whole, in the present step
        self._own: dict[Output, list[Tensor]] = {}  # what the criterion brings to them
        self._ends: dict[int, Any] = {}  # where the losses of its calls in the present step are in the graph
        self._version = 0  # of what was seen last of it
        self._reached = True  # whether the present call is on outputs of the model
        self._opaque: set[str] = set()  # classes of arguments that tensors can be hidden in
        self._factors = _Factors()
        self._off: Tensor | None = None  # the largest part of what arrived that was not the criterion's, in any step
        self._what = f"criterion ({type(criterion).__name__})"

    def watch(self, stack: ExitStack) -> None:
        """Follow calls of the criterion until ``stack`` unwinds."""
        stack.callback(self._trace.close)
        before = self._criterion.register_forward_pre_hook(self._follow, prepend=True, with_kwargs=True)
        stack.callback(before.remove)
        after = self._criterion.register_forward_hook(self._observe, with_kwargs=True, always_call=True)
        stack.callback(after.remove)
        session = self._controller.session
        session.on_output, session.on_arrival = self._note_output, self._note_arrival
        stack.callback(self._forget)

    def _forget(self) -> None:
        self._controller.session.on_output = self._controller.session.on_arrival = None
        self.new_step()

    def _note_output(self, call: ModelCall, index: int, output: Tensor) -> None:
        if index == 0 and self._controller.hands_out:
            self._worse(torch.ones((), dtype=torch.float64, device="cpu"))
        if vars(output) and not isinstance(output, TrackedTensor):  # what was put there may lead into the model
            self._worse(torch.ones((), dtype=torch.float64, device="cpu"))
        if not call.name:
            self._outputs[id(call), index] = _Seen(call, output.grad_fn, output.output_nr, output.shape)

    def _watched(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Return arguments that nothing but the criterion uses, in which what it brings to the model's outputs is seen."""
        leaves = [t for t in tensors_of((args, kwargs)) if t.grad_fn is not None]
        sources = {id(t): self._source(t) for t in leaves}
        whole = bool(sources) and None not in sources.values() and can_be_lent((args, kwargs))
        self._tokens = self._rows_per_sample(leaves, [source for source in sources.values() if source is not None])
        self._reached = whole or not self._outputs or any(self._comes_from_model(t) for t in leaves)
        self._opaque |= set() if self._reached else _opaque((args, kwargs))
        if not whole and self._reached and self._outputs:
            self._worse(torch.ones((), dtype=torch.float64, device="cpu"))
        if not whole:
            return args, kwargs
        self._lent = Lent((args, kwargs), lambda t: self._apart(t, sources.get(id(t))))
        lent: tuple[Any, Any] = self._lent.copy
        return lent

    def _rows_per_sample(self, leaves: list[Tensor], sources: list[tuple[Output, torch.Size]]) -> int:
        """How many rows each sample has in what comes from outputs ``[n, t, ...]`` of the model and counts tokens in one axis."""
        rows = self._controller.session.call.rows
        if self._controller.axis or not rows or any(not shape or shape[0] != rows for _, shape in sources):
            return 1
        found = {t.shape[0] // rows if t.dim() and t.shape[0] % rows == 0 else 1 for t in leaves}
        return found.pop() if len(found) == 1 else 1

    def _comes_from_model(self, value: Tensor) -> bool:
        ends = {seen.node for seen in self._outputs.values()}
        return any(node in ends for node in nodes_of([value]))

    def _source(self, value: Tensor) -> tuple[Output, torch.Size] | None:
        """The output of the model that ``value`` is another view of."""
        node, number = value.grad_fn, value.output_nr
        while node is not None:
            for output, seen in self._outputs.items():
                if node is seen.node and number == seen.number:
                    return output, seen.shape
            if node.name() not in _VIEWS:
                return None
            node, number = node.next_functions[0]
        return None

    def _apart(self, value: Tensor, source: tuple[Output, torch.Size] | None) -> Tensor:
        if source is None:
            return value
        alone = value.view_as(value)
        alone.register_hook(partial(self._note_brought, *source))
        return alone

    def _note_brought(self, output: Output, shape: torch.Size, grad: Tensor) -> None:
        if self._depth:  # it runs a backward pass of its own
            self._worse(torch.ones((), dtype=torch.float64, device="cpu"))
        own = grad.detach().reshape(shape)
        self._own.setdefault(output, []).append(own)
        self._version = own._version

    def _note_arrival(self, call: ModelCall, index: int, grad: Tensor) -> None:
        """A backward pass brings ``grad``: it should be what the criterion brings, and nothing else."""
        own = self._own.pop((id(call), index), [])
        off = torch.ones((), dtype=torch.float64, device=grad.device)
        same_memory = len(own) == 1 and own[0].data_ptr() == grad.data_ptr()
        if same_memory and grad._version == self._version:
            off = torch.zeros_like(off)  # handed on as it is: nothing was added
        elif own and not same_memory:
            a, b = (t.detach().to(wide_dtype(t.dtype)) for t in (grad, sum(own[1:], own[0])))
            off = ((a - b).norm() / a.norm().clamp(min=1e-30)).nan_to_num(0.0).double()
        self._worse(off)

    def _worse(self, off: Tensor) -> None:
        self._off = off if self._off is None else torch.maximum(self._off, off.to(self._off.device))

    @property
    def is_all(self) -> bool:
        """Whether in every step so far what arrived at the model's outputs was the criterion's gradient, and nothing else's."""
        return self._off is not None and float(self._off) < _OTHER_TERMS and self._factors.constant

    def new_step(self) -> None:
        """Forget the call of an earlier step."""
        self._calls, self._depth = [], 0
        self._outputs, self._own, self._ends = {}, {}, {}
        self._factors.new_step()

    def _follow(self, criterion: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        session = self._controller.session
        self._depth += 1
        if self._depth > 1 or not torch.is_grad_enabled() or self._recorder.state is not None or session.in_backward():
            return None
        self._given = tree_map(lambda leaf: leaf, (args, kwargs))
        self._state = ModuleState(criterion)
        watched = (args, kwargs) if self._recorder.paused else self._watched(args, kwargs)
        # Those of the model: the criterion may get all tokens in one axis.
        rows = self._checked_rows if self._recorder.paused else session.call.rows
        self._trace.start("", rows_of_inputs(tensors_of(args), session.axis) if rows is None else rows)
        return watched

    @untraced
    def _observe(self, criterion: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self._depth = max(0, self._depth - 1)
        if self._depth:
            return
        self._trace.stop()
        left = [] if self._state is None else self._state.made_since(hidden=True)
        left += [t for t in vars(output).values() if isinstance(t, Tensor)] if isinstance(output, Tensor) else []
        if self._lent is not None:
            left += self._lent.write_back()
        self._lent = self._state = None
        recorder = self._recorder
        in_loop = not recorder.paused and recorder.state is None and not self._controller.session.in_backward()
        if in_loop and torch.is_grad_enabled():
            if not self._reached:  # outputs of another model, such as a teacher's
                self._given = None
                return
            watched = isinstance(output, Tensor) and output.requires_grad
            if any(t is not output for t in left):  # with which the loop may do anything
                self._worse(torch.ones((), dtype=torch.float64, device="cpu"))
            call = _Call(None, self._tokens, not watched, self._trace.unverified)
            if watched:
                assert output.grad_fn is not None
                # After hooks of the loop, which may change the gradient.
                self._ends[id(call)] = output.grad_fn
                output.grad_fn.register_prehook(partial(self._note_loss, call, output.output_nr))
            if recorder.armed or self._trace.unverified:
                if len(self._calls) == LIMIT:
                    raise SelfCheckError(
                        f"{self._what} was called more than {LIMIT} times in a step, too often to be checked; nothing was "
                        "released. Remedy: call it once on the whole batch, or leave criterion out (the report then says that the "
                        "loss was not checked)."
                    )
                call.given = tree_map(_apart_with_history, self._given)
                self._calls.append(call)
        self._given = None

    def _note_loss(self, call: _Call, number: int, grads: tuple[Tensor | None, ...]) -> None:
        grad = grads[number]
        if grad is not None:
            call.reached = True
            self._factors.note(grad)
            end = self._ends.get(id(call))
            if end is None or not is_linear(end, {*self._ends.values(), *(seen.node for seen in self._outputs.values())}):
                self._worse(torch.ones((), dtype=torch.float64, device="cpu"))

    def takes_new_way(self, samples: int) -> bool:
        """Whether the criterion went through operations that no check on so many samples did."""
        return any(self._trace.unchecked(call.new, samples) for call in self._used())

    def _used(self) -> list[_Call]:
        """The calls that gradients came to; all, where none did."""
        return [call for call in self._calls if call.reached] or self._calls

    def check(self, samples: int) -> bool:
        """Compare; whether it was called.

        Raises:
            SelfCheckError: a disagreement, or the criterion was not called although it has to be.
        """
        if not self._calls and self._optional:
            return False
        if not self._calls:
            hidden = f" on outputs of the model (a {' or '.join(sorted(self._opaque))} is not looked into)" if self._opaque else ""
            raise SelfCheckError(
                f"criterion was not called{hidden} before this step, so it could not be checked. Pass the loss module that the "
                "training loop calls, on tensors in tuples, lists, mappings or dataclasses, or leave criterion out (the report "
                "then says that the loss was not checked)."
            )
        for call in self._used():
            self._check_call(call.given, samples, call.tokens)
        return True

    def _check_call(self, call: tuple[Any, Any], samples: int, tokens: int) -> None:
        axis, reduction = self._controller.axis, self._controller.loss_reduction
        with undisturbed(self._criterion), NoRandomness(samples), self._trace.apart():
            whole = self._gradients(call, samples)
            seen = self._trace.unverified
            if reduction == "mean" and self._is_scalar:  # else it was reduced by someone else, afterwards
                whole = [g * samples for g in whole]
            for i in some_samples(samples):
                try:
                    alone = self._gradients(one_sample(call, i, samples, axis, tokens), 1)
                except SelfCheckError:
                    raise
                except Exception as error:
                    raise not_alone(self._what, [i], error) from error
                for batched, single in zip(one_sample(whole, i, samples, axis, tokens), alone, strict=True):
                    off = float((batched - single).double().norm() / single.double().norm().clamp(min=1e-30))
                    if not off <= tolerance(single.dtype, coarse=False):
                        raise SelfCheckError(
                            f"{self._what}: its gradient for sample {i} of the batch is off by {off:.1e} from its gradient on "
                            "that sample alone; nothing was released. Either it couples the samples (a mean over all tokens, a "
                            f"contrastive term), or loss_reduction={reduction!r} is not how it reduces. Remedy: reduce within "
                            "each sample first, or declare the reduction."
                        )
        self._trace.verify(seen, samples)

    def _gradients(self, call: tuple[Any, Any], samples: int) -> list[Tensor]:
        self._checked_rows = samples
        leaves: list[Tensor] = []

        def leaf(value: Any) -> Any:
            if not isinstance(value, Tensor) or not value.requires_grad:
                return value
            leaves.append(value.detach().requires_grad_())
            return leaves[-1].clone()  # which may be changed in place

        args, kwargs = tree_map(leaf, call)
        loss = self._criterion(*args, **kwargs)
        if not isinstance(loss, Tensor):
            raise SelfCheckError(
                f"{self._what} returned a {type(loss).__name__}, not a tensor, so it could not be checked; nothing was released. "
                "Remedy: let it return the loss alone, or leave criterion out (the report then says that the loss was not checked)."
            )
        self._is_scalar = loss.dim() == 0
        found = torch.autograd.grad(loss.sum(), leaves, allow_unused=True)
        return [torch.zeros_like(t) if g is None else g for t, g in zip(leaves, found, strict=True)]
