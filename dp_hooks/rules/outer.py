"""OuterProducts: a gradient that is a sum of outer products, kept as its two factors until it is known what is cheaper.

The weight gradient of a linear map is ``dW[n, o, i] = sum_t left[n, t, o] * right[n, t, i]`` with ``n`` samples, ``t`` tokens
(positions, pixels, repeated uses of the parameter), ``o`` and ``i`` rows and columns of the weight as a matrix. For an
embedding ``left`` is one-hot and kept as ids ``[n, t]``. Norms of a parameter that was used several times, also in
several kinds of layers, follow from the inner products of all pairs of its uses, without any ``[n, o, i]`` tensor.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .._precision import wide_dtype

CHUNK = 1 << 24  # how many numbers are held at once in temporary tensors (64 MB of float32)
_HALF = 32  # sequences of at least twice as many tokens are cut in two, to use that Gram matrices are symmetric


@dataclass(eq=False)
class OuterProducts:
    """``dW[n] = sum_t left[n, t] (x) right[n, t]``, the gradient of one use of a parameter."""

    left: Tensor  # ``[n, t, o]``, or ids ``[n, t]`` that stand for one-hot rows
    right: Tensor  # ``[n, t, i]``
    shape: torch.Size  # the shape of the parameter, ``o * i`` numbers in this order
    scale: float = 1.0  # a number that multiplies the gradient
    is_kept: bool = field(default=False, init=False)  # whether the factors are in memory anyway until the sums are taken
    _norms: "tuple[Tensor, Tensor] | None" = field(default=None, init=False, repr=False)

    @property
    def is_lookup(self) -> bool:
        """Whether ``left`` holds ids."""
        return self.left.dim() == 2

    @property
    def samples(self) -> int:
        """N."""
        return int(self.left.shape[0])

    @property
    def tokens(self) -> int:
        """T."""
        return int(self.left.shape[1])

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
        return self.right.dtype if self.is_lookup else self.left.dtype

    @property
    def storages(self) -> set[int]:
        """Where the memory of the factors is."""
        return {self.left.untyped_storage().data_ptr(), self.right.untyped_storage().data_ptr()}

    @property
    def numbers(self) -> int:
        """How many numbers the factors hold."""
        return self.left.numel() + self.right.numel()

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
        parts = (slice(half), slice(half, self.tokens))
        one, two = (OuterProducts(self.left[:, part], self.right[:, part], self.shape) for part in parts)
        return [(one, one, weight), (two, two, weight), (one, two, 2 * weight)]

    def is_like(self, other: "OuterProducts") -> bool:
        """Whether both can be one use, with the tokens of both."""
        plain = type(self) is type(other) is OuterProducts and not self.is_lookup and not other.is_lookup
        return plain and (self.scale, self.left.dtype, self.right.dtype) == (other.scale, other.left.dtype, other.right.dtype)

    @staticmethod
    def joined(uses: "Sequence[OuterProducts]") -> "list[OuterProducts]":
        """Fewer uses with the same sum: of layers called again and again, where a pair of uses each would be too many."""
        found, waiting = [], list(uses)
        while waiting:
            first = waiting[0]
            alike = [first, *(use for use in waiting[1:] if first.is_like(use))]
            waiting = [use for use in waiting[1:] if not first.is_like(use)]
            if len(alike) > 1:
                left, right = torch.cat([use.left for use in alike], 1), torch.cat([use.right for use in alike], 1)
                first = OuterProducts(left, right, first.shape, first.scale)
            found.append(first)
        return found

    def pick(self, samples: slice | Tensor) -> "OuterProducts":
        """Return the factors of some samples."""
        if isinstance(samples, slice) and samples == slice(None):
            return self
        return OuterProducts(self.left[samples], self.right[samples], self.shape, self.scale)

    def weighed(self, weights: Tensor) -> "OuterProducts":
        """Return the factors of gradients that are multiplied by ``weights`` ``[n]``."""
        return OuterProducts(self.left, self.right * weights.to(self.right)[:, None, None], self.shape, self.scale)

    def together(self, count: int) -> "OuterProducts":
        """Return the factors of sums over ``count`` samples that follow each other: one sample with the tokens of all of them."""
        left, right = (t.unflatten(0, (-1, count)).flatten(1, 2) for t in (self.left, self.right))
        return OuterProducts(left, right, self.shape, self.scale)

    def absolute(self) -> "OuterProducts":
        """Return the factors without their signs: nothing cancels in what they give."""
        return OuterProducts(self.left if self.is_lookup else self.left.abs(), self.right.abs(), self.shape, abs(self.scale))

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
    dtype = wide_dtype(rows.dtype)
    norms: Tensor = torch.linalg.vector_norm(rows.reshape(rows.shape[0], rows.shape[1:].numel()), dim=1, dtype=dtype)
    return norms.square()


def _diagonal_norms(grams: Tensor) -> Tensor:
    return grams.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt()


def _row_norms(rows: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(rows, dim=2)
    return norms


def _looked_up(ids: Tensor, rows: Tensor) -> Tensor:
    """Return ``[n, t, s]``: one-hot ids ``[n, t]`` times rows ``[n, s, o]``, the entries that the ids name."""
    return rows.gather(2, ids[:, None, :].expand(-1, rows.shape[1], -1)).mT.contiguous()
