"""Per-sample gradients and clipped sums by plain autograd, one sample at a time: what everything is compared with."""

import torch


def sample_grads(model, losses_of, *batch):
    """Return ``{name: [n, *shape]}`` from one forward and backward pass per sample; ``losses_of(model, *batch) -> [1]``."""
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    rows = {name: [] for name in params}
    for i in range(batch[0].shape[0]):
        loss = losses_of(model, *(part[i : i + 1] for part in batch)).sum()
        grads = torch.autograd.grad(loss, list(params.values()), allow_unused=True)
        for (name, p), grad in zip(params.items(), grads, strict=True):
            rows[name].append(torch.zeros_like(p) if grad is None else grad.to_dense() if grad.is_sparse else grad)
    return {name: torch.stack(grads) for name, grads in rows.items()}


def clipped_sum(grads, bound):
    """Return ``{name: shape}``, the sum over samples of gradients clipped to ``bound`` in the norm over all parameters."""
    norms = torch.stack([g.reshape(len(g), -1).square().sum(1) for g in grads.values()]).sum(0).sqrt()
    factors = (bound / norms).clamp(max=1.0)
    return {name: torch.tensordot(factors, g, dims=1) for name, g in grads.items()}
