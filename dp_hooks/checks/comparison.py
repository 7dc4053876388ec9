"""Comparison: how a call, or a train function, is compared with itself on some of its samples, and with plain autograd."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial, reduce
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .._no_randomness import TRIALS, Draws, NoRandomness
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
from ..errors import DPHooksError, SelfCheckError, some_of
from ..gradients.sample_gradients import SampleGradients
from .compare import ValuesDiffer, compare, compare_sums, extreme_samples, jump_of, rounded
from .left_behind import compare_left, trained_kept
from .repeat_call import RepeatedCall, without_pattern
from .repeat_function import RepeatedFunction
from .single_samples import back_propagate, custom_functions, leaves_of, not_alone

Repeated = RepeatedCall | RepeatedFunction
# What the model was when a call began.
Began = tuple[ModuleState | None, CarriedState | None]
Begin = Callable[[Tensor | None], CarriedState]  # returns what the model carries at the start of the run
Compared = TypeVar("Compared")
# Samples that are enough to see whether a number drawn for the whole batch makes them mix.
_HANDFUL = 8
# How many calls after one that left something are looked at, where a queue or a turn may delay what is read.
_LATER = 8
# How often gradients are compared before they are said to differ, where rounding can make them jump.
_ATTEMPTS = 4


class Comparison:
    """Runs the model aside, on all samples of a batch and on some, and compares what comes out, gradients, and what is left behind.

    Attributes:
        coarse: whether autocast or half precision is in use.
    """

    def __init__(
        self, controller: HookController, model: nn.Module, params: list[nn.Parameter], trace: OpTrace, recorder: CallRecorder
    ) -> None:
        self._controller, self._model, self._params = controller, model, params
        self._trace, self._recorder = trace, recorder
        self.coarse = False

    def run(
        self,
        samples: int,
        again: Repeated,
        what: str,
        transitions: set[Transition],
        draws: Draws | None,
        began: Began,
        some: Callable[[Tensor], Repeated],
    ) -> bool:
        """Compare; whether there was anything to compare.

        Args:
            samples: n.
            again: runs on all samples or some.
            what: for messages.
            transitions: what the pass in question went through; the check has to go there, too.
            draws: what it drew: where random numbers led it another way than constants do, the check follows.
            began: the state of the model when it began: counters and caches of the model are no reason to go another way.
            some: the same on a smaller batch.
        """
        without = NoRandomness(samples)
        if not self._in_either_order(without, again, what, began):
            return False
        if samples > 1 and without.noisy:  # which may choose the samples that are mixed
            self._in_either_order(NoRandomness(samples, varied=True), again, what, began)
        if self._unseen(transitions, samples) and draws is not None:
            self._in_either_order(NoRandomness(samples, draws=draws), again, what, began)
        if samples > 1 and without.gates:
            self._try_gates(min(samples, _HANDFUL), some, what, draws, began)
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
        controller, samples = self._controller, without.samples
        assert samples is not None
        with self.apart(without, began) as begin:
            before = begin(None)
            loss = again.whole()
            seen = self._trace.unverified
            if isinstance(again, RepeatedCall) and (hidden := self._hidden(loss)):
                begin(None)
                loss = again.whole()
                _refuse_hidden(hidden, self._hidden(loss), what)
            if not loss.requires_grad:  # a part without parameters, called by itself: it may mix all the same
                controller.disable_hooks()
                self._check_state(samples, before, begin, again, what, kept=began[1] is not None)
                self._compare_values(samples, begin, again, what)
                self._trace.verify(seen, samples)
                return again.has_rows
            back_propagate(loss, [controller.session.anchor, *controller.params])
            found = controller.take()
            if found is None or found.samples != samples:
                return False  # a call on something else than the batch of this step
            controller.disable_hooks()
            self._check_state(samples, before, begin, again, what, kept=began[1] is not None)
            self._compare_values(samples, begin, again, what)
            agreed = _all_finite(found) and self._compare_passes(samples, begin, again, found, what)
            # Gradients can mix where no value does: behind weights that are zero, in hooks and functions of a backward pass.
            if samples > 1 or again.has_scalar or not agreed:
                self._compare_alone(samples, begin, again, found, what, jumps=agreed)
        self._trace.verify(seen, samples)
        return True

    def _hidden(self, loss: Tensor) -> list[Tensor]:
        """Tensors that ``loss`` would give gradients to, and that are no parameters of the model."""
        known = {id(self._controller.session.anchor), *(id(p) for p in self._model.parameters())}
        return [leaf for leaf in leaves_of([loss]) if id(leaf) not in known and type(leaf) in (Tensor, nn.Parameter)]

    def _compare_passes(self, samples: int, begin: Begin, again: Repeated, found: SampleGradients | None, what: str) -> bool:
        """Compare with plain autograd of the same forward pass, run once more; False if single samples have to tell.

        It need not come out to the last digit as it did: products depend on where tensors lie in memory. Where that switches a
        unit, the gradient jumps, but not in every run; what is wrong is wrong in all of them. A loss over the whole batch is
        compared as it is, one that has rows with a factor for each.
        """
        controller = self._controller
        factors = without_pattern((samples,))
        factors = torch.ones_like(factors) if again.has_scalar else factors.sign() * (0.25 + 0.75 * factors.abs())
        left = 1 if self._exact else _ATTEMPTS
        while True:
            assert found is not None
            begin(None)
            plain = again.weighted(factors)
            custom = custom_functions(plain)
            expected = self._gradients(plain)
            try:
                on_device = factors.to(plain.device)
                compare_sums(found, on_device, expected, self._params, controller, what, coarse=self.coarse)
                return not (custom and again.has_scalar)
            except SelfCheckError:
                left -= 1
                if custom:  # which may do anything with the gradients of several samples
                    return False
                if not left:
                    raise
            controller.enable_hooks()
            begin(None)
            back_propagate(again.whole(), [controller.session.anchor, *controller.params])
            found = controller.take()
            controller.disable_hooks()

    @property
    def _exact(self) -> bool:
        """Whether rounding is too small to switch a unit of the model."""
        return all(p.dtype == torch.float64 for p in self._params)

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

    def _compare_values(self, samples: int, begin: Begin, again: Repeated, what: str) -> None:
        """What comes out for a sample must not depend on who else is in the batch: halves of it are run, and a sample alone."""
        for rows in _parts(samples, twice=again.has_scalar):
            try:
                self._compare_some(rows, begin, again)
            except DPHooksError:
                raise
            except FAILS:  # it may count on the order of the samples: sequences sorted by length
                _apart_from_others(partial(self._compare_some, begin=begin, again=again), rows.sort().values, what)

    def _compare_some(self, rows: Tensor, begin: Begin, again: Repeated) -> None:
        begin(rows)
        try:
            again.compare(rows)
        except ValuesDiffer:
            if again.rounding:  # was measured
                raise
            with rounded(self._model.parameters()):
                begin(None)
                again.measure_rounding()
            begin(rows)
            again.compare(rows)

    def _check_state(self, samples: int, before: CarriedState, begin: Begin, again: Repeated, what: str, *, kept: bool) -> None:
        """What a batch leaves behind in the model must not reach the next one, nor the state dict; ``before`` it was run.

        The call is run on two halves of the batch, each from the same state, forwards and backwards. Where that leaves different
        things behind, they are of the samples: buffers are part of the state dict, and of attributes it is tried whether another
        call depends on them.
        """
        now = CarriedState(self._model)
        # Where what the model held before the step was not kept, ``before`` is what the same samples left there.
        if samples < 2 or (kept and not now.unlike(before)):
            return
        first, second = _halves(samples)
        left = []
        for rows in (first, second[: len(first)]):
            with trained_kept(self._params):
                begin(rows)
                _apart_from_others(partial(self._there_and_back, again), rows, what)
                left.append(CarriedState(self._model))
        found: list[list[Tensor]] = []
        for start in left:
            begin(first)
            start.put_back()
            found.append([])
            for _ in range(_LATER if left[0].attributes_unlike(left[1]) else 1):  # a queue is read when it is full
                found[-1] += self._there_and_back(again, first)
                CarriedState(self._model).put_back()  # without the history of what was left now
        compare_left(left, found, what)

    def _there_and_back(self, again: Repeated, rows: Tensor) -> list[Tensor]:
        """Run ``again`` on some samples, and a backward pass; return what came out, and the gradients."""
        outputs = again.outputs(rows)
        losses = [out.abs().square().sum() for out in outputs if out.requires_grad]  # whose gradients depend on what came out
        gradients = self._gradients(reduce(torch.add, (loss.to(losses[0]) for loss in losses))) if losses else {}
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
            first, second = _halves(rows)
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
        for (what, training), both in recorder.left_quietly.items():
            came_out: list[list[Tensor]] = [[], []]
            for call in calls:
                for one, outputs in zip(both, came_out, strict=True):
                    with self.apart(NoRandomness(samples), recorder.began(call)) as begin:
                        self._controller.disable_hooks()
                        begin(None)
                        one.overlay()
                        outputs += RepeatedCall(call, self._controller, samples).outputs(None)
            # What an evaluation writes into buffers (metrics) is no matter of training, unless it has a part in it.
            compare_left(both, came_out, what, buffers=training)
        recorder.cover_quiet()

    def _try_gates(self, samples: int, some: Callable[[Tensor], Repeated], what: str, draws: Draws | None, began: Began) -> None:
        """Where numbers are drawn for the whole batch, compare values also for other numbers, and for those of the step."""
        ways = [NoRandomness(samples, trial=trial) for trial in range(1, TRIALS)]
        if draws is not None and draws.numbers:
            ways.append(NoRandomness(samples, draws=draws))
        for without in ways:
            again = some(torch.arange(samples))
            _in_either_order(without, partial(self._compare_gate, without, again, samples, began, what))
            if again.has_scalar:  # of which values alone do not tell much
                self._in_either_order(without, again, what, began)

    def _compare_gate(self, without: NoRandomness, again: Repeated, samples: int, began: Began, what: str) -> None:
        with self.apart(without, began) as begin:
            self._controller.disable_hooks()
            begin(None)
            again.whole()
            self._compare_values(samples, begin, again, what)

    def _compare_alone(
        self, samples: int, begin: Begin, again: Repeated, found: SampleGradients, what: str, *, jumps: bool
    ) -> None:
        """Compare with the gradients of single samples; ``jumps``: all that differs may be units that rounding has switched.

        How far they may differ then is measured, where it matters: by what rounding of the parameters, up and down, does to them.
        """
        # That gradients depend on others shows in any sample, where its own ones are known to be right.
        picked = extreme_samples(found.sq_norms(found.params), samples, ends=again.has_scalar or not jumps)
        expected = self._gradients_alone(picked, begin, again, what)
        compared = partial(compare, found, picked, expected, self._params, self._controller, what, coarse=self.coarse)
        try:
            compared()
        except SelfCheckError:
            if not jumps or self._exact:
                raise
            measured = []
            for sign in (1, -1):
                with rounded(self._model.parameters(), coarse=self.coarse, sign=sign):
                    measured.append(jump_of(expected, self._gradients_alone(picked, begin, again, what, compared=False)))
            compared(jump=max(measured))

    def _gradients_alone(
        self, picked: list[int], begin: Begin, again: Repeated, what: str, *, compared: bool = True
    ) -> list[dict[nn.Parameter, Tensor]]:
        """The gradients of single samples; values are ``compared`` as well."""
        expected = []
        for i in picked:
            begin(torch.tensor([i]))
            try:
                expected.append(self._gradients(again.alone(i, compared=compared)))
            except DPHooksError:
                raise
            except Exception as error:
                raise not_alone(what, [i], error) from error
        return expected

    def _gradients(self, loss: Tensor) -> dict[nn.Parameter, Tensor]:
        """Gradients by plain autograd."""
        for p in self._model.parameters():
            p.grad = None
        if loss.requires_grad:
            back_propagate(loss, self._params)
        found = {p: p.grad.to_dense() if p.grad.is_sparse else p.grad for p in self._params if p.grad is not None}
        for p in found:  # the next run begins without any
            p.grad = None
        return found

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Calls of a check are not recorded."""
        self._recorder.paused = True
        try:
            yield
        finally:
            self._recorder.paused = False


def _in_either_order(without: NoRandomness, compare: Callable[[], Compared]) -> Compared:
    """Compare, with numbers cut in either order where each sample has several rows of them."""
    try:
        return compare()
    except SelfCheckError:
        if without.by_turns or not without.grouped:
            raise
        without.by_turns = True
        return compare()


def _refuse_hidden(before: list[Tensor], again: list[Tensor], what: str) -> None:
    """What is trained in a model has to be a parameter of it; what a pass makes anew, as for checkpointing, is not trained."""
    lasting = [leaf for leaf in before if any(leaf is other for other in again)]
    if lasting:
        shapes = some_of([f"{type(leaf).__name__} {tuple(leaf.shape)}" for leaf in lasting])
        raise SelfCheckError(
            f"{what}: it computes with trainable tensors that are no parameters of the model ({shapes}): they get gradients of "
            "private samples, neither clipped nor noised; nothing was released. Remedy: register them (nn.Parameter, "
            "nn.ParameterList, nn.ModuleList), or detach them."
        )


def _apart_from_others(run: Callable[[Tensor], Any], rows: Tensor, what: str) -> Any:
    try:
        return run(rows)
    except DPHooksError:
        raise
    except Exception as error:
        raise not_alone(what, rows.tolist(), error) from error


def on_some(call: RecordedCall, controller: HookController, samples: int, rows: Tensor) -> RepeatedCall:
    """Return ``call``, which was on ``samples`` samples, as a call on some of them only."""
    args, kwargs = rows_of((call.args, call.kwargs), rows, samples, controller.axis)
    return RepeatedCall(replace(call, args=args, kwargs=kwargs), controller, len(rows))


def _all_finite(found: SampleGradients) -> bool:
    return all(bool(torch.isfinite(norms).all()) for norms in found.sq_norms(found.params).values())


def _parts(samples: int, *, twice: bool) -> list[Tensor]:
    """Two halves of the batch, in which neighbours are parted, and a sample alone; ``twice``: two other halves, too."""
    if samples == 1:
        return []
    first, second = _halves(samples)
    parts = [first, second.flip(0)]  # which also shows where a sample's rows depend on its place among the others
    if samples <= 2:
        return parts
    return [*parts, first[:1], *(_halves(samples, 1) if twice else ())]  # of losses added up a difference can cancel by chance


def _halves(samples: int, seed: int = 0) -> list[Tensor]:
    """Two halves of the batch, of any samples, but in order: a model may count on it (sequences sorted by length)."""
    order = random.Random(samples + 1000 * seed).sample(range(samples), samples)
    return [torch.tensor(sorted(part), dtype=torch.long) for part in (order[: samples // 2], order[samples // 2 :])]
