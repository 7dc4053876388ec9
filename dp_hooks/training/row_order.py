"""RowOrder: whether all calls of a step have the examples in the same order, told by what the rows of their inputs hold."""

import itertools
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from .._tree import as_real
from ..errors import ScopeError

_CALLS = 16  # how many calls on the present part a further one is compared with
_FEW = 3  # so few rows are in the order of others by chance, unless they are rows of the batch
_MANY, _MANY_SHORT = 6, 12  # so many different rows are not; of one or two numbers it takes more
_LONG = 1024  # numbers of a row that count by their places
_PRIME, _BELOW = 2654435761, 1_000_003  # two numbers without a common factor: places count by multiples of the one


class RowOrder:
    """Compares the inputs of a call with those of earlier calls on the same part, since gradients are added up row by row.

    Rows are told by sums: they may be gone by the next call, and have another shape in it. A few rows that are classes, lengths,
    prototypes or levels of noise can be the same in another order by chance, which is no reason to refuse; rows that the loader
    handed out are not, unless they hold as little as that.
    """

    def __init__(self) -> None:
        """No call was made yet."""
        self._calls: deque[list[Tensor]] = deque(maxlen=_CALLS)

    def new_part(self) -> None:
        """Forget the calls on an earlier part."""
        self._calls.clear()

    def check(self, inputs: list[Tensor], rows: int | None, handed_out: list[Tensor]) -> None:
        """A call begins, on ``inputs`` of so many ``rows``, of a part that was ``handed_out``.

        Raises:
            ScopeError: they are those of an earlier call, in another order.
        """
        counted = [t for t in inputs if t.layout == torch.strided and t.dim() and len(t) == rows and t.numel()]
        mine = [_row_sums(t) for t in counted]
        for before in self._calls:
            if _moved(before, mine, counted, handed_out):
                raise ScopeError(
                    "the model was called twice in a step, the second time on the same rows in another order: gradients of row i "
                    "are added up and clipped as those of one example. Remedy: keep the order of the batch in every call of a step."
                )
        if mine:
            self._calls.append(mine)


def check_kept(inputs: list[Tensor], rows: Tensor, handed_out: list[Tensor], size: int) -> None:
    """Where ``rows`` of a part with ``size`` examples were declared, a call is on these, and not on others of the batch.

    Raises:
        ScopeError: it is on others.
    """
    for own, t in itertools.product(handed_out, inputs):
        alike = t.dim() > 1 and t.shape[1:] == own.shape[1:] and t.dtype == own.dtype and t.device == own.device
        if not alike or len(t) != len(rows) or len(own) != size:
            continue
        every, mine = _row_sums(own), _row_sums(t)
        other = not torch.equal(mine, every[rows.to(own.device)]) and bool(torch.isin(mine, every).all())
        if other and _is_telling(own) and len(every.unique()) > len(every) // 2:
            raise ScopeError(
                "the model was called on other rows of the batch than those declared by opt.keep_rows(): examples would be "
                "added up row by row. Remedy: declare the rows that all calls of the step are on, in their order."
            )


def _moved(before: list[Tensor], mine: list[Tensor], counted: list[Tensor], handed_out: list[Tensor]) -> bool:
    """Whether a call has rows of an earlier one in another order, and not by chance."""
    pairs = [(k, j) for k, now in enumerate(mine) for j, one in enumerate(before) if _in_another_order(one, now)]
    if not pairs:
        return False
    own = [_row_sums(t.to(mine[0].device)) for t in handed_out if t.layout == torch.strided and t.dim() and t.numel()]
    in_order = [(_among(before[j], own), _among(mine[k], own)) for k, j in pairs]
    left = [(k, j, any(known)) for (k, j), known in zip(pairs, in_order, strict=True) if not all(known)]
    all_moved = len(before) == len(mine) and {(k, k) for k in range(len(mine))} <= {(k, j) for k, j, _ in left}
    for k, _, of_batch in left:
        if len(mine[k].unique()) >= (_MANY if counted[k][0].numel() > 2 else _MANY_SHORT):
            return True
        if (of_batch or (all_moved and len(mine[k]) > _FEW)) and _is_telling(counted[k]):
            return True
    return False


def _among(sums: Tensor, others: Sequence[Tensor]) -> bool:
    return any(torch.equal(sums, other) for other in others)


def _row_sums(rows: Tensor) -> Tensor:
    """``[n]``: what the rows add up to, each number by its place; exactly, so that the same rows give the same anywhere."""
    flat = as_real(rows.detach()).reshape(len(rows), -1)
    if flat.is_floating_point() and flat.shape[1] > _LONG:
        return flat.sum(1, dtype=torch.float64)
    places = torch.arange(flat.shape[1], device=flat.device) * _PRIME % _BELOW + 1
    if flat.is_floating_point():
        return (flat.float() + 0.0).view(torch.int32).mul_(places.int()).sum(1)  # zeros have a sign
    return (flat.long() * places).sum(1)


def _is_telling(rows: Tensor) -> bool:
    """Whether a row holds so much that it is no class, level or the like: several numbers of some kinds, or many."""
    if rows[0].numel() >= 16 or (rows[0].numel() >= 3 and rows.unique().numel() >= 4):
        return True
    return len(rows) > _FEW and (rows.is_complex() or (rows.is_floating_point() and not bool((rows == rows.round()).all())))


def _in_another_order(before: Tensor, now: Tensor) -> bool:
    """Whether two lists of numbers are the same in another order; few kinds of numbers tell nothing."""
    if before.shape != now.shape or before.dtype != now.dtype or before.device != now.device or torch.equal(before, now):
        return False
    one, other = before.sort().values, now.sort().values
    kinds = 1 + int((one.diff() != 0).sum())
    return torch.equal(one, other) and kinds >= min(len(one), max(3, len(one) // 2))
