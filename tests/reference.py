"""Losses, per-sample gradients and clipped sums by plain autograd, one sample at a time: what everything is compared with."""

import torch


def per_sample(out):
    """Per-sample losses that weigh every output differently."""
    out = out.flatten(1)
    return (out * torch.linspace(0.5, 1.5, out.shape[1], dtype=out.dtype)).sin().sum(1)


def losses_of(model, *inputs):
    """The same of what ``model`` returns."""
    return per_sample(model(*inputs))


def sample_grads(model, losses_of, *batch):
    """Return ``{name: [n, *shape]}`` from one forward and backward pass per sample; ``losses_of(model, *batch) -> [1]``."""
    count = batch[0].shape[0]
    alone = (losses_of(model, *(part[i : i + 1] for part in batch)).sum() for i in range(count))
    return by_name(model, rows_by_backward(model, alone))


def by_name(model, rows):
    """Return what :func:`rows_by_backward` does as ``{name: [n, *shape]}``, of the trainable parameters."""
    columns = zip(*rows, strict=True) if rows else [()] * len(list(model.parameters()))
    found = zip(model.named_parameters(), columns, strict=True)
    return {name: torch.stack(c) if c else p.new_zeros(0, *p.shape) for (name, p), c in found if p.requires_grad}


def rows_by_backward(model, losses, retain_graph=False):
    """Return, for each of the ``losses`` (one per sample), a list of gradients: by ``backward()``, as checkpoints may need."""
    rows = []
    for loss in losses:
        model.zero_grad()
        loss.backward(retain_graph=retain_graph)
        rows.append([_dense(p) for p in model.parameters()])
    model.zero_grad()
    return rows


def _dense(p):
    if p.grad is None:
        return torch.zeros_like(p)
    return p.grad.to_dense() if p.grad.is_sparse else p.grad


def clipped_sum(grads, bound):
    """Return ``{name: shape}``, the sum over samples of gradients clipped to ``bound`` in the norm over all parameters."""
    norms = torch.stack([g.reshape(len(g), -1).abs().square().sum(1) for g in grads.values()]).sum(0).sqrt()
    factors = (bound / norms).clamp(max=1.0)
    return {name: torch.tensordot(factors.to(g.dtype), g, dims=1) for name, g in grads.items()}
