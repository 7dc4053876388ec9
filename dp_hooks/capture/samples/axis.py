"""Where the samples are in a tensor: which axis counts them, and in which order when the axis counts more than them."""

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class SampleAxis:
    """Samples are counted along ``axis``, which has ``outer * n * inner`` rows for ``n`` samples, in this order.

    ``None`` stands for whatever is left: tokens flattened into the batch, sample by sample, are ``(axis, 1, None)``, whatever
    their number; time-first ones are ``(axis, None, 1)``.
    """

    axis: int
    outer: int | None = 1
    inner: int | None = 1
    # Whether this is the only order that fits what was seen; not so where all rows are alike.
    sure: bool = field(default=True, compare=False)

    def agrees(self, other: "SampleAxis | None") -> bool:
        """Whether both may be the same: one that is not sure only tells which axis it is."""
        doubt = other is not None and self.axis == other.axis and not (self.sure and other.sure)
        return self == other or doubt

    def covers(self, other: "SampleAxis | None") -> bool:
        """Whether what is laid out like ``other`` is so here, too: one row per sample is a number of tokens as well."""
        tokens = (self.outer, self.inner) in ((1, None), (None, 1))
        return self == other or (tokens and other == SampleAxis(self.axis))

    def factors(self, size: int, n: int) -> tuple[int, int] | None:
        """Return ``(outer, inner)`` for an axis of ``size`` rows, or None if ``n`` samples do not fit into it."""
        if n == 0:
            return (1, 1) if size == 0 else None
        outer = self.outer or size // n // (self.inner or 1)
        inner = self.inner or size // n // (self.outer or 1)
        return (outer, inner) if outer * n * inner == size else None

    def fits(self, tensor: Tensor, n: int) -> bool:
        """Whether ``tensor`` can hold ``n`` samples in this layout."""
        return tensor.dim() > self.axis and self.factors(tensor.shape[self.axis], n) is not None

    def _sizes(self, tensor: Tensor, n: int) -> tuple[int, int]:
        found = self.factors(tensor.shape[self.axis], n)
        assert found is not None, f"{n} samples do not fit into axis {self.axis} of {tuple(tensor.shape)}"
        return found

    def samples(self, tensor: Tensor, n: int) -> Tensor:
        """Return ``[n, *shape of one sample]``; a sample has the rank of ``tensor``, ``outer * inner`` rows in ``axis``."""
        axis, (outer, inner) = self.axis, self._sizes(tensor, n)
        rows: Tensor = tensor.unflatten(axis, (outer, n, inner)).movedim(axis + 1, 0).flatten(axis + 1, axis + 2)
        return rows

    def spread(self, values: Tensor, tensor: Tensor) -> Tensor:
        """One value per sample, in all rows of ``tensor`` that are of that sample; the other axes have size 1."""
        outer, inner = self._sizes(tensor, len(values))
        shape = [-1 if axis == self.axis else 1 for axis in range(tensor.dim())]
        return values.repeat_interleave(inner).repeat(outer).reshape(shape)
