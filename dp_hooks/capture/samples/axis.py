"""Where the samples are in a tensor: which axis counts them, and in which order when the axis counts more than them."""

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class SampleAxis:
    """Samples are counted along ``axis``, which has ``outer * n * inner`` rows for ``n`` samples, in this order.

    ``None`` stands for whatever is left: tokens flattened into the batch, sample by sample, are ``(axis, 1, None)``, whatever
    their number; time-first ones are ``(axis, None, 1)``. ``ratio`` is the number of rows per sample when it was seen.
    """

    axis: int
    outer: int | None = 1
    inner: int | None = 1
    ratio: int = field(default=1, compare=False)

    @property
    def is_plain(self) -> bool:
        """Whether there is exactly one row per sample."""
        return self.outer == 1 and self.inner == 1

    def factors(self, size: int, n: int) -> tuple[int, int] | None:
        """Return ``(outer, inner)`` for an axis of ``size`` rows, or None if ``n`` samples do not fit into it."""
        if n == 0:
            return (1, 1) if size == 0 else None
        if size % n:
            return None
        rest = size // n
        if self.outer is None and self.inner is None:
            return None
        if self.outer is None:
            return (rest // self.inner, self.inner) if self.inner and rest % self.inner == 0 else None
        if self.inner is None:
            return (self.outer, rest // self.outer) if rest % self.outer == 0 else None
        return (self.outer, self.inner) if self.outer * self.inner == rest else None

    def fits(self, tensor: Tensor, n: int) -> bool:
        """Whether ``tensor`` can hold ``n`` samples in this layout."""
        return tensor.dim() > self.axis and self.factors(tensor.shape[self.axis], n) is not None

    def samples(self, tensor: Tensor, n: int) -> Tensor:
        """Return ``[n, *shape of one sample]``; a sample has the rank of ``tensor``, ``outer * inner`` rows in ``axis``."""
        found = self.factors(tensor.shape[self.axis], n)
        assert found is not None, f"{n} samples do not fit into axis {self.axis} of {tuple(tensor.shape)}"
        axis = self.axis
        split = tensor.unflatten(axis, (found[0], n, found[1]))
        rows: Tensor = split.movedim(axis + 1, 0).flatten(axis + 1, axis + 2)
        return rows
