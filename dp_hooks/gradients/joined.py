"""Joined: the per-sample gradients of many small parameters side by side, so that they cost no more operations than one."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..rules import sum_of_squares

# Up to how many numbers the gradients of a parameter are copied for it: operations, not numbers, are what takes time there.
_SMALL = {"cpu": 1 << 16}
_SMALL_ELSEWHERE = 1 << 18


def is_small(param: nn.Parameter, samples: int) -> bool:
    """Whether gradients of ``param`` for so many samples are few real numbers."""
    return param.numel() * samples <= _SMALL.get(param.device.type, _SMALL_ELSEWHERE) and not param.is_complex()


@dataclass(eq=False)
class Joined:
    """Gradients of several parameters in one dtype and on one device as ``rows [n, D]``; true ones are ``scale`` times these."""

    params: list[nn.Parameter]
    rows: Tensor
    scale: float
    _starts: dict[nn.Parameter, int] = field(init=False)

    def __post_init__(self) -> None:
        ends = itertools.accumulate((p.numel() for p in self.params), initial=0)
        self._starts = dict(zip(self.params, ends, strict=False))

    @classmethod
    def make(cls, written: Sequence[tuple[nn.Parameter, Tensor, float]]) -> "list[Joined]":
        """Join what is alike in dtype, device and scale; parameters keep their order."""
        alike: dict[object, list[tuple[nn.Parameter, Tensor, float]]] = {}
        for param, grads, scale in written:
            alike.setdefault((grads.dtype, grads.device, scale), []).append((param, grads, scale))
        made = []
        for some in alike.values():
            rows = [grads.flatten(1) if grads.dim() > 1 else grads[:, None] for _, grads, _ in some]
            made.append(cls([param for param, _, _ in some], torch.cat(rows, 1), some[0][2]))
        return made

    def sq_norms(self, group: Sequence[nn.Parameter]) -> Tensor | None:
        """``[n]``: squared norms over those of ``group`` that are here, which stand next to each other; None: none is."""
        here = [p for p in group if p in self._starts]
        if not here:
            return None
        return sum_of_squares(self._columns(self.rows, here)) * self.scale**2

    def weighted_sums(
        self, factors: Mapping[nn.Parameter, Tensor], samples: Tensor | None
    ) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Per parameter, the sum over ``samples`` (None: all) of factor times gradient; views of one tensor for each factor."""
        samples = None if samples is None else samples.to(self.rows.device)
        rows = self.rows if samples is None else self.rows[samples]
        for _, some in itertools.groupby(self.params, key=lambda p: id(factors[p])):
            params = list(some)
            factor = factors[params[0]] if samples is None else factors[params[0]][samples]
            total = torch.mv(self._columns(rows, params).mT, factor.to(rows.dtype) * self.scale)
            for p, piece in zip(params, total.split([p.numel() for p in params]), strict=True):
                yield p, piece if p.dim() == 1 else piece.view(p.shape)

    def _columns(self, rows: Tensor, params: Sequence[nn.Parameter]) -> Tensor:
        """Return the columns of ``params``, which stand next to each other."""
        if len(params) == len(self.params):
            return rows
        return rows[:, self._starts[params[0]] : self._starts[params[-1]] + params[-1].numel()]
