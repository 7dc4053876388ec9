"""The library checks itself: its per-sample gradients against plain autograd on single samples, before anything is released."""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .._no_randomness import Draws, NoRandomness, other_generators_kept
from .._rerun import AmbientContext, ModuleState, attributes_kept
from .._tree import one_sample, private_copy, tensors_of, tree_map
from ..capture.controller import HookController
from ..capture.trace import OpTrace, Transition, untraced
from ..errors import DPHooksError, SelfCheckError
from ..gradients.sample_gradients import SampleGradients
from .compare import compare, tolerance
from .recorded_call import RecordedCall, kind_of

# How many samples of a batch are run alone. All of them are in the batched run that they are compared with.
_ALONE = 3
# How many outermost calls are remembered: those of one step, in practice one or two.
_CALLS = 64


class SelfCheck:
    """Compares, on real inputs, what the controller captures with single-sample autograd; leaves no trace.

    A batch with one sample can only show that values are right, one with several also that samples do not mix:
    neither kind is released before it has been checked once. Random state, buffers, gradients and everything captured
    for the step in progress are the same afterwards. Cost: one more pass over the batch and up to three over single
    samples, once.
    """

    def __init__(
        self,
        controller: HookController,
        model: nn.Module,
        params: list[nn.Parameter],
        criterion: nn.Module | None = None,
    ) -> None:
        """Check the gradients of ``params`` that ``controller`` captures on ``model``, and those of ``criterion``."""
        self._criterion = criterion
        self._controller = controller
        self._model = model
        self._params = params
        self._checked: set[tuple[Any, ...]] = set()
        self._checked_calls: dict[tuple[Any, Any], set[int]] = {}
        self._observed: list[RecordedCall] = []
        self._call: RecordedCall | None = None
        self._overflow = False
        self._busy = False
        self._deferred = False
        self._came_back = False
        self._views: list[tuple[RecordedCall, int, Tensor, int]] = []
        self._trace = OpTrace(model.buffers)
        self._attributes: ModuleState | None = None
        self._criterion_trace = OpTrace()
        self._coarse = False  # autocast or half precision is in use
        self._criterion_call: tuple[Any, Any] | None = None
        self._state: dict[str, Tensor] = {}
        self.loss_verified = False

    # ---------------------------------------------------------------- watching

    def watch(self, stack: ExitStack) -> None:
        """Observe outermost calls into the model, and calls of the criterion, until ``stack`` unwinds."""
        self._controller.observer, self._controller.trace = self, self._trace
        stack.callback(self._unwatch)
        if self._criterion is not None:
            before = self._criterion.register_forward_pre_hook(self._follow_criterion, prepend=True)
            stack.callback(before.remove)
            after = self._criterion.register_forward_hook(self._observe_criterion, with_kwargs=True, always_call=True)
            stack.callback(after.remove)

    def _unwatch(self) -> None:
        self._controller.observer = self._controller.trace = None
        self._trace.close()
        self._criterion_trace.close()
        self._observed = []
        self._call = self._criterion_call = None

    def begins(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """An outermost call into the model begins: keep its inputs as they are now, if they will be needed."""
        if self._busy:
            return
        kind = kind_of(name, args, kwargs)
        key = self._key(2)
        new = (key, kind) not in self._checked_calls
        device = self._params[0].device.type
        if new:
            if not self._observed:
                self._state = self._written()
            args, kwargs = private_copy((args, kwargs))
        self._call = RecordedCall(module, name, args, kwargs, AmbientContext.current(device), key, kind, new)
        if not self._deferred:
            self._call.attributes = ModuleState(self._model)

    def ends(self) -> tuple[RecordedCall | None, list[Tensor]]:
        """The call is over; what it left in attributes of the model can be used in a loss like its outputs."""
        call, self._call = self._call, None
        if self._busy or call is None:
            return None, []
        call.transitions, call.draws = self._trace.unverified, self._trace.draws
        if call.copied or call.transitions:
            self._keep(call)
        return call, call.left

    def _keep(self, call: RecordedCall) -> None:
        if len(self._observed) == _CALLS:
            self._overflow = True
        else:
            self._observed.append(call)

    def reached(self, call: RecordedCall | None, index: int) -> None:
        """Gradients come back from output number ``index`` of the call."""
        if self._busy or call is None:
            return
        self._came_back = True
        call.reached.add(index)
        if call not in self._observed and index not in self._checked_calls.get((call.key, call.kind), ()):
            self._keep(call)

    def has_view(self, call: RecordedCall | None, index: int, output: Tensor) -> None:
        """Remember what tells later whether the output was changed in place."""
        if self._busy or call is None or index in self._checked_calls.get((call.key, call.kind), ()):
            return
        self._views.append((call, index, output.detach(), output._version))

    def _settle_views(self) -> None:
        """Take outputs that were changed in place as used in the loss."""
        views, self._views = self._views, []
        for call, index, alias, version in views:
            if alias._version != version:  # which it shares with the output
                self.reached(call, index)

    def captured(self, samples: int) -> None:
        """Check before ``p.grad_sample`` is written: who reads it need not take a step."""
        if not self._deferred and self.needed(samples):
            self.check_calls(samples)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Check nothing before the end of the block, where another check takes place: of a whole function, from its start."""
        self._deferred, self._attributes = True, ModuleState(self._model)
        try:
            yield
        finally:
            self._deferred, self._attributes = False, None

    def _key(self, samples: int) -> tuple[Any, ...]:
        """What a check has shown something about: one sample or several, the modes of modules, what is trainable."""
        modes = tuple((module.training, len(module._forward_hooks)) for module in self._model.modules())
        return ("one" if samples == 1 else "many", modes, tuple(p.requires_grad for p in self._params))

    def _follow_criterion(self, criterion: nn.Module, args: Any) -> None:
        if torch.is_grad_enabled() and not self._deferred and not self._controller.in_backward():
            sized = [t.shape[self._controller.axis] for t in tensors_of(args) if t.dim() > self._controller.axis]
            self._criterion_trace.start("", sized[0] if sized else None)

    @untraced
    def _observe_criterion(self, criterion: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self._criterion_trace.stop()
        if not self._busy and torch.is_grad_enabled() and (self.armed or self._criterion_trace.unverified):
            self._criterion_call = private_copy((args, kwargs))

    def new_step(self) -> None:
        """Forget calls observed before a boundary."""
        self._observed = []
        self._came_back = False
        self._views = []
        self._criterion_trace.unverified = set()
        self._trace.unverified = set()
        self._state = {}
        self._overflow = False
        self._criterion_call = None

    # ---------------------------------------------------------------- checking

    @property
    def armed(self) -> bool:
        """Whether the next batch with several samples would be checked, as things stand."""
        return self._key(2) not in self._checked

    def needed(self, samples: int) -> bool:
        """Whether a batch of this size may not be released before a check: nothing like it, or not every call, was checked."""
        if samples == 0 or self._busy:
            return False
        self._settle_views()
        if self._key(samples) not in self._checked or self._new_criterion(samples):
            return True
        return any(self._is_new(call, samples) for call in self._used())

    def _new_criterion(self, samples: int) -> bool:
        return bool(self._criterion_trace.unchecked(self._criterion_trace.unverified, samples))

    def needed_for_function(self, samples: int) -> bool:
        """The same for a step that a whole function was followed in."""
        return self.needed(samples) or (samples > 0 and bool(self._trace.unchecked(self._trace.unverified, samples)))

    def _used(self) -> list[RecordedCall]:
        """The calls that gradients came back from; all, where none did: a loss may only use what is inside them."""
        return [call for call in self._observed if call.reached] if self._came_back else self._observed

    def _is_new(self, call: RecordedCall, samples: int) -> bool:
        known = self._checked_calls.get((self._key(samples), call.kind))
        return known is None or not call.reached <= known or bool(self._trace.unchecked(call.transitions, samples))

    def check_calls(self, samples: int) -> None:
        """Check every outermost call observed since the last boundary, with random cotangents on its outputs.

        Raises:
            SelfCheckError: a disagreement, or a check that could not be made. What was captured must not be used then.
        """
        try:
            self._check_calls(samples)
        finally:
            self.new_step()

    def _check_calls(self, samples: int) -> None:
        calls = [call for call in self._used() if self._has_rows(call, samples)]
        if self._overflow:
            raise SelfCheckError(
                f"more than {_CALLS} separate calls into the model before one step: too many to compare. Call them from the "
                "forward of one module, or train with a @dp_step function, which is checked whole."
            )
        before = self._key(samples) in self._checked  # now it is about calls that were not made then
        if self._criterion is not None and (not before or self._new_criterion(samples)):
            self._check_criterion(samples)
        if before and not calls:
            return
        if not calls:
            raise SelfCheckError(
                "the self-check saw no call into the model before this step, so nothing could be compared. Run the model "
                "inside the scope, in one process, with gradients enabled."
            )
        self._check_written()
        controller, compared = self._controller, 0
        for call in calls:
            self._coarse = call.context.autocast is not None
            compared += self._compare(
                samples,
                lambda call=call: call.loss(controller, samples, None),  # type: ignore[misc]
                lambda i, call=call: call.loss(controller, samples, i),  # type: ignore[misc]
                call.name or "the model",
                call.transitions,
                call.draws,
                call.attributes or self._attributes,
            )
        if not compared:
            raise SelfCheckError(
                "no output of the model could be compared in the self-check: none has a row per sample or is a scalar loss. "
                "Remedy: declare the sample axis (batch_first), or train with a @dp_step function, which is checked whole."
            )
        if not before:
            self.loss_verified = self._criterion is not None and samples > 1
        self._passed(samples, calls)

    def _has_rows(self, call: RecordedCall, samples: int) -> bool:
        axis = self._controller.axis
        return any(t.dim() > axis and t.shape[axis] == samples for t in tensors_of((call.args, call.kwargs)))

    def _check_criterion(self, samples: int) -> None:
        """Compare the gradient of the loss function on the batch with that on single samples."""
        if self._criterion_call is None:
            raise SelfCheckError(
                "criterion was not called before this step, so it could not be checked. Pass the loss module that the "
                "training loop calls, or leave criterion out (the report then says: loss not verified)."
            )
        axis, call = self._controller.axis, self._criterion_call
        with self._controller.separate(), self._undisturbed(NoRandomness(samples)), self._criterion_trace.apart():
            whole = self._criterion_gradients(call)
            seen = self._criterion_trace.unverified
            if self._controller.loss_reduction == "mean":
                whole = [g * samples for g in whole]
            for i in _some(samples):
                try:
                    alone = self._criterion_gradients(one_sample(call, i, samples, axis))
                except Exception as error:
                    raise self._not_alone(f"criterion ({type(self._criterion).__name__})", i, error) from error
                for batched, single in zip(one_sample(whole, i, samples, axis), alone, strict=True):
                    off = float((batched - single).double().norm() / single.double().norm().clamp(min=1e-30))
                    if not off <= tolerance(single.dtype, coarse=False):
                        raise SelfCheckError(
                            f"criterion ({type(self._criterion).__name__}): its gradient for sample {i} of the batch is off by "
                            f"{off:.1e} from its gradient on that sample alone; nothing was released. Either it couples the "
                            "samples (a mean over all tokens, a contrastive term), or "
                            f"loss_reduction={self._controller.loss_reduction!r} is not how it reduces. Remedy: reduce within each "
                            "sample first, or declare the reduction."
                        )
        self._criterion_trace.verify(seen, samples)

    def _criterion_gradients(self, call: tuple[Any, Any]) -> list[Tensor]:
        assert self._criterion is not None
        leaves: list[Tensor] = []

        def leaf(value: Any) -> Any:
            if not isinstance(value, Tensor) or not value.is_floating_point():
                return value
            leaves.append(value.detach().requires_grad_())
            return leaves[-1]

        args, kwargs = tree_map(leaf, call)
        found = torch.autograd.grad(self._criterion(*args, **kwargs).sum(), leaves, allow_unused=True)
        return [torch.zeros_like(t) if g is None else g for t, g in zip(leaves, found, strict=True)]

    def check_loss(self, samples: int, whole: Callable[[], Tensor], alone: Callable[[int], Tensor]) -> None:
        """Check a whole train function, loss included.

        Args:
            samples: n.
            whole: runs on the batch and returns its loss, reduced as the scope declares.
            alone: runs on sample i alone and returns its loss as a scalar.

        Raises:
            SelfCheckError: a disagreement, or a check that could not be made.
        """
        taken = self._trace.unverified
        if self._key(2) in self._checked and not self._trace.unchecked(taken, samples):
            return  # another call than then: it is compared alone, by check_calls
        self._check_written()
        self._coarse = any(call.context.autocast is not None for call in self._observed)
        if not self._compare(samples, whole, alone, "the train function", taken, self._trace.draws, self._attributes):
            raise SelfCheckError(
                f"the train function could not be compared: run again on the same batch, it did not give a loss over its {samples} "
                "samples. Remedy: let it compute the same on every call, one row per example."
            )
        self._passed(samples, self._observed)
        self.loss_verified = samples > 1 or self.loss_verified

    def _passed(self, samples: int, calls: list[RecordedCall]) -> None:
        for key in {self._key(samples), self._key(1)}:
            self._checked.add(key)
            for call in calls:
                known = self._checked_calls.setdefault((key, call.kind), set())
                known |= call.reached or set(range(len(call.outputs)))

    def _compare(
        self,
        samples: int,
        whole: Callable[[], Tensor],
        alone: Callable[[int], Tensor],
        what: str,
        transitions: set[Transition],
        draws: Draws | None,
        attributes: ModuleState | None,
    ) -> bool:
        """Compare; whether there was anything to compare.

        Args:
            samples: n.
            whole: runs on the batch and returns the loss.
            alone: runs on sample i.
            what: for messages.
            transitions: what the pass in question went through; the check has to go there, too.
            draws: what it drew: where random numbers led it another way than constants do, the check follows.
            attributes: those of the model when it began: counters and caches of the model are no reason to go another way.
        """
        without = NoRandomness(samples)
        if not self._compared(without, whole, alone, what, attributes):
            return False
        if samples > 1 and without.noisy:  # which may choose the samples that are mixed
            self._compared(NoRandomness(samples, varied=True), whole, alone, what, attributes)
        if self._unseen(transitions, samples) and draws is not None:
            self._compared(NoRandomness(samples, draws=draws), whole, alone, what, attributes)
        if left := self._unseen(transitions, samples):
            places = sorted({"the function" if name is None else name or "the model" for name, *_ in left})
            raise SelfCheckError(
                f"{what}: run again on the same batch, it did not do the same as before (in {', '.join(places[:4])}), so "
                "that could not be checked; nothing was released. Remedy: let branches depend on inputs, attributes, or random "
                "numbers from torch, random or numpy's global generators only."
            )
        return True

    def _unseen(self, transitions: set[Transition], samples: int) -> set[Transition]:
        left = self._trace.repeatable(self._trace.unchecked(transitions, samples))
        self._trace.verify(transitions - left, samples)
        if left:
            classes = {name: type(module) for name, module in self._model.named_modules()}
            left = self._trace.verify_alike(left, samples, classes)
        return left

    def _compared(
        self,
        without: NoRandomness,
        whole: Callable[[], Tensor],
        alone: Callable[[int], Tensor],
        what: str,
        attributes: ModuleState | None,
    ) -> bool:
        controller, samples = self._controller, without.samples
        assert samples is not None
        picked = _some(samples)
        with controller.separate(), self._undisturbed(without), self._trace.apart():
            self._begin_again(without, attributes, None)
            loss = whole()
            seen = self._trace.unverified
            if not loss.requires_grad:
                return False
            _backward(loss, [controller.anchor, *controller.params])
            found = controller.take()
            if found is None or found.samples != samples:
                return False  # a call on something else than the batch of this step
            controller.disable_hooks()
            try:
                expected = []
                for i in picked:
                    self._begin_again(without, attributes, i)
                    expected.append(self._reference(alone, i, what))
            finally:
                controller.enable_hooks()
            self._compare_gradients(found, picked, expected, what)
        self._trace.verify(seen, samples)
        return True

    @staticmethod
    def _begin_again(without: NoRandomness, attributes: ModuleState | None, alone: int | None) -> None:
        without.begin_again(alone)
        if attributes is not None:
            attributes.put_back()

    def _written(self) -> dict[str, Tensor]:
        named = [
            *self._model.named_buffers(),
            *((n, p) for n, p in self._model.named_parameters() if not p.requires_grad),
        ]
        return {name: t.detach().clone() for name, t in named if t.is_floating_point()}

    def _check_written(self) -> None:
        """Refuse models that wrote what they saw of private samples to buffers or frozen parameters."""
        after = {**dict(self._model.named_buffers()), **dict(self._model.named_parameters())}
        changed = [
            name
            for name, value in self._state.items()
            if name in after and not torch.equal(after[name].nan_to_num(), value.nan_to_num())
        ]
        if changed:
            raise SelfCheckError(
                f"{', '.join(changed)}: written during the forward pass, from private samples and without noise, and part of "
                "the state dict. Remedy: call .eval() on the module that does it, or take it out of the model."
            )

    def _reference(self, alone: Callable[[int], Tensor], i: int, what: str) -> dict[nn.Parameter, Tensor]:
        for p in self._model.parameters():
            p.grad = None
        try:
            loss = alone(i)
            if loss.requires_grad:
                _backward(loss, self._params)
        except DPHooksError:
            raise
        except Exception as error:
            raise self._not_alone(what, i, error) from error
        return {p: p.grad.to_dense() if p.grad.is_sparse else p.grad for p in self._params if p.grad is not None}

    def _not_alone(self, what: str, i: int, error: Exception) -> SelfCheckError:
        return SelfCheckError(
            f"{what}: sample {i} could not be run alone for the self-check ({type(error).__name__}: {error}). Remedy: "
            "the model and the loss must work on a batch of one; an input that all samples share must not have "
            "as many rows as the batch has samples."
        )

    def _compare_gradients(
        self, found: SampleGradients, picked: list[int], expected: list[dict[nn.Parameter, Tensor]], what: str
    ) -> None:
        compare(found, picked, expected, self._params, self._controller, what, coarse=self._coarse)

    @contextmanager
    def _undisturbed(self, without: NoRandomness) -> Iterator[None]:
        """Run with dropout off, and put random state, buffers, attributes and gradients back afterwards."""
        devices = sorted({p.device.index or 0 for p in self._params if p.device.type == "cuda"})
        buffers = [(b, b.detach().clone()) for b in self._model.buffers()]
        grads = [(p, p.grad) for p in self._model.parameters()]
        self._busy = True
        try:
            with (
                attributes_kept(self._model),
                torch.random.fork_rng(devices=devices),
                other_generators_kept(),
                torch.enable_grad(),
                without,
            ):
                yield
        finally:
            self._busy = False
            with torch.no_grad():
                for buffer, value in buffers:
                    if not torch.equal(buffer, value):  # a graph may have saved it, and would notice
                        buffer.copy_(value)
            for p, grad in grads:
                p.grad = grad


def _backward(loss: Tensor, leaves: Sequence[Tensor]) -> None:
    """Back-propagate to ``leaves`` only: other models in the same graph, private or not, must not notice.

    ``Tensor.backward`` would switch function modes off, and dropout would be back in what checkpointing runs again.
    Reentrant checkpointing allows only a backward pass to everything.
    """
    inputs = () if _has_reentrant_checkpoint(loss) else tuple(leaf for leaf in leaves if leaf.requires_grad)
    torch.autograd.Variable._execution_engine.run_backward(
        (loss,), (torch.ones_like(loss),), False, False, inputs, allow_unreachable=True, accumulate_grad=True
    )


def _has_reentrant_checkpoint(loss: Tensor) -> bool:
    seen, stack = set(), [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            if "CheckpointFunction" in type(node).__name__:
                return True
            stack += [parent for parent, _ in node.next_functions]
    return False


def _some(samples: int) -> list[int]:
    """Choose the samples to run alone: the ends and some between them."""
    if samples <= _ALONE:
        return list(range(samples))
    between = random.Random(0).sample(range(1, samples - 1), _ALONE - 2)
    return sorted({0, samples - 1, *between})
