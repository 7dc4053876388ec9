"""Stacked: small calls of modules that are alike (the layers of a transformer), computed as if they were one call."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

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
            if len({*map(id, params)}) < len(params):  # a layer that was called several times
                yield from (_written(Piece([p], rows, first.scale), first) for p, rows in _rows(params, found[name], first.samples))
            else:
                yield _written(Piece(params, found[name].reshape(first.samples, -1), first.scale), first)


def _rows(params: Sequence[nn.Parameter], grads: Tensor, samples: int) -> Iterator[tuple[nn.Parameter, Tensor]]:
    columns = grads.reshape(samples, len(params), -1).unbind(1)
    return zip(params, columns, strict=True)


def _written(piece: Piece, like: Deferred) -> Instantiated:
    return Instantiated(_Columns(piece), like.samples, like.name, piece.scale, piece)


@dataclass(eq=False)
class _Columns(Mapping[nn.Parameter, Tensor]):
    """Views of gradients side by side, each made when it is asked for: most of them only count together."""

    piece: Piece
    _ends: dict[nn.Parameter, int] = field(default_factory=dict)

    def __getitem__(self, param: nn.Parameter) -> Tensor:
        if not self._ends:
            self._ends.update(zip(self, itertools.accumulate(p.numel() for p in self), strict=True))
        end, rows = self._ends[param], self.piece.rows
        return rows[:, end - param.numel() : end].reshape(len(rows), *param.shape)

    def __iter__(self) -> Iterator[nn.Parameter]:
        return iter(self.piece.params)

    def __len__(self) -> int:
        return len(self.piece.params)


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
