"""HookController: attaches to the submodules of a model, captures what per-sample gradients need, and leaves."""

import functools
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn

from .._tree import modules_of
from .._validate import boolean, one_of
from ..errors import ScopeError
from ..gradients.grad_sample import GradSamples, clear
from ..gradients.sample_gradients import SampleGradients
from ..gradients.sinks import DeferredSink, Sink
from ..gradients.two_pass import TwoPass
from ..rules import RuleTable
from .calls.session import LeakHook, Session
from .compile_stance import eager
from .discovery import Discovery
from .hooked_modules import HookedModules
from .model_calls import ModelCalls
from .module_calls import ModuleCalls
from .module_hooks import ModuleHooks, hooks_everywhere
from .samples.tracker import Tracker
from .samples.uses import SampleAxes
from .validate import check_is_module, check_model

MODES = ("ghost", "hooks", "functorch")
REDUCTIONS = ("mean", "sum")


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
            UnsupportedModelError: see ``strict``; names the first three offending modules.
        """
        self.model = check_is_module(m)
        self.batch_first = boolean("batch_first", batch_first)
        reduction = one_of("loss_reduction", loss_reduction, REDUCTIONS)
        self.grad_sample_mode = "functorch" if force_functorch else one_of("grad_sample_mode", grad_sample_mode, MODES)
        if strict:
            check_model(m)
        self.params: list[nn.Parameter] = []  # the trainable ones whose gradients are captured, each once
        self._names: dict[Tensor, str] = {}
        self._stack: ExitStack | None = None
        sink: Sink = DeferredSink() if self.grad_sample_mode == "ghost" else GradSamples(self.params)
        self.session = session = Session(sink, 0 if batch_first else 1, reduction)
        tracker = Tracker(session, SampleAxes())
        rules = RuleTable(generic_only=self.grad_sample_mode == "functorch")
        self._hooked_modules = HookedModules(m, rules, session, tracker)
        self._module_hooks = ModuleHooks(self._hooked_modules.swaps)
        self._module_calls = ModuleCalls(session, self._hooked_modules, tracker)
        self._discovery = Discovery(m, session, self._hooked_modules, tracker)
        self._model_calls = ModelCalls(m, session, self._hooked_modules, tracker, self._discovery, self._module_calls)
        self.add_hooks()

    def add_hooks(self) -> None:
        """Install and enable the hooks, if they are not there already; a failure half-way takes back what was installed."""
        if self._stack is not None:
            return
        calls, outer = self._module_calls, self._model_calls
        with ExitStack() as stack:
            stack.callback(self._forget)
            stack.enter_context(eager())
            self._hooked_modules.find()
            self.params[:] = self._hooked_modules.params
            self._names = {param: name for name, param in self.model.named_parameters()}
            stack.callback(self.session.restore_parameters)
            attach = functools.partial(self._module_hooks.attach, stack)
            for hooked in self._hooked_modules:
                attach(hooked.module, functools.partial(calls.before, hooked), functools.partial(calls.after, hooked))
            for name, module in self.model.named_modules():
                if hasattr(module, "track_running_stats"):
                    attach(module, functools.partial(outer.guard, name), outer.straighten)
            for name, module in self.model.named_modules():
                if self._module_hooks.accepts(module):
                    attach(module, functools.partial(outer.enter, name), outer.leave, outer=True)
            for param in self.params:
                if param._post_accumulate_grad_hooks is None:  # else an empty dictionary would stay behind
                    stack.callback(setattr, param, "_post_accumulate_grad_hooks", None)
                leaked = LeakHook(weakref.ref(self.session), self.name_of(param))
                number = param.register_post_accumulate_grad_hook(leaked).id
                stack.callback(param._post_accumulate_grad_hooks.pop, number, None)
            self._stack = stack.pop_all()
        self.enable_hooks()

    def enable_hooks(self) -> None:
        """Capture from now on."""
        if self._stack is None:
            raise ScopeError("enable_hooks() on a controller without hooks: call add_hooks() first.")
        self.session.enabled = True

    def disable_hooks(self) -> None:
        """Capture nothing from now on, and ignore graphs captured before; parameters get ordinary gradients."""
        self.session.enabled = False

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
            for param in self.model.parameters():
                clear(param)

    def _forget(self) -> None:
        self.discard()
        self._hooked_modules.forget()
        self._module_hooks.forget()
        self._discovery.forget()
        self.params.clear()

    @property
    def hooks_enabled(self) -> bool:
        """Whether anything is captured."""
        return self.session.enabled

    @property
    def loss_reduction(self) -> str:
        """How the loss that is back-propagated is reduced over samples: "mean" or "sum"."""
        return self.session.loss_reduction

    @property
    def axis(self) -> int:
        """The sample axis of inputs and outputs."""
        return self.session.axis

    def name_of(self, param: Tensor) -> str:
        """Return the qualified name of ``param`` in the model."""
        if param in self._names:
            return self._names[param]
        return next((name for name, p in self.model.named_parameters() if p is param), "<not in the model>")

    def hooked_by_others(self) -> list[nn.Module]:
        """Modules of the model with forward hooks of the user, which may take out what is inside."""
        return [module for module in self.model.modules() if self._module_hooks.has_others(module)]

    @property
    def hands_out(self) -> bool:
        """Whether hooks of the user are called inside the model: what they get may enter a loss beside the model's outputs."""
        inside = (module for module in modules_of(self.model) if module is not self.model)
        return hooks_everywhere() or any(self._module_hooks.are_given(module) for module in inside)

    @property
    def has_gradients(self) -> bool:
        """Whether a finished backward pass is waiting."""
        return self.session.passes.samples is not None

    @property
    def samples(self) -> int:
        """Number of samples in the backward passes that are waiting; 0 if there are none."""
        return self.session.passes.samples or 0

    @property
    def is_stale(self) -> bool:
        """Whether what is waiting belongs to an earlier batch than the one handed out last."""
        return self.has_gradients and self.session.passes.batch_number != self.session.batch_number

    def next_batch(self) -> None:
        """Another batch is handed out: what is captured from now on belongs to it."""
        self.session.batch_number += 1

    def peek(self) -> SampleGradients | None:
        """What the backward passes since the last boundary captured, which stays here; None if there were none."""
        samples = self.session.passes.samples
        return None if samples is None else self.session.sink.peek(samples)

    def take(self) -> SampleGradients | None:
        """Hand over what the backward passes since the last boundary captured; None if there were none."""
        samples = self.session.passes.samples
        self.session.reset()
        return None if samples is None else self.session.sink.take(samples)

    def discard(self) -> None:
        """Drop what was captured since the last boundary, ``grad_sample`` included."""
        self.session.discard()

    @contextmanager
    def separate(self) -> Iterator[None]:
        """Capture something else in between: what was captured before is back, unchanged, afterwards."""
        try:
            with self.session.separate():
                yield
        finally:
            if self.session.retracked_task is not None:
                self._hooked_modules.track_again()

    @contextmanager
    def reduced_by(self, loss_reduction: str) -> Iterator[None]:
        """Take the losses back-propagated meanwhile as reduced by "mean" or "sum"."""
        kept, self.session.loss_reduction = self.session.loss_reduction, loss_reduction
        try:
            yield
        finally:
            self.session.loss_reduction = kept

    @contextmanager
    def two_passes(self, again: Callable[[], None]) -> Iterator[None]:
        """Take norms in the first backward pass and sums in a second, which ``again`` runs; see :class:`.TwoPass`."""
        kept, self.session.sink = self.session.sink, TwoPass(again)
        try:
            yield
        finally:
            self.session.sink = kept
            self.session.reset()
