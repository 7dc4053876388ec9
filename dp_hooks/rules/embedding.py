"""Embedding tables: ``y[n, t, d] = W[ids[n, t], d]``. A per-sample gradient has one non-zero row per distinct id."""

from collections.abc import Hashable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .linear import wide
from .outer import OuterProducts
from .rule import Call, Rule


def outer_products(call: Call) -> dict[str, OuterProducts]:
    """``dW[n] = sum_t onehot(ids[n, t]) (x) g[n, t]``, with zeros where the id is ``padding_idx``."""
    g = wide(call.grad)
    tokens = g.shape[1:-1].numel()
    ids = call.input.reshape(g.shape[0], tokens).long()
    g = g.reshape(g.shape[0], tokens, g.shape[-1])
    padding = getattr(call.module, "padding_idx", None)
    if padding is not None:
        g = g.masked_fill((ids == padding)[..., None], 0)
    return {"weight": OuterProducts(ids, g, call.parameter("weight").shape)}


def grad_samples(call: Call) -> dict[str, Tensor]:
    """Scatter-add of the output gradients into ``[n, V, d]``."""
    return {name: use.grads() for name, use in outer_products(call).items()}


def refusal(module: nn.Module) -> str | None:
    """Say why this embedding cannot be trained privately, or None."""
    reasons = []
    if getattr(module, "max_norm", None) is not None:
        reasons.append(
            "max_norm rescales rows of the table in place according to the ids in the batch, an update without noise. "
            "Remedy: build it with max_norm=None"
        )
    if getattr(module, "scale_grad_by_freq", False):
        reasons.append(
            "scale_grad_by_freq divides gradients by counts over the whole batch, which mixes samples. "
            "Remedy: build it with scale_grad_by_freq=False"
        )
    return "; ".join(reasons) or None


def _padding_idx(module: nn.Module) -> Hashable:
    return getattr(module, "padding_idx", None)


EMBEDDING = Rule(
    "Embedding",
    grad_samples,
    outer_products=outer_products,
    parameters=frozenset({"weight"}),
    subclasses=True,
    any_rank=True,
    alike=_padding_idx,
)


def _argument(call: Call, position: int, name: str) -> Tensor | None:
    value = call.kwargs.get(name, call.args[position] if len(call.args) > position else None)
    return value if isinstance(value, Tensor) else None


def _bags(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """Return ids, weights and a mask of what counts, each ``[n, t]``; bags given by offsets are padded to one length."""
    ids, weights = call.input.long(), _argument(call, 2, "per_sample_weights")
    weights = torch.ones_like(ids, dtype=torch.float32) if weights is None else weights
    counted = torch.ones_like(ids, dtype=torch.bool)
    if ids.dim() == 1:
        offsets = _argument(call, 1, "offsets")
        assert offsets is not None  # PyTorch insists on them for 1-D input
        starts = offsets[: call.samples]
        ends = torch.cat([offsets, offsets.new_tensor([len(ids)])])[1 : call.samples + 1]
        longest = int((ends - starts).max()) if call.samples else 0
        places = starts[:, None] + torch.arange(longest, device=ids.device)
        counted = places < ends[:, None]
        places = places.clamp(max=max(0, len(ids) - 1))
        ids, weights = (ids[places], weights[places]) if len(ids) else (places, places.float())
    padding = call.module.padding_idx
    return ids, weights, counted if padding is None else counted & (ids != padding)


def _bag_tokens(call: Call) -> tuple[Tensor, Tensor]:
    """Return ids ``[n, t]`` and the gradient ``[n, t, d]`` that each of them got."""
    g = wide(call.grad)
    ids, weights, counted = _bags(call)
    mode = call.module.mode
    if mode == "max":  # each feature's gradient goes to the first id that has the maximum
        rows = F.embedding(ids, call.parameter("weight").detach()).masked_fill(~counted[..., None], -torch.inf)
        if ids.shape[1] == 0:
            return ids, g[:, None, :].expand(-1, 0, -1)
        first = F.one_hot(rows.argmax(1), ids.shape[1]).movedim(-1, 1)
        return ids, g[:, None, :] * (first * counted[..., None]).to(g.dtype)
    share = counted.to(g.dtype) * weights.to(g.dtype)
    if mode == "mean":
        share = share / counted.sum(1, keepdim=True).clamp(min=1)
    return ids, g[:, None, :] * share[..., None]


def bag_outer_products(call: Call) -> dict[str, OuterProducts]:
    """As for an embedding, with the bag's gradient handed to each of its ids; see ``_bag_tokens``."""
    return {"weight": OuterProducts(*_bag_tokens(call), call.parameter("weight").shape)}


def bag_grad_samples(call: Call) -> dict[str, Tensor]:
    """Scatter-add into ``[n, V, d]``."""
    return {name: use.grads() for name, use in bag_outer_products(call).items()}


EMBEDDING_BAG = Rule(
    "EmbeddingBag", bag_grad_samples, outer_products=bag_outer_products, parameters=frozenset({"weight"}), batch_dim=0
)


def has_flat_ids(call: Call) -> bool:
    """Whether the call is one of an ``EmbeddingBag`` with offsets: its ids are not one row per sample."""
    return isinstance(call.module, nn.EmbeddingBag) and _argument(call, 1, "offsets") is not None
