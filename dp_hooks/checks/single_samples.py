"""Single samples: which of a batch are run alone, and by plain autograd."""

import random
from collections.abc import Iterable, Iterator, Sequence, Set
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from ..capture.calls.gradient_tap import Tap
from ..errors import SelfCheckError

_ALONE = 3  # how many samples of a batch are run alone. All of them are in the batched run that they are compared with.


def some_samples(samples: int) -> list[int]:
    """Choose the samples to run alone: the ends and some between them."""
    if samples <= _ALONE:
        return list(range(samples))
    between = random.Random(0).sample(range(1, samples - 1), _ALONE - 2)
    return sorted({0, samples - 1, *between})


class NotAlone(SelfCheckError):
    """Some samples cannot be run without the others."""


def not_alone(what: str, numbers: list[int], error: Exception) -> NotAlone:
    """The error for samples that cannot be run without the others."""
    which = f"sample {numbers[0]}" if len(numbers) == 1 else f"{len(numbers)} of the samples"
    return NotAlone(
        f"{what}: {which} could not be run alone for the self-check ({type(error).__name__}: {error}). Remedy: "
        "the model and the loss must work on a batch of any size, also of one; an input that all samples share must not have "
        "as many rows as the batch has samples."
    )


def back_propagate(loss: Tensor, leaves: Sequence[Tensor]) -> None:
    """Back-propagate to ``leaves`` only: other models in the same graph, private or not, must not notice.

    ``Tensor.backward`` would switch function modes off, and dropout would be back in what checkpointing runs again.
    Reentrant checkpointing allows only a backward pass to everything.
    """
    reentrant = any(name.startswith("CheckpointFunction") for name in custom_functions(loss))
    inputs = () if reentrant else tuple(leaf for leaf in leaves if leaf.requires_grad)
    torch.autograd.Variable._execution_engine.run_backward(
        (loss,), (torch.ones_like(loss),), False, False, inputs, allow_unreachable=True, accumulate_grad=True
    )


def custom_functions(loss: Tensor) -> set[str]:
    """Return the names of the custom autograd functions of users that ``loss`` comes from."""
    nodes = nodes_of([loss])
    custom: list[Any] = [type(node) for node in nodes if isinstance(node, BackwardCFunction)]
    return {kind.__name__ for kind in custom if kind._forward_cls is not Tap}


def leaves_of(tensors: Sequence[Tensor], ends: Set[Any] = frozenset()) -> list[Tensor]:
    """Return the leaves that the graphs of ``tensors``, as far as ``ends``, add gradients to."""
    lone = [t for t in tensors if t.grad_fn is None and t.requires_grad]
    return [*lone, *(node.variable for node in nodes_of(tensors, ends) if hasattr(node, "variable"))]


def nodes_of(tensors: Iterable[Tensor], ends: Set[Any] = frozenset()) -> Iterator[Any]:
    """Go through the nodes that ``tensors`` come from, each once, as far as ``ends``."""
    seen, waiting = set(ends), [t.grad_fn for t in tensors]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            waiting += [behind for behind, _ in node.next_functions]
