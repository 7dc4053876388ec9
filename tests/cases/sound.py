"""Models without a fault that are called, draw numbers and return things in unusual ways: none of them may be refused."""

from functools import partial

import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.checkpoint import checkpoint

from ..models import Net
from ..reference import losses_of, per_sample
from .mixing import D, between, linear
from .models import Output


def chain(*layers):
    """Return a maker of ``layers``, made anew, between linear ones."""
    return lambda: nn.Sequential(linear(), *(make() for make in layers), linear())


def around(fn):
    """Return a maker of a network with a forward of its own around two layers."""
    return lambda: Net(fn, inner=between(torch.tanh)())


def depth(s, x):
    """Drop whole samples in the way that vision transformers do."""
    keep = (0.8 + torch.rand((len(x), 1, 1), dtype=x.dtype)).floor()
    return x + s.inner(x) / 0.8 * keep


def kept_on_cpu(s, x):
    with torch.autograd.graph.save_on_cpu():
        return s.inner(x)


class Checkpointed(nn.Module):
    """Runs its block under checkpointing, with dropout inside."""

    def __init__(self, use_reentrant):
        super().__init__()
        self.use_reentrant = use_reentrant
        self.block = nn.Sequential(linear(), nn.Dropout(0.3), nn.GELU(), linear())

    def forward(self, x):
        return checkpoint(self.block, x, use_reentrant=self.use_reentrant)


class Parts(nn.Module):
    """Has methods that call its submodules."""

    def __init__(self):
        super().__init__()
        self.encoder, self.head = between(torch.tanh)(), linear()

    def encode(self, x):
        return self.encoder(x).tanh()


def frozen_encoder():
    return nn.TransformerEncoderLayer(D, 1, 16, dropout=0.3, batch_first=True).requires_grad_(False)


def frozen_lstm():
    return Net(lambda s, x: s.r(x)[0], r=nn.LSTM(D, D, 2, dropout=0.3, batch_first=True)).requires_grad_(False)


def noise():
    """Adds noise of the input's shape, as variational autoencoders do."""
    return Net(lambda s, x: x + 0.1 * torch.randn_like(x))


def of(fn):
    """Return the losses of ``fn(model, x)``."""
    return lambda model, x: per_sample(fn(model, x))


# model, and per-sample losses of it
SOUND = {
    "dropout": (chain(partial(nn.Dropout, 0.4)), losses_of),
    "alpha and feature dropout": (chain(partial(nn.AlphaDropout, 0.4), partial(nn.Dropout1d, 0.3)), losses_of),
    "noise": (chain(noise), losses_of),
    "stochastic depth": (around(depth), losses_of),
    "a frozen encoder with dropout": (chain(frozen_encoder), losses_of),
    "a frozen LSTM with dropout": (chain(frozen_lstm), losses_of),
    "checkpointing": (chain(partial(Checkpointed, False)), losses_of),
    "reentrant checkpointing": (chain(partial(Checkpointed, True)), losses_of),
    "saved tensors on the CPU": (around(kept_on_cpu), losses_of),
    "dataclass": (around(lambda s, x: Output(s.inner(x), None)), of(lambda m, x: m(x).hidden)),
    "nested": (around(lambda s, x: {"a": [s.inner(x), None], "b": (3, "c", x.long())}), of(lambda m, x: m(x)["a"][0])),
    "keywords and constants": (
        around(lambda s, *, x, power, name, nothing=None: s.inner(x) ** power),
        of(lambda m, x: m(x=x, power=2, name="a")),
    ),
    "calls of parts": (Parts, of(lambda m, x: m.head(m.encoder(x)))),
    "calls of methods": (Parts, of(lambda m, x: m.head(m.encode(x)))),
    "a layer called many times": (Parts, of(lambda m, x: m.head(m.head(m.encoder(x) * 0.1) * 0.1))),
    "a summary of the batch beside the output": (
        around(lambda s, x: (s.inner(x), s.inner(x).detach().mean())),
        of(lambda m, x: m(x)[0]),
    ),
    "spectral norm": (lambda: nn.Sequential(spectral_norm(linear()), nn.Tanh(), linear()), losses_of),
    "centred in itself": (between(lambda h: h - h.mean(1, keepdim=True)), losses_of),
    "layer norm": (chain(partial(nn.LayerNorm, D)), losses_of),
    "samples permuted and put back": (between(lambda h: h.flip(0).tanh().flip(0)), losses_of),
}
