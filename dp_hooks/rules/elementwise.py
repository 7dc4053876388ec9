"""Small layers with closed forms: PReLU and Bilinear."""

import torch
from torch import Tensor

from .linear import wide
from .rule import Call, Rule


def _prelu(call: Call) -> dict[str, Tensor]:
    """``dw[n, c] = sum g * min(x, 0)`` over everything but sample and channel; one slope may serve all channels."""
    x, g = call.input, wide(call.grad)
    product = x.clamp(max=0).to(g.dtype) * g
    if call.parameter("weight").numel() == 1:
        return {"weight": product.flatten(1).sum(1, keepdim=True) if product.dim() > 1 else product[:, None]}
    shared = tuple(range(2, product.dim()))
    return {"weight": product.sum(shared) if shared else product}


PRELU = Rule("PReLU", _prelu, parameters=frozenset({"weight"}), subclasses=True, batch_dim=0)


def _bilinear(call: Call) -> dict[str, Tensor]:
    """``dW[n, o, i, j] = sum_t g[n, t, o] x1[n, t, i] x2[n, t, j]`` for ``y = x1 W x2 + b``."""
    x1, x2 = (x.movedim(call.batch_dim, 0) for x in call.inputs)
    g = wide(call.grad, x1)
    tokens = g.shape[1:-1].numel()
    g, x1, x2 = (v.reshape(v.shape[0], tokens, v.shape[-1]).to(g.dtype) for v in (g, x1, x2))
    out: dict[str, Tensor] = {}
    if "weight" in call.names:
        out["weight"] = torch.einsum("nto,nti,ntj->noij", g, x1, x2)
    if "bias" in call.names:
        out["bias"] = g.sum(1)
    return out


BILINEAR = Rule("Bilinear", _bilinear, subclasses=True, all_per_sample=True, any_rank=True)
