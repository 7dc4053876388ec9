"""Models in which a sample's output depends on the others, or on what was seen before: all of them must be refused."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models import Net, randn
from . import case, made

N, T, D = 6, 4, 5

linear = partial(nn.Linear, D, D)


def tokens() -> Tensor:
    return randn(N, T, D)


def rows() -> Tensor:
    return randn(N, D)


def between(middle):
    """Return a maker of two layers with ``middle`` between them."""
    return lambda: Net(lambda s, x: s.b(middle(s.a(x))), a=linear(), b=linear())


def shuffled(h):
    """Permute the samples and put them back: harmless unless something in between depends on the place."""
    order = torch.arange(len(h)).flip(0)
    scale = torch.linspace(1, 2, len(h), dtype=h.dtype)[:, None, None]
    return (h[order] * scale)[order]


def picked(h):
    """Keep the largest tokens of the whole batch."""
    limit = h.norm(dim=-1).flatten().topk(len(h)).values[-1]
    return h * (h.norm(dim=-1, keepdim=True) >= limit)


def batch_attention(h):
    """Let the samples attend to each other, token by token."""
    q = h.transpose(0, 1)
    return F.scaled_dot_product_attention(q, q, q).transpose(0, 1)


def capacity(h):
    """Let only the first half of all positive tokens of the batch through, as routers with a capacity do."""
    positive = (h[..., 0] > 0).flatten()
    place = positive.long().cumsum(0)
    return h * (place <= len(place) // 4).view(*h.shape[:2], 1)


def normed_together(h):
    return F.layer_norm(h.flatten(0, 1).T, (h.shape[0] * h.shape[1],)).T.view(h.shape)


def negatives(h):
    return h - 0.1 * (h.mean(1) @ h.mean(1).T).softmax(1).mean(0)[:, None, None]


def quantised(h):
    return h + ((h / h.detach().std()).round() * h.detach().std() - h).detach()


class Averaging(nn.Module):
    """Keeps a running mean of its inputs in an ordinary attribute, and subtracts it."""

    def __init__(self):
        super().__init__()
        self.mean: Any = 0.0

    def forward(self, x):
        self.mean = 0.5 * self.mean + 0.5 * x.detach().mean(0)
        return x - self.mean


def parts(fn, **parts):
    return lambda: Net(fn, **{name: made(part) for name, part in parts.items()})


OF_ANY = {
    "batch mean subtracted": lambda h: h - h.mean(0),
    "divided by the largest value": lambda h: h / h.abs().max(),
    "sorted": lambda h: h.sort(0).values,
    "cumulative sum": lambda h: h.cumsum(0) / 3,
    "rolled": lambda h: h + 0.5 * h.roll(1, 0),
    "flipped": lambda h: h.flip(0),
    "norm of the whole batch": lambda h: h / h.norm(),
}
OF_ROWS = {
    "attention between samples": lambda h: torch.softmax(h @ h.mT, -1) @ h,
    "batch norm as a function": lambda h: F.batch_norm(h, None, None, training=True),
}
OF_TOKENS = {
    "detached batch mean subtracted": lambda h: h - h.detach().mean(0),
    "batch norm as a function": lambda h: F.batch_norm(h.mT, None, None, training=True).mT,
    "instance norm over all samples": normed_together,
    "attention over the batch": batch_attention,
    "in-batch negatives": negatives,
    "scaled by place": shuffled,
    "tokens picked over the batch": picked,
    "capacity of a router": capacity,
    "divided by the number of samples": lambda h: h / len(h),
    "clamped to a quantile of the batch": lambda h: h.clamp(max=float(h.detach().flatten().quantile(0.7))),
    "mixed with another sample": lambda h: 0.9 * h + 0.1 * h[torch.arange(len(h)) - 1],
    "one sample replaced by another": lambda h: torch.cat([h[:-1], h[:1]]),
    "last sample zeroed": lambda h: torch.cat([h[:-1], 0 * h[-1:]]),
    "reshaped across samples": lambda h: h.reshape(h.shape[1], h.shape[0], -1).transpose(0, 1),
    "normed over the batch": lambda h: F.normalize(h, dim=0),
    "softmax over the batch": lambda h: h.softmax(0),
    "quantised by a scale of the batch": quantised,
}

MIXING = [
    *(case(f"{name}, of rows", between(mix), rows) for name, mix in (OF_ANY | OF_ROWS).items()),
    *(case(name, between(mix), tokens) for name, mix in (OF_ANY | OF_TOKENS).items()),
    case("running mean in an attribute", lambda: nn.Sequential(linear(), Averaging(), linear()), tokens),
    case(
        "conv over the batch",
        parts(lambda s, x: s.b(s.c(x.permute(1, 2, 0)).permute(2, 0, 1)), c=lambda: nn.Conv1d(D, D, 3, padding=1), b=linear),
        tokens,
    ),
    case("recurrence over the batch", parts(lambda s, x: s.b(s.r(x)[0]), r=partial(nn.LSTM, D, D), b=linear), tokens),
    case(
        "module of attention over the batch",
        parts(lambda s, x: s.b(s.m(x, x, x)[0]), m=partial(nn.MultiheadAttention, D, 1), b=linear),
        tokens,
    ),
    case("owner that centres", parts(lambda s, x: s.b((x - x.mean(0)) * s.w), w=(D,), b=linear), tokens),
    case("shared weight scaled by the batch", parts(lambda s, x: s.b(x * (s.w * x.detach().mean())), w=(D,), b=linear), tokens),
]


def _chosen(mask, x):
    return torch.where(mask, 0.5 * x + 0.5 * x.flip(0), x)


# Changes of a batch [n, 5].
RANDOM_MIXING = {
    "shuffled by sorted noise": lambda x: 0.5 * x + 0.5 * x[torch.rand(len(x)).argsort()],
    "shuffled by sorted normal numbers": lambda x: 0.5 * x + 0.5 * x[torch.randn(len(x)).sort().indices],
    "mixed where noise is small": lambda x: _chosen(torch.rand(len(x), 1) < 0.5, x),
    "mixed where noise is large": lambda x: _chosen(torch.rand(len(x), 1) > 0.5, x),
    "mixed where noise in place is small": lambda x: _chosen(torch.empty(len(x), 1).uniform_() < 0.5, x),
    "partners by random integers": lambda x: 0.5 * x + 0.5 * x[torch.randint(0, len(x), (len(x),))],
    "several rows permuted by noise": lambda x: 0.5 * x + 0.5 * x.flatten()[torch.rand(x.numel()).argsort()].view_as(x),
    "permuted": lambda x: 0.5 * x + 0.5 * x[torch.randperm(len(x))],
}
RANDOM_BUT_SOUND = {
    "a time step for each sample": lambda x: x * torch.randint(0, 9, (len(x), 1)),
    "normal noise": lambda x: x + torch.randn(len(x), 5, dtype=x.dtype),
    "masked by noise": lambda x: x * (torch.rand_like(x) > 0.3),
    "the same noise for all": lambda x: x + torch.randn(5, dtype=x.dtype),
    "scaled by torch.normal": lambda x: x * torch.normal(1.0, 0.1, (len(x), 1), dtype=x.dtype),
    "numbers of a distribution": lambda x: x + torch.distributions.Normal(x, 1.0).sample(),
    "chosen by multinomial": lambda x: x * torch.multinomial(torch.ones(len(x), 3), 1),
    "integers for several rows of each": lambda x: x * torch.randint(0, 9, (5 * len(x), 1)).view(len(x), 5),
    "integers for several rows, one of each after the other": lambda x: x * torch.randint(0, 9, (5 * len(x), 1)).view(5, -1).T,
    "noise for several rows of each": lambda x: x * (1 + torch.randn(5 * len(x), 1, dtype=x.dtype).view(len(x), 5)),
    "stochastic depth of several rows": lambda x: x * torch.empty(5 * len(x), dtype=x.dtype).bernoulli_(0.7).view(len(x), 5) / 0.7,
    "classes of several rows": lambda x: x * torch.distributions.Categorical(logits=x[..., None].expand(-1, -1, 3)).sample(),
    "gumbel softmax": lambda x: x * F.gumbel_softmax(x),
    "hard gumbel softmax": lambda x: x * F.gumbel_softmax(x, hard=True),
    "leaky units with random slopes": lambda x: F.rrelu(x, training=True),
    "from a generator of its own": lambda x: x + torch.rand(len(x), 1, generator=torch.Generator().manual_seed(3)),
}
