"""Stacked: small calls of modules that are alike (the layers of a transformer), computed as if they were one call."""

import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from ..rules import Call
from .joined import Piece
from .terms import Deferred, Instantiated


def stacked(waiting: Sequence[Deferred]) -> Iterator[Instantiated]:
    """Write out the gradients of calls that wait for it, those of one kind together."""
    kinds: dict[object, list[Deferred]] = {}
    for term in waiting:
        kinds.setdefault(term.kind, []).append(term)
    for alike in kinds.values():
        first = alike[0]
        names = first.call.names
        found = first.run(_as_one(alike, names))
        for at, name in enumerate(names):
            params = [term.params[at] for term in alike]
            if len(set(params)) < len(params):  # a layer that was called several times
                yield from (_written(Piece([p], rows, first.scale), first) for p, rows in _rows(params, found[name], first.samples))
            else:
                yield _written(Piece(params, found[name].reshape(first.samples, -1), first.scale), first)


def _rows(params: Sequence[nn.Parameter], grads: Tensor, samples: int) -> Iterator[tuple[nn.Parameter, Tensor]]:
    columns = grads.reshape(samples, len(params), -1).unbind(1)
    return zip(params, columns, strict=True)


def _written(piece: Piece, like: Deferred) -> Instantiated:
    columns = piece.rows.split([p.numel() for p in piece.params], 1)
    tensors = {p: rows.reshape(like.samples, *p.shape) for p, rows in zip(piece.params, columns, strict=True)}
    return Instantiated(tensors, like.samples, like.name, piece.scale, piece)


def _as_one(alike: Sequence[Deferred], names: tuple[str, ...]) -> Call:
    """A call on all their samples: the first one of each, then the second one of each."""
    # A backward pass inside another one may end while parameters are tracked for what is run again.
    call = dataclasses.replace(alike[0].call, names=names, own={name: p for p, name in alike[0].names.items()})
    if len(alike) == 1:
        return call
    axis, count = call.batch_dim, len(alike)

    def side_by_side(tensors: list[Tensor]) -> Tensor:
        return torch.stack(tensors, axis + 1).flatten(axis, axis + 1)

    x = side_by_side([term.call.inputs[0] for term in alike])
    grad = side_by_side([grad for term in alike for grad in term.call.grads if grad is not None])
    return dataclasses.replace(call, args=(x,), grads=[grad], samples=call.samples * count)
