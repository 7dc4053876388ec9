"""Random allocation: in a pass every example is in one batch, and which one is drawn for each by itself."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import Sampler

from ..noise.entropy import fresh_generator
from ..noise.secret_bytes import secret_bytes
from .draws import Words, numbers_below, words_from, words_of


class AllocationSampler(Sampler[list[int]]):
    """Puts every example of a pass into one of ``batches`` logical batches, each with the same probability, independently.

    Also known as balls and bins (Chua et al., 2024, arXiv:2412.16802); privacy amplification is proved for it by Feldman and
    Shenfeld (2025, arXiv:2502.08202). Sizes of batches vary as with Poisson sampling, and can be 0; in a batch the examples come
    in ascending order. A pass is drawn as a whole, anew each time, with a few numbers in memory for every example.
    """

    def __init__(
        self, examples: int, batches: int, generator: torch.Generator | None = None, *, words: Words | None = None
    ) -> None:
        """Allocate ``range(examples)``; without ``generator`` and ``words`` from fresh entropy."""
        self.examples = examples
        self.batches = batches
        if words is None:
            words = words_of(generator if generator is not None else fresh_generator(torch.device("cpu")))
        self._words = words

    @classmethod
    def secure(cls, examples: int, batches: int) -> "AllocationSampler":
        """Allocate by bits that nobody can predict."""
        return cls(examples, batches, words=words_from(secret_bytes))

    def __len__(self) -> int:
        """Logical batches in a pass."""
        return self.batches

    def __iter__(self) -> Iterator[list[int]]:
        """Draw a pass, and go through its batches."""
        batch = numbers_below(self.batches, self.examples, self._words)
        by_batch: Tensor = batch.argsort(stable=True)
        for own in by_batch.split(torch.bincount(batch, minlength=self.batches).tolist()):
            yield own.tolist()
