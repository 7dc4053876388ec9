"""Embedding tables: ``y[n, t, d] = W[ids[n, t], d]``. A per-sample gradient has one non-zero row per distinct id."""

import torch
from torch import Tensor, nn

from .rule import Call, Rule, squared_norms


def _rows(call: Call) -> tuple[Tensor, Tensor]:
    """Return ``ids [n, t]`` and ``g [n, t, d]`` in at least float32, with zeros where the id is ``padding_idx``."""
    g = call.grad
    g = g.to(torch.promote_types(g.dtype, torch.float32))
    ids = call.input.reshape(g.shape[0], -1) if g.shape[0] else call.input.new_zeros((0, 1))
    g = g.reshape(g.shape[0], ids.shape[1], g.shape[-1])
    padding = getattr(call.module, "padding_idx", None)
    if padding is not None:
        g = g.masked_fill((ids == padding)[..., None], 0)
    return ids, g


def _table(call: Call) -> tuple[int, int]:
    rows, width = call.parameter("weight").shape
    return rows, width


def grad_samples(call: Call) -> dict[str, Tensor]:
    """Scatter-add of the output gradients into ``[n, V, d]``."""
    ids, g = _rows(call)
    size, width = _table(call)
    out = g.new_zeros((g.shape[0], size, width))
    out.scatter_add_(1, ids[..., None].expand_as(g), g)
    return {"weight": out}


def sq_norms(call: Call) -> dict[str, Tensor]:
    """Add up the rows that belong to the same (sample, id), then square: exact, with memory ``[n * t, d]``."""
    ids, g = _rows(call)
    size, _ = _table(call)
    samples = torch.arange(g.shape[0], device=g.device)
    keys, index = torch.unique((samples[:, None] * size + ids).flatten(), return_inverse=True)
    rows = g.new_zeros((keys.shape[0], g.shape[-1])).index_add_(0, index, g.flatten(0, 1))
    per_row = squared_norms(rows)
    return {"weight": per_row.new_zeros(g.shape[0]).index_add_(0, keys // size, per_row)}


def weighted_sums(call: Call, factors: Tensor) -> dict[str, Tensor]:
    """One scatter-add of the scaled output gradients into the table."""
    ids, g = _rows(call)
    out = g.new_zeros(_table(call))
    scaled = (g * factors.to(g.dtype)[:, None, None]).flatten(0, 1)
    return {"weight": out.index_add_(0, ids.flatten(), scaled)}


def refusal(module: nn.Module) -> str | None:
    """Say why this embedding cannot be trained privately, or None."""
    reasons = []
    if getattr(module, "max_norm", None) is not None:
        reasons.append(
            "max_norm rescales rows of the table in place according to the ids in the batch, an update without "
            "noise. Remedy: build it with max_norm=None"
        )
    if getattr(module, "scale_grad_by_freq", False):
        reasons.append(
            "scale_grad_by_freq divides gradients by counts over the whole batch, which mixes samples. "
            "Remedy: build it with scale_grad_by_freq=False"
        )
    return "; ".join(reasons) or None


EMBEDDING = Rule(
    "Embedding",
    grad_samples,
    sq_norms,
    weighted_sums,
    frozenset({"weight"}),
    subclasses=True,
    expands=True,
    any_rank=True,
)
