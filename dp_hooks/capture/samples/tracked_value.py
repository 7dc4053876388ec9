"""TrackedValue: a tensor that all samples share, with the small graph that leads from parameters to it."""

import warnings
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ...errors import UnsupportedModelError
from ...gradients.terms import scaled

FAILS = (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError)  # of an operation without a batching rule


@dataclass(eq=False)
class TrackedParameter:
    """A parameter in the small graph that leads from it to a tracked tensor: ``leaf`` stands for ``param`` there."""

    param: nn.Parameter
    leaf: Tensor
    name: str


@dataclass(eq=False)
class Memory:
    """What a tensor and its views share: what is written into one of them is in all."""

    roots: dict[int, TrackedParameter] = field(default_factory=dict)  # the parameters behind it, by identity
    is_written: bool = False  # whether something was written into it since it was made
    tensors: list[weakref.ref[Tensor]] = field(default_factory=list)  # the tracked tensors in it


@dataclass(eq=False)
class TrackedValue:
    """A tensor that all samples share, computed from the parameters behind ``memory`` by ordinary autograd operations.

    ``rearranges``: it holds numbers of one parameter, each at most once, so that gradients of both have the same norm.
    ``custom``: custom autograd functions made it, whose backward need not be linear: sums are not taken before it.
    """

    value: Tensor
    memory: Memory
    rearranges: bool = False
    custom: bool = False

    @property
    def roots(self) -> tuple[TrackedParameter, ...]:
        """The parameters that it was computed from."""
        return tuple(self.memory.roots.values())

    @property
    def keeps_norm(self) -> bool:
        """Whether its gradients have the norm of those of the parameter behind it."""
        return self.rearranges and not self.memory.is_written

    @property
    def is_parameter(self) -> bool:
        """Whether it is a parameter itself, as it is."""
        return len(self.roots) == 1 and self.value is self.roots[0].leaf

    def to_parameter(self, param: nn.Parameter, grad: Tensor) -> Tensor:
        """Take one gradient ``[*value.shape]`` back to ``param``."""
        return grad if self.is_parameter else self._back(param, grad)

    def rows_to_parameter(self, param: nn.Parameter, grads: Tensor) -> Tensor:
        """Take gradients ``[n, *value.shape]`` back to ``param``: ``[n, *param.shape]``."""
        if self.is_parameter:
            return grads
        if grads.shape[0] == 0:
            return grads.new_zeros((0, *param.shape))
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="There is a performance drop")
                return self._back(param, grads, grads.shape[:1])
        except FAILS:
            return torch.stack([self._back(param, grad) for grad in grads])

    def _back(self, param: nn.Parameter, grads: Tensor, rows: Sequence[int] = ()) -> Tensor:
        (root,) = (root for root in self.roots if root.param is param)
        found = None
        if self.value.requires_grad:  # else a custom function gave it back as not differentiable
            grads = grads.to(self.value.dtype)
            (found,) = torch.autograd.grad(
                self.value, [root.leaf], grads, retain_graph=True, allow_unused=True, is_grads_batched=bool(rows)
            )
        return root.leaf.new_zeros((*rows, *param.shape)) if found is None else found

    def scaled_rows_to_parameter(self, param: nn.Parameter, grads: Tensor, scale: float) -> Tensor:
        """``scale`` times that, in at least float32; before it where the way back need not be linear."""
        before, after = (scale, 1.0) if self.custom else (1.0, scale)
        return scaled(self.rows_to_parameter(param, scaled(grads, before)), after)


def roots_of(values: Iterable[TrackedValue]) -> dict[int, TrackedParameter]:
    """The parameters behind some values, by identity."""
    return {id(root.param): root for value in values for root in value.roots}


def names_of(roots: Sequence[TrackedParameter]) -> str:
    """The names of the parameters, for messages."""
    return ", ".join(sorted({root.name for root in roots}))


def refused(roots: Sequence[TrackedParameter], reason: str) -> UnsupportedModelError:
    """The error for parameters whose per-sample gradients cannot be told apart."""
    return UnsupportedModelError(
        f"{names_of(roots)}: {reason}, so the per-sample gradients cannot be told apart. Remedy: give the "
        "operation one row per sample, write a rule for the module with dp_hooks.register_rule, or freeze the "
        "parameters named with requires_grad_(False)."
    )
