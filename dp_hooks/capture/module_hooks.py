"""Hooks put on modules from outside, of which copies and pickles of the modules know nothing."""

import copy
import functools
from collections import OrderedDict
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from .calls.parameter_swap import ParameterSwap

# Put on hooked modules and taken away with the hooks: they make copies and pickles come out without hooks.
_ON_MODULES = ("__getstate__", "__deepcopy__")
_HOOK_DICTS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
)


def _nothing(*args: Any, **kwargs: Any) -> None:
    """What a copy has in the place of a hook of ours, where it has one: the handle of another hook holds the dictionary of all."""


class _Hook(functools.partial[Any]):
    """A hook of ours."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return _nothing

    def __reduce__(self) -> tuple[Any, ...]:
        return _no_hook, ()


def _no_hook() -> Callable[..., None]:
    return _nothing


def _take_out(module: nn.Module, number: int) -> None:
    """Remove a hook. The garbage collector, which may end a scope, has emptied the weak references in its handle by then."""
    for name in _HOOK_DICTS:
        getattr(module, name).pop(number, None)


def _is_of_others(hook: Any) -> bool:
    """Whether it is no hook of PyTorch's own (weight norm in its old form)."""
    return not str(getattr(hook, "__module__", None) or type(hook).__module__).startswith("torch.")


def hooks_everywhere() -> bool:
    """Whether there are hooks of the user on all modules that there are."""
    everywhere = nn.modules.module
    hooks = (everywhere._global_forward_hooks, everywhere._global_forward_pre_hooks)
    return any(_is_of_others(hook) for some in hooks for hook in some.values())


class ModuleHooks:
    """Knows which hooks are ours, so that copies of hooked modules come out with the user's hooks and parameters only."""

    def __init__(self, swaps: Callable[[], Iterable[ParameterSwap]]) -> None:
        """``swaps`` tells where other tensors may stand in the place of parameters."""
        self._swaps = swaps
        self._ids: dict[int, set[int]] = {}

    def attach(
        self,
        stack: ExitStack,
        module: nn.Module,
        before: Callable[..., Any],
        after: Callable[..., Any] | None,
        *,
        outer: bool = False,
    ) -> None:
        """Hook ``before`` and ``after`` onto ``module`` until ``stack`` unwinds; until then copies of it go without them.

        Unless ``outer``, captured inputs and outputs are what forward itself saw and returned, within users' hooks.
        """
        ids = self._clean_copies_of(module, stack)
        handle = module.register_forward_pre_hook(_Hook(before), prepend=True, with_kwargs=True)
        stack.callback(_take_out, module, handle.id)
        ids.add(handle.id)
        if after is not None:
            handle = module.register_forward_hook(_Hook(after), prepend=not outer, with_kwargs=True, always_call=True)
            stack.callback(_take_out, module, handle.id)
            ids.add(handle.id)

    @staticmethod
    def accepts(module: nn.Module) -> bool:
        """Whether hooks can be put on ``module``: not on scripted ones, which have nothing trainable either."""
        return not isinstance(module, torch.jit.ScriptModule)

    def has_others(self, module: nn.Module) -> bool:
        """Whether ``module`` has forward hooks that are not ours."""
        ours = self._ids.get(id(module), set())
        return any(key not in ours for key in module._forward_hooks)

    def are_given(self, module: nn.Module) -> bool:
        """Whether hooks that are neither ours nor PyTorch's get inputs or outputs of ``module``."""
        ours = self._ids.get(id(module), set())
        hooks = (module._forward_hooks, module._forward_pre_hooks)
        if ours.issuperset(hooks[0]) and ours.issuperset(hooks[1]):
            return False
        return any(key not in ours and _is_of_others(hook) for some in hooks for key, hook in some.items())

    def forget(self) -> None:
        """The hooks are gone."""
        self._ids = {}

    def _clean_copies_of(self, module: nn.Module, stack: ExitStack) -> set[int]:
        """Let copies of ``module`` go without hooks of ours; returns the set of their ids."""
        if id(module) not in self._ids:
            self._ids[id(module)] = set()
            vars(module)["__getstate__"] = functools.partial(self._state_of, module)
            vars(module)["__deepcopy__"] = functools.partial(self._copy_of, module)
            for name in _ON_MODULES:
                stack.callback(vars(module).pop, name, None)
        return self._ids[id(module)]

    def _state_of(self, module: nn.Module) -> dict[str, Any]:
        """State for ``pickle`` and ``copy``: the module as it would be without hooks."""
        own = getattr(type(module), "__getstate__", None)
        default = getattr(object, "__getstate__", None)
        return self._without_hooks(module, vars(module) if own is None or own is default else own(module))

    def _without_hooks(self, module: nn.Module, attributes: dict[str, Any]) -> dict[str, Any]:
        state = {key: value for key, value in attributes.items() if key not in _ON_MODULES}
        ours = self._ids.get(id(module), set())
        for key in _HOOK_DICTS:
            state[key] = OrderedDict((k, v) for k, v in state[key].items() if k not in ours)
        originals = {(id(owner), key): swap.params[name] for swap in self._swaps() for owner, key, name in swap.places}
        state["_parameters"] = {key: originals.get((id(module), key), param) for key, param in state["_parameters"].items()}
        return state

    def _copy_of(self, module: nn.Module, memo: dict[int, Any]) -> Any:
        """``copy.deepcopy`` while our hooks are taken out of the module's own dictionaries, to which handles of the user refer."""
        kept, clean = dict(vars(module)), self._without_hooks(module, vars(module))
        hooks = {key: (kept[key], list(kept[key].items())) for key in _HOOK_DICTS}
        try:
            for key, (dictionary, _) in hooks.items():
                mine = clean[key]
                for number in [number for number in dictionary if number not in mine]:
                    del dictionary[number]
                clean[key] = dictionary
            vars(module).clear()
            vars(module).update(clean)
            return copy.deepcopy(module, memo)  # now without this method
        finally:
            vars(module).clear()
            vars(module).update(kept)
            for dictionary, items in hooks.values():
                dictionary.clear()
                dictionary.update(items)


def is_hooked(module: nn.Module) -> bool:
    """Whether ``module`` has hooks of ours."""
    state = vars(module).get("__getstate__")
    return isinstance(state, functools.partial) and isinstance(getattr(state.func, "__self__", None), ModuleHooks)
