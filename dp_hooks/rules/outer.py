"""Gradients that are sums of outer products: the factors stay apart until it is known what is cheaper.

The weight gradient of a linear map is ``dW[n, o, i] = sum_t left[n, t, o] * right[n, t, i]`` with ``n`` samples, ``t`` tokens
(positions, pixels, repeated uses of the parameter), ``o`` and ``i`` rows and columns of the weight as a matrix. For an
embedding ``left`` is one-hot and kept as ids ``[n, t]``. Norms of a parameter that was used several times, also in
several kinds of layers, follow from the inner products of all pairs of its uses, without any ``[n, o, i]`` tensor.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import combinations

import torch
from torch import Tensor

# How many numbers are held at once in temporary tensors (64 MB of float32).
CHUNK = 1 << 24
# Gram norms may be too high by this part of their value; samples for which it could be more are instantiated.
_SLACK = 1e-3
# Sequences of at least twice as many tokens are cut in two, to use that Gram matrices are symmetric.
_HALF = 32


@dataclass(eq=False)
class OuterProducts:
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
    _norms: "tuple[Tensor, Tensor] | None" = field(default=None, init=False, repr=False)

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

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the gradients."""
        return self.right.dtype

    def norms(self) -> tuple[Tensor, Tensor]:
        """``|left_t|`` and ``|right_t|``, both ``[n, t]``: known from the products of the tokens with themselves."""
        if self._norms is None:
            left = torch.ones_like(self.left, dtype=self.dtype) if self.is_lookup else _row_norms(self.left)
            self._norms = left, _row_norms(self.right)
        return self._norms

    def keep_norms(self, left: Tensor, right: Tensor) -> None:
        """Take the norms from the diagonals of the Gram matrices ``[n, t, t]``."""
        self._norms = _diagonal_norms(left), _diagonal_norms(right)

    def left_products(self, other: "OuterProducts") -> Tensor:
        """``left_t . left_s`` ``[n, t, s]``, ``t`` of this use and ``s`` of another, of any kinds."""
        if self.is_lookup and other.is_lookup:
            return (self.left[:, :, None] == other.left[:, None, :]).to(self.dtype)
        if self.is_lookup:
            return _looked_up(self.left, other.left)
        if other.is_lookup:
            return _looked_up(other.left, self.left).mT
        return torch.bmm(self.left, other.left.mT)

    def right_products(self, other: "OuterProducts") -> Tensor:
        """``right_t . right_s`` ``[n, t, s]``; a tensor of its own."""
        return torch.bmm(self.right, other.right.mT)

    def gram_cost(self, others: int) -> float:
        """Multiplications per sample of the products of these tokens with ``others``, and of reading the results.

        Half of the products of one use with itself are spared, see :meth:`blocks`; that is not counted.
        """
        return self.tokens * others * ((0 if self.is_lookup else self.rows) + self.columns + 1.0)

    def instantiation_cost(self) -> float:
        """Multiplications per sample of the gradient itself, and of its square."""
        return self.rows * self.columns * ((0 if self.is_lookup else self.tokens) + 1.0)

    def blocks(self) -> "list[tuple[OuterProducts, OuterProducts, float]]":
        """Cut the pairs of tokens into blocks ``(a, b, weight)`` that need no work twice: Gram matrices are symmetric."""
        half, weight = self.tokens // 2, self.scale**2
        if half < _HALF:
            return [(self, self, weight)]
        one, two = (
            OuterProducts(self.left[:, part], self.right[:, part], self.shape)
            for part in (slice(half), slice(half, self.tokens))
        )
        return [(one, one, weight), (two, two, weight), (one, two, 2 * weight)]

    def pick(self, samples: slice | Tensor) -> "OuterProducts":
        """Return the factors of some samples."""
        if isinstance(samples, slice) and samples == slice(None):
            return self
        return OuterProducts(self.left[samples], self.right[samples], self.shape, self.scale)

    def absolute(self) -> "OuterProducts":
        """Return the factors without their signs: nothing cancels in what they give."""
        return OuterProducts(
            self.left if self.is_lookup else self.left.abs(), self.right.abs(), self.shape, abs(self.scale)
        )

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
        left, right, f = self.left, self.right, (factors * self.scale).to(self.dtype)[:, None, None]
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
    norms: Tensor = torch.linalg.vector_norm(rows.reshape(rows.shape[0], rows.shape[1:].numel()), dim=1, dtype=dtype)
    return norms.square()


def sq_norms(uses: Sequence[OuterProducts]) -> Tensor:
    """Return ``[n]``: squared norms of the sum of all ``uses`` of one parameter, or upper bounds tight to 1e-3.

    A lone lookup and a lone token are exact; else the cheaper of two formulas is taken, from the number of multiplications
    per sample that each needs. Gram matrices of all tokens together need ``t^2 (o + i)`` (Li, Tramer, Liang, Hashimoto,
    "Large language models can be strong differentially private learners", ICLR 2022, section 4; see
    :meth:`OuterProducts.gram_cost`), the gradient itself ``t o i``. Choosing layer by layer is from Bu, Mao, Xu, "Scalable
    and efficient training of large convolutional neural networks with differential privacy", NeurIPS 2022, section 4.1.
    """
    first = uses[0]
    if len(uses) == 1 and first.is_lookup:
        return _lookup_norms(first)
    if len(uses) == 1 and first.tokens == 1:
        return sum_of_squares(first.left) * sum_of_squares(first.right) * first.scale**2
    grams, instantiation = _costs(uses)
    if grams >= instantiation:
        return instantiated_norms(uses)
    tokens = sum(use.tokens for use in uses)
    step = max(1, CHUNK // (3 * tokens * tokens + 1))
    parts = [_gram_norms([use.pick(slice(i, i + step)) for use in uses]) for i in range(0, first.samples, step)]
    return torch.cat(parts) if parts else first.left.new_zeros(0, dtype=first.dtype)


def _costs(uses: Sequence[OuterProducts]) -> tuple[float, float]:
    """Multiplications per sample by Gram matrices and by instantiation."""
    tokens = sum(use.tokens for use in uses)
    return sum(use.gram_cost(tokens) for use in uses), sum(use.instantiation_cost() for use in uses)


def instantiated_norms(uses: Sequence[OuterProducts]) -> Tensor:
    """Return ``[n]``: squared norms of the per-sample gradients, written out for a few samples at a time."""
    first = uses[0]
    step = max(1, CHUNK // max(1, first.rows * first.columns))
    parts = []
    for i in range(0, first.samples, step):
        grads, *more = (use.pick(slice(i, i + step)).grads() for use in uses)
        for other in more:
            grads = grads + other
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
    computed by instantiation, unless a tighter bound that costs less clears it, see :func:`_size_of_terms`.
    """
    first = uses[0]
    blocks = _blocks(uses)
    eps = torch.finfo(first.dtype).eps
    rounding = eps * math.sqrt(first.rows), eps * math.sqrt(first.columns)
    sums = [_block_sum(*block, rounding) for block in blocks]
    total, slack = (torch.stack(parts).sum(0) for parts in zip(*sums, strict=True))
    unsure = _unsure(total, slack)
    if unsure.numel():
        grams, instantiation = _costs(uses)
        if 2 * grams < instantiation:
            slack[unsure] = _in_parts(_size_of_terms, uses, unsure) * sum(rounding)
            unsure = _unsure(total, slack)
    total = total + slack
    if unsure.numel():
        total[unsure] = _in_parts(instantiated_norms, uses, unsure)
    return total


def _unsure(total: Tensor, slack: Tensor) -> Tensor:
    """Return the indices of the samples whose sums are not known well enough: negative, NaN and infinite ones, too."""
    return (~(slack <= _SLACK * total) | total.isinf()).nonzero().flatten()


def _in_parts(
    norms: Callable[[Sequence[OuterProducts]], Tensor], uses: Sequence[OuterProducts], samples: Tensor
) -> Tensor:
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


def _block_sum(
    a: OuterProducts, b: OuterProducts, weight: float, rounding: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """Return ``[n]``: the weighted sum over the pairs of tokens of ``a`` and ``b``, and how far off it may be."""
    left, right = a.left_products(b), a.right_products(b)
    if a is b:
        a.keep_norms(left, right)
    value = (left * right).sum((1, 2)) * weight
    (left_a, right_a), (left_b, right_b) = a.norms(), b.norms()
    off = _pairs(left_a, right.abs_(), left_b) * rounding[0] + _pairs(right_a, left.abs_(), right_b) * rounding[1]
    return value, off * abs(weight)


def _diagonal_norms(grams: Tensor) -> Tensor:
    return grams.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt()


def _pairs(a: Tensor, products: Tensor, b: Tensor) -> Tensor:
    """Return ``sum_{t,s} a[n, t] products[n, t, s] b[n, s]``."""
    return (torch.bmm(products, b[..., None])[..., 0] * a).sum(1)


def _row_norms(rows: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(rows, dim=2)
    return norms


def _looked_up(ids: Tensor, rows: Tensor) -> Tensor:
    """Return ``[n, t, s]``: one-hot ids ``[n, t]`` times rows ``[n, s, o]``, the entries that the ids name."""
    return rows.gather(2, ids[:, None, :].expand(-1, rows.shape[1], -1)).mT.contiguous()
