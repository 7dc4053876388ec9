"""RecordedCall: a call into the model from outside, with what is needed to run it again."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..._no_randomness import Draws
from ..._rerun import AmbientContext
from ..._tree import tensors_of
from .carried_state import CarriedState
from .module_state import ModuleState
from .trace import Transition


@dataclass(eq=False)
class RecordedCall:
    """A call of the model, or of a part of it."""

    module: nn.Module  # what was called
    name: str  # its qualified name in the model
    args: tuple[Any, ...]  # positional inputs; copies of their own if ``copied``
    kwargs: dict[str, Any]  # keyword inputs, likewise
    context: AmbientContext  # what the call was surrounded by
    key: Any = None  # the state of the model when it was called, as far as one check covers others
    kind: Any = None  # what it was called with, likewise
    copied: bool = False  # whether no check has covered such a call yet
    reached: set[int] = field(default_factory=set)  # numbers of the outputs that a backward pass came from
    transitions: set[Transition] = field(default_factory=set)  # operations it went through that no check did
    draws: Draws | None = None  # the random numbers that can have decided which way it took
    around: bool = False  # whether it is a forward method around the calls that were seen, and is checked beside them
    with_gradients: bool = True  # whether it was made with gradients enabled
    carried: CarriedState | None = None  # what the model held when it began, where that is asked for
    state: ModuleState | None = None  # attributes of the model when it began
    rounds: bool = False  # whether a module in it gave out half precision
    training: bool = field(init=False)  # the mode of the module
    inference: bool = field(default_factory=torch.is_inference_mode_enabled)  # whether it was made in inference mode

    def __post_init__(self) -> None:
        """Remember the mode: checks run when it may be another one."""
        self.training = self.module.training

    @property
    def coarse(self) -> bool:
        """Whether some of it is computed in half precision."""
        return self.rounds or self.context.autocast is not None

    @property
    def left(self) -> list[Tensor]:
        """What the last run of the call left in attributes of the model, with its history."""
        return [] if self.state is None else self.state.made_since()


def kind_of(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What is called, and with what kinds of inputs: a check of a call without a mask shows nothing about one with it."""
    given = frozenset(key for key, value in kwargs.items() if value is not None)
    kinds = frozenset((t.dim(), t.dtype) for t in tensors_of((args, kwargs)))
    return name, tuple(type(arg) for arg in args), given, kinds
