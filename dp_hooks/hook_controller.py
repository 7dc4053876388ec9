"""HookController: attaches to the submodules of a model, captures what per-sample gradients need, and leaves."""

import functools
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from ._tree import join, split, tensors_of, tree_map
from ._validate import boolean, one_of
from .batch_axes import BatchAxes, Entry, Trial, gradients_wanted, numbers_of_rows, rows_for_trial
from .eager import eager
from .errors import DPHooksError, ScopeError, UnsupportedModelError
from .gradients import Captured, SampleGradients, Source, Stored
from .lifting import Lifted, Lifter, Make
from .model_check import check_is_module, check_model, mixes_samples, mixing_reason
from .no_dropout import Draws, NoDropout, other_generators_kept
from .paths import Paths, unfollowed
from .rules import GENERIC, Call, Rule, RuleTable, check_samples
from .site_calls import samples_apart
from .slots import ParameterSlots, attributes_kept, autocast_as, autocast_dtype
from .two_pass import TwoPass, TwoPassGradients

MODES = ("ghost", "hooks", "functorch")
REDUCTIONS = ("mean", "sum")

# What a model may raise when it is run on another number of rows than it was given.
_CANNOT_RUN = (
    DPHooksError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)

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
    lifts: bool = False
    entry: Entry | None = None
    captures: bool = False
    outside: tuple[str, ...] = ()
    inner: tuple["_Site", ...] = ()
    memo: dict[str, Any] = field(default_factory=dict)


class Observer(Protocol):
    """Who is told of outermost calls, and of backward passes before what they captured can be seen."""

    def begins(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """An outermost call begins."""

    def ends(self) -> Any:
        """It has ended; what is returned stands for the call in :meth:`reached`."""

    def reached(self, call: Any, index: int) -> None:
        """A backward pass came to the call by its floating-point output number ``index``."""

    def captured(self, samples: int) -> None:
        """A backward pass over so many samples is over; may raise to refuse what it captured."""


class _Contribution(Source, Protocol):
    """A source that knows where it came from and how many samples it is over."""

    @property
    def samples(self) -> int: ...

    @property
    def name(self) -> str: ...


@dataclass(eq=False)
class _Use:
    """One watched result of the forward pass, on its way to the backward pass. Holds no tensor: autograd does."""

    controller: "HookController"
    name: str
    serial: int
    inputs: list[Tensor]
    make: Make
    site: _Site | None = None


@dataclass(eq=False)
class _Pass:
    """A backward pass that has not come to its end; ``serial`` tells the logical part its forward belonged to."""

    serial: int
    found: list[Source] = field(default_factory=list)
    sizes: set[tuple[str, int]] = field(default_factory=set)
    refusals: list[UnsupportedModelError] = field(default_factory=list)


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
        self._lifter = Lifter(self, BatchAxes(self.axis))
        self._repeated: dict[int, _Site] = {}
        self._repeating = 0
        self._outermost: tuple[str, nn.Module, tuple[Any, ...], dict[str, Any]] | None = None
        self._buffers: dict[str, tuple[Tensor, int]] = {}
        self._hook_ids: dict[int, set[int]] = {}
        self._rows: int | None = None
        self._depth = 0
        self.observer: Observer | None = None
        self.paths: Paths | None = None
        self._aside = -1
        self._refilled: int | None = None
        self._running = 0
        self._open: dict[int, _Pass] = {}
        self._leaks: list[nn.Parameter] = []
        self._pending: list[Source] = []
        self._samples: int | None = None
        self._serial = 0
        self._consumed = False
        self._unreached: dict[nn.Parameter, Tensor] = {}
        self._twice: TwoPass | None = None
        self.repeat_backward: Callable[[], None] | None = None
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
            stack.enter_context(eager())
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
        self._repeated = {}
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
        lifts = self._rules.lifts(module)
        rule = self._rules.find(module)
        # Modules that read the weights of their children: the children's own hooks never fire.
        whole = isinstance(module, nn.MultiheadAttention) if lifts else rule.whole_subtree
        if self._rules.owns_subtree(module) and whole:
            owns = any(p.requires_grad for p in module.parameters())
        if owns:
            yield _Site(name, module, rule, ParameterSlots(module, recurse=whole), lifts)
            if whole:
                return
        for key, child in module.named_children():
            yield from self._find_sites(child, f"{name}.{key}" if name else key, seen)

    @property
    def params(self) -> list[nn.Parameter]:
        """The trainable parameters whose gradients are captured, each once."""
        return list({id(p): p for site in self._sites for p in site.slots.params.values()}.values())

    def name_of(self, param: nn.Parameter) -> str:
        """Return the qualified name of ``param`` in the model."""
        named = dict(self._module.named_parameters())
        for site in self._sites:  # where other tensors may be in place now
            named |= {f"{site.name}.{name}" if site.name else name: p for name, p in site.slots.params.items()}
        return next((name for name, p in named.items() if p is param), "<not in the model>")

    # ---------------------------------------------------------------- forward

    def _capturing(self) -> bool:
        return self.hooks_enabled and not self._running and gradients_wanted(self._lifter.trial)

    def _enter(
        self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Follow which call is the outermost; its first input tells the number of samples."""
        if self._running:
            return None
        if self._lifter.trial is not None:
            self._lifter.trial.enter(name, module, (args, kwargs))
        elif not self.in_backward():
            self._depth += 1
            if self._depth == 1:
                self._begin(name, module, args, kwargs)
            elif self.paths is not None:
                self.paths.enter(name)
        site = self._repeated.get(id(module))
        if site is not None:
            self._before(site, module, args, kwargs)
            self._repeating += bool(site.slots.filled)
        return None

    @unfollowed
    def _begin(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The outermost call begins."""
        sized = [t.shape[self.axis] for t in tensors_of((args, kwargs)) if t.dim() > self.axis]
        self._rows = sized[0] if sized else None
        self._repeating = 0
        self._lifter.begin(self._rows)
        if not torch.is_grad_enabled():
            return
        if self.observer is not None:
            self.observer.begins(name, module, args, kwargs)
        if self._capturing():
            self._outermost = (name, module, args, kwargs)
            self._learn()
            self._buffers = self._written()
            for site in self._sites:
                self._lift_outside(site)
            if self.paths is not None:
                self.paths.start(name, self._rows)

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if self._running:
            return None
        site = self._repeated.get(id(module))
        replaced = None
        if site is not None and site.slots.filled:
            self._repeating -= 1
            replaced = self._after(site, module, args, kwargs, output)
        if self._lifter.trial is not None:
            self._lifter.trial.leave(output)
        elif not self.in_backward():
            self._depth = max(0, self._depth - 1)
            if self.paths is not None and self._depth:
                self.paths.leave()
            if self._depth == 0:
                return self._end(output, replaced)
        return replaced

    @unfollowed
    def _end(self, output: Any, replaced: Any) -> Any:
        """The outermost call ends."""
        if self.paths is not None:
            self.paths.stop()
        self._empty_outside()
        self._outermost = None
        self._check_buffers()
        lowered = self._lifter.lower(output)
        result = replaced if lowered is output else lowered
        if self.hooks_enabled and torch.is_grad_enabled():
            call = None if self.observer is None else self.observer.ends()
            self._watch(call, output if result is None else result)
        return result

    def _watch(self, call: Any, output: Any) -> None:
        """Be told when a backward pass comes to the outputs of an outermost call."""
        floats = [t for t in tensors_of(output) if t.is_floating_point()]
        for index, tensor in enumerate(floats):
            if tensor.grad_fn is not None:
                # What is kept of the call lives as long as its graph does.
                arrived = functools.partial(self._arrived, call, self.serial, index, tensor.output_nr)
                tensor.grad_fn.register_prehook(arrived)

    def _arrived(self, call: Any, serial: int, index: int, output_nr: int, grads: tuple[Tensor | None, ...]) -> None:
        if not self.hooks_enabled or grads[output_nr] is None:
            return
        if self.observer is not None:
            self.observer.reached(call, index)
        if self._refilled is None and any(site.lifts or site.outside for site in self._sites):
            self._pass(serial)  # whose end is the end of this
            self._refilled = torch._C._current_graph_task_id()
            self._refill()

    def _refill(self) -> None:
        """Lift what was lifted in the forward pass: checkpointing runs parts of modules again, without calling those."""
        for site in self._sites:
            self._refill_site(site)

    def _refill_site(self, site: _Site) -> None:
        if site.lifts and not site.slots.filled and id(site.module) not in self._repeated:
            prefix = f"{site.name}." if site.name else ""
            site.slots.fill({n: self._lifter.lift(p, prefix + n) for n, p in site.slots.params.items()})
        else:
            self._lift_outside(site)

    def _lifts_outside(self) -> bool:
        """Whether parameters used outside their module are lifted now."""
        if self._lifter.trial is not None:
            return True
        return self._refilled is not None if self.in_backward() else self._outermost is not None

    def in_backward(self) -> bool:
        """Whether a backward pass is running, so that what is run forwards is run again."""
        return torch._C._current_graph_task_id() not in (-1, self._aside)

    def _written(self) -> dict[str, tuple[Tensor, int]]:
        """Floating-point buffers with the number of times they were written to."""
        return {n: (b, b._version) for n, b in self._module.named_buffers() if b.is_floating_point()}

    def _check_buffers(self) -> None:
        """Refuse a forward pass that wrote to a buffer: what comes from private samples gets no noise there."""
        before, self._buffers = self._buffers, {}
        after = self._written() if before else {}
        changed = []
        for name, (buffer, version) in before.items():
            now, times = after.get(name, (None, 0))
            if now is buffer:
                written = times != version
            else:
                written = (
                    now is None or now.shape != buffer.shape or not torch.equal(now.nan_to_num(), buffer.nan_to_num())
                )
            if written:
                changed.append(name)
        if changed:
            raise UnsupportedModelError(
                f"{', '.join(changed)}: written during the forward pass. What is written to buffers from private samples gets "
                "no noise. Remedy: call .eval() on the module that does it, or replace it."
            )

    def _current_rows(self) -> int | None:
        # Inside a backward pass a checkpointed part of the model is run again: the rows are those of the forward pass.
        return self._rows if self._depth or self.in_backward() else None

    def _guard(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self.hooks_enabled and mixes_samples(module) and (module.training or torch.is_grad_enabled()):
            raise UnsupportedModelError(f"{name} ({type(module).__name__}): {mixing_reason(module)}.")

    @unfollowed
    def _before(self, site: _Site, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._running or self._repeating:
            return
        if self._twice is not None and self._lifter.trial is None and not self.in_backward():
            self._twice.used(list(site.slots.params.values()))
        for filled in (site, *site.inner):  # in use outside, or an interrupted forward could not put them back
            if filled.slots.filled:
                filled.slots.restore()
        if not self._capturing() or not site.slots.trainable():
            return
        self._check_own(site)
        inputs = tensors_of((args, kwargs))
        site.captures, site.entry = not site.lifts and not any(isinstance(t, Lifted) for t in inputs), None
        if site.captures:
            site.entry = self._lifter.call_of(site.name, inputs)
            if site.entry is not None and site.entry.shared:
                site.captures = False
                self._lifter.note_shared(site.name, site.entry)
        if site.captures:
            site.slots.detach()
        else:
            prefix = f"{site.name}." if site.name else ""
            site.slots.fill({n: self._lifter.lift(p, prefix + n) for n, p in site.slots.params.items()})

    def _check_own(self, site: _Site) -> None:
        """Refuse to run with other parameters than those that are trained."""
        if foreign := site.slots.foreign():
            raise UnsupportedModelError(
                f"{site.name or 'the model'}: {', '.join(foreign)} is not the parameter that was there when the scope began "
                "(torch.func.functional_call, load_state_dict(assign=True), a new nn.Parameter). Remedy: change values in "
                "place (load_state_dict without assign), or enter a new scope."
            )

    def _empty_outside(self) -> None:
        refilled, self._refilled = self._refilled is not None, None
        for site in self._sites:
            if site.outside or (refilled and site.slots.filled):
                site.slots.restore()

    def _lift_outside(self, site: _Site) -> None:
        """Lift the parameters that are used outside their own module, for as long as the outermost call runs."""
        if site.outside and not site.slots.filled:
            self._check_own(site)
            prefix = f"{site.name}." if site.name else ""
            lifted = {n: self._lifter.lift(p, prefix + n, n in site.outside) for n, p in site.slots.params.items()}
            site.slots.fill({n: t if n in site.outside else site.slots.params[n] for n, t in lifted.items()})

    @unfollowed
    def _after(self, site: _Site, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if self._running or self._repeating:
            return None
        ran_filled = site.slots.filled
        if ran_filled:
            site.slots.restore()
        if self._lifts_outside():  # also after a call without gradients, which emptied them
            for emptied in (site, *site.inner):
                self._lift_outside(emptied)
        if not ran_filled or not self._capturing() or not site.captures:
            return None
        if any(isinstance(value, PackedSequence) for value in (*args, *kwargs.values())):
            raise UnsupportedModelError(
                f"{site.name or 'the model'} ({type(module).__name__}): got a PackedSequence, in which the rows of the "
                "samples are interleaved. Remedy: pass the padded tensor, and pick the last valid output by length."
            )
        outputs = _differentiable(output)
        if self._lifter.trial is not None:
            repeated = id(site.module) in self._repeated
            if repeated:  # on each sample alone, it gives back what belongs to that sample
                self._lifter.trial.unmark(outputs)
            self._lifter.note_call(site.name, site.entry, outputs, repeated=repeated)
            return None
        if not outputs:
            return None
        skeleton, inputs = split((args, kwargs))
        plain = all(type(t) is Tensor for t in (*inputs, *outputs))  # others may have something to say
        with torch._C.DisableTorchFunction() if plain else nullcontext():
            names = site.slots.trainable()
            autocast = autocast_dtype(outputs[0].device.type)
            make = functools.partial(self._captured, site, site.entry, self._current_rows(), skeleton, names, autocast)
            tapped = iter(
                self._tap(outputs, _Use(self, site.name, self.serial, [t.detach() for t in inputs], make, site))
            )
        if isinstance(output, Tensor):
            return next(tapped)
        whole, tensors = split(output)
        return join(whole, [next(tapped) if any(t is o for o in outputs) else t for t in tensors])

    def tap(self, outputs: Sequence[Tensor], saved: list[Tensor], name: str, make: Make) -> list[Tensor]:
        """Return ``outputs``, watched: ``make`` is called with the tensors saved and the gradients that come back."""
        return self._tap(outputs, _Use(self, name, self.serial, saved, make))

    def _tap(self, outputs: Sequence[Tensor], use: _Use) -> list[Tensor]:
        return list(_Tap.apply(self.token, use, *outputs))

    # ---------------------------------------------------------------- trials

    @unfollowed
    def try_again(self) -> None:
        """Learn anew in the middle of a forward pass, from the call that is running."""
        if self._outermost is None or self.in_backward():
            return
        held = [
            (site, {name: owner._parameters[key] for owner, key, name in site.slots.places}, site.captures, site.entry)
            for site in self._sites
            if site.slots.filled
        ]
        self._learn(again=True)
        for site, tensors, captures, entry in held:
            site.slots.fill(tensors)  # type: ignore[arg-type]
            site.captures, site.entry = captures, entry
        for site in self._sites:
            self._lift_outside(site)

    def _learn(self, again: bool = False) -> None:
        """Find out, once per outermost module and mode, which axes count samples, by runs on other numbers of rows."""
        assert self._outermost is not None
        name, module, args, kwargs = self._outermost
        axes, rows = self._lifter.axes, self._rows
        key, telling = (name, module.training), (name, module.training, "several")
        self._lifter.strict = key in axes.shown
        if not rows or (not again and (telling in axes.tried or (rows == 1 and key in axes.tried))):
            return
        for site in self._sites:
            if site.slots.filled:  # an interrupted forward could not put them back
                site.slots.restore()
            if site.slots.foreign():
                return  # a trial would put them back
        axes.tried |= {key} if rows == 1 else {key, telling}
        # In the middle of a pass, go the way that it went so far.
        draws = self.paths.drawn_inside if again and self.paths is not None else None
        trials: list[Trial] = []
        counts = numbers_of_rows(self._module, (args, kwargs))
        done = False
        while not done:
            count, tints = counts[len(trials)], rows > 1 and len(trials) == 1
            trial = self._try(module, args, kwargs, rows, count, draws, tints=tints)
            if tints and (trial is None or trial.strayed):
                tinted, trial = trial, self._try(module, args, kwargs, rows, count, draws, orders=True)
                if tinted is not None and trial is not None and self._repeat_one(tinted.led_astray(trial)):
                    trials = []
                    continue
            if trial is None:
                return
            trials.append(trial)
            done = len(trials) == len(counts) or (len(trials) > 1 and BatchAxes.agree(trials))
            if self._repeat_where_needed(trials, done):
                trials, done = [], False  # what is repeated as a whole is tried anew
        axes.learn(trials)
        axes.shown.add(key)
        self._lifter.strict = True
        for site in self._sites:
            prefix = f"{site.name}." if site.name else ""
            whole = self._repeated.get(id(site.module)) is site  # its parameters are those of the sites inside
            touched = [n for n in site.slots.params if self._lifter.is_touched(prefix + n)]
            site.outside = () if whole else tuple(touched)

    def _repeat_where_needed(self, trials: list[Trial], done: bool) -> bool:
        """Have modules repeated sample by sample where rows are picked by their values inside; whether any is new."""
        wanted = [(frame.name, frame.module) for trial in trials for frame in trial.frames if frame.repeat]
        for key, agreed in BatchAxes.merged(trials).items() if done else ():
            if agreed is None or any(entry.is_routed for entry in agreed):
                around = [trial.repeated_module(e) for trial in trials for e in trial.entries.get(key, [])]
                wanted += [found for found in around if found is not None]
        new = False
        for name, module in wanted:
            if id(module) not in self._repeated:
                self._repeat(name, module)
                new = True
        return new

    def _repeat_one(self, calls: Sequence[tuple[str, nn.Module]]) -> bool:
        """Have the first of ``calls`` repeated that is not yet; whether there is one."""
        for name, module in calls:
            if id(module) not in self._repeated:
                self._repeat(name, module)
                return True
        return False

    def _repeat(self, name: str, module: nn.Module) -> None:
        """From now on, repeat ``module`` on each sample, whatever is inside."""
        below = {id(m) for m in module.modules()}
        inner = tuple(site for site in self._sites if id(site.module) in below)
        site = _Site(name, module, GENERIC, ParameterSlots(module, recurse=True), inner=inner)
        self._repeated[id(module)] = site
        self._sites.append(site)

    def _try(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        rows: int,
        count: int,
        draws: Draws | None,
        *,
        tints: bool = False,
        orders: bool = False,
    ) -> Trial | None:
        """Run ``module`` on ``count`` rows, without gradients or random numbers, and leave no trace."""
        lifter = self._lifter
        kept = (lifter.rows, lifter.counts, self._repeating)
        trial = Trial(count, telling=rows > 1, tints=tints, orders=orders)
        few = tree_map(
            lambda leaf: rows_for_trial(leaf, rows, count, self.axis) if isinstance(leaf, Tensor) else leaf,
            (args, kwargs),
        )
        buffers = [(b, b.detach().clone()) for b in module.buffers()]
        devices = sorted({p.device.index or 0 for p in module.parameters() if p.device.type == "cuda"})
        lifter.trial, lifter.rows, lifter.counts = trial, count, {}
        try:
            with (
                attributes_kept(module),
                torch.random.fork_rng(devices=devices),
                other_generators_kept(),
                torch.enable_grad(),
                NoDropout(draws) as without,
                trial.watching(),
            ):
                without.begin_again()
                for site in self._sites:
                    if id(site.module) not in self._repeated:
                        site.outside = tuple(site.slots.params)
                        self._lift_outside(site)
                module(*few[0], **few[1])
        except _CANNOT_RUN:
            trial.check_inputs()
            return None
        finally:
            for site in self._sites:
                site.outside = ()
                if site.slots.filled:
                    site.slots.restore()
            lifter.trial = None
            lifter.rows, lifter.counts, self._repeating = kept
            with torch.no_grad():
                for buffer, value in buffers:
                    if not torch.equal(buffer, value):
                        buffer.copy_(value)
        trial.check_inputs()
        return trial

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

    def leaked(self, param: nn.Parameter) -> None:
        """Take note that autograd delivered a gradient to what stands for ``param``."""
        self._leaked(param)

    def _record(self, use: _Use, saved: Callable[[], list[Tensor]], grads: list[Tensor | None]) -> None:
        if torch.is_grad_enabled():
            raise UnsupportedModelError(
                f"{use.name or 'the model'}: a backward pass with create_graph=True went through a managed layer "
                "(gradient penalty, second derivatives). Its per-sample gradients cannot be captured. Remedy: drop the "
                "penalty, or freeze the layers it goes through."
            )
        if not torch._C._will_engine_execute_node(self._token_node):
            return  # torch.autograd.grad(loss, something else)
        opened = self._pass(use.serial)
        if use.serial != opened.serial or (self._samples is not None and use.serial != self._serial):
            raise ScopeError(
                "gradients of an earlier logical batch are still waiting: they cannot be accumulated over batches. "
                "Call opt.step() for every batch, or opt.zero_grad() to drop them. For large batches set a larger "
                "batch_size in the loader and max_physical_batch_size in the scope."
            )
        with self._own_parameters(use.site):
            try:
                for source in use.make(saved(), [None if g is None else g.detach() for g in grads]):
                    opened.sizes.add((source.name, source.samples))
                    opened.found.extend(self._reduced(source))
            except UnsupportedModelError as error:
                self._refuse(opened, error, use.name)

    def _refuse(self, opened: _Pass, error: UnsupportedModelError, where: str) -> None:
        """Go on to the end of the pass, so that all that stands in the way is named."""
        if str(error) not in map(str, opened.refusals):
            opened.refusals.append(error)

    @contextmanager
    def _own_parameters(self, site: _Site | None) -> Iterator[None]:
        """Rules find the parameters of a module in the module, also while they are lifted for a part that is run again."""
        filled = [] if site is None or self._refilled is None else [s for s in (site, *site.inner) if s.slots.filled]
        for one in filled:
            one.slots.restore()
        try:
            yield
        finally:
            for one in filled:
                self._refill_site(one)

    def _reduced(self, source: _Contribution) -> list[Source]:
        """Work out at once what is wanted at once, or what takes no more memory afterwards, and let go of what it came from."""
        # backward() may be called inside the user's autocast, which is not for sums
        with autocast_as(source.params[0].device.type, None):
            if self._twice is not None:
                return self._twice.receive(source, source.name)
            if self.grad_sample_mode == "ghost":
                return source.condensed() if isinstance(source, Captured) else [source]
            if isinstance(source, Captured):
                return [Stored(source.all_grads(), source.samples, source.name)]
            written = {p: source.grads(p, slice(None)) for p in source.params}
            return [Stored(written, source.samples, source.name)]

    def scale(self, samples: int) -> float:
        """The factor that undoes the mean over the batch."""
        return float(samples) if self.loss_reduction == "mean" else 1.0

    def _captured(
        self,
        site: _Site,
        entry: Entry | None,
        rows: int | None,
        skeleton: Any,
        names: tuple[str, ...],
        autocast: torch.dtype | None,
        saved: list[Tensor],
        grads: list[Tensor | None],
    ) -> list[_Contribution]:
        """Make the source for one call of a module whose rule works on the whole call."""
        rule = site.rule
        axis = self.axis if rule.batch_dim is None else rule.batch_dim
        first = next(g for g in grads if g is not None)
        if rows is None:
            rows = first.shape[axis] if first.dim() > axis else 0
        args, kwargs = join(skeleton, saved)
        if rows == 0:
            params = [site.slots.params[name] for name in names]
            return [Stored({p: p.new_zeros((0, *p.shape)) for p in params}, 0, site.name)]
        run = functools.partial(self._rerun, site, autocast, first.device.type)
        call = Call(site.module, site.name, args, kwargs, grads, rows, axis, names, run, site.memo)
        if entry is not None:
            rule, call = samples_apart(rule, call, entry)
        check_samples(rule, call)
        return [Captured(call, rule, self.scale(rows))]

    def _finish_pass(self, task: int) -> None:
        """Runs at the end of a backward pass; one that was broken off never gets here."""
        if task == self._refilled:
            self._empty_outside()
        finished = self._open.pop(task, None)
        if finished is None:
            return
        found = finished.found
        if self._leaks:
            leaks, self._leaks = self._leaks, []
            names = ", ".join(sorted({self.name_of(p) for p in leaks}))
            leaked = UnsupportedModelError(
                f"{names}: used where no hook saw it, so its gradient arrived summed over the batch. It was dropped, and "
                "nothing was released. This happens when a weight is used outside its module's forward "
                "(F.linear(h, other.weight)) in a way that could not be followed. Remedy: use the weight through its module, or "
                "freeze it."
            )
            self._refuse(finished, leaked, names)
        if finished.refusals:
            raise _all_of(finished.refusals)
        sizes = {samples for _, samples in finished.sizes}
        if self._samples is not None:
            sizes.add(self._samples)
        if len(sizes) > 1:
            listing = ", ".join(sorted(f"{name or 'the model'}: {n}" for name, n in finished.sizes)[:8])
            raise ScopeError(
                f"different numbers of samples ({sorted(sizes)}) met in one step ({listing}). Backward passes between two "
                "steps must be over the same samples, one row each. Call opt.step() or opt.zero_grad() in between."
            )
        if not sizes:
            return
        self._samples, self._serial = sizes.pop(), finished.serial
        if self.grad_sample_mode == "ghost":
            self._pending.extend(found)
            return
        if self.observer is not None:  # p.grad_sample can be read from now on
            try:
                self.observer.captured(self._samples)
            except BaseException:
                self.discard()
                raise
        self._promote(found)

    def _promote(self, found: list[Source]) -> None:
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
        for param in self.params:  # what the loss does not reach has a gradient, too: zero, in one place of memory
            if param.requires_grad and "grad_sample" not in vars(param):
                self._unreached[param] = param.new_zeros(()).expand(self.samples, *param.shape)
                _store(param, self._unreached[param])

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
            unreached, self._unreached = self._unreached, {}
            stored = {
                p: g
                for p in self.params
                if isinstance(g := vars(p).get("grad_sample"), Tensor) and g is not unreached.get(p)
            }
            self._consumed = True
            return SampleGradients(samples, [Stored(stored, samples, "")])
        if self._twice is not None:
            again = self.repeat_backward
            assert again is not None  # set together with the first backward pass
            return TwoPassGradients(samples, pending, self._twice, again)
        return SampleGradients(samples, pending)

    @contextmanager
    def two_passes(self) -> Iterator[None]:
        """Take norms in the first backward pass of this context and sums in a second, which ``repeat_backward`` runs.

        What is captured is let go at once; see :class:`~dp_hooks.two_pass.TwoPass`.
        """
        self._twice = TwoPass()
        try:
            yield
        finally:
            self._twice = self.repeat_backward = None
            self._reset()

    def discard(self) -> None:
        """Drop what was captured since the last boundary, ``grad_sample`` included."""
        self._reset()
        self._consumed = False
        self._unreached = {}
        for param in self.params:
            _clear(param)

    @contextmanager
    def separate(self) -> Iterator[None]:
        """Capture something else in between: what was captured before is back, unchanged, afterwards."""
        names = (
            "_open",
            "_leaks",
            "_rows",
            "_depth",
            "_pending",
            "_samples",
            "_serial",
            "_consumed",
            "_unreached",
            "_twice",
            "_aside",
            "_refilled",
        )
        kept, lifter = {name: getattr(self, name) for name in names}, self._lifter.state()
        samples = {p: vars(p)["grad_sample"] for p in self.params if "grad_sample" in vars(p)}
        for p in samples:
            _clear(p)
        self._open, self._consumed, self._unreached, self._twice = {}, False, {}, None
        self._aside = torch._C._current_graph_task_id()
        self._reset()
        try:
            yield
        finally:
            self.discard()
            self._lifter.set_state(lifter)
            for name, value in kept.items():
                setattr(self, name, value)
            if self._refilled is not None:
                self._refill()
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
        if self._outermost is not None and self.paths is not None:  # the pass was interrupted
            self.paths.stop()
        self._outermost = self._refilled = None
        for site in self._sites:
            if site.slots.filled:  # an interrupted forward could not put the parameters back
                site.slots.restore()
        self._open = {}
        self._leaks = []
        self._depth = 0
        self._pending = []
        self._samples = None


def _all_of(refusals: list[UnsupportedModelError]) -> UnsupportedModelError:
    if len(refusals) == 1:
        return refusals[0]
    listing = "\n".join(f"  - {error}" for error in refusals)
    return UnsupportedModelError(f"the model cannot be trained privately, for {len(refusals)} reasons:\n{listing}")


def _differentiable(tree: Any) -> list[Tensor]:
    with torch._C.DisableTorchFunction():
        return [t for t in tensors_of(tree) if t.is_floating_point() or t.is_complex()]


def _store(param: nn.Parameter, grads: Tensor) -> None:
    """Set ``param.grad_sample``, and see to it that it does not travel along when ``param`` is pickled."""
    vars(param)["grad_sample"] = grads
    vars(param)["__getstate__"] = functools.partial(_state_without_gradients, param)


def _clear(param: nn.Parameter) -> None:
    vars(param).pop("grad_sample", None)
    vars(param).pop("__getstate__", None)


def _state_without_gradients(param: nn.Parameter) -> dict[str, Any]:
    return {key: value for key, value in vars(param).items() if key not in ("grad_sample", "__getstate__")}
