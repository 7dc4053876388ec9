"""Parameters that became trainable inside a scope: their gradients are neither clipped nor noised."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from .._tree import modules_of
from ..capture.controller import HookController
from ..errors import UnsupportedModelError, some_of


def refuse_unmanaged(groups: Iterable[Mapping[str, Any]], controller: HookController, managed: Collection[int]) -> None:
    """Look at those of an optimizer's ``groups`` and of the model, and drop the gradients of trainable ones not in ``managed``.

    Raises:
        UnsupportedModelError: there are any.
    """
    params = [p for group in groups for p in group["params"]]
    params += [p for module in modules_of(controller.model) for p in module._parameters.values() if p is not None]
    unmanaged = list({id(p): p for p in params if id(p) not in managed and p.requires_grad}.values())
    for p in unmanaged:
        p.grad = None  # it is of private samples, and without noise
    if unmanaged:
        names = some_of([controller.name_of(p) for p in unmanaged])
        raise UnsupportedModelError(
            f"{names}: became trainable after the scope began, so gradients were neither clipped nor noised. "
            "Set requires_grad before entering; to unfreeze later, leave the scope and enter a new one with "
            "accountant=scope.accountant."
        )
