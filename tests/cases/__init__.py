"""Tables of models with a batch for each, and what is known of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..models import Net, randn
from ..reference import losses_of

N = 3


@dataclass(frozen=True)
class Case:
    """A model and a batch of ``N`` samples for it; a new layer or model is one row of a table of these.

    ``loss(model, *batch)`` gives one loss per sample. ``empty``: whether PyTorch runs the model on no sample at all.
    ``refused``: what the error has to say in modes, by name, in which the case cannot be. Gradients are compared to
    ``tolerance``, relative, and to a tenth of it, absolute.
    """

    name: str
    model: Callable[[], nn.Module]
    inputs: Callable[[], list[Tensor]]
    loss: Callable[..., Tensor] = losses_of
    empty: bool = True
    refused: Mapping[str, str] = field(default_factory=dict)
    tolerance: float = 1e-8

    def __str__(self) -> str:
        return self.name

    def made(self) -> tuple[nn.Module, list[Tensor]]:
        """Build the model, away from its initial values, and the batch: in float64, the same every time."""
        torch.default_generator.manual_seed(1)
        model = self.model().double()
        for p in model.parameters():
            nn.init.normal_(p, std=0.5)
        return model, self.inputs()


def case(name: str, model: Callable[[], nn.Module], *inputs: Callable[[], Tensor], **known: Any) -> Case:
    """Return the row of a table; every one of the ``inputs`` makes a tensor."""
    return Case(name, model, lambda: [make() for make in inputs], **known)


def net(name: str, fn: Callable[..., Any], *inputs: Callable[[], Tensor], **parts: Any) -> Case:
    """Return the row of a network that runs ``fn(self, *inputs)`` over ``parts``: each made by a call, or a parameter's shape."""
    return case(name, lambda: Net(fn, **{key: made(part) for key, part in parts.items()}), *inputs)


def made(part: Any) -> Any:
    """Make one part of a network."""
    return param(*part) if isinstance(part, tuple) else part()


def rows(*shape: int) -> Callable[[], Tensor]:
    """Return a maker of ``N`` rows of normal numbers."""
    return lambda: randn(N, *shape)


def ids(*shape: int, top: int = 7) -> Callable[[], Tensor]:
    """Return a maker of ``N`` rows of whole numbers below ``top``."""
    return lambda: torch.randint(0, top, (N, *shape))


def param(*shape: int) -> nn.Parameter:
    """Return a parameter of normal numbers."""
    return nn.Parameter(torch.randn(shape))
