"""ModuleCalls: what happens when a hooked module is called: its parameters are swapped, its inputs and outputs captured."""

import functools
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from .._rerun import autocast_dtype
from .._tree import differentiable, join, split, tensors_of
from ..errors import UnsupportedModelError
from ..gradients.terms import Deferred, Instantiated, Term
from ..rules import Call, check_samples
from .calls.gradient_tap import Grads, tap
from .calls.session import Session
from .calls.trace import untraced
from .hooked_modules import HookedModule, HookedModules
from .samples.probe import gradients_wanted
from .samples.split_call import split_call
from .samples.tracked import TrackedTensor, in_transform
from .samples.tracker import Tracker
from .samples.uses import UseLayout

_HALF = frozenset((torch.bfloat16, torch.float16))
_PLAIN = frozenset((Tensor,))


class ModuleCalls:
    """The hooks before and after every call of a hooked module."""

    def __init__(self, session: Session, hooked_modules: HookedModules, tracker: Tracker) -> None:
        self._session = session
        self._hooked_modules = hooked_modules
        self._tracker = tracker

    def capturing(self) -> bool:
        """Whether calls are captured now."""
        session = self._session
        return session.enabled and not session.rerunning and gradients_wanted(self._tracker.probe)

    @untraced
    def before(self, hooked: HookedModule, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Swap the parameters: for detached ones where a rule reads the call, else for tracked ones."""
        session, probe = self._session, self._tracker.probe
        if session.rerunning or session.repeating:
            return
        if probe is None and not session.in_backward():
            session.sink.used(hooked.swap.params.values())
        if session.swapped:
            for swapped in (hooked, *hooked.inner):  # in use outside, or an interrupted forward could not put them back
                if swapped.swap.swapped:
                    swapped.swap.restore()
        if not self.capturing() or not hooked.swap.is_trainable:
            return
        hooked.check_own()
        inputs = tensors_of((args, kwargs))
        if in_transform():
            if probe is None:
                raise UnsupportedModelError(
                    f"{hooked.name or 'the model'} ({type(module).__name__}): it is called in a torch.func transform (vmap, grad, "
                    "jvp, ...), where its samples cannot be followed. Remedy: call the transform inside the forward of a module "
                    "that is given the batch and owns the parameters, or freeze them with requires_grad_(False)."
                )
            probe.note(("call", hooked.name), probe.bypassed(list(hooked.swap.params.values())))
            return
        hooked.captures, hooked.use = not hooked.tracks and TrackedTensor not in map(type, inputs), None
        if hooked.captures:
            hooked.use = self._tracker.call_of(hooked.name, inputs)
            if hooked.use is not None and hooked.use.shared:
                hooked.captures = False
                if probe is not None:
                    probe.note(("call", hooked.name), hooked.use)
        if hooked.captures:
            hooked.swap.detach()
        else:
            hooked.track(self._tracker)

    @untraced
    def after(self, hooked: HookedModule, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Put the parameters back, and return the outputs, watched; None: as they are."""
        session, probe = self._session, self._tracker.probe
        if session.rerunning or session.repeating or session.threads.is_other():
            return None
        ran_swapped = hooked.swap.swapped
        if ran_swapped:
            hooked.swap.restore()
        if (hooked.outside or hooked.inner) and self._tracks_outside():  # also after a call without gradients, which emptied them
            for emptied in (hooked, *hooked.inner):
                emptied.track_outside(self._tracker)
        if not ran_swapped or not self.capturing() or not hooked.captures:
            return None
        if (kwargs or len(args) != 1 or not isinstance(args[0], Tensor)) and any(
            isinstance(value, PackedSequence) for value in (*args, *kwargs.values())
        ):
            raise UnsupportedModelError(
                f"{hooked.name or 'the model'} ({type(module).__name__}): got a PackedSequence, in which the rows of the "
                "samples are interleaved. Remedy: pass the padded tensor, and pick the last valid output by length."
            )
        with torch._C.DisableTorchFunction():
            outputs = differentiable(output)
            rounds = not _HALF.isdisjoint([t.dtype for t in outputs])
        if probe is not None:
            repeated = self._hooked_modules.repeated(hooked.module) is not None
            if repeated:  # on each sample alone, it gives back what belongs to that sample
                probe.unmark(outputs)
            self._tracker.note_call(hooked.name, hooked.use, outputs, repeated=repeated)
            return None
        if not outputs:
            return None
        if rounds and session.call.record is not None:
            session.call.record.rounds = True
        skeleton, inputs = split((args, kwargs))
        plain = _PLAIN.issuperset(map(type, inputs)) and _PLAIN.issuperset(map(type, outputs))  # others may have something to say
        with torch._C.DisableTorchFunction() if plain else nullcontext():
            names, autocast = hooked.swap.trainable(), autocast_dtype(outputs[0].device.type)
            make = functools.partial(self._terms, hooked, hooked.use, session.rows(), skeleton, names, autocast)
            around = functools.partial(self._hooked_modules.own_parameters, hooked)
            watched = tap(session, outputs, [t.detach() for t in inputs], hooked.name, make, around)
        if isinstance(output, Tensor):
            return watched[0]
        tapped, (whole, tensors) = iter(watched), split(output)
        return join(whole, [next(tapped) if any(t is o for o in outputs) else t for t in tensors])

    def _tracks_outside(self) -> bool:
        """Whether parameters used outside their module are tracked now."""
        session = self._session
        if self._tracker.probe is not None:
            return True
        return session.retracked_task is not None if session.in_backward() else session.call.running

    def _terms(
        self,
        hooked: HookedModule,
        use: UseLayout | None,
        rows: int | None,
        skeleton: Any,
        names: tuple[str, ...],
        autocast: torch.dtype | None,
        saved: list[Tensor],
        grads: Grads,
    ) -> list[Term]:
        """Make the term of one call of a module whose rule works on the whole call."""
        session, rule = self._session, hooked.rule
        axis = session.axis if rule.batch_dim is None else rule.batch_dim
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
        check_samples(call)
        return [Deferred(call, rule, session.scale(rows), hooked.swap.names_of(names))]
