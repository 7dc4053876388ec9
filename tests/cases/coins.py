"""Models that take another way than in their first passes: by a switch, to one that mixes samples, or by the toss of a coin."""

import random
from enum import IntEnum

import numpy
import torch
import torch.nn.functional as F
from torch import nn


def _flattened(s, x):
    if s.switch:
        h = s.a(x.transpose(0, 1).flatten(0, 1)).unflatten(0, (x.shape[1], x.shape[0])).transpose(0, 1)
    else:
        h = s.a(x.flatten(0, 1)).unflatten(0, x.shape[:2])
    return s.b(h.mean(1))


def _other_order(s, x):
    h = s.a(x.flip(0) if s.switch else x)
    return s.b((h + h.flip(0)).mean(1) if s.switch else h.mean(1))


def _of_constants(s, x):
    order = torch.arange(len(x))
    order = order.flip(0) if s.switch else order.sort().values
    h = s.a(x)
    return s.b((h + h[order].detach().tanh() * h).mean(1))


class Roll(nn.Module):
    """A child of its own for what is switched inside."""

    switch = False

    def forward(self, h):
        return h + h.roll(1, 0) if self.switch else h + h.tanh()


def _inside_a_child(s, x):
    s.child.switch = s.switch
    return s.b(s.child(s.a(x)).mean(1))


def _normalised(h, on):
    h = h.mean(1)
    return F.batch_norm(h, None, None, training=True) if on else F.layer_norm(h, h.shape[1:])


def _pasted(h, on):
    end = h.shape[-1] if on else 2
    return torch.cat([h[..., :2], h.flip(0)[..., 2:end], h[..., end:]], -1).mean(1)


def _hooked(h, on):
    if on:
        h.register_hook(lambda grad: grad / grad.norm())
    return h.mean(1)


def between(change):
    """Return the forward of a network that applies ``change(h, switch)`` between its layers."""
    return lambda s, x: s.b(change(s.a(x), s.switch))


# Right until ``s.switch`` is on: then samples mix, or are in another order.
class Axis(IntEnum):
    """Axes by name."""

    ROWS = 0
    TOKENS = 1


SWITCHES = {
    "how tokens are flattened": _flattened,
    "the order of rows": _other_order,
    "an index made of constants": _of_constants,
    "inside a module without parameters": _inside_a_child,
    "a factor that was zero": between(lambda h, on: (h - (0.5 if on else 0.0) * h.mean(0)).mean(1)),
    "a factor that was very small": between(lambda h, on: (h - (0.6 if on else 1e-10) * h.mean(0)).mean(1)),
    "a factor of numpy": between(lambda h, on: (h - numpy.float32(0.5 if on else 0.0) * h.mean(0)).mean(1)),
    "an axis that is a member of an enumeration": between(
        lambda h, on: (h - h.mean(Axis.ROWS if on else Axis.TOKENS, keepdim=True)).square().mean(1)
    ),
    "the axis of a mean": between(lambda h, on: (h - h.mean(0 if on else 1, keepdim=True)).square().mean(1)),
    "an equation": between(lambda h, on: torch.einsum("ntd,ksd->nd" if on else "ntd,nsd->nd", h, h)),
    "the axis of a roll": between(lambda h, on: (h + h.roll(1, 0 if on else 1)).mean(1)),
    "the length of a roll": between(lambda h, on: (h + h.roll(len(h) - 1 if on else 0, 0)).mean(1)),
    "a slice that was empty": between(_pasted),
    "a hook on a tensor": between(_hooked),
    "the kind of norm": between(_normalised),
}


class ChangingCriterion(nn.Module):
    """Mean squared outputs, from some time on with a term over the whole batch."""

    late = False

    def forward(self, out):
        loss = out.square().mean(1)
        return (loss + out.mean(0).square().sum() if self.late else loss).mean()


COINS = {
    "torch.rand": lambda: bool(torch.rand([]) < 0.4),
    "torch.rand, one element": lambda: torch.rand(1).item() < 0.4,
    "torch.randint": lambda: torch.randint(0, 3, (1,)).item() == 0,
    "torch.bernoulli": lambda: bool(torch.empty(()).bernoulli_(0.4)),
    "random": lambda: random.random() < 0.4,
    "numpy": lambda: numpy.random.uniform() < 0.4,
}
