"""Cells of recurrent networks, called step by step: each is two linear maps, of the input and of the state, and what follows.

``gi = W_ih x + b_ih`` and ``gh = W_hh h + b_hh`` are computed again, with the equations of PyTorch's documentation of
``nn.RNNCell``, ``nn.LSTMCell`` and ``nn.GRUCell``; the gradients of the loss with respect to them are factors of the two weights'.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .linear import wide
from .outer import OuterProducts
from .rule import Call, Rule

_NAMES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
States = Sequence[Tensor]
Grads = Sequence[Tensor | None]
# From gi, gh, the state and the gradients of the outputs: the gradients of gi and gh.
Backward = Callable[[Tensor, Tensor, States, Grads, nn.Module], tuple[Tensor, Tensor]]


def _rnn(gi: Tensor, gh: Tensor, state: States, grads: Grads, cell: nn.Module) -> tuple[Tensor, Tensor]:
    (dh,) = grads
    before = gi + gh
    relu = cast(nn.RNNCell, cell).nonlinearity == "relu"
    slope = (before > 0).to(before.dtype) if relu else 1 - before.tanh().square()
    d = cast(Tensor, dh) * slope
    return d, d


def _lstm(gi: Tensor, gh: Tensor, state: States, grads: Grads, cell: nn.Module) -> tuple[Tensor, Tensor]:
    c = state[1]
    i, f, g, o = (gi + gh).chunk(4, -1)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    out = (f * c + i * g).tanh()
    dh, dc = (torch.zeros_like(c) if grad is None else grad for grad in grads)
    dc = dc + dh * o * (1 - out.square())
    parts = [dc * g * i * (1 - i), dc * c * f * (1 - f), dc * i * (1 - g.square()), dh * out * o * (1 - o)]
    d = torch.cat(parts, -1)
    return d, d


def _gru(gi: Tensor, gh: Tensor, state: States, grads: Grads, cell: nn.Module) -> tuple[Tensor, Tensor]:
    (h,), (grad,) = state, grads
    dh = cast(Tensor, grad)
    (ir, iz, new), (hr, hz, hn) = gi.chunk(3, -1), gh.chunk(3, -1)
    r, z = (ir + hr).sigmoid(), (iz + hz).sigmoid()
    n = (new + r * hn).tanh()
    dn = dh * (1 - z) * (1 - n.square())
    both = [dn * hn * r * (1 - r), dh * (h - n) * z * (1 - z)]
    return torch.cat([*both, dn], -1), torch.cat([*both, dn * r], -1)


_BACKWARD: dict[type[nn.Module], Backward] = {nn.RNNCell: _rnn, nn.LSTMCell: _lstm, nn.GRUCell: _gru}


def _given(call: Call) -> tuple[Tensor, Any]:
    given = dict(zip(("input", "hx"), call.args, strict=False)) | call.kwargs
    return given["input"], given.get("hx")


def _factors(call: Call) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return ``x [n, t, i]``, ``h [n, t, h]`` and the gradients of ``gi`` and ``gh``, each ``[n, t, gates h]``."""
    cell = cast(nn.RNNCellBase, call.module)
    kind = next(kind for kind in _BACKWARD if isinstance(cell, kind))
    x, hx = _given(call)
    first = next(grad for grad in call.grads if grad is not None)
    x = wide(x, first).reshape(call.samples, -1, cell.input_size)
    size = (*x.shape[:2], cell.hidden_size)
    if hx is None:
        state = [x.new_zeros(size)] * (2 if kind is nn.LSTMCell else 1)
    else:
        state = [wide(t, x).reshape(size) for t in (hx if isinstance(hx, (tuple, list)) else [hx])]
    grads = [None if grad is None else wide(grad, x).reshape(size) for grad in call.grads]
    weights = [None if getattr(cell, name) is None else call.parameter(name).detach().to(x.dtype) for name in _NAMES]
    gi, gh = F.linear(x, cast(Tensor, weights[0]), weights[2]), F.linear(state[0], cast(Tensor, weights[1]), weights[3])
    return x, state[0], *_BACKWARD[kind](gi, gh, state, grads, cell)


def outer_products(call: Call) -> dict[str, OuterProducts]:
    """Of both weights, with as many tokens as a sample has rows, one mostly."""
    x, h, di, dh = _factors(call)
    found = {"weight_ih": (di, x), "weight_hh": (dh, h)}
    return {name: OuterProducts(*found[name], call.parameter(name).shape) for name in found if name in call.names}


def grad_samples(call: Call) -> dict[str, Tensor]:
    """Outer products summed over ``t``, and for the biases the factors themselves."""
    x, h, di, dh = _factors(call)
    found = {"weight_ih": di.mT @ x, "weight_hh": dh.mT @ h, "bias_ih": di.sum(1), "bias_hh": dh.sum(1)}
    return {name: found[name] for name in call.names}


def _shares_nothing(cell: nn.Module) -> bool:
    params = [p for p in cell._parameters.values() if p is not None]
    return len(set(params)) == len(params)


CELL = Rule(
    "recurrent cell",
    grad_samples,
    outer_products=outer_products,
    parameters=frozenset(_NAMES),
    subclasses=True,
    applies=_shares_nothing,
    batch_dim=0,
    all_per_sample=True,
)
CELLS: tuple[type[nn.Module], ...] = tuple(_BACKWARD)
