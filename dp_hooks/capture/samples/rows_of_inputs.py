"""How many samples a call of the model is on: the first input tells."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...errors import UnsupportedModelError


def rows_of_inputs(inputs: Sequence[Tensor], axis: int) -> int | None:
    """Return the size of the first of ``inputs`` that has an ``axis``; None if there is no such input."""
    return next((t.shape[axis] for t in inputs if t.dim() > axis), None)


def counted_otherwise(inputs: Sequence[Tensor], axis: int) -> str:
    """A remark for errors, where an input has as many rows along another axis, so that the wrong one may have been declared."""
    for t in inputs:
        if t.dim() > 1 and t.shape[0] == t.shape[1] and t.shape[0] > 1:
            return (
                f" (an input has shape {tuple(t.shape)}: if axis {1 - axis} counts samples, declare batch_first={axis == 1}; if "
                "all samples share it, it must not have as many rows as the batch)"
            )
    return ""


def refuse_without_rows(inputs: Sequence[Tensor], axis: int, name: str) -> None:
    """Refuse tensors that samples cannot be taken from one by one.

    Raises:
        UnsupportedModelError: an input is nested (jagged), or it is sparse and counts samples.
    """
    what, rows = name or "the model", rows_of_inputs(inputs, axis)
    for t in inputs:
        if t.is_nested:
            raise UnsupportedModelError(
                f"{what}: an input is a nested tensor (jagged), whose samples differ in size and cannot be taken out one by one. "
                "Remedy: pad it, torch.nested.to_padded_tensor(x, 0.0), in the collate function or before the call, and give the "
                "model a mask."
            )
        if t.layout != torch.strided and t.dim() > axis and t.shape[axis] == rows:
            raise UnsupportedModelError(
                f"{what}: an input is a sparse tensor ({t.layout}) that counts samples, and single samples cannot be taken out of "
                "it. Remedy: x.to_dense() in the collate function or before the call; for bags of words, ids and nn.EmbeddingBag."
            )
