"""TrackedTensor: stands for a parameter where no rule reads its gradient, and for what is computed from parameters alone."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..._tree import join, split
from ..calls.session import Session
from .tracked_value import TrackedValue

# Runs a function on arguments some of which are tracked: function, args, kwargs, skeleton, tensors.
Operate = Callable[[Any, Any, Any, Any, list[Tensor]], Any]


def is_float(tensor: Tensor) -> bool:
    """Whether gradients can flow to ``tensor``."""
    if isinstance(tensor, TrackedTensor):
        return True
    return tensor.is_floating_point() or tensor.is_complex()


def name_of(function: Any) -> str:
    """The name of a torch function without underscores around it."""
    name: str = getattr(function, "__name__", str(function))
    return name.removeprefix("__").removesuffix("__").rstrip("_") if name != "__get__" else name


def attribute_of(function: Any) -> str:
    """Which attribute ``__get__`` is asked for."""
    return str(getattr(getattr(function, "__self__", None), "__name__", ""))


def works_in_place(function: Any) -> bool:
    """Whether a torch function writes into its first argument, as far as its name tells."""
    raw = getattr(function, "__name__", "")
    if raw.endswith("__"):
        return raw == "__setitem__" or (raw.startswith("__i") and raw not in ("__invert__", "__iter__", "__int__", "__index__"))
    return raw.endswith("_")


def in_transform() -> bool:
    """Whether a transform of ``torch.func`` is running, such as ``vmap``, inside of which tensors are not what they look like."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def same_storage(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are in the same memory."""
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr() != 0


class TrackedTensor(torch.Tensor):
    """A tensor that all samples share, computed from parameters only; hands each operation on it to who tracks it."""

    session: Session
    operate: Operate
    label: int

    @property
    def content(self) -> TrackedValue:
        """What it holds, and how it came from parameters."""
        found: TrackedValue = vars(self)["_content"]
        if found.custom and not found.value.requires_grad:
            # What a custom function returned gets its history after the fact: autograd adds it to the same object.
            with torch._C.DisableTorchFunctionSubclass(), torch.enable_grad():
                if self.requires_grad:
                    found = TrackedValue(self.as_subclass(torch.Tensor), found.memory, custom=True)
                    self.content = found
        return found

    @content.setter
    def content(self, content: TrackedValue) -> None:
        vars(self)["_content"] = content

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        skeleton, tensors = split((args, kwargs or {}))
        first = next((t for t in tensors if isinstance(t, TrackedTensor)), None)
        if first is None or "session" not in vars(first) or not first.session.enabled:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        return first.operate(func, args, kwargs or {}, skeleton, tensors)


def plain(tensor: Tensor) -> Tensor:
    """The same values, without history, and no longer followed."""
    if not isinstance(tensor, TrackedTensor):
        return tensor
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.content.value.detach()


def on_values(func: Any, skeleton: Any, tensors: list[Tensor]) -> Any:
    """Run ``func`` on plain values."""
    args, kwargs = join(skeleton, [plain(t) for t in tensors])
    return func(*args, **kwargs)
