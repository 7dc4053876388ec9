"""Rules for linear layers that are wrong in gradients, norms, weighted sums, or outer products."""

import dataclasses

import torch

from dp_hooks.rules import Rule
from dp_hooks.rules.linear import LINEAR

from .mixing import T


def gradients(call):
    return {name: g.clone() for name, g in LINEAR.grad_samples(call).items()}


def changed(fn, only=None):
    """A rule whose gradients are ``fn`` of the right ones."""
    return Rule("broken", lambda call: {k: g if only not in (None, k) else fn(g) for k, g in gradients(call).items()})


def norms(fn):
    """A rule whose squared norms are ``fn`` of the right ones."""

    def sq_norms(call):
        return {name: fn(g.flatten(1).square().sum(1)) for name, g in gradients(call).items()}

    return Rule("broken", gradients, sq_norms=sq_norms)


def norms_times(factor):
    return norms(lambda s: factor**2 * s)


def sums(fn):
    """A rule whose weighted sum is ``fn(factors, gradients)``."""
    return Rule("broken", gradients, weighted_sums=lambda call, w: {k: fn(w, g) for k, g in gradients(call).items()})


def plain_sum(w, g):
    return torch.tensordot(w, g, 1)


def products(side, fn):
    """The library's own rule with one side of its outer products changed."""

    def outer_products(call):
        found = LINEAR.outer_products(call)
        for use in found.values():
            setattr(use, side, fn(getattr(use, side)))
        return found

    return dataclasses.replace(LINEAR, outer_products=outer_products)


def _first_token(call):
    x, g = call.input[:, 0], call.grad[:, 0]
    return {"weight": torch.einsum("no,ni->noi", g, x), "bias": g}


BROKEN_RULES = {
    "twice as large": changed(lambda g: 2 * g),
    "one percent too small": changed(lambda g: 0.99 * g),
    "a thousandth too small": changed(lambda g: 0.999 * g),
    "zero": changed(lambda g: 0 * g),
    "sign": changed(lambda g: -g),
    "samples swapped": changed(lambda g: g.roll(1, 0)),
    "two samples swapped": changed(lambda g: g[[*reversed(range(len(g[:2]))), *range(2, len(g))]]),
    "samples in reverse": changed(lambda g: g.flip(0)),
    "last sample forgotten": changed(lambda g: torch.cat([g[:-1], 0 * g[-1:]])),
    "average over samples": changed(lambda g: g.mean(0, keepdim=True).expand_as(g)),
    "bias forgotten": changed(lambda g: 0 * g, "bias"),
    "bias doubled": changed(lambda g: 2 * g, "bias"),
    "weight transposed": changed(lambda g: g.mT, "weight"),
    "one row forgotten": changed(lambda g: torch.cat([g[:, :-1], 0 * g[:, -1:]], 1)),
    "mean over tokens": changed(lambda g: g / T),
    "only the first token": Rule("broken", _first_token),
    "norms one percent too small": norms_times(0.99),
    "norms a thousandth too small": norms_times(0.999),
    "norms halved": norms_times(0.5),
    "norms doubled": norms_times(2.0),
    "norms zero": norms_times(0.0),
    "norms without the last sample": norms(lambda s: s * (torch.arange(len(s)) < len(s) - 1)),
    "sums without the first sample": sums(lambda w, g: plain_sum(w[1:], g[1:])),
    "sums doubled": sums(lambda w, g: 2 * plain_sum(w, g)),
    "sums one percent too large": sums(lambda w, g: 1.01 * plain_sum(w, g)),
    "sums that ignore the factors": sums(lambda w, g: g.sum(0)),
    "sums with the factors of the neighbours": sums(lambda w, g: plain_sum(w.roll(1), g)),
    "sums that average": sums(lambda w, g: plain_sum(w, g) / len(g)),
    "outer products scaled": products("left", lambda left: 1.1 * left),
    "outer products swapped": products("left", lambda left: left.roll(1, 0)),
    "outer products without later tokens": products("right", lambda x: torch.cat([x[:, :1], 0 * x[:, 1:]], 1)),
    "outer products with axes mixed": products("right", lambda x: x.transpose(0, 1).reshape(x.shape)),
}
