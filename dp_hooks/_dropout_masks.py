"""DropoutMasks: what stands in the place of dropout's own masks where runs of different size are compared."""

import torch
from torch import Tensor

# What a dropout drops, one after the other, until masks of runs of different size fit: other features of each sample, the same
# features of all rows, nothing.
_OF_EACH, _OF_ALL, _NOTHING = range(3)


class DropoutMasks:
    """Masks that are the same for a sample whoever else is in the batch, for one dropout of a run after the other."""

    def __init__(self, samples: int | None) -> None:
        """For runs on ``samples``, and on some of them."""
        self._samples = samples
        self._axes: list[tuple[int | None, int | None, int]] = []  # see _find_axes, one dropout after the other
        self._drops: dict[int, int] = {}  # what that of this number does, if not the first of these
        self._misfits: set[int] = set()  # those whose masks on some samples had nothing in common with those on all
        self._next = 0
        self._some: Tensor | None = None

    def begin_again(self, some: Tensor | None) -> None:
        """A run begins, on ``some`` samples, or on all of them (None), which tells what the others do."""
        self._next, self._some = 0, some
        if some is None:
            self._axes = []

    def adapt(self) -> bool:
        """Drop less where masks did not fit, for runs to come; whether there are such."""
        adapted = bool(self._misfits)
        for number in self._misfits:
            self._drops[number] = self._drops.get(number, _OF_EACH) + 1
        self._misfits = set()
        return adapted

    def make(self, x: Tensor, p: float) -> Tensor | None:
        """What is kept, ``1 / (1 - p)``, and what is not, 0, of ``x``; None: all of it is kept as it is."""
        number, self._next = self._next, self._next + 1
        if self._some is None:
            self._axes.append(self._find_axes(x, self._drops.get(number, _OF_EACH)))
        if number >= len(self._axes):
            return None
        samples, features, count = self._axes[number]
        if features is None and samples is None:
            return None
        rows = self._samples if self._some is None else len(self._some)
        for axis, size in ((features, count), (samples, rows)):
            if axis is not None and x.shape[axis : axis + 1] != (size,):
                self._misfits.add(number)
                return None
        generator = torch.Generator("cpu").manual_seed(number)
        numbers = torch.zeros([1] * x.dim(), device="cpu")  # of all samples, one for each feature
        for axis, size in ((features, count), (samples, self._samples or 0)):
            if axis is not None:
                numbers = numbers + _along(torch.rand(size, generator=generator, device="cpu"), axis, x.dim())
        numbers %= 1
        if samples is not None and features is not None and numbers.shape[samples] > 3:
            numbers.select(samples, 1).fill_(0.0)  # of one nothing is kept, and of one everything
            numbers.select(samples, 2).fill_(1.0)
        flat = numbers.flatten()
        dropped = numbers <= min(max(p, float(flat.min())), float(flat.topk(2).values[-1]))  # one is, at least, and one is not
        if samples is not None and self._some is not None:
            dropped = dropped.index_select(samples, self._some.cpu())
        return (~dropped).to(x.device, x.dtype) / (1 - p)

    def _find_axes(self, x: Tensor, drops: int) -> tuple[int | None, int | None, int]:
        """The axis that counts samples, the last one that does not, and its length; None: there is none."""
        sizes = list(enumerate(x.shape))
        samples = next((d for d, size in sizes if size == self._samples), None) if drops == _OF_EACH else None
        features = next((d for d, size in reversed(sizes) if size > 1 and d != samples), None)
        if features == 0 and samples is None and (drops == _OF_ALL or not self._samples or len(x) % self._samples == 0):
            features = None  # its rows may be those of samples
        if drops == _NOTHING:
            return None, None, 1
        return samples, features, 1 if features is None else x.shape[features]


def _along(numbers: Tensor, axis: int, dims: int) -> Tensor:
    """A view of ``numbers`` along one of so many axes."""
    shape = [1] * dims
    shape[axis] = -1
    return numbers.reshape(shape)
