"""Linear layers with inputs of any rank: ``y[n, t, o] = sum_i x[n, t, i] W[o, i] + b[o]``."""

import torch
from torch import Tensor

from .rule import Call, Rule, squared_norms

# How many numbers of per-sample gradients are held at once while their norms are taken.
_CHUNK = 1 << 24


def _inputs(call: Call) -> tuple[Tensor, Tensor]:
    """Return ``x [n, t, i]`` and ``g [n, t, o]`` in one dtype of at least float32: sums are rounded after the noise."""
    x, g = call.input, call.grad
    dtype = torch.promote_types(torch.promote_types(x.dtype, g.dtype), torch.float32)
    tokens = g[0].numel() // g.shape[-1] if g.shape[0] and g.shape[-1] else 1
    return x.reshape(x.shape[0], tokens, x.shape[-1]).to(dtype), g.reshape(g.shape[0], tokens, g.shape[-1]).to(dtype)


def grad_samples(call: Call) -> dict[str, Tensor]:
    """Outer products summed over ``t``: ``dW[n, o, i] = sum_t g[n, t, o] x[n, t, i]``."""
    x, g = _inputs(call)
    out: dict[str, Tensor] = {}
    if "weight" in call.names:
        out["weight"] = torch.einsum("nto,nti->noi", g, x)
    if "bias" in call.names:
        out["bias"] = g.sum(1)
    return out


def _instantiated_norms(x: Tensor, g: Tensor) -> Tensor:
    rows = max(1, _CHUNK // max(1, x.shape[-1] * g.shape[-1]))
    parts = [
        squared_norms(torch.einsum("nto,nti->noi", gc, xc)) for xc, gc in zip(x.split(rows), g.split(rows), strict=True)
    ]
    return torch.cat(parts)


def _weight_norms(x: Tensor, g: Tensor) -> Tensor:
    """Return an upper bound of ``|dW[n]|^2``, tight to 1e-3, by the cheaper of two exact formulas.

    ``|dW|^2 = sum_{t,s} (x_t . x_s)(g_t . g_s)`` needs two ``t x t`` Gram matrices, ``2 t^2 (i + o)`` operations
    instead of ``t i o`` (Li et al., "Large language models can be strong differentially private learners", ICLR 2022,
    section 4; Bu et al., "Scalable and efficient training of large convolutional neural networks with differential
    privacy", NeurIPS 2022, for the choice ``2 t^2 < i o``). Where token gradients cancel, the Gram sum loses digits: its rounding
    error is at most about ``t eps sum_t |x_t|^2 sum_t |g_t|^2``. That bound is added, and a sample for which it
    exceeds one part in a thousand is computed by instantiation instead.
    """
    tokens = x.shape[1]
    if tokens == 1:
        return squared_norms(x) * squared_norms(g)
    if x.shape[0] == 0 or 2 * tokens * tokens >= x.shape[-1] * g.shape[-1]:
        return _instantiated_norms(x, g)
    gram = (torch.bmm(x, x.mT) * torch.bmm(g, g.mT)).sum((1, 2))
    slack = tokens * torch.finfo(x.dtype).eps * squared_norms(x) * squared_norms(g)
    unsure = ~(slack <= 1e-3 * gram)  # also true for NaN and negative sums
    gram = gram + slack
    if bool(unsure.any()):
        gram[unsure] = _instantiated_norms(x[unsure], g[unsure])
    return gram


def sq_norms(call: Call) -> dict[str, Tensor]:
    """Squared norms without keeping any ``[n, o, i]`` tensor; see ``_weight_norms``."""
    x, g = _inputs(call)
    out: dict[str, Tensor] = {}
    if "weight" in call.names:
        out["weight"] = _weight_norms(x, g)
    if "bias" in call.names:
        out["bias"] = squared_norms(g.sum(1))
    return out


def weighted_sums(call: Call, factors: Tensor) -> dict[str, Tensor]:
    """One matrix product, as in an ordinary backward pass: ``sum_{n,t} f[n] g[n, t, o] x[n, t, i]``."""
    x, g = _inputs(call)
    factors = factors.to(g.dtype)
    scaled = g * factors[:, None, None]
    out: dict[str, Tensor] = {}
    if "weight" in call.names:
        out["weight"] = scaled.flatten(0, 1).mT @ x.flatten(0, 1)
    if "bias" in call.names:
        out["bias"] = scaled.sum((0, 1))
    return out


LINEAR = Rule("Linear", grad_samples, sq_norms, weighted_sums, subclasses=True, any_rank=True)
