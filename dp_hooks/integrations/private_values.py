"""Which tensors were computed from private examples, followed through every operation of a step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..errors import ScopeError


class PrivateValues(TorchDispatchMode):
    """Follows values of private examples, forward and backward, detached or not, while it is entered.

    For steps of optimizers beside the private one: whatever they apply must not be computed from private examples. Numbers that
    Python read from a tensor (``item()``), and how many examples there are, are not followed.
    """

    def __init__(self) -> None:
        """Nothing is private yet."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._private: set[StorageWeakRef] = set()
        self._watches = True

    @contextmanager
    def of(self, batch: Any) -> Iterator[None]:
        """Follow what is computed from ``batch`` in the block."""
        self._private = {storage for storage in self._private if not storage.expired()}
        self._note(tree_leaves(batch))
        with self:
            yield

    @contextmanager
    def released(self) -> Iterator[None]:
        """What is computed in the block is not private: it gets noise there."""
        before, self._watches = self._watches, False
        try:
            yield
        finally:
            self._watches = before

    def guard(self, optimizer: torch.optim.Optimizer, args: Any = (), kwargs: Any = None) -> None:
        """A hook before each step of an ordinary optimizer.

        Raises:
            ScopeError: it is about to apply gradients of private examples.
        """
        params = [p for group in optimizer.param_groups for p in group["params"]]
        raw = [p for p in params if p.grad is not None and self._has([p.grad])]
        if raw:
            raise ScopeError(
                f"{type(optimizer).__name__} was about to apply gradients that were computed from private examples, neither "
                f"clipped nor noised, to {len(raw)} of its {len(params)} tensors (shapes {[tuple(p.shape) for p in raw[:3]]}). "
                "Private examples may go into the private part alone, for a loss that its own optimizer steps: leave them out of "
                "the other loss, and call zero_grad() of this optimizer before its backward pass. One optimizer is private: it has "
                "to hold all that private examples train."
            )

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        """Run an operation; what comes of private values is private."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self._watches and self._has(tree_leaves((args, kwargs))):
            written = [
                kwargs.get(argument.name, args[k] if k < len(args) else None)
                for k, argument in enumerate(func._schema.arguments)
                if argument.alias_info is not None and argument.alias_info.is_write
            ]
            self._note(tree_leaves((result, written)))
        return result

    def _note(self, leaves: Sequence[Any]) -> None:
        self._private.update(StorageWeakRef(s) for leaf in leaves if isinstance(leaf, Tensor) for s in _storages(leaf))

    def _has(self, leaves: Sequence[Any]) -> bool:
        return any(StorageWeakRef(s) in self._private for leaf in leaves if isinstance(leaf, Tensor) for s in _storages(leaf))


def _storages(tensor: Tensor) -> list[Any]:
    """Where its numbers are."""
    if tensor.layout is torch.strided:
        return [tensor.untyped_storage()]
    if tensor.layout is torch.sparse_coo:
        return [tensor._indices().untyped_storage(), tensor._values().untyped_storage()]
    return []
