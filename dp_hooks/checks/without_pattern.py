"""Numbers without pattern, for checks: not drawn, since draws are replaced in them."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_BLOCK = 1 << 20  # numbers that are made at once


def without_pattern(shape: Sequence[int], offset: int = 0, *, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return numbers in (-1, 1) that are the same in every run; others for another ``offset``."""
    numbers = torch.empty(math.prod(shape), dtype=dtype, device="cpu")
    for start, block in enumerate(numbers.split(_BLOCK)):
        first = offset + start * _BLOCK
        index = torch.arange(first, first + len(block), dtype=torch.float64, device="cpu")
        block.copy_(index.mul_(12.9898).add_(1.0).sin_().mul_(43758.5453).abs_().frac_().mul_(2).sub_(1))
    return numbers.reshape(tuple(shape))
