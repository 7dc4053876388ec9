"""The modules of a model whose calls are captured, and what stands in the place of their parameters meanwhile."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .._rerun import autocast_as
from ..errors import UnsupportedModelError
from ..rules import GENERIC, Rule, RuleTable
from .calls.parameter_swap import ParameterSwap
from .calls.session import Session
from .calls.undisturbed import attributes_kept
from .samples.tracker import Tracker
from .samples.uses import UseLayout


@dataclass(eq=False)
class HookedModule:
    """A module whose calls are captured, with the rule for it."""

    name: str  # its qualified name in the model
    module: nn.Module
    rule: Rule  # what turns its captured calls into per-sample gradients
    swap: ParameterSwap  # where its parameters are stored
    tracks: bool = False  # its parameters are tracked in every call, since no rule covers what it does with them
    use: UseLayout | None = None  # what probes have shown of the call that is running
    captures: bool = False  # whether that call is captured for the rule
    outside: tuple[str, ...] = ()  # names of parameters that are used outside the module, too
    inner: tuple["HookedModule", ...] = ()  # hooked modules inside a module that is repeated as a whole
    memo: dict[str, Any] = field(default_factory=dict)  # what its rule keeps from call to call

    def full_name(self, name: str) -> str:
        """The name in the model of its parameter ``name``."""
        return f"{self.name}.{name}" if self.name else name

    def check_own(self) -> None:
        """Refuse to run with other parameters than those that are trained."""
        if foreign := self.swap.foreign():
            raise UnsupportedModelError(
                f"{self.name or 'the model'}: {', '.join(foreign)} is not the parameter that was there when the scope began "
                "(torch.func.functional_call, load_state_dict(assign=True), a new nn.Parameter). Remedy: change values in "
                "place (load_state_dict without assign), or enter a new scope."
            )

    def track(self, tracker: Tracker) -> None:
        """Track all parameters, for a call."""
        self.swap.put({n: tracker.track(p, self.full_name(n)) for n, p in self.swap.params.items()})

    def track_outside(self, tracker: Tracker) -> None:
        """Track the parameters that are used outside their own module, for as long as the outermost call runs."""
        if self.outside and not self.swap.swapped:
            self.check_own()
            tracked = {n: tracker.track(p, self.full_name(n), n in self.outside) for n, p in self.swap.params.items()}
            self.swap.put({n: t if n in self.outside else self.swap.params[n] for n, t in tracked.items()})


class HookedModules:
    """All hooked modules of a model, in the order of its modules; those that are repeated as a whole come last."""

    def __init__(self, model: nn.Module, rules: RuleTable, session: Session, tracker: Tracker) -> None:
        self._model = model
        self._rules = rules
        self._session = session
        self._tracker = tracker
        self._all: list[HookedModule] = []
        self._repeated: dict[int, HookedModule] = {}

    def __iter__(self) -> Iterator[HookedModule]:
        return iter(self._all)

    def find(self) -> None:
        """Look through the model."""
        self._all = list(self._find(self._model, "", set()))

    def _find(self, module: nn.Module, name: str, seen: set[int]) -> Iterator[HookedModule]:
        if id(module) in seen:
            return
        seen.add(id(module))
        owns = any(p is not None and p.requires_grad for p in module._parameters.values())
        tracks = self._rules.tracks(module)
        rule = self._rules.find(module)
        # Modules that read the weights of their children: the children's own hooks never fire.
        whole = isinstance(module, nn.MultiheadAttention) if tracks else rule.whole_subtree
        if self._rules.owns_subtree(module) and whole:
            owns = any(p.requires_grad for p in module.parameters())
        if owns:
            yield HookedModule(name, module, rule, ParameterSwap(module, whole, self._session.swapped), tracks)
            if whole:
                return
        for key, child in module.named_children():
            yield from self._find(child, f"{name}.{key}" if name else key, seen)

    def forget(self) -> None:
        """The hooks are gone."""
        self._all = []
        self._repeated = {}

    @property
    def params(self) -> list[nn.Parameter]:
        """The trainable parameters whose gradients are captured, each once."""
        return list({id(p): p for hooked in self for p in hooked.swap.params.values()}.values())

    def swaps(self) -> list[ParameterSwap]:
        """Where their parameters are stored."""
        return [hooked.swap for hooked in self]

    def repeat(self, name: str, module: nn.Module) -> None:
        """From now on, repeat ``module`` on each sample, whatever is inside."""
        below = {id(m) for m in module.modules()}
        inner = tuple(hooked for hooked in self if id(hooked.module) in below)
        swap = ParameterSwap(module, True, self._session.swapped)
        hooked = HookedModule(name, module, GENERIC, swap, inner=inner)
        self._repeated[id(module)] = hooked
        self._all.append(hooked)

    def repeated(self, module: nn.Module) -> HookedModule | None:
        """The one for ``module`` if it is repeated as a whole."""
        return self._repeated.get(id(module))

    def set_outside(self) -> None:
        """Take over from the tracker which parameters are used outside their own module."""
        for hooked in self:
            whole = self.repeated(hooked.module) is hooked  # its parameters are those of the modules inside
            touched = [n for n in hooked.swap.params if self._tracker.is_touched(hooked.full_name(n))]
            hooked.outside = () if whole else tuple(touched)

    def track_outside(self) -> None:
        """Track all parameters that are used outside their own module."""
        for hooked in self:
            hooked.track_outside(self._tracker)
            if hooked.outside and self._tracker.probe is None:
                self._session.sink.used([hooked.swap.params[name] for name in hooked.outside])

    def any_tracked(self) -> bool:
        """Whether any parameter is tracked in some call."""
        return any(hooked.tracks or hooked.outside for hooked in self)

    def track_again(self) -> None:
        """Track what was tracked in the forward pass: checkpointing runs parts of modules again, without calling those."""
        for hooked in self:
            self._track_again(hooked)

    def _track_again(self, hooked: HookedModule) -> None:
        called = type(hooked.module).forward is not nn.Module.forward  # a ParameterDict is not: all uses are outside
        if hooked.tracks and called and not hooked.swap.swapped and self.repeated(hooked.module) is None:
            hooked.track(self._tracker)
        else:
            hooked.track_outside(self._tracker)

    def own_parameters(self, hooked: HookedModule) -> AbstractContextManager[None]:
        """Rules find the parameters of a module in the module, also while they are tracked for a part that is run again."""
        return nullcontext() if self._session.retracked_task is None else self._put_back(hooked)

    @contextmanager
    def _put_back(self, hooked: HookedModule) -> Iterator[None]:
        swapped = [one for one in (hooked, *hooked.inner) if one.swap.swapped]
        for one in swapped:
            one.swap.restore()
        try:
            yield
        finally:
            for one in swapped:
                self._track_again(one)

    def rerun(
        self,
        hooked: HookedModule,
        autocast: torch.dtype | None,
        device: str,
        tensors: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Call a module with other tensors as parameters, capturing nothing and leaving nothing."""
        self._session.rerunning += 1
        try:
            with attributes_kept(hooked.module), autocast_as(device, autocast):
                hooked.swap.put(tensors)
                try:
                    return hooked.module(*args, **kwargs)
                finally:
                    hooked.swap.restore()
        finally:
            self._session.rerunning -= 1
