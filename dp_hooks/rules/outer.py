"""Gradients that are sums of outer products: the factors stay apart until it is known what is cheaper.

The weight gradient of a linear map is ``dW[n, o, i] = sum_t left[n, t, o] * right[n, t, i]`` with ``n`` samples, ``t`` tokens
(positions, pixels, repeated uses of the parameter), ``o`` and ``i`` rows and columns of the weight as a matrix. For an
embedding ``left`` is one-hot and kept as ids ``[n, t]``. Norms of a parameter that was used several times, also in
several kinds of layers, follow from the inner products of all pairs of its uses, without any ``[n, o, i]`` tensor.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement

import torch
from torch import Tensor

# How many numbers are held at once in temporary tensors (64 MB of float32).
CHUNK = 1 << 24
# Gram norms may be too high by this part of their value; samples for which it could be more are instantiated.
_SLACK = 1e-3
# Sequences at least twice as long are cut in two, to use that Gram matrices are symmetric.
_HALF = 32


@dataclass(eq=False)
class Outer:
    """``dW[n] = sum_t left[n, t] (x) right[n, t]``, the gradient of one use of a parameter.

    Attributes:
        left: ``[n, t, o]``, or ids ``[n, t]`` that stand for one-hot rows.
        right: ``[n, t, i]``.
        shape: the shape of the parameter, ``o * i`` numbers in this order.
        scale: a number that multiplies the gradient.
    """

    left: Tensor
    right: Tensor
    shape: torch.Size
    scale: float = 1.0

    @property
    def is_lookup(self) -> bool:
        """Whether ``left`` holds ids."""
        return self.left.dim() == 2

    @property
    def samples(self) -> int:
        """N."""
        return int(self.right.shape[0])

    @property
    def tokens(self) -> int:
        """T."""
        return int(self.right.shape[1])

    @property
    def rows(self) -> int:
        """o: rows of the weight as a matrix."""
        return int(self.shape[0]) if self.is_lookup else int(self.left.shape[-1])

    @property
    def columns(self) -> int:
        """i: columns of the weight as a matrix."""
        return int(self.right.shape[-1])

    def pick(self, samples: slice | Tensor) -> "Outer":
        """Return the factors of some samples."""
        if isinstance(samples, slice) and samples == slice(None):
            return self
        return Outer(self.left[samples], self.right[samples], self.shape, self.scale)

    def grads(self) -> Tensor:
        """Per-sample gradients ``[n, *shape]``."""
        if self.is_lookup:
            out = self.right.new_zeros((self.samples, self.rows, self.columns))
            out.scatter_add_(1, self.left[..., None].expand_as(self.right), self.right)
        else:
            out = torch.bmm(self.left.mT, self.right)
        return (out if self.scale == 1 else out.mul_(self.scale)).view(self.samples, *self.shape)

    def weighted_sum(self, factors: Tensor) -> Tensor:
        """``sum_n factors[n] dW[n]`` in one matrix product over samples and tokens; the narrower factor is scaled."""
        left, right, f = self.left, self.right, (factors * self.scale).to(self.right.dtype)[:, None, None]
        if self.is_lookup:
            total = scatter_rows(left.flatten(), (right * f).flatten(0, 1), self.rows)
        else:
            if self.rows < self.columns:
                left = left * f
            else:
                right = right * f
            total = left.flatten(0, 1).mT @ right.flatten(0, 1)
        return total.view(self.shape)


def scatter_rows(ids: Tensor, values: Tensor, rows: int) -> Tensor:
    """Return ``[rows, d]`` with each of ``values`` ``[k, d]`` added to the row that ``ids`` ``[k]`` names."""
    # The backward pass of an embedding: in parallel over rows, where index_add_ goes token by token.
    total: Tensor = torch.ops.aten.embedding_dense_backward(values, ids, rows, -1, False)
    return total


def sum_of_squares(rows: Tensor) -> Tensor:
    """Return ``[n]``, the squared norm of each row of ``[n, ...]``, added up in at least float32."""
    dtype = torch.promote_types(rows.dtype, torch.float32)
    norms: Tensor = torch.linalg.vector_norm(rows.flatten(1), dim=1, dtype=dtype)
    return norms.square()


def gram_cost(tokens: int, rows: int, columns: int) -> float:
    """Multiplications per sample of a norm from two Gram matrices: ``t^2 (o + i)``, and ``t^2`` for their product.

    Li, Tramer, Liang, Hashimoto, "Large language models can be strong differentially private learners", ICLR 2022, section 4.
    """
    return float(tokens * tokens * (rows + columns + 1))


def instantiation_cost(tokens: int, rows: int, columns: int) -> float:
    """Multiplications per sample of a norm from the gradient itself: ``t o i``, and ``o i`` for its square.

    Whether this or :func:`gram_cost` is less decides how a norm is taken, layer by layer (Bu, Mao, Xu, "Scalable and
    efficient training of large convolutional neural networks with differential privacy", NeurIPS 2022, section 4.1).
    """
    return float((tokens + 1) * rows * columns)


def sq_norms(uses: Sequence[Outer]) -> Tensor:
    """Return ``[n]``: squared norms of the sum of all ``uses`` of one parameter, or upper bounds tight to 1e-3.

    A lone lookup and a lone token are exact; else the cheaper of two formulas by :func:`gram_cost` of all tokens together.
    """
    first = uses[0]
    if len(uses) == 1 and first.is_lookup:
        return _lookup_norms(first)
    if len(uses) == 1 and first.tokens == 1:
        return sum_of_squares(first.left) * sum_of_squares(first.right) * first.scale**2
    tokens = sum(use.tokens for use in uses)
    rows = 0 if any(use.is_lookup for use in uses) else first.rows
    if gram_cost(tokens, rows, first.columns) >= instantiation_cost(tokens, first.rows, first.columns):
        return instantiated_norms(uses)
    step = max(1, CHUNK // (3 * tokens * tokens + 1))
    parts = [_gram_norms([use.pick(slice(i, i + step)) for use in uses]) for i in range(0, first.samples, step)]
    return torch.cat(parts) if parts else first.right.new_zeros(0)


def instantiated_norms(uses: Sequence[Outer]) -> Tensor:
    """Return ``[n]``: squared norms of the per-sample gradients, written out for a few samples at a time."""
    first = uses[0]
    step = max(1, CHUNK // max(1, first.rows * first.columns))
    parts = []
    for i in range(0, first.samples, step):
        grads, *more = (use.pick(slice(i, i + step)).grads() for use in uses)
        for other in more:
            grads = grads + other
        parts.append(sum_of_squares(grads))
    return torch.cat(parts) if parts else first.right.new_zeros(0)


def _lookup_norms(use: Outer) -> Tensor:
    """Add up the rows that belong to the same (sample, id), then square: exact, with memory ``[n * t, i]``."""
    n, size = use.samples, use.rows
    samples = torch.arange(n, device=use.left.device)
    keys, index = torch.unique((samples[:, None] * size + use.left).flatten(), return_inverse=True)
    per_row = sum_of_squares(scatter_rows(index, use.right.flatten(0, 1), keys.shape[0]))
    return per_row.new_zeros(n).index_add_(0, keys // size, per_row) * use.scale**2


def _gram_norms(uses: Sequence[Outer]) -> Tensor:
    """``|dW|^2 = sum_{t,s} (left_t . left_s)(right_t . right_s)`` over the tokens of all uses, plus a rounding bound.

    Where tokens cancel, the sum loses digits. Each inner product of length ``d`` is off by at most about ``sqrt(d)``
    units of rounding times both norms (the probabilistic bound of Higham and Mary, SIAM J. Sci. Comput. 41, 2019), so the sum
    is off by at most ``eps (sqrt(o) + sqrt(i) + log2(t^2)) (sum_t |left_t| |right_t|)^2``. That bound is added, so that no
    sample is clipped less than its norm demands; a sample for which it exceeds one part in a thousand, or whose sum is
    negative or not finite, is computed by instantiation.
    """
    first = uses[0]
    total: Tensor | None = None
    sizes: Tensor | None = None
    for a, b in combinations_with_replacement(range(len(uses)), 2):
        if a == b:
            value, size = _self_product(uses[a])
            value, size = value * uses[a].scale ** 2, size * uses[a].scale
            sizes = size if sizes is None else sizes + size
        else:
            value = _cross_product(uses[a], uses[b]) * (2 * uses[a].scale * uses[b].scale)
        total = value if total is None else total + value
    assert total is not None
    assert sizes is not None
    tokens = sum(use.tokens for use in uses)
    rounding = math.sqrt(first.rows) + math.sqrt(first.columns) + 2 * math.log2(tokens)
    slack = (torch.finfo(first.right.dtype).eps * rounding) * sizes.square()
    unsure = ~(slack <= _SLACK * total)  # also true for NaN and negative sums
    total = total + slack
    if bool(unsure.any()):
        total[unsure] = instantiated_norms([use.pick(unsure) for use in uses])
    return total


def _self_product(use: Outer) -> tuple[Tensor, Tensor]:
    """Return ``|dW|^2 [n]`` of one use, and ``sum_t |left_t| |right_t| [n]``."""
    if use.is_lookup:
        gram = torch.bmm(use.right, use.right.mT)
        sizes = gram.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt().sum(1)
        return gram.masked_fill_(use.left[:, :, None] != use.left[:, None, :], 0).sum((1, 2)), sizes
    t = use.tokens
    if t >= 2 * _HALF and t % 2 == 0:
        # The diagonal blocks are products of half the length; the two blocks beside them are equal.
        halves = [part.reshape(2 * use.samples, t // 2, part.shape[-1]) for part in (use.left, use.right)]
        value, sizes = _gram_product(*halves)
        beside = torch.bmm(use.left[:, : t // 2], use.left[:, t // 2 :].mT)
        beside.mul_(torch.bmm(use.right[:, : t // 2], use.right[:, t // 2 :].mT))
        return value.view(-1, 2).sum(1) + 2 * beside.sum((1, 2)), sizes.view(-1, 2).sum(1)
    return _gram_product(use.left, use.right)


def _gram_product(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    gram = torch.bmm(left, left.mT).mul_(torch.bmm(right, right.mT))
    return gram.sum((1, 2)), gram.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt().sum(1)


def _cross_product(a: Outer, b: Outer) -> Tensor:
    """Return ``<dW_a, dW_b>`` ``[n]`` for two uses of the same parameter, of any kinds."""
    right = torch.bmm(a.right, b.right.mT)
    if a.is_lookup and b.is_lookup:
        return right.masked_fill_(a.left[:, :, None] != b.left[:, None, :], 0).sum((1, 2))
    if b.is_lookup:
        return _cross_product(b, a)
    return right.mul_(_looked_up(a.left, b.left) if a.is_lookup else torch.bmm(a.left, b.left.mT)).sum((1, 2))


def _looked_up(ids: Tensor, rows: Tensor) -> Tensor:
    """Return ``[n, t, s]``: one-hot ids ``[n, t]`` times rows ``[n, s, o]``, the entries that the ids name."""
    return rows.gather(2, ids[:, None, :].expand(-1, rows.shape[1], -1)).mT
