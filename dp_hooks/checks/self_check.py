"""The library checks itself: its per-sample gradients against plain autograd on single samples, before anything is released."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from .._no_randomness import Draws, NoRandomness
from .._rerun import ModuleState, undisturbed
from .._tree import tensors_of
from ..capture.calls.call_recorder import LIMIT, CallRecorder
from ..capture.calls.recorded_call import RecordedCall
from ..capture.calls.trace import OpTrace, Transition
from ..capture.controller import HookController
from ..errors import DPHooksError, SelfCheckError
from ..gradients.grad_sample import GradSamples
from .compare import compare
from .criterion import CriterionCheck
from .padding import PaddingCheck
from .repeat_call import RepeatedCall
from .single_samples import back_propagate, not_alone, some_samples


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
        padding: PaddingCheck | None = None,
    ) -> None:
        self._controller = controller
        self._model = model
        self._params = params
        self._trace = OpTrace(model.buffers)
        self._recorder = CallRecorder(model, params, self._trace)
        self._criterion = None if criterion is None else CriterionCheck(criterion, controller, self._recorder)
        self._padding = padding
        self._coarse = False  # autocast or half precision is in use
        self.loss_verified = False

    # ---------------------------------------------------------------- watching

    def watch(self, stack: ExitStack) -> None:
        """Have outermost calls into the model, and calls of the criterion, recorded until ``stack`` unwinds."""
        session = self._controller.session
        session.recorder, session.trace = self._recorder, self._trace
        if isinstance(session.sink, GradSamples):
            session.sink.before_write = self._before_write
        stack.callback(self._unwatch)
        if self._criterion is not None:
            self._criterion.watch(stack)

    def _unwatch(self) -> None:
        self._controller.session.recorder = self._controller.session.trace = None
        self._trace.close()
        self.new_step()

    def _before_write(self, samples: int) -> None:
        """Check before ``p.grad_sample`` is written: who reads it need not take a step."""
        if self._recorder.state is None and self.needed(samples):
            self.check_calls(samples)

    def deferred(self) -> AbstractContextManager[None]:
        """Check nothing before the end of a block, where another check takes place: of a whole function, from its start."""
        return self._recorder.whole_function()

    def saw_batch(self, batch: Any) -> None:
        """A batch is handed out: one that shows padding for the first time is checked, too."""
        if self._padding is not None:
            self._recorder.situation = "padded" if self._padding.saw_batch(batch) else ""

    def new_step(self) -> None:
        """Forget calls recorded before a boundary."""
        self._recorder.new_step()
        if self._criterion is not None:
            self._criterion.new_step()

    # ---------------------------------------------------------------- whether to check

    @property
    def armed(self) -> bool:
        """Whether the next batch with several samples would be checked, as things stand."""
        return self._recorder.armed

    def needed(self, samples: int) -> bool:
        """Whether a batch of this size may not be released before a check: nothing like it, or not every call, was checked."""
        recorder = self._recorder
        if samples == 0 or recorder.paused:
            return False
        used = recorder.used()
        if recorder.key(samples) not in recorder.checked or self._new_criterion(samples):
            return True
        return any(self._is_new(call, samples) for call in used)

    def needed_for_function(self, samples: int) -> bool:
        """The same for a step that a whole function was followed in."""
        return self.needed(samples) or (samples > 0 and bool(self._trace.unchecked(self._trace.unverified, samples)))

    def _new_criterion(self, samples: int) -> bool:
        return self._criterion is not None and self._criterion.takes_new_way(samples)

    def _is_new(self, call: RecordedCall, samples: int) -> bool:
        known = self._recorder.covered.get((self._recorder.key(samples), call.kind))
        return known is None or not call.reached <= known or bool(self._trace.unchecked(call.transitions, samples))

    # ---------------------------------------------------------------- checking

    def check_calls(self, samples: int) -> None:
        """Check every outermost call recorded since the last boundary, with random cotangents on its outputs.

        Raises:
            SelfCheckError: a disagreement, or a check that could not be made. What was captured must not be used then.
        """
        try:
            self._check_calls(samples)
        finally:
            self.new_step()

    def _check_calls(self, samples: int) -> None:
        recorder, controller = self._recorder, self._controller
        calls = [call for call in recorder.used() if self._has_rows(call, samples)]
        if recorder.overflowed:
            raise SelfCheckError(
                f"more than {LIMIT} separate calls into the model before one step: too many to compare. Call them from the "
                "forward of one module, or train with a @dp_step function, which is checked whole."
            )
        before = recorder.key(samples) in recorder.checked  # now it is about calls that were not made then
        if self._criterion is not None and (not before or self._new_criterion(samples)):
            with controller.separate(), self._paused():
                self._criterion.check(samples)
        if before and not calls:
            return
        if not calls:
            raise SelfCheckError(
                "the self-check saw no call into the model before this step, so nothing could be compared. Run the model "
                "inside the scope, in one process, with gradients enabled."
            )
        self._check_written()
        outputs, compared = [], False
        for call in calls:
            self._coarse = call.context.autocast is not None
            again = RepeatedCall(call, controller, samples)
            state = call.state or recorder.state
            what = call.name or "the model"
            compared |= self._compare(samples, partial(again.loss, None), again.loss, what, call.transitions, call.draws, state)
            outputs.append(len(again))
        if not compared:
            raise SelfCheckError(
                "no output of the model could be compared in the self-check: none has a row per sample or is a scalar loss. "
                "Remedy: declare the sample axis (batch_first), or train with a @dp_step function, which is checked whole."
            )
        if not before:
            self.loss_verified = self._criterion is not None and samples > 1
        self._check_padding(calls, samples)
        self._passed(samples, calls, outputs)

    def _has_rows(self, call: RecordedCall, samples: int) -> bool:
        axis = self._controller.axis
        return any(t.dim() > axis and t.shape[axis] == samples for t in tensors_of((call.args, call.kwargs)))

    def check_loss(self, samples: int, whole: Callable[[], Tensor], alone: Callable[[int], Tensor]) -> None:
        """Check a whole train function, loss included.

        Args:
            samples: n.
            whole: runs on the batch and returns its loss, reduced as the scope declares.
            alone: runs on sample i alone and returns its loss as a scalar.

        Raises:
            SelfCheckError: a disagreement, or a check that could not be made.
        """
        taken, recorder = self._trace.unverified, self._recorder
        if not self.armed and not self._trace.unchecked(taken, samples):
            return  # another call than then: it is compared alone, by check_calls
        self._check_written()
        self._coarse = any(call.context.autocast is not None for call in recorder.calls)
        if not self._compare(samples, whole, alone, "the train function", taken, self._trace.draws, recorder.state):
            raise SelfCheckError(
                f"the train function could not be compared: run again on the same batch, it did not give a loss over its {samples} "
                "samples. Remedy: let it compute the same on every call, one row per example."
            )
        self._check_padding(recorder.calls, samples)
        self._passed(samples, recorder.calls, [0] * len(recorder.calls))
        self.loss_verified = samples > 1 or self.loss_verified

    def _passed(self, samples: int, calls: list[RecordedCall], outputs: list[int]) -> None:
        recorder = self._recorder
        keys = {recorder.key(samples), recorder.key(1)}
        for key in keys | {(key[0], "", *key[2:]) for key in keys}:
            recorder.checked.add(key)
            for call, count in zip(calls, outputs, strict=True):
                known = recorder.covered.setdefault((key, call.kind), set())
                known |= call.reached or set(range(count))

    def _check_padding(self, calls: list[RecordedCall], samples: int) -> None:
        controller = self._controller
        if self._padding is None or not self._recorder.situation:
            return
        for call in calls:
            without = NoRandomness(samples)
            with controller.separate(), self._paused(), undisturbed(self._model), without, self._trace.apart():
                controller.disable_hooks()
                try:
                    _begin_again(without, call.state or self._recorder.state, None)
                    self._padding.check(call, samples, call.name or "the model")
                finally:
                    controller.enable_hooks()

    def _check_written(self) -> None:
        """Refuse models that wrote what they saw of private samples to buffers or frozen parameters."""
        written = self._recorder.written
        if written is not None and (names := written.since()):
            raise SelfCheckError(
                f"{', '.join(names)}: written during the forward pass, from private samples and without noise, and part of "
                "the state dict. Remedy: call .eval() on the module that does it, or take it out of the model."
            )

    # ---------------------------------------------------------------- one comparison

    def _compare(
        self,
        samples: int,
        whole: Callable[[], Tensor],
        alone: Callable[[int], Tensor],
        what: str,
        transitions: set[Transition],
        draws: Draws | None,
        state: ModuleState | None,
    ) -> bool:
        """Compare; whether there was anything to compare.

        Args:
            samples: n.
            whole: runs on the batch and returns the loss.
            alone: runs on sample i.
            what: for messages.
            transitions: what the pass in question went through; the check has to go there, too.
            draws: what it drew: where random numbers led it another way than constants do, the check follows.
            state: that of the model when it began: counters and caches of the model are no reason to go another way.
        """
        without = NoRandomness(samples)
        if not self._compared(without, whole, alone, what, state):
            return False
        if samples > 1 and without.noisy:  # which may choose the samples that are mixed
            self._compared(NoRandomness(samples, varied=True), whole, alone, what, state)
        if self._unseen(transitions, samples) and draws is not None:
            self._compared(NoRandomness(samples, draws=draws), whole, alone, what, state)
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
        state: ModuleState | None,
    ) -> bool:
        controller, samples = self._controller, without.samples
        assert samples is not None
        picked = some_samples(samples)
        with controller.separate(), self._paused(), undisturbed(self._model), without, self._trace.apart():
            _begin_again(without, state, None)
            loss = whole()
            seen = self._trace.unverified
            if not loss.requires_grad:
                return False
            back_propagate(loss, [controller.session.anchor, *controller.params])
            found = controller.take()
            if found is None or found.samples != samples:
                return False  # a call on something else than the batch of this step
            controller.disable_hooks()
            try:
                expected = []
                for i in picked:
                    _begin_again(without, state, i)
                    expected.append(self._reference(alone, i, what))
            finally:
                controller.enable_hooks()
            compare(found, picked, expected, self._params, controller, what, coarse=self._coarse)
        self._trace.verify(seen, samples)
        return True

    def _reference(self, alone: Callable[[int], Tensor], i: int, what: str) -> dict[nn.Parameter, Tensor]:
        for p in self._model.parameters():
            p.grad = None
        try:
            loss = alone(i)
            if loss.requires_grad:
                back_propagate(loss, self._params)
        except DPHooksError:
            raise
        except Exception as error:
            raise not_alone(what, i, error) from error
        return {p: p.grad.to_dense() if p.grad.is_sparse else p.grad for p in self._params if p.grad is not None}

    @contextmanager
    def _paused(self) -> Iterator[None]:
        """Calls of a check are not recorded."""
        self._recorder.paused = True
        try:
            yield
        finally:
            self._recorder.paused = False


def _begin_again(without: NoRandomness, state: ModuleState | None, alone: int | None) -> None:
    without.begin_again(alone)
    if state is not None:
        state.put_back()
