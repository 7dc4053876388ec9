"""HookController: attaches to the submodules of a model, captures what per-sample gradients need, and leaves."""

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from .._rerun import autocast_as, autocast_dtype
from .._tree import join, outputs_of, split, tensors_of
from .._validate import boolean, one_of
from ..errors import ScopeError, UnsupportedModelError
from ..gradients.grad_sample import GradSamples, clear
from ..gradients.sample_gradients import SampleGradients
from ..gradients.terms import Contribution, Deferred, Instantiated, Term
from ..gradients.two_pass import TwoPass, TwoPassGradients
from ..rules import Call, RuleTable, check_samples
from .backward_passes import BackwardPass, BackwardPasses
from .buffer_writes import Versions, check_unwritten, versions
from .compile_stance import eager
from .discovery import Discovery, OutermostCall
from .gradient_tap import Tap, TappedCall
from .hooked_modules import HookedModule, HookedModules
from .module_hooks import ModuleHooks
from .samples.probe import gradients_wanted
from .samples.split_call import split_call
from .samples.tracker import Make, TrackedTensor, Tracker
from .samples.uses import SampleAxes, UseLayout
from .trace import OpTrace, untraced
from .validate import check_is_module, check_model, mixes_samples, mixing_reason

MODES = ("ghost", "hooks", "functorch")
REDUCTIONS = ("mean", "sum")


class Observer(Protocol):
    """Who is told of outermost calls, and of backward passes before what they captured can be seen."""

    def begins(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """An outermost call begins."""

    def ends(self) -> tuple[Any, list[Tensor]]:
        """It has ended; returns what stands for the call in :meth:`reached`, and tensors that it left beside its outputs."""

    def reached(self, call: Any, index: int) -> None:
        """A backward pass came to the call by its floating-point output number ``index``."""

    def has_view(self, call: Any, index: int, output: Tensor) -> None:
        """The output is a view: when it is changed in place it gets another history, and :meth:`reached` may not be called."""

    def captured(self, samples: int) -> None:
        """A backward pass over so many samples is over; may raise to refuse what it captured."""


@dataclass(frozen=True)
class _Ended:
    """An outermost call that is over: what stands for it elsewhere, its logical part, its rows, what was tracked in it."""

    call: Any
    batch_number: int
    rows: int | None
    tracker: tuple[Any, ...]


class HookController:
    """Captures per-sample gradients of a model through hooks on its submodules, from outside.

    The model is neither wrapped nor changed: while a hooked module runs, its trainable parameters are replaced by
    their detached selves, so that autograd computes no gradient for them; what comes back to the module's output is
    recorded together with its input. All state lives here. The one attribute put on the user's objects is
    ``p.grad_sample`` (``[n, *p.shape]``) in the modes "hooks" and "functorch".

    All backward passes between two boundaries (:meth:`take`, :meth:`discard`) belong to the same samples: their
    gradients are added per sample. ``p.grad`` stays None.

    Used on its own it takes the place of Opacus's ``GradSampleHooks``; inside ``private_training`` it is managed for
    you. A closed controller is inert, even while graphs built earlier are still alive.
    """

    def __init__(
        self,
        m: nn.Module,
        *,
        batch_first: bool = True,
        loss_reduction: str = "mean",
        strict: bool = True,
        force_functorch: bool = False,
        grad_sample_mode: str = "hooks",
    ) -> None:
        """Attach to ``m``.

        Args:
            m: the model.
            batch_first: the sample axis of inputs and outputs is 0; else 1.
            loss_reduction: "mean" or "sum": how the loss that will be back-propagated is reduced over samples.
            strict: refuse modules known to mix samples or to write them to buffers. Without it per-sample gradients
                are best effort, as in Opacus; never use that for a private run.
            force_functorch: same as ``grad_sample_mode="functorch"``.
            grad_sample_mode: "hooks" and "functorch" materialise ``p.grad_sample`` during backward; "ghost" keeps
                what is needed to work it out later.

        Raises:
            InvalidArgumentError: an argument of the wrong kind, or a wrapped model.
            UnsupportedModelError: see ``strict``; lists every offending module.
        """
        self._module = check_is_module(m)
        self.batch_first = boolean("batch_first", batch_first)
        self.loss_reduction = one_of("loss_reduction", loss_reduction, REDUCTIONS)
        self.grad_sample_mode = "functorch" if force_functorch else one_of("grad_sample_mode", grad_sample_mode, MODES)
        self.hooks_enabled = False
        if strict:
            check_model(m)
        self.axis = 0 if batch_first else 1
        self.anchor = torch.zeros((), requires_grad=True)
        # Held for its identity: it tells a backward() from an autograd.grad() that is after something else.
        self._anchor_node: Any = self.anchor.view_as(self.anchor).grad_fn.next_functions[0][0]  # type: ignore[union-attr]
        self._stack: ExitStack | None = None
        self._tracker = Tracker(self, SampleAxes(self.axis))
        self._hooked_modules = HookedModules(
            m, RuleTable(generic_only=self.grad_sample_mode == "functorch"), self._tracker
        )
        self._module_hooks = ModuleHooks(self._hooked_modules.swap)
        self._discovery = Discovery(m, self._hooked_modules, self._tracker)
        self._outermost: OutermostCall | None = None
        self._buffers: Versions = {}
        self._rows: int | None = None
        self._depth = 0
        self.observer: Observer | None = None
        self.trace: OpTrace | None = None
        self._outer_task = -1
        self._retracked_task: int | None = None
        self._passes = BackwardPasses()
        self._grad_samples = GradSamples()
        self._two_pass: TwoPass | None = None
        self.repeat_backward: Callable[[], None] | None = None
        self.batch_number = 0
        self.add_hooks()

    # ---------------------------------------------------------------- life

    def add_hooks(self) -> None:
        """Install the hooks and enable them; if they are installed already, nothing changes.

        A failure half-way takes back what was installed.
        """
        if self._stack is not None:
            return
        with ExitStack() as stack:
            stack.callback(self._forget)
            stack.enter_context(eager())
            self._hooked_modules.find()
            attach = functools.partial(self._module_hooks.attach, stack)
            for hooked in self._hooked_modules:
                stack.callback(hooked.swap.restore)
                before = functools.partial(self._before, hooked)
                attach(hooked.module, before, functools.partial(self._after, hooked))
            for name, module in self._module.named_modules():
                if hasattr(module, "track_running_stats"):
                    attach(module, functools.partial(self._guard, name), None)
            for name, module in self._module.named_modules():
                if not isinstance(module, torch.jit.ScriptModule):  # accepts no hooks, and has nothing trainable
                    attach(module, functools.partial(self._enter, name), self._leave, outer=True)
            for param in self.params:
                if param._post_accumulate_grad_hooks is None:  # else an empty dictionary would stay behind
                    stack.callback(setattr, param, "_post_accumulate_grad_hooks", None)
                stack.callback(param.register_post_accumulate_grad_hook(self._leaked).remove)
            self._stack = stack.pop_all()
        self.enable_hooks()

    def enable_hooks(self) -> None:
        """Capture from now on."""
        if self._stack is None:
            raise ScopeError("enable_hooks() on a controller without hooks: call add_hooks() first.")
        self.hooks_enabled = True

    def disable_hooks(self) -> None:
        """Capture nothing from now on, and ignore graphs captured before; parameters get ordinary gradients."""
        self.hooks_enabled = False

    def remove_hooks(self) -> None:
        """Remove every hook and put every parameter back; may be called any number of times."""
        self.disable_hooks()
        if self._stack is not None:
            stack, self._stack = self._stack, None
            stack.__exit__(*sys.exc_info())  # what is being handled stays in the context of what goes wrong here

    def cleanup(self) -> None:
        """Remove the hooks and every ``grad_sample``: the model is as it was before."""
        try:
            self.remove_hooks()
        finally:
            for param in self._module.parameters():
                clear(param)

    def _forget(self) -> None:
        self.discard()
        self._hooked_modules.forget()
        self._module_hooks.forget()

    @property
    def params(self) -> list[nn.Parameter]:
        """The trainable parameters whose gradients are captured, each once."""
        return self._hooked_modules.params

    def name_of(self, param: nn.Parameter) -> str:
        """Return the qualified name of ``param`` in the model."""
        named = dict(self._module.named_parameters())
        for hooked in self._hooked_modules:  # where other tensors may be in place now
            named |= {hooked.full_name(name): p for name, p in hooked.swap.params.items()}
        return next((name for name, p in named.items() if p is param), "<not in the model>")

    def hooked_by_others(self) -> list[nn.Module]:
        """Modules of the model with forward hooks of the user, which may take out what is inside."""
        return [module for module in self._module.modules() if self._module_hooks.has_others(module)]

    # ---------------------------------------------------------------- forward

    def _capturing(self) -> bool:
        return self.hooks_enabled and not self._hooked_modules.rerunning and gradients_wanted(self._tracker.probe)

    def _enter(
        self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Follow which call is the outermost; its first input tells the number of samples."""
        if self._hooked_modules.rerunning:
            return None
        if self._tracker.probe is not None:
            self._tracker.probe.enter(name, module, (args, kwargs))
        elif not self.in_backward():
            self._depth += 1
            if self._depth == 1:
                self._begin(name, module, args, kwargs)
            elif self.trace is not None:
                self.trace.enter(name)
        hooked = self._hooked_modules.repeated(module)
        if hooked is not None:
            self._before(hooked, module, args, kwargs)
            self._hooked_modules.repeating += bool(hooked.swap.swapped)
        return None

    @untraced
    def _begin(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The outermost call begins."""
        sized = [t.shape[self.axis] for t in tensors_of((args, kwargs)) if t.dim() > self.axis]
        self._rows = sized[0] if sized else None
        self._hooked_modules.repeating = 0
        self._tracker.begin(self._rows)
        if not torch.is_grad_enabled():
            return
        if self.observer is not None:
            self.observer.begins(name, module, args, kwargs)
        if self._capturing():
            self._outermost = OutermostCall(name, module, args, kwargs, self._rows)
            self._discovery.learn(self._outermost)
            self._buffers = versions(self._module)
            self._hooked_modules.track_outside()
            if self.trace is not None:
                self.trace.start(name, self._rows)

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if self._hooked_modules.rerunning:
            return None
        hooked = self._hooked_modules.repeated(module)
        replaced = None
        if hooked is not None and hooked.swap.swapped:
            self._hooked_modules.repeating -= 1
            replaced = self._after(hooked, module, args, kwargs, output)
        if self._tracker.probe is not None:
            self._tracker.probe.leave(output)
        elif not self.in_backward():
            self._depth = max(0, self._depth - 1)
            if self.trace is not None and self._depth:
                self.trace.leave()
            if self._depth == 0:
                return self._end(output, replaced)
        return replaced

    @untraced
    def _end(self, output: Any, replaced: Any) -> Any:
        """The outermost call ends."""
        if self.trace is not None:
            self.trace.stop()
        self._untrack_outside()
        self._outermost = None
        self._check_buffers()
        lowered = self._tracker.untrack(output)
        result = replaced if lowered is output else lowered
        if self.hooks_enabled and torch.is_grad_enabled():
            call, more = (None, []) if self.observer is None else self.observer.ends()
            self._watch(call, [*outputs_of(output if result is None else result), *more])
        return result

    def _watch(self, call: Any, outputs: list[Tensor]) -> None:
        """Be told when a backward pass comes to the outputs of an outermost call."""
        floats = [t for t in outputs if t.is_floating_point()]
        ended = _Ended(call, self.batch_number, self._rows, self._tracker.state())
        for index, tensor in enumerate(floats):
            if tensor.grad_fn is not None:
                # What is kept of the call lives as long as its graph does.
                tensor.grad_fn.register_prehook(functools.partial(self._arrived, ended, index, tensor.output_nr))
                if self.observer is not None and tensor._is_view():
                    self.observer.has_view(call, index, tensor)

    def _arrived(self, ended: "_Ended", index: int, output_nr: int, grads: tuple[Tensor | None, ...]) -> None:
        if not self.hooks_enabled or grads[output_nr] is None:
            return
        # Checkpointing runs parts of this call again, and the model may have been called on other samples since.
        self._rows = ended.rows
        self._tracker.set_state(ended.tracker)
        if self.observer is not None:
            self.observer.reached(ended.call, index)
        if self._retracked_task is None and any(hooked.tracks or hooked.outside for hooked in self._hooked_modules):
            self._passes.running(ended.batch_number, self._finish_pass)  # whose end is the end of this
            self._retracked_task = torch._C._current_graph_task_id()
            self._hooked_modules.track_again()

    def _tracks_outside(self) -> bool:
        """Whether parameters used outside their module are tracked now."""
        if self._tracker.probe is not None:
            return True
        return self._retracked_task is not None if self.in_backward() else self._outermost is not None

    def in_backward(self) -> bool:
        """Whether a backward pass is running, so that what is run forwards is run again."""
        return torch._C._current_graph_task_id() not in (-1, self._outer_task)

    def _check_buffers(self) -> None:
        """Refuse a forward pass that wrote to a buffer: what comes from private samples gets no noise there."""
        before, self._buffers = self._buffers, {}
        check_unwritten(self._module, before)

    def _current_rows(self) -> int | None:
        # Inside a backward pass a checkpointed part of the model is run again: the rows are those of the forward pass.
        return self._rows if self._depth or self.in_backward() else None

    def _guard(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self.hooks_enabled and mixes_samples(module) and (module.training or torch.is_grad_enabled()):
            raise UnsupportedModelError(f"{name} ({type(module).__name__}): {mixing_reason(module)}.")

    @untraced
    def _before(self, hooked: HookedModule, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._hooked_modules.rerunning or self._hooked_modules.repeating:
            return
        if self._two_pass is not None and self._tracker.probe is None and not self.in_backward():
            self._two_pass.used(list(hooked.swap.params.values()))
        for swapped in (hooked, *hooked.inner):  # in use outside, or an interrupted forward could not put them back
            if swapped.swap.swapped:
                swapped.swap.restore()
        if not self._capturing() or not hooked.swap.trainable():
            return
        hooked.check_own()
        inputs = tensors_of((args, kwargs))
        hooked.captures, hooked.use = not hooked.tracks and not any(isinstance(t, TrackedTensor) for t in inputs), None
        if hooked.captures:
            hooked.use = self._tracker.call_of(hooked.name, inputs)
            if hooked.use is not None and hooked.use.shared:
                hooked.captures = False
                self._tracker.note_shared(hooked.name, hooked.use)
        if hooked.captures:
            hooked.swap.detach()
        else:
            hooked.track(self._tracker)

    def _untrack_outside(self) -> None:
        refilled, self._retracked_task = self._retracked_task is not None, None
        self._hooked_modules.untrack_outside(refilled)

    @untraced
    def _after(
        self, hooked: HookedModule, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        if self._hooked_modules.rerunning or self._hooked_modules.repeating:
            return None
        ran_filled = hooked.swap.swapped
        if ran_filled:
            hooked.swap.restore()
        if self._tracks_outside():  # also after a call without gradients, which emptied them
            for emptied in (hooked, *hooked.inner):
                emptied.track_outside(self._tracker)
        if not ran_filled or not self._capturing() or not hooked.captures:
            return None
        if any(isinstance(value, PackedSequence) for value in (*args, *kwargs.values())):
            raise UnsupportedModelError(
                f"{hooked.name or 'the model'} ({type(module).__name__}): got a PackedSequence, in which the rows of the "
                "samples are interleaved. Remedy: pass the padded tensor, and pick the last valid output by length."
            )
        outputs = _differentiable(output)
        if self._tracker.probe is not None:
            repeated = self._hooked_modules.repeated(hooked.module) is not None
            if repeated:  # on each sample alone, it gives back what belongs to that sample
                self._tracker.probe.unmark(outputs)
            self._tracker.note_call(hooked.name, hooked.use, outputs, repeated=repeated)
            return None
        if not outputs:
            return None
        skeleton, inputs = split((args, kwargs))
        plain = all(type(t) is Tensor for t in (*inputs, *outputs))  # others may have something to say
        with torch._C.DisableTorchFunction() if plain else nullcontext():
            names = hooked.swap.trainable()
            autocast = autocast_dtype(outputs[0].device.type)
            make = functools.partial(
                self._captured, hooked, hooked.use, self._current_rows(), skeleton, names, autocast
            )
            tapped = iter(
                self._tap(
                    outputs,
                    TappedCall(
                        self._record, hooked.name, self.batch_number, [t.detach() for t in inputs], make, hooked
                    ),
                )
            )
        if isinstance(output, Tensor):
            return next(tapped)
        whole, tensors = split(output)
        return join(whole, [next(tapped) if any(t is o for o in outputs) else t for t in tensors])

    def tap(self, outputs: Sequence[Tensor], saved: list[Tensor], name: str, make: Make) -> list[Tensor]:
        """Return ``outputs``, watched: ``make`` is called with the tensors saved and the gradients that come back."""
        return self._tap(outputs, TappedCall(self._record, name, self.batch_number, saved, make))

    def _tap(self, outputs: Sequence[Tensor], use: TappedCall) -> list[Tensor]:
        return list(Tap.apply(self.anchor, use, *outputs))

    @untraced
    def discover_again(self) -> None:
        """Learn anew in the middle of a forward pass, from the call that is running."""
        if self._outermost is None or self.in_backward():
            return
        self._discovery.learn_again(self._outermost, None if self.trace is None else self.trace.drawn_inside)

    # ---------------------------------------------------------------- backward

    def _leaked(self, param: Tensor) -> None:
        """Autograd delivered a gradient to a managed parameter: it was used where nothing captured it."""
        if not self.hooks_enabled:
            return
        param.grad = None
        assert isinstance(param, nn.Parameter)
        self._passes.running(self.batch_number, self._finish_pass)
        self._passes.leaks.append(param)

    def leaked(self, param: nn.Parameter) -> None:
        """Take note that autograd delivered a gradient to what stands for ``param``."""
        self._leaked(param)

    def _record(self, use: TappedCall, saved: Callable[[], list[Tensor]], grads: list[Tensor | None]) -> None:
        if not self.hooks_enabled:
            return
        if torch.is_grad_enabled():
            raise UnsupportedModelError(
                f"{use.name or 'the model'}: a backward pass with create_graph=True went through a managed layer "
                "(gradient penalty, second derivatives). Its per-sample gradients cannot be captured. Remedy: drop the "
                "penalty, or freeze the layers it goes through."
            )
        if not torch._C._will_engine_execute_node(self._anchor_node):
            return  # torch.autograd.grad(loss, something else)
        opened = self._passes.running(use.batch_number, self._finish_pass)
        self._passes.check_batch_number(opened, use.batch_number)
        with self._hooked_modules.own_parameters(None if self._retracked_task is None else use.hooked):
            try:
                for source in use.make(saved(), [None if g is None else g.detach() for g in grads]):
                    opened.sizes.add((source.name, source.samples))
                    opened.found.extend(self._reduced(source))
            except UnsupportedModelError as error:
                self._refuse(opened, error, use.name)

    def _refuse(self, opened: BackwardPass, error: UnsupportedModelError, where: str) -> None:
        """Go on to the end of the pass, so that all that stands in the way is named."""
        opened.refuse(error)

    def _reduced(self, source: Contribution) -> list[Term]:
        """Work out at once what is wanted at once, or what takes no more memory afterwards, and let go of what it came from."""
        # backward() may be called inside the user's autocast, which is not for sums
        with autocast_as(source.params[0].device.type, None):
            if self._two_pass is not None:
                return self._two_pass.receive(source, source.name)
            if self.grad_sample_mode == "ghost":
                return source.instantiate_small() if isinstance(source, Deferred) else [source]
            if isinstance(source, Deferred):
                return [Instantiated(source.all_grads(), source.samples, source.name)]
            written = {p: source.grads(p, slice(None)) for p in source.params}
            return [Instantiated(written, source.samples, source.name)]

    def scale(self, samples: int) -> float:
        """The factor that undoes the mean over the batch."""
        return float(samples) if self.loss_reduction == "mean" else 1.0

    def _captured(
        self,
        hooked: HookedModule,
        use: UseLayout | None,
        rows: int | None,
        skeleton: Any,
        names: tuple[str, ...],
        autocast: torch.dtype | None,
        saved: list[Tensor],
        grads: list[Tensor | None],
    ) -> list[Contribution]:
        """Make the source for one call of a module whose rule works on the whole call."""
        rule = hooked.rule
        axis = self.axis if rule.batch_dim is None else rule.batch_dim
        first = next(g for g in grads if g is not None)
        if rows is None:
            rows = first.shape[axis] if first.dim() > axis else 0
        args, kwargs = join(skeleton, saved)
        if rows == 0:
            params = [hooked.swap.params[name] for name in names]
            return [Instantiated({p: p.new_zeros((0, *p.shape)) for p in params}, 0, hooked.name)]
        run = functools.partial(self._hooked_modules.rerun, hooked, autocast, first.device.type)
        call = Call(hooked.module, hooked.name, args, kwargs, grads, rows, axis, names, run, hooked.memo)
        if use is not None:
            rule, call = split_call(rule, call, use)
        check_samples(rule, call)
        return [Deferred(call, rule, self.scale(rows))]

    def _finish_pass(self, task: int) -> None:
        """Runs at the end of a backward pass; one that was broken off never gets here."""
        if task == self._retracked_task:
            self._untrack_outside()
        finished = self._passes.finish(task, self.name_of, self._refuse)
        if finished is None:
            return
        samples, found = finished
        if self.grad_sample_mode == "ghost":
            self._passes.pending.extend(found)
            return
        if self.observer is not None:  # p.grad_sample can be read from now on
            try:
                self.observer.captured(samples)
            except BaseException:
                self.discard()
                raise
        self._grad_samples.add(self.params, samples, found)

    # ---------------------------------------------------------------- boundaries

    def take(self) -> SampleGradients | None:
        """Hand over what the backward passes since the last boundary captured; None if there were none."""
        taken = self._passes
        self._reset()
        if taken.samples is None:
            return None
        if self.grad_sample_mode != "ghost":
            return self._grad_samples.take(self.params, taken.samples)
        if self._two_pass is not None:
            again = self.repeat_backward
            assert again is not None  # set together with the first backward pass
            return TwoPassGradients(taken.samples, taken.pending, self._two_pass, again)
        return SampleGradients(taken.samples, taken.pending)

    @contextmanager
    def two_passes(self) -> Iterator[None]:
        """Take norms in the first backward pass of this context and sums in a second, which ``repeat_backward`` runs.

        What is captured is let go at once; see :class:`~dp_hooks.gradients.two_pass.TwoPass`.
        """
        self._two_pass = TwoPass()
        try:
            yield
        finally:
            self._two_pass = self.repeat_backward = None
            self._reset()

    def discard(self) -> None:
        """Drop what was captured since the last boundary, ``grad_sample`` included."""
        self._reset()
        self._grad_samples.discard(self.params)

    @contextmanager
    def separate(self) -> Iterator[None]:
        """Capture something else in between: what was captured before is back, unchanged, afterwards."""
        names = ("_passes", "_rows", "_depth", "_two_pass", "_outer_task", "_retracked_task")
        with self._grad_samples.aside(self.params):
            kept, tracker = {name: getattr(self, name) for name in names}, self._tracker.state()
            self._two_pass, self._outer_task = None, torch._C._current_graph_task_id()
            self._reset()
            try:
                yield
            finally:
                self.discard()
                self._tracker.set_state(tracker)
                for name, value in kept.items():
                    setattr(self, name, value)
                if self._retracked_task is not None:
                    self._hooked_modules.track_again()

    @property
    def has_gradients(self) -> bool:
        """Whether a finished backward pass is waiting."""
        return self._passes.samples is not None

    @property
    def is_stale(self) -> bool:
        """Whether what is waiting belongs to an earlier batch than the one handed out last."""
        return self._passes.samples is not None and self._passes.batch_number != self.batch_number

    @contextmanager
    def reduced_by(self, loss_reduction: str) -> Iterator[None]:
        """Take the losses back-propagated meanwhile as reduced by "mean" or "sum"."""
        kept, self.loss_reduction = self.loss_reduction, loss_reduction
        try:
            yield
        finally:
            self.loss_reduction = kept

    @property
    def samples(self) -> int:
        """Number of samples in the backward passes that are waiting; 0 if there are none."""
        return self._passes.samples or 0

    def _reset(self) -> None:
        if self._outermost is not None and self.trace is not None:  # the pass was interrupted
            self.trace.stop()
        self._outermost = self._retracked_task = None
        self._hooked_modules.restore()  # an interrupted forward could not
        self._passes = BackwardPasses()
        self._depth = 0


def _differentiable(tree: Any) -> list[Tensor]:
    with torch._C.DisableTorchFunction():
        return [t for t in tensors_of(tree) if t.is_floating_point() or t.is_complex()]
