"""RowOrder: whether all calls of a step have the examples in the same order, told by what the rows of their inputs hold."""

import itertools
from collections import deque
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from .._tree import as_real
from ..errors import ScopeError

_CALLS = 64  # how many calls on the present part a further one is compared with
# So many different rows are not in the order of others by chance; rows of the batch that hold little, so many.
_MANY, _MANY_SHORT = 6, 12
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

    def check(self, inputs: list[Tensor], rows: int | None, handed_out: list[Tensor], axis: int = 0) -> None:
        """A call begins, on ``inputs`` of so many ``rows`` along ``axis``, of a part that was ``handed_out``.

        Raises:
            ScopeError: they are those of an earlier call, in another order; or some of them are rows of the part in another order,
                beside others that are in its own.
        """
        counted = [_rows_first(t, axis) for t in inputs if _has_rows(t, axis) and t.shape[axis] == rows]
        handed_out = [_rows_first(t, at) for t in handed_out for at in {0, axis} if _has_rows(t, at) and t.shape[at] == rows]
        mine = [_row_sums(t) for t in counted]
        if len(counted) > 1 and _some_moved(mine, counted, handed_out):
            raise ScopeError(
                "the model was called on rows of the batch beside rows of it in another order (negatives from the batch, MixUp, a "
                "shuffled copy): row i is made of two examples. Remedy: let row i come from example i in every input; pairs belong "
                "into the dataset, as one example each."
            )
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
        if not alike or len(t) != len(rows) or len(own) != size or not t.numel():
            continue
        every, mine = _row_sums(own), _row_sums(t)
        other = not torch.equal(mine, every[rows.to(own.device)]) and bool(torch.isin(mine, every).all())
        if other and _is_telling(own) and len(every.unique()) > len(every) // 2:
            raise ScopeError(
                "the model was called on other rows of the batch than those declared by opt.keep_rows(): examples would be "
                "added up row by row. Remedy: declare the rows that all calls of the step are on, in their order."
            )


def check_in_order(inputs: list[Tensor], handed_out: list[Tensor], size: int, axis: int) -> None:
    """Where units are protected, which rows belong to one is known by their places: a call is on the part in its own order.

    Raises:
        ScopeError: an input is rows of the part in another order.
    """
    counted = [(own, d) for own in handed_out for d in dict.fromkeys((0, axis)) if _has_rows(own, d) and own.shape[d] == size]
    for t in inputs:
        alike = [(own, at) for own, at in counted if t.shape == own.shape and t.dtype == own.dtype]
        if not alike or any(t is own for own, _ in alike):
            continue
        sums = [[_row_sums(_rows_first(rows, at)).cpu() for rows in (own, t)] for own, at in alike]
        moved = not any(torch.equal(*both) for both in sums) and any(
            _in_another_order(*both) and (_is_telling(own) or len(both[0].unique()) >= _MANY_SHORT)
            for both, (own, _) in zip(sums, alike, strict=True)
        )
        if moved:
            raise ScopeError(
                "the model was called on the rows of the batch in another order than they were handed out in. With privacy_unit= "
                "the rows of a unit are told by their places, and rows of several units would be clipped as one. Remedy: keep "
                "the order of the batch; it is a random sample as it is."
            )


def _moved(before: list[Tensor], mine: list[Tensor], counted: list[Tensor], handed_out: list[Tensor]) -> bool:
    """Whether a call has rows of an earlier one in another order, and not by chance."""
    pairs = [(k, j) for k, now in enumerate(mine) for j, one in enumerate(before) if _in_another_order(one, now)]
    if not pairs:
        return False
    own = [_row_sums(t.to(mine[0].device)) for t in handed_out]
    in_order = [(_among(before[j], own), _among(mine[k], own)) for k, j in pairs]
    for k, of_batch in [(k, any(known)) for (k, _), known in zip(pairs, in_order, strict=True) if not all(known)]:
        kinds = len(mine[k].unique())
        if (of_batch or kinds >= _MANY) and _is_telling(counted[k]):
            return True
        if of_batch and kinds >= _MANY_SHORT:
            return True
    return False


def _some_moved(mine: list[Tensor], counted: list[Tensor], handed_out: list[Tensor]) -> bool:
    """Whether some inputs of a call are rows that were handed out in their order, and some in another."""
    moved = in_order = False
    for own in handed_out:
        sums: Tensor | None = None
        for k, t in enumerate(counted):
            if t is own or t.data_ptr() == own.data_ptr():
                in_order = True
                continue
            if t.shape != own.shape or t.dtype != own.dtype or t.device != own.device:
                continue
            sums = _row_sums(own) if sums is None else sums
            in_order = in_order or torch.equal(sums, mine[k])
            moved = moved or (_in_another_order(sums, mine[k]) and _is_telling(own))
    return moved and in_order


def _has_rows(tensor: Tensor, axis: int) -> bool:
    return tensor.layout == torch.strided and tensor.dim() > axis and tensor.numel() > 0


def _rows_first(tensor: Tensor, axis: int) -> Tensor:
    return tensor.movedim(axis, 0) if axis else tensor


def _among(sums: Tensor, others: Sequence[Tensor]) -> bool:
    return any(torch.equal(sums, other) for other in others)


def _row_sums(rows: Tensor) -> Tensor:
    """``[n]``: what the rows add up to, each number by its place; exactly, so that the same rows give the same anywhere."""
    flat = as_real(rows.detach()).reshape(len(rows), -1)
    if flat.is_floating_point():
        if flat.shape[1] > _LONG:  # neighbours count together
            each = flat.shape[1] // _LONG
            flat = flat[:, : each * _LONG].reshape(len(flat), _LONG, each).sum(2, dtype=torch.float32)
        flat = (flat.float() + 0.0).view(torch.int32)  # zeros have a sign
    places = _places(flat.shape[1], flat.device)
    if flat.dtype == torch.int32:
        return flat.mul(places.int()).sum(1, dtype=torch.int32)  # modulo 2^32
    return (flat.long() * places).sum(1)


@lru_cache(maxsize=64)
def _places(count: int, device: torch.device) -> Tensor:
    """What numbers of a row count by."""
    return torch.arange(count, device=device) * _PRIME % _BELOW + 1


def _is_telling(rows: Tensor) -> bool:
    """Whether a row holds so much that it is no class, level or the like: some numbers of some kinds, or many of two."""
    flat = as_real(rows.detach()).reshape(len(rows), -1)
    if flat.shape[1] < 3:
        return False
    kinds = flat.unique()
    fractions = flat.is_floating_point() and not bool((flat == flat.round()).all())
    if len(kinds) >= 4 or (len(kinds) == 3 and fractions):
        return True
    rarer = torch.minimum((flat == kinds[0]).sum(1), (flat != kinds[0]).sum(1))
    return flat.shape[1] >= 16 and int(rarer.median()) >= 3


def _in_another_order(before: Tensor, now: Tensor) -> bool:
    """Whether two lists of numbers are the same in another order; few kinds of numbers tell nothing."""
    if before.shape != now.shape or before.dtype != now.dtype or before.device != now.device or torch.equal(before, now):
        return False
    one, other = before.sort().values, now.sort().values
    kinds = 1 + int((one.diff() != 0).sum())
    return torch.equal(one, other) and kinds >= min(len(one), max(3, len(one) // 2))
