"""The library checks itself: its per-sample gradients against plain autograd on single samples, before anything is released."""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any

from torch import Tensor, nn

from .._no_randomness import NoRandomness
from .._precision import full_precision
from .._tree import modules_of, tensors_of
from ..capture.calls.call_recorder import LIMIT, CallRecorder
from ..capture.calls.recorded_call import RecordedCall
from ..capture.calls.trace import OpTrace, Transition
from ..capture.controller import HookController
from ..errors import SelfCheckError
from ..gradients.grad_sample import GradSamples
from ..gradients.sample_gradients import SampleGradients
from ..gradients.units import Units
from .compare import all_together
from .comparison import Comparison
from .criterion import CriterionCheck
from .padding import PaddingCheck
from .repeat_call import RepeatedCall
from .repeat_function import RepeatedFunction
from .spot_check import SpotCheck

# What is special about a batch that was drawn to be checked anew.
_SPOT = "spot"


class SelfCheck:
    """Compares, on real inputs, what the controller captures with single-sample autograd; leaves no trace.

    A batch with one sample can only show that values are right, one with several also that samples do not mix:
    neither kind is released before it has been checked once. Random state, buffers, gradients and everything captured
    for the step in progress are the same afterwards. Cost: a few passes over the batch, once.
    """

    def __init__(
        self,
        controller: HookController,
        model: nn.Module,
        params: list[nn.Parameter],
        criterion: nn.Module | None = None,
        padding: PaddingCheck | None = None,
        spot: SpotCheck | None = None,
        *,
        criterion_is_optional: bool = False,
    ) -> None:
        self._controller = controller
        self._model = model
        self._params = params
        self._trace = OpTrace(lambda: [b for m in modules_of(model) for b in m._buffers.values() if b is not None])
        self._recorder = CallRecorder(model, params, self._trace)
        self._criterion = (
            None if criterion is None else CriterionCheck(criterion, controller, self._recorder, optional=criterion_is_optional)
        )
        self._padding = padding
        self._spot = spot or SpotCheck(0.0, int)
        self._comparison = Comparison(controller, model, params, self._trace, self._recorder)
        self._loss_verified = self._whole = False
        self.model_verified = False  # the model as a whole, not only parts that were called one by one

    @property
    def loss_verified(self) -> bool:
        """Whether the loss was checked: a whole train function, or a criterion that was all of the loss in every step."""
        return self._loss_verified and (self._whole or (self._criterion is not None and self._criterion.is_all))

    # ---------------------------------------------------------------- watching

    def watch_units(self, units: Callable[[], Units | None]) -> None:
        """Check what is clipped, too, where several samples of a step are one unit; ``units`` tells which."""
        self._comparison.gradients.units_of_step = units

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
        self._recorder.close()

    def _before_write(self, gradients: SampleGradients) -> None:
        """Check before ``p.grad_sample`` is written: who reads it need not take a step."""
        if self._recorder.state is None and self.needed(gradients.samples):
            self.check_calls(gradients.samples, all_together(gradients.sq_norms(gradients.params)))

    def deferred(self) -> AbstractContextManager[None]:
        """Check nothing before the end of a block, where another check takes place: of a whole function, from its start."""
        return self._recorder.whole_function()

    def saw_batch(self, batch: Any) -> None:
        """A batch is handed out: one that shows padding for the first time is checked, too, and later ones at random."""
        recorder = self._recorder
        if recorder.situation == _SPOT:
            recorder.forget(_SPOT)
        recorder.situation = "padded" if self._padding is not None and self._padding.saw_batch(batch) else ""
        self._spot.saw_batch(wanted=not self.armed)
        if self._spot.now:
            recorder.situation = _SPOT

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
        if recorder.key(samples) not in recorder.checked or self._new_criterion(samples) or recorder.quiet or recorder.changed:
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

    def check_calls(self, samples: int, norms: Tensor | None = None) -> None:
        """Check every outermost call recorded since the last boundary, with random cotangents on its outputs.

        Args:
            samples: n.
            norms: ``[n]``, of the gradients in question; samples with the largest and the smallest are looked at one by one.

        Raises:
            SelfCheckError: a disagreement, or a check that could not be made. What was captured must not be used then.
        """
        try:
            with full_precision(), self._comparison.of_step(norms):
                self._check_calls(samples)
        except SelfCheckError as error:
            self._spot.complete(error)
            raise
        finally:
            self.new_step()

    def _check_calls(self, samples: int) -> None:
        recorder, controller = self._recorder, self._controller
        # A backward pass that left something may have come to calls that are known.
        used = recorder.used() or (recorder.came_back_to if recorder.changed else [])
        calls = [call for call in used if self._has_rows(call, samples)]
        if recorder.overflowed:
            raise SelfCheckError(
                f"more than {LIMIT} separate calls into the model before one step: too many to compare. Call them from the "
                "forward of one module, or train with a @dp_step function, which is checked whole."
            )
        before = recorder.key(samples) in recorder.checked  # now it is about calls that were not made then
        with_loss = False
        if self._criterion is not None and (not before or self._new_criterion(samples)):
            with controller.separate(), self._comparison.paused():
                with_loss = self._criterion.check(samples)
        self._comparison.check_quiet(calls, samples)
        if before and not calls:
            return
        if not calls:
            raise SelfCheckError(
                "the self-check saw no call into the model before this step, so nothing could be compared. Run the model "
                "inside the scope, in one process, with gradients enabled."
            )
        outputs, compared = [], False
        for call in calls:
            self._comparison.gradients.coarse = call.coarse
            began, rows = recorder.began(call), self._chosen(call.transitions, samples)
            what = call.name or "the model"
            again = RepeatedCall(call, controller, samples)
            again = again if rows is None else again.on(rows)
            compared |= self._comparison.run(again, what, call.transitions, call.draws, began)
            outputs.append(len(again))
        if not compared:
            raise SelfCheckError(
                "no output of the model could be compared in the self-check: none has a row per sample or is a scalar loss. "
                "Remedy: declare the sample axis (batch_first), or train with a @dp_step function, which is checked whole."
            )
        if not before and (samples > 1 or not self.model_verified):
            self._loss_verified = with_loss and samples > 1
        self._check_padding(calls, samples)
        self.model_verified |= samples > 1 and any(not call.name for call in calls)
        self._passed(samples, calls, outputs)

    def _chosen(self, transitions: set[Transition], samples: int) -> Tensor | None:
        """The samples to check; None: all, as where the way is new: fewer samples might not go it."""
        return None if self._trace.unchecked(transitions, samples) else self._spot.rows(samples)

    def _has_rows(self, call: RecordedCall, samples: int) -> bool:
        axis = self._controller.axis
        return any(t.dim() > axis and t.shape[axis] == samples for t in tensors_of((call.args, call.kwargs)))

    def check_loss(self, samples: int, run: Callable[[Tensor | None], Tensor], norms: Tensor | None = None) -> None:
        """Check a whole train function, loss included.

        Args:
            samples: n.
            run: runs on samples of these numbers (None: on all), and returns their losses or one, reduced as the scope declares.
            norms: see :meth:`check_calls`.

        Raises:
            SelfCheckError: a disagreement, or a check that could not be made.
        """
        try:
            with full_precision(), self._comparison.of_step(norms):
                self._check_loss(samples, run)
        except SelfCheckError as error:
            self._spot.complete(error)
            raise

    def _check_loss(self, samples: int, run: Callable[[Tensor | None], Tensor]) -> None:
        taken, recorder = self._trace.unverified, self._recorder
        if not self.armed and not self._trace.unchecked(taken, samples) and not recorder.changed:
            return  # another call than then: it is compared alone, by check_calls
        calls = [*recorder.calls, *recorder.came_back_to]  # known ones as well, which are no longer kept
        self._comparison.gradients.coarse = any(call.coarse for call in calls)
        coarse = any(call.context.autocast is not None for call in calls)  # values are not, where that is inside
        chosen, drawn = self._chosen(taken, samples), self._trace.draws

        again = RepeatedFunction(run, self._controller, samples, coarse=coarse)
        again = again if chosen is None else again.on(chosen)
        if not self._comparison.run(again, "the train function", taken, drawn, recorder.began(None)):
            raise SelfCheckError(
                f"the train function could not be compared: run again on the same batch, it did not give a loss over its {samples} "
                "samples. Remedy: let it compute the same on every call, one row per example."
            )
        self._comparison.check_quiet([call for call in recorder.calls if self._has_rows(call, samples)], samples)
        self._check_padding(recorder.calls, samples)
        self._passed(samples, recorder.calls, [0] * len(recorder.calls))
        self._loss_verified = samples > 1 or self._loss_verified
        self._whole = True
        self.model_verified = samples > 1 or self.model_verified

    def _passed(self, samples: int, calls: list[RecordedCall], outputs: list[int]) -> None:
        recorder = self._recorder
        self._spot.passed()
        recorder.cover_changed()
        keys = {recorder.key(samples), recorder.key(1)}
        for key in keys | {(key[0], "", *key[2:]) for key in keys}:
            recorder.checked.add(key)
            for call, count in zip(calls, outputs, strict=True):
                known = recorder.covered.setdefault((key, call.kind), set())
                known |= call.reached or set(range(count))

    def _check_padding(self, calls: list[RecordedCall], samples: int) -> None:
        controller = self._controller
        if self._padding is None or self._recorder.situation != "padded":
            return
        for call in calls:
            with self._comparison.apart(NoRandomness(samples), self._recorder.began(call)) as begin:
                controller.disable_hooks()
                begin(None)
                self._padding.check(call, samples, call.name or "the model")
