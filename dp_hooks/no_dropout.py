"""Runs a model without its random numbers, so that runs of different size can be compared."""

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_DROPOUT = ("dropout1d", "dropout2d", "dropout3d")
_NOISE = ("rand", "rand_like", "randn", "randn_like")
_DRAWN_IN_PLACE = ("uniform_", "normal_", "exponential_", "log_normal_", "cauchy_")
_RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu")


def is_dropout(name: str) -> bool:
    """Whether a function of this name is some kind of dropout."""
    return name.rstrip("_").endswith("dropout") or name in _DROPOUT


class NoDropout(TorchFunctionMode):
    """Replaces dropout by the identity and noise by a constant, so that runs of different size can be compared.

    ``eval()`` would turn dropout off as well, but would also hide BatchNorm's batch statistics. Permutations are left
    alone: a model that shuffles samples mixes them.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
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
