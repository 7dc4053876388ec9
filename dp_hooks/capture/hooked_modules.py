"""The modules of a model whose calls are captured, and what stands in the place of their parameters meanwhile."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..errors import UnsupportedModelError
from ..rules import GENERIC, Rule, RuleTable
from .parameter_swap import ParameterSlots, attributes_kept, autocast_as
from .samples.probe import Entry
from .samples.tracker import Lifter


@dataclass(eq=False)
class Site:
    """A module whose calls are captured, with the rule for it.

    Attributes:
        name: its qualified name in the model.
        module: the module itself.
        rule: what turns its captured calls into per-sample gradients.
        slots: where its parameters are stored.
        lifts: its parameters are lifted in every call, since no rule covers what it does with them.
        entry: what trials have shown of the call that is running.
        captures: whether that call is captured for the rule.
        outside: names of parameters that are used outside the module, too.
        inner: sites inside a module that is repeated as a whole.
        memo: what its rule keeps from call to call.
    """

    name: str
    module: nn.Module
    rule: Rule
    slots: ParameterSlots
    lifts: bool = False
    entry: Entry | None = None
    captures: bool = False
    outside: tuple[str, ...] = ()
    inner: tuple["Site", ...] = ()
    memo: dict[str, Any] = field(default_factory=dict)

    def full_name(self, name: str) -> str:
        """The name in the model of its parameter ``name``."""
        return f"{self.name}.{name}" if self.name else name

    def check_own(self) -> None:
        """Refuse to run with other parameters than those that are trained."""
        if foreign := self.slots.foreign():
            raise UnsupportedModelError(
                f"{self.name or 'the model'}: {', '.join(foreign)} is not the parameter that was there when the scope began "
                "(torch.func.functional_call, load_state_dict(assign=True), a new nn.Parameter). Remedy: change values in "
                "place (load_state_dict without assign), or enter a new scope."
            )

    def lift(self, lifter: Lifter) -> None:
        """Lift all parameters, for a call."""
        self.slots.fill({n: lifter.lift(p, self.full_name(n)) for n, p in self.slots.params.items()})

    def lift_outside(self, lifter: Lifter) -> None:
        """Lift the parameters that are used outside their own module, for as long as the outermost call runs."""
        if self.outside and not self.slots.filled:
            self.check_own()
            lifted = {n: lifter.lift(p, self.full_name(n), n in self.outside) for n, p in self.slots.params.items()}
            self.slots.fill({n: t if n in self.outside else self.slots.params[n] for n, t in lifted.items()})


class Sites:
    """All sites of a model, in the order of its modules; those of modules that are repeated as a whole come last.

    Attributes:
        repeating: how many modules that are repeated as a whole are running: what is inside is theirs.
        rerunning: how many modules are being called with tensors of ours, for gradients.
    """

    def __init__(self, model: nn.Module, rules: RuleTable, lifter: Lifter) -> None:
        """There are none until :meth:`find`."""
        self._model = model
        self._rules = rules
        self._lifter = lifter
        self._all: list[Site] = []
        self._repeated: dict[int, Site] = {}
        self.repeating = 0
        self.rerunning = 0

    def __iter__(self) -> Iterator[Site]:
        return iter(self._all)

    # ---------------------------------------------------------------- which there are

    def find(self) -> None:
        """Look through the model."""
        self._all = list(self._find(self._model, "", set()))

    def _find(self, module: nn.Module, name: str, seen: set[int]) -> Iterator[Site]:
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
            yield Site(name, module, rule, ParameterSlots(module, recurse=whole), lifts)
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
        return list({id(p): p for site in self for p in site.slots.params.values()}.values())

    def slots(self) -> list[ParameterSlots]:
        """Where their parameters are stored."""
        return [site.slots for site in self]

    def repeat(self, name: str, module: nn.Module) -> None:
        """From now on, repeat ``module`` on each sample, whatever is inside."""
        below = {id(m) for m in module.modules()}
        inner = tuple(site for site in self if id(site.module) in below)
        site = Site(name, module, GENERIC, ParameterSlots(module, recurse=True), inner=inner)
        self._repeated[id(module)] = site
        self._all.append(site)

    def repeated(self, module: nn.Module) -> Site | None:
        """The site of ``module`` if it is repeated as a whole."""
        return self._repeated.get(id(module))

    # ---------------------------------------------------------------- what stands in their places

    def lift_outside(self) -> None:
        """Lift all parameters that are used outside their own module."""
        for site in self:
            site.lift_outside(self._lifter)

    def refill(self) -> None:
        """Lift what was lifted in the forward pass: checkpointing runs parts of modules again, without calling those."""
        for site in self:
            self._refill(site)

    def _refill(self, site: Site) -> None:
        if site.lifts and not site.slots.filled and self.repeated(site.module) is None:
            site.lift(self._lifter)
        else:
            site.lift_outside(self._lifter)

    def empty_outside(self, refilled: bool) -> None:
        """The outermost call, or with ``refilled`` the backward pass, is over."""
        for site in self:
            if site.outside or (refilled and site.slots.filled):
                site.slots.restore()

    def restore(self) -> None:
        """Put all parameters back that are not in place."""
        for site in self:
            if site.slots.filled:
                site.slots.restore()

    @contextmanager
    def own_parameters(self, site: Site | None) -> Iterator[None]:
        """Rules find the parameters of a module in the module, also while they are lifted for a part that is run again."""
        filled = [] if site is None else [s for s in (site, *site.inner) if s.slots.filled]
        for one in filled:
            one.slots.restore()
        try:
            yield
        finally:
            for one in filled:
                self._refill(one)

    def rerun(
        self,
        site: Site,
        autocast: torch.dtype | None,
        device: str,
        tensors: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Call the module of ``site`` with other tensors as parameters, capturing nothing and leaving nothing."""
        self.rerunning += 1
        try:
            with attributes_kept(site.module), autocast_as(device, autocast):
                site.slots.fill(tensors)
                try:
                    return site.module(*args, **kwargs)
                finally:
                    site.slots.restore()
        finally:
            self.rerunning -= 1
