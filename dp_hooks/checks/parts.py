"""Parts of a batch that a check runs."""

import random
from collections.abc import Sequence

import torch
from torch import Tensor


def parts_of(samples: int, *, twice: bool, alone: bool = True) -> list[Tensor]:
    """Two halves of the batch, in which neighbours are parted, and a sample ``alone``; ``twice``: two other halves, too."""
    if samples == 1:
        return []
    first, second = halves(samples)
    parts = [first, second.flip(0)]  # which also shows where a sample's rows depend on its place among the others
    if samples <= 2:
        return parts
    parts += [first[:1]] if alone else []
    return [*parts, *halves(samples, 1)] if twice else parts  # of losses added up a difference can cancel by chance


def halves(samples: int, seed: int = 0) -> list[Tensor]:
    """Two halves of the batch, of any samples, but in order: a model may count on it (sequences sorted by length)."""
    order = random.Random(samples + 1000 * seed).sample(range(samples), samples)
    return [torch.tensor(sorted(part), dtype=torch.long, device="cpu") for part in (order[: samples // 2], order[samples // 2 :])]


def a_few(samples: int, first: Sequence[int], count: int) -> Tensor:
    """Choose ``count`` samples: the ``first`` and others."""
    others = random.Random(samples).sample(range(samples), samples)
    return torch.tensor(sorted(list(dict.fromkeys([*first, *others]))[:count]), dtype=torch.long, device="cpu")
