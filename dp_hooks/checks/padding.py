"""PaddingCheck: whether what the model makes of a sample depends on how far others made it be padded."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .._rerun import is_copy
from .._tree import PaddedField, field_at, one_sample, outputs_of, tree_map
from ..capture.calls.recorded_call import RecordedCall
from ..errors import SelfCheckError
from .compare import tolerance


@dataclass(eq=False)
class PaddingCheck:
    """Runs a padded sample alone, once as it is and once without its padding: both have to come out alike.

    Attributes:
        paddings: what the probe of the collate function found to be padded, each with one value.
        waiting: whether it has not been seen yet.
    """

    paddings: Sequence[PaddedField]
    axis: int
    waiting: bool = True
    _fields: list[Tensor] = field(default_factory=list)  # of the present batch, where some sample is padded
    _lengths: list[int] = field(default_factory=list)

    def saw_batch(self, batch: Any) -> bool:
        """Look for padded samples in a batch that is handed out; whether there are some to be checked."""
        self._fields, self._lengths = [], []
        if not self.waiting or not self.paddings:
            return False
        found = [(padding, field_at(batch, padding.path)) for padding in self.paddings]
        fields = [(padding, t) for padding, t in found if isinstance(t, Tensor) and t.dim() > padding.axis + 1 and len(t) > 1]
        sizes = {t.shape[_whole_axis(padding.axis, self.axis)] for padding, t in fields}
        if len(fields) != len(self.paddings) or len(sizes) != 1 or len({padding.at_end for padding, _ in fields}) != 1:
            return False
        filled = torch.stack([self._filled(padding, t) for padding, t in fields]).all(0)  # [n, size]
        if fields[0][0].at_end:
            filled = filled.flip(1)
        lengths = (~filled).int().cummax(1).values.sum(1).tolist()
        if min(lengths) == max(lengths):
            return False
        self._fields, self._lengths = [t for _, t in fields], lengths
        return True

    def _filled(self, padding: PaddedField, field: Tensor) -> Tensor:
        """``[n, size]``: where there is nothing but the value that pads."""
        assert padding.value is not None
        rows = field.movedim(self.axis, 0).movedim(padding.axis + 1, 1).eq(padding.value)
        return rows.flatten(2).all(2) if rows.dim() > 2 else rows

    def check(self, call: RecordedCall, samples: int, what: str) -> bool:
        """Compare; whether ``call`` got a padded field, so that there was something to compare.

        Raises:
            SelfCheckError: the outputs for a sample alone are others without its padding.
        """
        if not self._lengths or len(self._lengths) != samples:
            return False
        size = self._fields[0].shape[_whole_axis(self.paddings[0].axis, self.axis)]
        i = min(range(samples), key=lambda k: (self._lengths[k] == 0, self._lengths[k]))
        length, at_end = self._lengths[i], self.paddings[0].at_end
        if length in (0, size):
            return False
        known: list[bool] = []

        def cut(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            mine = any(is_copy(leaf, own) for own in self._fields)
            known.append(mine)
            for axis in range(leaf.dim()):
                if axis != self.axis and leaf.shape[axis] == size:
                    if leaf.is_floating_point() and not mine and leaf.dim() > 2:
                        raise _Ambiguous
                    leaf = leaf.narrow(axis, 0 if at_end else size - length, length)
            return leaf

        try:
            shorter = tree_map(cut, (call.args, call.kwargs))
        except _Ambiguous:
            return False
        if not any(known):
            return False
        padded = self._outputs(call, one_sample((call.args, call.kwargs), i, samples, self.axis))
        alone = self._outputs(call, one_sample(shorter, i, samples, self.axis))
        for one, other in zip(padded, alone, strict=False):
            axes = [d for d in range(one.dim()) if one.dim() == other.dim() and one.shape[d] != other.shape[d]]
            if one.dim() != other.dim() or any((one.shape[d], other.shape[d]) != (size, length) for d in axes):
                return False
            for d in axes:
                one = one.narrow(d, 0 if at_end else size - length, length)
            off = float((one - other).double().norm() / other.double().norm().clamp(min=1e-12))
            if off > tolerance(one.dtype, coarse=call.coarse):
                raise SelfCheckError(
                    f"{what}: its output for sample {i} is off by {off:.1e} without the padding that a longer example of the "
                    f"batch made necessary ({length} of {size} positions are its own), so one example changes the rows of "
                    "others; nothing was released. Remedy: give the model an attention mask (or lengths) and let it leave the "
                    "padding out, or pad all examples to one length in the dataset."
                )
        self.waiting = False
        return True

    @staticmethod
    def _outputs(call: RecordedCall, inputs: tuple[Any, dict[str, Any]]) -> list[Tensor]:
        args, kwargs = inputs
        with call.context.restored():
            outputs = outputs_of(call.module(*args, **kwargs))
        return [t.detach() for t in outputs if t.is_floating_point() and t.numel() > 1]


class _Ambiguous(Exception):
    """An axis may or may not be the padded one."""


def _whole_axis(axis: int, sample_axis: int) -> int:
    return axis + 1 if axis >= sample_axis else axis
