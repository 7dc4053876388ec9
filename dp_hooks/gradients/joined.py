"""Joined: the per-sample gradients of many small parameters side by side, so that they cost no more operations than one."""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..rules import sum_of_squares

# Up to how many numbers the gradients of a parameter are copied for it: operations, not numbers, are what takes time there.
_SMALL = {"cpu": 1 << 16}
_SMALL_ELSEWHERE = 1 << 18


def is_small(param: nn.Parameter, samples: int) -> bool:
    """Whether gradients of ``param`` for so many samples are few real numbers."""
    return is_little(param.numel() * samples, param.device) and not param.is_complex()


def is_little(numbers: int, device: torch.device) -> bool:
    """Whether an operation on so many numbers takes as long as one on a single number, about."""
    return numbers <= _SMALL.get(device.type, _SMALL_ELSEWHERE)


class Piece(NamedTuple):
    """Gradients of some parameters, one after the other, as ``rows [n, d]``; true ones are ``scale`` times these."""

    params: list[nn.Parameter]
    rows: Tensor
    scale: float


@dataclass(eq=False)
class Joined:
    """Gradients of several parameters in one dtype and on one device as ``rows [n, D]``; true ones are ``scale`` times these."""

    params: list[nn.Parameter]
    rows: Tensor
    scale: float

    @classmethod
    def make(cls, pieces: Iterable[Piece]) -> "list[Joined]":
        """Join what is alike in dtype, device and scale."""
        alike: dict[object, list[Piece]] = {}
        for piece in pieces:
            alike.setdefault((piece.rows.dtype, piece.rows.device, piece.scale), []).append(piece)
        made = []
        for some in alike.values():
            rows = [piece.rows for piece in some]
            made.append(cls([p for piece in some for p in piece.params], torch.cat(rows, 1), some[0].scale))
        return made

    def sq_norms(self) -> Tensor:
        """``[n]``: squared norms over all of them."""
        return sum_of_squares(self.rows) * self.scale**2

    def weighted_sums(
        self, factors: Mapping[nn.Parameter, Tensor], samples: Tensor | None
    ) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Per parameter, the sum over ``samples`` (None: all) of factor times gradient; views of one tensor for each factor."""
        samples = None if samples is None else samples.to(self.rows.device)
        rows = self.rows if samples is None else self.rows[samples]
        end = 0
        for _, some in itertools.groupby(self.params, key=lambda p: id(factors[p])):
            params = list(some)
            sizes = [p.numel() for p in params]
            start, end = end, end + sum(sizes)
            columns = rows if len(params) == len(self.params) else rows[:, start:end]
            factor = factors[params[0]] if samples is None else factors[params[0]][samples]
            total = torch.mv(columns.mT, factor.to(rows.dtype) * self.scale)
            for p, piece in zip(params, total.split(sizes), strict=True):
                yield p, piece if p.dim() == 1 else piece.view(p.shape)
