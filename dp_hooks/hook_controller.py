"""HookController: attaches to the submodules of a model, captures what per-sample gradients need, and leaves."""

import functools
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from ._tree import join, split, tensors_of
from ._validate import boolean, one_of
from .errors import ScopeError, UnsupportedModelError
from .gradients import Captured, SampleGradients, Source, Stored
from .model_check import check_is_module, check_model, mixes_samples, mixing_reason
from .rules import Call, Rule, RuleTable, check_samples, expands_shared_ids
from .slots import ParameterSlots, attributes_kept, autocast_as, autocast_dtype

MODES = ("ghost", "hooks", "functorch")
REDUCTIONS = ("mean", "sum")

# Put on hooked modules and taken away with the hooks: they make copies and pickles come out without hooks.
_ON_MODULES = ("__getstate__", "__deepcopy__")
_HOOK_DICTS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
)


@dataclass(eq=False)
class _Site:
    """A module whose calls are captured, with the rule for it."""

    name: str
    module: nn.Module
    rule: Rule
    slots: ParameterSlots
    memo: dict[str, Any] = field(default_factory=dict)


@dataclass(eq=False)
class _Use:
    """One forward call of a site, on its way to the backward pass. Holds no tensor: autograd does."""

    controller: "HookController"
    site: _Site
    rows: int | None
    serial: int
    skeleton: Any
    names: tuple[str, ...]
    inputs: list[Tensor]
    autocast: torch.dtype | None


@dataclass(eq=False)
class _Pass:
    """A backward pass that has not come to its end; ``serial`` tells the logical part its forward belonged to."""

    serial: int
    found: list[Captured | Stored] = field(default_factory=list)
    sizes: dict[str, int] = field(default_factory=dict)


class _Tap(torch.autograd.Function):
    """Identity on the outputs of a module; its backward hands the output gradients to the controller.

    The outputs are returned as detached aliases: unlike ``mark_dirty`` this leaves their version counter alone (modules
    whose last operation saves its own result), and unlike a view they may be changed in place afterwards. The inputs go
    through ``save_for_backward``, so that a later in-place change of them is PyTorch's own error, and
    checkpointing can drop and recompute them.
    """

    @staticmethod
    def forward(ctx: Any, token: Tensor, use: _Use, *outputs: Tensor) -> tuple[Tensor, ...]:
        ctx.use = use
        ctx.save_for_backward(*use.inputs)
        use.inputs = []
        ctx.set_materialize_grads(False)
        return tuple(t.detach() for t in outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        controller: HookController = ctx.use.controller
        if controller.hooks_enabled and any(g is not None for g in grads):
            controller._record(ctx.use, lambda: list(ctx.saved_tensors), list(grads))
        return (None, None, *grads)


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
        self._rules = RuleTable(generic_only=self.grad_sample_mode == "functorch")
        self.token = torch.zeros((), requires_grad=True)
        # Held for its identity: it tells a backward() from an autograd.grad() that is after something else.
        self._token_node: Any = self.token.view_as(self.token).grad_fn.next_functions[0][0]  # type: ignore[union-attr]
        self._stack: ExitStack | None = None
        self._sites: list[_Site] = []
        self._hook_ids: dict[int, set[int]] = {}
        self._rows: int | None = None
        self._depth = 0
        self.observer: Callable[[str, nn.Module, tuple[Any, ...], dict[str, Any]], None] | None = None
        self._running = 0
        self._open: dict[int, _Pass] = {}
        self._leaks: list[nn.Parameter] = []
        self._pending: list[Source] = []
        self._samples: int | None = None
        self._serial = 0
        self._consumed = False
        self.serial = 0
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
            self._sites = list(self._find_sites(self._module, "", set()))
            for site in self._sites:
                stack.callback(site.slots.restore)
                before = functools.partial(self._before, site)
                self.attach(stack, site.module, before, functools.partial(self._after, site))
            for name, module in self._module.named_modules():
                if hasattr(module, "track_running_stats"):
                    self.attach(stack, module, functools.partial(self._guard, name), None)
            for name, module in self._module.named_modules():
                if not isinstance(module, torch.jit.ScriptModule):  # accepts no hooks, and has nothing trainable
                    self.attach(stack, module, functools.partial(self._enter, name), self._leave, outer=True)
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
                _clear(param)

    def _forget(self) -> None:
        self.discard()
        self._sites = []
        self._hook_ids = {}

    def attach(
        self,
        stack: ExitStack,
        module: nn.Module,
        before: Callable[..., Any],
        after: Callable[..., Any] | None,
        *,
        outer: bool = False,
    ) -> None:
        """Hook ``before`` and ``after`` onto ``module`` until ``stack`` unwinds; copies of the module go without them.

        Unless ``outer``, captured inputs and outputs are what forward itself saw and returned, within users' hooks.
        """
        ids = self._clean_copies_of(module, self._stack or stack)
        handle = module.register_forward_pre_hook(before, prepend=True, with_kwargs=True)
        stack.callback(handle.remove)
        ids.add(handle.id)
        if after is not None:
            handle = module.register_forward_hook(after, prepend=not outer, with_kwargs=True, always_call=True)
            stack.callback(handle.remove)
            ids.add(handle.id)

    def _clean_copies_of(self, module: nn.Module, stack: ExitStack) -> set[int]:
        """Let copies of ``module`` go without hooks of ours; returns the set of their ids."""
        if id(module) not in self._hook_ids:
            self._hook_ids[id(module)] = set()
            vars(module)["__getstate__"] = functools.partial(self._state_of, module)
            if hasattr(type(module), "__deepcopy__"):
                vars(module)["__deepcopy__"] = functools.partial(self._copy_of, module)
            for name in _ON_MODULES:
                stack.callback(vars(module).pop, name, None)
        return self._hook_ids[id(module)]

    def _state_of(self, module: nn.Module) -> dict[str, Any]:
        """State for ``pickle`` and ``copy``: the module as it would be without hooks."""
        own = getattr(type(module), "__getstate__", None)
        default = getattr(object, "__getstate__", None)
        return self._without_hooks(module, vars(module) if own is None or own is default else own(module))

    def _without_hooks(self, module: nn.Module, attributes: dict[str, Any]) -> dict[str, Any]:
        state = {key: value for key, value in attributes.items() if key not in _ON_MODULES}
        ours = self._hook_ids.get(id(module), set())
        for key in _HOOK_DICTS:
            state[key] = OrderedDict((k, v) for k, v in state[key].items() if k not in ours)
        originals = {
            (id(owner), key): site.slots.params[name] for site in self._sites for owner, key, name in site.slots.places
        }
        state["_parameters"] = {
            key: originals.get((id(module), key), param) for key, param in state["_parameters"].items()
        }
        return state

    def _copy_of(self, module: nn.Module, memo: dict[int, Any]) -> Any:
        """``copy.deepcopy`` for classes with a ``__deepcopy__`` of their own, which ignore ``__getstate__``."""
        kept, clean = dict(vars(module)), self._without_hooks(module, vars(module))
        try:
            vars(module).clear()
            vars(module).update(clean)
            return type(module).__deepcopy__(module, memo)  # type: ignore[attr-defined]
        finally:
            vars(module).clear()
            vars(module).update(kept)

    # ---------------------------------------------------------------- sites

    def _find_sites(self, module: nn.Module, name: str, seen: set[int]) -> Iterator[_Site]:
        if id(module) in seen:
            return
        seen.add(id(module))
        owns = any(p is not None and p.requires_grad for p in module._parameters.values())
        if self._rules.owns_subtree(module):
            owns = any(p.requires_grad for p in module.parameters())
        if owns:
            rule = self._rules.find(module)
            site = _Site(name, module, rule, ParameterSlots(module, recurse=rule.whole_subtree))
            yield site
            if rule.whole_subtree:
                return
        for key, child in module.named_children():
            yield from self._find_sites(child, f"{name}.{key}" if name else key, seen)

    @property
    def params(self) -> list[nn.Parameter]:
        """The trainable parameters whose gradients are captured, each once."""
        return list({id(p): p for site in self._sites for p in site.slots.params.values()}.values())

    def name_of(self, param: nn.Parameter) -> str:
        """Return the qualified name of ``param`` in the model."""
        return next((name for name, p in self._module.named_parameters() if p is param), "<not in the model>")

    # ---------------------------------------------------------------- forward

    def _capturing(self) -> bool:
        return self.hooks_enabled and not self._running and torch.is_grad_enabled()

    def _enter(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Follow which call is the outermost; its first input tells the number of samples."""
        if self._running or torch._C._current_graph_task_id() != -1:
            return
        self._depth += 1
        if self._depth > 1:
            return
        sized = [t.shape[self.axis] for t in tensors_of((args, kwargs)) if t.dim() > self.axis]
        self._rows = sized[0] if sized else None
        if self.observer is not None and torch.is_grad_enabled():
            self.observer(name, module, args, kwargs)

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if not self._running and torch._C._current_graph_task_id() == -1:
            self._depth = max(0, self._depth - 1)

    def _current_rows(self) -> int | None:
        # Inside a backward pass a checkpointed part of the model is run again: the rows are those of the forward pass.
        return self._rows if self._depth or torch._C._current_graph_task_id() != -1 else None

    def _guard(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self.hooks_enabled and mixes_samples(module) and (module.training or torch.is_grad_enabled()):
            raise UnsupportedModelError(f"{name} ({type(module).__name__}): {mixing_reason(module)}.")

    def _before(
        self, site: _Site, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self._running:
            return None
        if site.slots.filled:  # an interrupted forward could not put them back
            site.slots.restore()
        if not self._capturing() or not any(p.requires_grad for p in site.slots.params.values()):
            return None
        if foreign := site.slots.foreign():
            raise UnsupportedModelError(
                f"{site.name or 'the model'}: {', '.join(foreign)} is not the parameter that was there when the scope began "
                "(torch.func.functional_call, load_state_dict(assign=True), a new nn.Parameter). Remedy: change values in "
                "place (load_state_dict without assign), or enter a new scope."
            )
        site.slots.detach()
        return expands_shared_ids(site.rule, args, kwargs, self._current_rows(), self.axis)

    def _after(self, site: _Site, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if self._running or not site.slots.filled:
            return None
        site.slots.restore()
        if not self._capturing():
            return None
        if any(isinstance(value, PackedSequence) for value in (*args, *kwargs.values())):
            raise UnsupportedModelError(
                f"{site.name or 'the model'} ({type(module).__name__}): got a PackedSequence, in which the rows of the "
                "samples are interleaved. Remedy: pass the padded tensor, and pick the last valid output by length."
            )
        outputs = [t for t in tensors_of(output) if t.is_floating_point() or t.is_complex()]
        if not outputs:
            return None
        names = tuple(name for name, p in site.slots.params.items() if p.requires_grad)
        skeleton, inputs = split((args, kwargs))
        autocast = autocast_dtype(outputs[0].device.type)
        held = [t.detach() for t in inputs]
        use = _Use(self, site, self._current_rows(), self.serial, skeleton, names, held, autocast)
        tapped = iter(_Tap.apply(self.token, use, *outputs))
        if isinstance(output, Tensor):
            return next(tapped)
        whole, tensors = split(output)
        return join(whole, [next(tapped) if t.is_floating_point() or t.is_complex() else t for t in tensors])

    # ---------------------------------------------------------------- backward

    def _pass(self, serial: int) -> "_Pass":
        task = torch._C._current_graph_task_id()
        if task not in self._open:
            self._open[task] = _Pass(serial)
            torch.autograd.Variable._execution_engine.queue_callback(functools.partial(self._finish_pass, task))
        return self._open[task]

    def _leaked(self, param: Tensor) -> None:
        """Autograd delivered a gradient to a managed parameter: it was used where nothing captured it."""
        if not self.hooks_enabled:
            return
        param.grad = None
        assert isinstance(param, nn.Parameter)
        self._pass(self.serial)
        self._leaks.append(param)

    def _record(self, use: _Use, saved: Callable[[], list[Tensor]], grads: list[Tensor | None]) -> None:
        if torch.is_grad_enabled():
            raise UnsupportedModelError(
                f"{use.site.name or 'the model'}: a backward pass with create_graph=True went through a managed layer "
                "(gradient penalty, second derivatives). Its per-sample gradients cannot be captured. Remedy: drop the "
                "penalty, or freeze the layers it goes through."
            )
        if not torch._C._will_engine_execute_node(self._token_node):
            return  # torch.autograd.grad(loss, something else)
        site, rule = use.site, use.site.rule
        axis = self.axis if rule.batch_dim is None else rule.batch_dim
        args, kwargs = join(use.skeleton, saved())
        first = next(g for g in grads if g is not None)
        rows = use.rows
        if rows is None:
            rows = first.shape[axis] if first.dim() > axis else 0
        detached = [None if g is None else g.detach() for g in grads]
        call = Call(
            site.module,
            site.name,
            args,
            kwargs,
            detached,
            rows,
            axis,
            use.names,
            functools.partial(self._rerun, site, use.autocast, first.device.type),
            site.memo,
        )
        check_samples(rule, call)
        captured = Captured(call, rule, float(rows) if self.loss_reduction == "mean" else 1.0)
        opened = self._pass(use.serial)
        if use.serial != opened.serial or (self._samples is not None and use.serial != self._serial):
            raise ScopeError(
                "gradients of an earlier logical batch are still waiting: they cannot be accumulated over batches. "
                "Call opt.step() for every batch, or opt.zero_grad() to drop them. For large batches set a larger "
                "batch_size in the loader and max_physical_batch_size in the scope."
            )
        opened.sizes[site.name] = rows
        with autocast_as(first.device.type, None):  # backward() may be called inside the user's autocast
            if self.grad_sample_mode == "ghost":
                opened.found.extend(part for part in captured.condensed() if part is not None)
            else:
                opened.found.append(Stored(captured.all_grads()))

    def _finish_pass(self, task: int) -> None:
        """Runs at the end of a backward pass; one that was broken off never gets here."""
        finished = self._open.pop(task, None)
        if finished is None:
            return
        found = finished.found
        if self._leaks:
            leaks, self._leaks = self._leaks, []
            names = ", ".join(sorted({self.name_of(p) for p in leaks}))
            raise UnsupportedModelError(
                f"{names}: used where no hook saw it, so its gradient arrived summed over the batch. It was dropped, and "
                "nothing was released. This happens when a weight is used outside its module's forward "
                "(F.linear(h, other.weight)), or when the model was compiled and run before the scope began. Remedy: use "
                "the weight through its module, enter the scope before compiling, or freeze it."
            )
        sizes = set(finished.sizes.values())
        if self._samples is not None:
            sizes.add(self._samples)
        if len(sizes) > 1:
            listing = ", ".join(sorted(f"{name or 'the model'}: {n}" for name, n in finished.sizes.items())[:8])
            raise ScopeError(
                f"different numbers of samples ({sorted(sizes)}) met in one step ({listing}). Backward passes between two "
                "steps must be over the same samples, one row each. Call opt.step() or opt.zero_grad() in between."
            )
        if not found:
            return
        self._samples, self._serial = sizes.pop(), finished.serial
        if self.grad_sample_mode == "ghost":
            self._pending.extend(found)
        else:
            self._promote(found)

    def _promote(self, found: "list[Captured | Stored]") -> None:
        """Write the sum over all uses in this pass to ``p.grad_sample``, adding to what earlier passes left there."""
        if self._consumed:
            for param in self.params:
                _clear(param)
            self._consumed = False
        fresh = SampleGradients(self.samples, found)
        for param in fresh.params:
            earlier = vars(param).get("grad_sample")
            grads = fresh.grads(param)
            _store(param, grads if earlier is None else earlier + grads)

    def _rerun(
        self,
        site: _Site,
        autocast: torch.dtype | None,
        device: str,
        tensors: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Call the module of ``site`` with other tensors as parameters, capturing nothing and leaving nothing."""
        self._running += 1
        try:
            with attributes_kept(site.module), autocast_as(device, autocast):
                site.slots.fill(tensors)
                try:
                    return site.module(*args, **kwargs)
                finally:
                    site.slots.restore()
        finally:
            self._running -= 1

    # ---------------------------------------------------------------- boundaries

    def take(self) -> SampleGradients | None:
        """Hand over what the backward passes since the last boundary captured; None if there were none."""
        samples, pending = self._samples, self._pending
        self._reset()
        if samples is None:
            return None
        if self.grad_sample_mode != "ghost":
            stored = {p: g for p in self.params if isinstance(g := vars(p).get("grad_sample"), Tensor)}
            self._consumed = True
            return SampleGradients(samples, [Stored(stored)])
        return SampleGradients(samples, pending)

    def discard(self) -> None:
        """Drop what was captured since the last boundary, ``grad_sample`` included."""
        self._reset()
        self._consumed = False
        for param in self.params:
            _clear(param)

    @contextmanager
    def separate(self) -> Iterator[None]:
        """Capture something else in between: what was captured before is back, unchanged, afterwards."""
        names = ("_open", "_leaks", "_rows", "_depth", "_pending", "_samples", "_serial", "_consumed")
        kept = {name: getattr(self, name) for name in names}
        samples = {p: vars(p)["grad_sample"] for p in self.params if "grad_sample" in vars(p)}
        for p in samples:
            _clear(p)
        self._open, self._consumed = {}, False
        self._reset()
        try:
            yield
        finally:
            self.discard()
            for name, value in kept.items():
                setattr(self, name, value)
            for p, grads in samples.items():
                _store(p, grads)

    @property
    def has_gradients(self) -> bool:
        """Whether a finished backward pass is waiting."""
        return self._samples is not None

    @property
    def is_stale(self) -> bool:
        """Whether what is waiting belongs to an earlier batch than the one handed out last."""
        return self._samples is not None and self._serial != self.serial

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
        return self._samples or 0

    def _reset(self) -> None:
        for site in self._sites:
            if site.slots.filled:  # an interrupted forward could not put the parameters back
                site.slots.restore()
        self._open = {}
        self._leaks = []
        self._depth = 0
        self._pending = []
        self._samples = None


def _store(param: nn.Parameter, grads: Tensor) -> None:
    """Set ``param.grad_sample``, and see to it that it does not travel along when ``param`` is pickled."""
    vars(param)["grad_sample"] = grads
    vars(param)["__getstate__"] = functools.partial(_state_without_gradients, param)


def _clear(param: nn.Parameter) -> None:
    vars(param).pop("grad_sample", None)
    vars(param).pop("__getstate__", None)


def _state_without_gradients(param: nn.Parameter) -> dict[str, Any]:
    return {key: value for key, value in vars(param).items() if key not in ("grad_sample", "__getstate__")}
