"""Losses that couple the samples of a batch, or are reduced in another way than the mean over samples that is declared."""

import torch
import torch.nn.functional as F

from ..models import randn
from ..reference import per_sample
from .mixing import D, N, T


def padding():
    """Return tokens, and a mask of those that count."""
    return [randn(N, T, D), (torch.arange(T)[None] < torch.tensor([1, 2, 3, 4, 2, 1])[:, None]).double()]


def _balance(out):
    share = out.flatten(0, 1).softmax(-1).mean(0)
    return per_sample(out).mean() + 0.01 * (share * share).sum()


def _weighted(out):
    weights = per_sample(out).detach().abs()
    return (per_sample(out) * weights / weights.sum()).sum()


# From the output and the mask: a scalar, or one loss per sample.
LOSSES = {
    "mean over tokens that count": lambda out, keep: (out.square().sum(-1) * keep).sum() / keep.sum(),
    "mean over what is positive": lambda out, keep: out[out > 0].sum() / (out > 0).sum().clamp(min=1),
    "divided by the norm of all losses": lambda out, keep: per_sample(out) / per_sample(out).norm(),
    "divided by the detached mean": lambda out, keep: per_sample(out) / per_sample(out).detach().mean().abs(),
    "contrastive": lambda out, keep: F.cross_entropy(out.mean(1) @ out.mean(1).T, torch.arange(len(out))),
    "triplets": lambda out, keep: (per_sample(out) - per_sample(out).roll(1)).relu(),
    "largest in the batch": lambda out, keep: per_sample(out).max(),
    "hard examples": lambda out, keep: per_sample(out).topk(2).values.mean(),
    "sum for mean": lambda out, keep: per_sample(out).sum(),
    "mean over tokens of a sum": lambda out, keep: out.square().sum() / T,
    "balanced load": lambda out, keep: _balance(out),
    "one sample left out": lambda out, keep: per_sample(out)[1:].mean(),
    "one sample left out, rest in place": lambda out, keep: per_sample(out) * (torch.arange(len(out)) > 0),
    "one sample twice": lambda out, keep: per_sample(out)[[*range(len(out) - 1), 0]],
    "weights normalised over the batch": lambda out, keep: _weighted(out),
    "softmax weights": lambda out, keep: per_sample(out) * per_sample(out).softmax(0),
    "softmax weights, summed": lambda out, keep: (out.square().mean((1, 2)) * out.sum((1, 2)).softmax(0)).sum(),
    "variance": lambda out, keep: per_sample(out).var(0),
    "variance next to a mean": lambda out, keep: out.var(0, unbiased=False).sum() + per_sample(out).mean(),
    "labels of the neighbour": lambda out, keep: per_sample(out * keep.roll(1, 0)[..., None]),
    "ranking": lambda out, keep: (per_sample(out)[:, None] - per_sample(out)[None]).sigmoid().mean(1),
    "mean of a power": lambda out, keep: per_sample(out).square().mean().sqrt(),
    "log of a sum": lambda out, keep: per_sample(out).logsumexp(0),
    "averaged over a fixed size": lambda out, keep: per_sample(out).sum() / 32,
    "correlation": lambda out, keep: torch.corrcoef(out.flatten(1)).square().mean(),
}
