"""Comparison: how a call, or a train function, is compared with itself on some of its samples, and with plain autograd."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial, reduce
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .._no_randomness import FEW_TRIALS, TRIALS, Draws, NoRandomness
from .._tree import rows_of, tensors_of
from ..capture.calls.call_recorder import CallRecorder
from ..capture.calls.carried_state import CarriedState
from ..capture.calls.module_state import ModuleState
from ..capture.calls.recorded_call import RecordedCall
from ..capture.calls.trace import OpTrace, Transition
from ..capture.calls.undisturbed import undisturbed
from ..capture.controller import HookController
from ..capture.samples.rows_of_inputs import rows_of_inputs
from ..capture.samples.tracked_value import FAILS
from ..errors import DPHooksError, SelfCheckError, UnsupportedModelError, some_of
from .compare import NotFinite, ValuesDiffer, extreme_samples
from .gradient_comparison import Begin, GradientComparison, Repeated
from .hidden_leaves import hidden_leaves, refuse_hidden
from .left_behind import compare_left, trained_kept
from .other_weights import exchanged, is_closed, rounded
from .parts import a_few, halves, parts_of
from .repeat_call import RepeatedCall
from .single_samples import NotAlone, not_alone
from .units import to_compare
from .unsaved import Unsaved

# What the model was when a call began.
Began = tuple[ModuleState | None, CarriedState | None]
Compared = TypeVar("Compared")
# Samples that are enough to see whether a number drawn for the whole batch makes them mix, and to compare gradients of.
_HANDFUL = 8
# How many calls after one that left something are looked at, where a queue or a turn may delay what is read.
_LATER = 8
# With other parameters a loop may have no end: after so many times the operations of a run it is broken off.
_LONGER = 20
# So many bytes of activations, beside what a step has captured, are no matter.
_LITTLE = 1 << 22


class Comparison:
    """Runs the model aside, on all samples of a batch and on some, and compares what comes out, gradients, and what is left behind.

    Attributes:
        gradients: compares those.
    """

    def __init__(
        self, controller: HookController, model: nn.Module, params: list[nn.Parameter], trace: OpTrace, recorder: CallRecorder
    ) -> None:
        self._controller, self._model, self._params = controller, model, params
        self._trace, self._recorder = trace, recorder
        self.gradients = GradientComparison(controller, model, params)
        self._unsaved = Unsaved(model.parameters())
        self._norms: Tensor | None = None
        self._operations = 0  # in the last run
        self._enough = _HANDFUL  # samples for a comparison that need not be of all

    def run(self, again: Repeated, what: str, transitions: set[Transition], draws: Draws | None, began: Began) -> bool:
        """Compare; whether there was anything to compare.

        Args:
            again: runs on all samples or some.
            what: for messages.
            transitions: what the pass in question went through; the check has to go there, too.
            draws: what it drew: where random numbers led it another way than constants do, the check follows.
            began: the state of the model when it began: counters and caches of the model are no reason to go another way.
        """
        samples = again.samples
        without = NoRandomness(samples)
        if not self._in_either_order(without, again, what, began):
            return False
        if samples > 1 and without.noisy:  # which may choose the samples that are mixed
            self._try_way(NoRandomness(samples, varied=True), samples, again, what, began)
        if self._unseen(transitions, samples) and draws is not None:
            self._in_either_order(NoRandomness(samples, draws=draws), again, what, began)
        if samples > 1 and without.gates:
            self._try_gates(min(samples, _HANDFUL), again, what, draws, began, choices=without.choices)
        if samples > 1:
            self._compare_otherwise(min(samples, self._enough), again, what, draws, began, gates=without.gates)
        if left := self._unseen(transitions, samples):
            places = sorted({"the function" if name is None else name or "the model" for name, *_ in left})
            raise SelfCheckError(
                f"{what}: run again on the same batch, it did not do the same as before (in {some_of(places)}), so "
                "that could not be checked; nothing was released. Remedy: let branches depend on inputs, attributes, or random "
                "numbers from torch, random or numpy's global generators only."
            )
        return True

    def _in_either_order(self, without: NoRandomness, again: Repeated, what: str, began: Began) -> bool:
        return _in_either_order(without, partial(self._compared, without, again, what, began))

    def _unseen(self, transitions: set[Transition], samples: int) -> set[Transition]:
        left = self._trace.repeatable(self._trace.unchecked(transitions, samples))
        self._trace.verify(transitions - left, samples)
        if left:
            classes = {name: type(module) for name, module in self._model.named_modules()}
            left = self._trace.verify_alike(left, samples, classes)
        return left

    def _compared(self, without: NoRandomness, again: Repeated, what: str, began: Began) -> bool:
        controller, samples = self._controller, again.samples
        with self.apart(without, began) as begin:
            before = begin(None)
            rows = self._run_unsaved(again)
            seen = set() if rows is None else self._trace.unverified
            now = None if rows is None else CarriedState(self._model)  # what all samples left
            controller.session.sink.count_as = samples
            some, begin_some = (again, begin) if rows is None else (again.on(rows), partial(_begin_among, begin, rows))
            begin_some(None)
            loss = some.whole() if rows is None else _apart_from_others(lambda _: some.whole(), rows, what)
            seen |= self._trace.unverified
            self._operations = without.operations
            if isinstance(some, RepeatedCall) and (hidden := hidden_leaves(loss, controller)):
                begin_some(None)
                loss = some.whole()
                refuse_hidden(hidden, hidden_leaves(loss, controller), what)
            found = None
            if loss.requires_grad:  # else it is a part without parameters, called by itself: it may mix all the same
                found = self.gradients.capture(loss)
                if found is None or found.samples != some.samples:
                    return False  # a call on something else than the batch of this step
            controller.disable_hooks()
            self._check_state(before, begin, again, what, kept=began[1] is not None, now=now)
            self._compare_values(begin, again, what)
            if found is not None:
                if isinstance(some, RepeatedCall) and isinstance(again, RepeatedCall) and some is not again:
                    some.take_layout(again)
                self.gradients.compare(begin_some, some, found, what)
                self.gradients.compare_units(begin_some, some, found, what)
        self._trace.verify(seen, samples)
        return found is not None or again.has_rows

    def _run_unsaved(self, again: Repeated) -> Tensor | None:
        """Run it on all samples, for values; choose those to compare gradients of. None: all, of a run that is to come.

        A step has captured what it needs of the whole batch by now, and the activations of another run beside that can be more
        than there is room for. Of many samples with large activations values are compared of all, and gradients of some.
        """
        samples = again.samples
        self._enough, few = _HANDFUL, max(2, min(_HANDFUL, samples // 4))
        if samples <= few:
            return None
        with self._unsaved.run():
            again.keep()
        if self._unsaved.failed or self._unsaved.bytes <= _LITTLE:
            return None
        self._enough = few
        known = self._norms is not None and len(self._norms) == samples
        first = extreme_samples(self._norms, samples, ends=False) if known else []
        units = self.gradients.units(again.among)
        together = None if units is None else to_compare(units)
        if units is not None and together is not None:
            first = [*units.rows_of(together).tolist(), *first]
        return a_few(samples, first, few)

    @contextmanager
    def apart(self, without: NoRandomness, began: Began) -> Iterator[Begin]:
        """Run the model in the block without a trace; what is given begins a run on some samples (None: all) as the call began."""
        controller, model, (state, carried) = self._controller, self._model, began
        with controller.separate(), self.paused(), undisturbed(model), without, self._trace.apart():
            now, held = CarriedState(model), None if state is None else state.now()
            if state is not None:
                state.put_back()
            start = carried or CarriedState(model)

            def begin(some: Tensor | None) -> CarriedState:
                without.begin_again(some)
                if state is not None:
                    state.put_back()
                start.put_back()
                return start

            try:
                yield begin
            finally:
                start.put_back()
                if held is not None:
                    held.put_back()
                now.put_back()
                controller.enable_hooks()

    def _compare_values(self, begin: Begin, again: Repeated, what: str, *, alone: bool = True) -> None:
        """What comes out for a sample must not depend on who else is in the batch: halves of it are run, and a sample ``alone``."""
        for rows in parts_of(again.samples, twice=again.has_scalar, alone=alone):
            try:
                self._compare_some(rows, begin, again)
            except DPHooksError:
                raise
            except FAILS:  # it may count on the order of the samples: sequences sorted by length
                _apart_from_others(partial(self._compare_some, begin=begin, again=again), rows.sort().values, what)

    def _compare_otherwise(
        self, samples: int, whole: Repeated, what: str, draws: Draws | None, began: Began, *, gates: bool
    ) -> None:
        """The same with other parameters, which later steps may lead to: what is dead or closed in this batch may mix later."""
        without = NoRandomness(samples)
        # Gradients that do not come through a layer of zeros may mix behind it, where no value does.
        closed = not self.gradients.coarse and (  # in half precision rounding is larger than with the model's own parameters
            self.gradients.blocked or any(is_closed(p) for p in self._trainable if not self._is_bias(p))
        )
        _in_either_order(without, partial(self._with_other_weights, without, whole, samples, began, what, closed))
        for sign in (1, -1) if gates else ():
            with _if_it_can_be_computed(), exchanged(self._trainable, sign):
                self._try_gates(samples, whole, what, draws, began, values_only=True)

    def _is_bias(self, param: nn.Parameter) -> bool:
        """Whether a parameter is added, as its name says."""
        name = self._controller.name_of(param).rpartition(".")[2]
        return name.startswith("bias") or name.endswith("bias")

    def _with_other_weights(
        self, without: NoRandomness, whole: Repeated, samples: int, began: Began, what: str, gradients: bool
    ) -> None:
        with self.apart(without, began) as begin:
            self._controller.disable_hooks()
            for sign in (1, -1):
                for closed in (False, True):  # what is not closed may keep it from being computed
                    again = whole.on(torch.arange(samples, device="cpu"))
                    with _if_it_can_be_computed(), exchanged(self._trainable, sign, closed=closed):
                        self._compare_exchanged(without, begin, again, what, kept=began[1] is not None)
                        if gradients and again.is_finite:
                            self._compare_gradients(begin, again, what)
                    if again.is_finite:
                        break

    def _compare_exchanged(self, without: NoRandomness, begin: Begin, again: Repeated, what: str, *, kept: bool) -> None:
        begin(None)
        before = CarriedState(self._model)
        self._keep(without, begin, again)
        self._check_state(before, begin, again, what, kept=kept)
        self._compare_values(begin, again, what, alone=False)

    def _compare_gradients(self, begin: Begin, again: Repeated, what: str) -> None:
        self._controller.enable_hooks()
        try:
            begin(None)
            loss = again.whole()
            found = self.gradients.capture(loss) if loss.requires_grad else None
        except UnsupportedModelError:  # it goes another way with these parameters, which no run has shown
            return
        finally:
            self._controller.disable_hooks()
        if found is not None and found.samples == again.samples:
            with suppress(NotFinite):
                self.gradients.compare(begin, again, found, what, values=False)

    def _keep(self, without: NoRandomness, begin: Begin, again: Repeated) -> None:
        """Run it on all its samples, for values, under circumstances that it need not be made for."""

        def keep() -> None:
            with without.limited(_LONGER * self._operations):
                again.keep()

        self._unsaved.attempt(keep, partial(begin, None))

    @property
    def _trainable(self) -> list[nn.Parameter]:
        return [p for p in self._model.parameters() if p.requires_grad]

    def _compare_some(self, rows: Tensor, begin: Begin, again: Repeated) -> None:
        try:
            self._run_some(rows, begin, again)
        except ValuesDiffer:
            if again.rounding:  # was measured
                raise
            with rounded(self._model.parameters()):
                begin(None)
                again.measure_rounding()
            self._run_some(rows, begin, again)

    def _run_some(self, rows: Tensor, begin: Begin, again: Repeated) -> None:
        begin(rows)
        self._unsaved.attempt(partial(again.compare, rows), partial(begin, rows))

    def _check_state(
        self, before: CarriedState, begin: Begin, again: Repeated, what: str, *, kept: bool, now: CarriedState | None = None
    ) -> None:
        """What a batch leaves behind in the model must not reach the next one, nor the state dict; ``before`` it was run.

        The call is run on two halves of the batch, each from the same state, forwards and backwards. Where that leaves different
        things behind, they are of the samples: buffers are part of the state dict, and of attributes it is tried whether another
        call depends on them.
        """
        now = now or CarriedState(self._model)
        # Where what the model held before the step was not kept, ``before`` is what the same samples left there.
        if again.samples < 2 or (kept and not now.unlike(before)):
            return
        first, second = halves(again.samples)
        left = []
        for rows in (first, second[: len(first)]):
            with trained_kept(self._params):
                begin(rows)
                _apart_from_others(partial(self._there_and_back, again), rows, what)
                left.append(CarriedState(self._model))
        found: list[list[Tensor]] = []
        unlike = left[0].unlike(left[1])
        for start in left:
            begin(first)
            start.put_back()
            found.append([])
            for _ in range(_LATER if unlike.attributes else 1):  # a queue is read when it is full
                found[-1] += self._there_and_back(again, first)
                CarriedState(self._model).put_back()  # without the history of what was left now
        compare_left(unlike, found, what)

    def _there_and_back(self, again: Repeated, rows: Tensor) -> list[Tensor]:
        """Run ``again`` on some samples, and a backward pass; return what came out, and the gradients."""
        outputs = again.outputs(rows)
        losses = [out.abs().square().sum() for out in outputs if out.requires_grad]  # whose gradients depend on what came out
        gradients = self.gradients.of(reduce(torch.add, (loss.to(losses[0]) for loss in losses))) if losses else {}
        return [*(out.detach() for out in outputs), *gradients.values()]

    def check_quiet(self, calls: list[RecordedCall], samples: int) -> None:
        """The same for calls that no gradients came back to: what they leave must not reach the calls with gradients.

        What they did leave of their samples is remembered, and tried again in every later check: training may begin to read it.
        """
        recorder, axis, model = self._recorder, self._controller.axis, self._model
        for quiet in recorder.quiet:
            rows = rows_of_inputs(tensors_of((quiet.args, quiet.kwargs)), axis) or 0
            if rows < 2 or quiet.reached:  # the latter is among ``calls``
                continue
            left: list[CarriedState] = []
            first, second = halves(rows)
            for half in (first, second):
                part = half.repeat(3)[:rows]  # a model may count on their number (caches)
                mode = torch.inference_mode if quiet.inference else torch.no_grad
                with trained_kept(self._params), self.apart(NoRandomness(rows), (quiet.state, quiet.carried)) as begin:
                    self._controller.disable_hooks()
                    begin(part)
                    args, kwargs = rows_of((quiet.args, quiet.kwargs), part, rows, axis)
                    with quiet.context.restored(), mode():
                        for _ in range(_LATER):  # what is gathered may be made use of by turns
                            quiet.module(*args, **kwargs)
                    left.append(CarriedState(model))
            recorder.remember(quiet, left)
        for (what, training), (unlike, *both) in recorder.left_quietly.items():
            came_out: list[list[Tensor]] = [[], []]
            for call in calls:
                for one, outputs in zip(both, came_out, strict=True):
                    with self.apart(NoRandomness(samples), recorder.began(call)) as begin:
                        self._controller.disable_hooks()
                        begin(None)
                        one.overlay()
                        outputs += RepeatedCall(call, self._controller, samples).outputs(None)
            # What an evaluation writes into buffers (metrics) is no matter of training, unless it has a part in it.
            compare_left(unlike, came_out, what, buffers=training)
        recorder.cover_quiet()

    def _try_gates(
        self,
        samples: int,
        whole: Repeated,
        what: str,
        draws: Draws | None,
        began: Began,
        *,
        choices: int = 0,
        values_only: bool = False,
    ) -> None:
        """Where numbers are drawn for the whole batch, compare values also for other numbers, and for those of the step."""
        last = FEW_TRIALS if values_only else TRIALS if choices < TRIALS else TRIALS + choices
        ways = [NoRandomness(samples, trial=trial, choices=choices) for trial in range(1, last)]
        if draws is not None and draws.few:
            ways.append(NoRandomness(samples, draws=draws))
        for without in ways:
            self._try_way(without, samples, whole, what, began, values_only=values_only)

    def _try_way(
        self, without: NoRandomness, samples: int, whole: Repeated, what: str, began: Began, *, values_only: bool = False
    ) -> None:
        """Compare values of the first samples where random numbers are others."""
        again = whole.on(torch.arange(samples, device="cpu"))
        _in_either_order(without, partial(self._compare_way, without, again, began, what))
        if again.has_scalar and not values_only:  # of which values alone do not tell much
            self._in_either_order(without, again, what, began)

    def _compare_way(self, without: NoRandomness, again: Repeated, began: Began, what: str) -> None:
        with self.apart(without, began) as begin:
            self._controller.disable_hooks()
            begin(None)
            self._keep(without, begin, again)
            self._compare_values(begin, again, what)

    @contextmanager
    def of_step(self, norms: Tensor | None) -> Iterator[None]:
        """The checks in the block are for the sake of gradients with these norms, ``[n]``."""
        self._norms = norms
        try:
            yield
        finally:
            self._norms = None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Calls of a check are not recorded."""
        self._recorder.paused = True
        try:
            yield
        finally:
            self._recorder.paused = False


def _begin_among(begin: Begin, rows: Tensor, some: Tensor | None) -> CarriedState:
    """Begin a run on ``some`` of those samples that are ``rows`` of the batch."""
    return begin(rows if some is None else rows[some])


def _in_either_order(without: NoRandomness, compare: Callable[[], Compared]) -> Compared:
    """Compare, with numbers cut in either order where each sample has several rows of them, and with masks of dropout that fit."""
    try:
        return compare()
    except SelfCheckError:
        if not without.masks.adapt():
            if without.by_turns or not without.grouped:
                raise
            without.by_turns = True
    return _in_either_order(without, compare)


@contextmanager
def _if_it_can_be_computed() -> Iterator[None]:
    """The block may fail for reasons of the model's own, which has parameters that it need not be made for."""
    try:
        yield
    except NotAlone:
        return
    except (DPHooksError, TimeoutError, MemoryError):
        raise
    except Exception:  # noqa: BLE001 - whatever a model raises
        return


def _apart_from_others(run: Callable[[Tensor], Any], rows: Tensor, what: str) -> Any:
    try:
        return run(rows)
    except DPHooksError:
        raise
    except Exception as error:
        raise not_alone(what, rows.tolist(), error) from error
