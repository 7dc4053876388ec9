"""Snapshots of everything a user owns."""

from typing import Any

from torch import nn


class Snapshot:
    """All objects a user can see on a model, an optimizer and a loss function, to be compared by identity later."""

    def __init__(self, model: nn.Module, *others: Any) -> None:
        self._model = model
        self._others = others
        self._before = self._look()

    def _look(self) -> dict[str, Any]:
        seen: dict[str, Any] = {"state_dict keys": tuple(self._model.state_dict())}
        for name, module in self._model.named_modules():
            seen[f"{name} itself"] = module
            seen[f"{name} class"] = type(module)
            self._look_into(seen, name, vars(module))
        for name, param in self._model.named_parameters(remove_duplicate=False):
            seen[f"{name} itself"] = param
            seen[f"{name} class"] = type(param)
            seen[f"{name} requires_grad"] = param.requires_grad
            self._look_into(seen, f"{name} vars", vars(param))
            hooks = {"post": param._post_accumulate_grad_hooks, "backward": param._backward_hooks}
            self._look_into(seen, f"{name} hooks", hooks)
        for other in self._others:
            seen[f"{type(other).__name__} class"] = type(other)
            self._look_into(seen, type(other).__name__, vars(other), skip=("state", "param_groups"))
        return seen

    def _look_into(self, seen: dict[str, Any], label: str, items: dict[Any, Any], skip: tuple[str, ...] = ()) -> None:
        for key, value in items.items():
            seen[f"{label}.{key}"] = value
            if isinstance(value, dict) and key not in skip:
                self._look_into(seen, f"{label}.{key}", value)
            elif isinstance(value, list) and key not in skip:
                self._look_into(seen, f"{label}.{key}", dict(enumerate(value)))
            if isinstance(value, dict):
                seen[f"{label}.{key} order"] = tuple(value) if key not in skip else ()

    def differences(self) -> list[str]:
        """Return the labels of everything that is new, gone or another object now."""
        before, now = self._before, self._look()

        def same(a: Any, b: Any) -> bool:
            return a is b or (isinstance(a, (tuple, int, float, str)) and type(a) is type(b) and a == b)

        changed = [key for key in before.keys() & now.keys() if not same(before[key], now[key])]
        return sorted([*(before.keys() ^ now.keys()), *changed])
