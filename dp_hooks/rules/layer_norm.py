"""Layer norm with or without weight and bias: ``y = w * normalised(x) + b``."""

from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from .rule import Call, Rule


def grad_samples(call: Call) -> dict[str, Tensor]:
    """``dw[n] = sum_t g * normalised(x)``, ``db[n] = sum_t g``."""
    layer, x, g = cast(nn.LayerNorm, call.module), call.input, call.grad
    shared = tuple(range(1, g.dim() - len(layer.normalized_shape)))

    def over_tokens(value: Tensor) -> Tensor:
        return value.sum(shared) if shared else value

    out: dict[str, Tensor] = {}
    if "weight" in call.names:
        out["weight"] = over_tokens(F.layer_norm(x, layer.normalized_shape, eps=layer.eps).to(g.dtype) * g)
    if "bias" in call.names:
        out["bias"] = over_tokens(g)
    return out


LAYER_NORM = Rule("LayerNorm", grad_samples, subclasses=True, any_rank=True)
