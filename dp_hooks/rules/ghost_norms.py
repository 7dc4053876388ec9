"""Gram or instantiate: squared norms of per-sample gradients from their factors, by the cheaper of the two ways.

Norms are upper bounds: where tokens cancel, a Gram sum loses digits, and a norm that is too small would clip too little.
"""

import functools
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor

from .outer import CHUNK, OuterProducts, scatter_rows, sum_of_squares

_SLACK = 1e-3  # Gram norms may be too high by this part of their value; samples for which it could be more are instantiated


@dataclass(frozen=True)
class Way:
    """How the norms of a parameter's gradients are taken."""

    instantiates: bool  # gradients are written out; else Gram matrices of the factors, or no more than a reading of them
    multiplications: float  # what that takes per sample


def choose_way(uses: Sequence[OuterProducts]) -> Way:
    """Gram or instantiate: the cheaper of two formulas, by the number of multiplications per sample that each needs.

    Gram matrices of all tokens together need ``t^2 (o + i)`` (Li, Tramer, Liang, Hashimoto, "Large language models can be
    strong differentially private learners", ICLR 2022, section 4; see :meth:`OuterProducts.gram_cost`), the gradient itself
    ``t o i``. Choosing layer by layer is from Bu, Mao, Xu, "Scalable and efficient training of large convolutional neural
    networks with differential privacy", NeurIPS 2022, section 4.1. A lone lookup and a lone token need neither.
    """
    first = uses[0]
    if len(uses) == 1 and first.is_lookup:
        return Way(False, first.tokens * first.columns)
    if len(uses) == 1 and first.tokens == 1:
        return Way(False, first.columns + first.rows)
    tokens = sum(use.tokens for use in uses)
    grams = sum(use.gram_cost(tokens) for use in uses)
    instantiation = sum(use.instantiation_cost() for use in uses)
    return Way(grams >= instantiation, min(grams, instantiation))


def sq_norms(uses: Sequence[OuterProducts]) -> Tensor:
    """Return ``[n]``: squared norms of the sum of all ``uses`` of one parameter, or upper bounds tight to 1e-3."""
    first = uses[0]
    if len(uses) == 1 and first.is_lookup:  # this and a lone token are exact
        return _lookup_norms(first)
    if len(uses) == 1 and first.tokens == 1:
        return sum_of_squares(first.left) * sum_of_squares(first.right) * first.scale**2
    if choose_way(uses).instantiates:
        return instantiated_norms(uses)
    tokens = sum(use.tokens for use in uses)
    step = max(1, CHUNK // (3 * tokens * tokens + 1))
    if 0 < first.samples <= step:
        return _gram_norms(uses)
    parts = []
    with looked_at_together(few=True):
        for i in range(0, first.samples, step):
            parts.append(_gram_norms([use.pick(slice(i, i + step)) for use in uses]))
    return torch.cat(parts) if parts else first.left.new_zeros(0, dtype=first.dtype)


def instantiated_norms(uses: Sequence[OuterProducts]) -> Tensor:
    """Return ``[n]``: squared norms of the per-sample gradients, written out for a few samples at a time."""
    first = uses[0]
    step = max(1, CHUNK // max(1, first.rows * first.columns))
    parts = []
    for i in range(0, first.samples, step):
        grads = functools.reduce(torch.add, (use.pick(slice(i, i + step)).grads() for use in uses))
        parts.append(sum_of_squares(grads))
    return torch.cat(parts) if parts else first.left.new_zeros(0, dtype=first.dtype)


def _lookup_norms(use: OuterProducts) -> Tensor:
    """Add up the rows that belong to the same (sample, id), then square: exact, with memory ``[n * t, i]``."""
    n, size = use.samples, use.rows
    samples = torch.arange(n, device=use.left.device)
    keys, index = torch.unique((samples[:, None] * size + use.left).flatten(), return_inverse=True)
    per_row = sum_of_squares(scatter_rows(index, use.right.flatten(0, 1), keys.shape[0]))
    return per_row.new_zeros(n).index_add_(0, keys // size, per_row) * use.scale**2


def _gram_norms(uses: Sequence[OuterProducts]) -> Tensor:
    """``|dW|^2 = sum_{t,s} (left_t . left_s)(right_t . right_s)`` over the tokens of all uses, plus a rounding bound.

    Where tokens cancel, the sum loses digits, and a norm that is too small clips too little. An inner product of length
    ``d`` is off by at most about ``sqrt(d)`` units of rounding times both norms (the probabilistic bound of Higham and
    Mary, SIAM J. Sci. Comput. 41, 2019; two units are allowed for each), so each pair of tokens is off by at most ``eps
    (sqrt(o) |left_t| |left_s| |right_t . right_s| + sqrt(i) |right_t| |right_s| |left_t . left_s|)``. The sum of these is
    added. A sample for which it exceeds one part in a thousand, or whose sum is negative or not finite, is
    computed by instantiation, unless a tighter bound that costs less clears it, see :func:`_size_of_terms`. That is asked at
    once, or at the end of a block :func:`looked_at_together`.
    """
    first = uses[0]
    eps = torch.finfo(first.dtype).eps
    rounding = eps * math.sqrt(first.rows), eps * math.sqrt(first.columns)
    sums = [_block_sum(*block, rounding) for block in _blocks(uses)]
    total, slack = sums[0] if len(sums) == 1 else (torch.stack(parts).sum(0) for parts in zip(*sums, strict=True))
    norms = total + slack
    estimate = _Estimate(uses, total, slack, norms, sum(rounding))
    if _open.waiting is None:
        _settle([estimate])
    else:
        _open.waiting.append(estimate)
        _open.held += 0 if first.is_kept else sum(use.numbers for use in uses)
        if _open.held > CHUNK:  # it may be copies that are kept alive
            _settle_waiting()
    return norms


class _Estimate(NamedTuple):
    """Norms by Gram matrices that have to be corrected for samples for which rounding matters."""

    uses: Sequence[OuterProducts]
    total: Tensor  # ``[n]``: sums over pairs of tokens
    slack: Tensor  # ``[n]``: how far off they may be
    norms: Tensor  # ``[n]``: both together; corrected in place
    rounding: float


class _Open(threading.local):
    waiting: list[_Estimate] | None = None  # None: no block is open
    held = 0  # how many numbers are kept alive by what waits


_open = _Open()


@contextmanager
def looked_at_together(*, few: bool = False) -> Iterator[None]:
    """Find out at the end of the block for which samples rounding matters, of all norms taken in it: one wait for a device.

    Norms that :func:`sq_norms` returns inside are corrected in place then, and final afterwards. A block within another one is
    part of it, unless there are ``few`` norms in it.
    """
    if _open.waiting is not None and not few:
        yield
        return
    kept = _open.waiting, _open.held
    _open.waiting, _open.held = None if few else [], 0
    try:
        yield
        if not few:
            _settle_waiting()
    finally:
        _open.waiting, _open.held = kept


def _settle_waiting() -> None:
    assert _open.waiting is not None
    waiting, _open.waiting, _open.held = _open.waiting, [], 0
    alike: dict[object, list[_Estimate]] = {}
    for estimate in waiting:
        alike.setdefault((estimate.total.shape, estimate.total.dtype, estimate.total.device), []).append(estimate)
    for some in alike.values():
        _settle(some)


def _settle(estimates: Sequence[_Estimate]) -> None:
    """Correct norms alike in shape, dtype and device, where rounding may matter."""
    if len(estimates) == 1:
        unsure = _unsure(estimates[0].total, estimates[0].slack)
        if unsure.numel():
            _correct(estimates[0], unsure)
        return
    both = [torch.stack(parts) for parts in ([e.total for e in estimates], [e.slack for e in estimates])]
    found = _unsure(*(part.flatten() for part in both))
    if found.numel():
        samples = estimates[0].total.shape[0]
        numbers = found // samples
        for number in numbers.unique().tolist():
            _correct(estimates[number], found[numbers == number] % samples)


def _correct(estimate: _Estimate, unsure: Tensor) -> None:
    uses, total, slack, norms, rounding = estimate
    instantiation = sum(use.instantiation_cost() for use in uses)
    if 2 * choose_way(uses).multiplications < instantiation:  # Gram matrices of factors without signs
        slack[unsure] = _in_parts(_size_of_terms, uses, unsure) * rounding
        norms[unsure] = (total + slack)[unsure]
        unsure = _unsure(total, slack)
    if unsure.numel():
        norms[unsure] = _in_parts(instantiated_norms, uses, unsure)


def _unsure(total: Tensor, slack: Tensor) -> Tensor:
    """Return the indices of the samples whose sums are not known well enough: negative, NaN and infinite ones, too."""
    return (~(slack <= _SLACK * total) | total.isinf()).nonzero().flatten()


def _in_parts(norms: Callable[[Sequence[OuterProducts]], Tensor], uses: Sequence[OuterProducts], samples: Tensor) -> Tensor:
    """Return ``norms`` of the chosen samples, whose factors are copied for a few at a time."""
    step = max(1, CHUNK // max(1, sum(use.tokens * (use.rows + use.columns) for use in uses)))
    return torch.cat([norms([use.pick(part) for use in uses]) for part in samples.split(step)])


def _blocks(uses: Sequence[OuterProducts]) -> list[tuple[OuterProducts, OuterProducts, float]]:
    """Cut all pairs of tokens, of the same use and of different ones, into blocks ``(a, b, weight)``."""
    blocks = [block for use in uses for block in use.blocks()]
    return blocks + [(a, b, 2 * a.scale * b.scale) for a, b in combinations(uses, 2)]


def _size_of_terms(uses: Sequence[OuterProducts]) -> Tensor:
    """Return ``[n]``: the Gram sum of factors without signs, for a tighter bound of rounding than norms of tokens give.

    What Higham and Mary bound the error of ``a . b`` by is ``|a| . |b|`` without signs, which the product of norms exceeds
    where tokens are large in different places, as the gradients of logits are. With both inner products bounded in this way
    the sum over pairs is itself a Gram sum.
    """
    sizes = [use.absolute() for use in uses]
    sums = [(a.left_products(b) * a.right_products(b)).sum((1, 2)) * weight for a, b, weight in _blocks(sizes)]
    return torch.stack(sums).sum(0)


def _block_sum(a: OuterProducts, b: OuterProducts, weight: float, rounding: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """Return ``[n]``: the weighted sum over the pairs of tokens of ``a`` and ``b``, and how far off it may be."""
    left, right = a.left_products(b), a.right_products(b)
    if a is b:
        a.keep_norms(left, right)
    value = (left * right).sum((1, 2)) * weight
    (left_a, right_a), (left_b, right_b) = a.norms(), b.norms()
    of_left, of_right = rounding[0] * abs(weight), rounding[1] * abs(weight)
    return value, _pairs(left_a, right.abs_(), left_b) * of_left + _pairs(right_a, left.abs_(), right_b) * of_right


def _pairs(a: Tensor, products: Tensor, b: Tensor) -> Tensor:
    """Return ``sum_{t,s} a[n, t] products[n, t, s] b[n, s]``."""
    return (torch.bmm(products, b[..., None])[..., 0] * a).sum(1)
