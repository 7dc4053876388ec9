"""Runs a model without its random numbers, so that runs of different size can be compared."""

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_DROPOUT = ("dropout1d", "dropout2d", "dropout3d")
_NOISE = ("rand", "rand_like", "randn", "randn_like")
_DRAWN_IN_PLACE = ("uniform_", "normal_", "exponential_", "log_normal_", "cauchy_")
_RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu")


# All that draw numbers, dropout aside.
DRAWS = frozenset((*_NOISE, *_DRAWN_IN_PLACE, "bernoulli", "bernoulli_", "randint", "randint_like", "random_"))


def _other_generators() -> tuple[Any, Any]:
    numpy = sys.modules.get("numpy")  # a model that draws from it has imported it
    return random.getstate(), None if numpy is None else numpy.random.get_state()


def _set_other_generators(state: tuple[Any, Any]) -> None:
    random.setstate(state[0])
    if state[1] is not None:
        sys.modules["numpy"].random.set_state(state[1])


@contextmanager
def other_generators_kept() -> Iterator[None]:
    """Put the generators of Python and NumPy back afterwards."""
    state = _other_generators()
    try:
        yield
    finally:
        _set_other_generators(state)


@dataclass(eq=False)
class Draws:
    """What a pass drew that can decide which way it takes: single numbers, and the generators beside torch's as it began."""

    numbers: list[tuple[str, Tensor]] = field(default_factory=list)
    _generators: tuple[Any, Any] = field(default_factory=_other_generators)

    def note(self, name: str, out: Any) -> None:
        """Keep what the function ``name``, one of :data:`DRAWS`, drew, if it is one number."""
        if isinstance(out, Tensor) and out.numel() == 1:
            self.numbers.append((name, out.detach().clone()))

    def begin_again(self) -> None:
        """Set the generators of Python and NumPy to what they were."""
        _set_other_generators(self._generators)


def is_dropout(name: str) -> bool:
    """Whether a function of this name is some kind of dropout."""
    return name.rstrip("_").endswith("dropout") or name in _DROPOUT


class NoDropout(TorchFunctionMode):
    """Replaces dropout by the identity and noise by a constant, so that runs of different size can be compared.

    ``eval()`` would turn dropout off as well, but would also hide BatchNorm's batch statistics. Permutations are left
    alone: a model that shuffles samples mixes them. Given the ``draws`` of a pass, single numbers are what it drew, so
    that a model that tosses a coin goes the same way again.
    """

    def __init__(self, draws: Draws | None = None) -> None:
        """Take constants for random numbers, or single ones from ``draws``."""
        super().__init__()
        self.draws = draws
        self._drawn = 0

    def begin_again(self) -> None:
        """A run begins: seeds are set, and ``draws`` are taken from the first one."""
        torch.manual_seed(0)
        random.seed(0)
        if "numpy" in sys.modules:
            sys.modules["numpy"].random.seed(0)
        self._drawn = 0
        if self.draws is not None:
            self.draws.begin_again()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = self._without(func, args, kwargs)
        name = getattr(func, "__name__", "")
        if self.draws is not None and name in DRAWS and isinstance(out, Tensor) and out.numel() == 1:
            queue = self.draws.numbers[self._drawn :]
            if queue and queue[0][0] == name and queue[0][1].shape == out.shape:
                self._drawn += 1
                with torch.no_grad():
                    out.copy_(queue[0][1])
        return out

    @staticmethod
    def _without(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if is_dropout(name):
            return args[0] if args else kwargs["input"]
        if name == "scaled_dot_product_attention":
            args = (*args[:4], 0.0, *args[5:]) if len(args) > 4 else args
            kwargs.pop("dropout_p", None)
        elif name == "multi_head_attention_forward":
            args = (*args[:10], 0.0, *args[11:]) if len(args) > 10 else args
            if "dropout_p" in kwargs:
                kwargs["dropout_p"] = 0.0
        elif name in _RECURRENT:  # of their arguments only dropout is a float
            args = tuple(0.0 if isinstance(arg, float) else arg for arg in args)
        elif name == "bernoulli_":  # stochastic depth: keep probability p, divided by p afterwards
            return args[0].fill_(args[1] if len(args) > 1 else kwargs.get("p", 0.5))
        elif name == "bernoulli":
            return args[0].clone()
        elif name in _DRAWN_IN_PLACE:
            return args[0].fill_(0.75)
        elif name in _NOISE:
            out = func(*args, **kwargs)
            with torch.no_grad():
                return out.fill_(0.75)
        return func(*args, **kwargs)
