"""Poisson sampling: every example is in a batch or not, independently; and the same with at most so many in a batch."""

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

from ..noise.entropy import fresh_generator
from ..noise.secret_bytes import ReadBytes, secret_bytes
from .draws import included, some_of, words_from, words_of


class PoissonSampler(Sampler[list[int]]):
    """Draws logical batches in which every example is present independently with probability ``sample_rate``.

    This is the sampling that privacy amplification is proved for (Abadi et al., CCS 2016; Mironov et al., 2019,
    arXiv:1908.10530). The size of a batch varies and can be 0; its examples come in ascending order, whatever is in them. A batch
    takes time for the examples in it, not for all there are; it is exactly so distributed (:func:`~.draws.included`).

    With ``most``, a batch of more is cut: which ones are dropped is drawn, every choice with the same probability (truncated
    Poisson sampling: Ganesh et al., 2025, arXiv:2508.15089).
    """

    def __init__(
        self, examples: int, sample_rate: float, batches: int, generator: torch.Generator | None = None, *, most: int | None = None
    ) -> None:
        """Draw ``batches`` index lists from ``range(examples)`` a pass; without ``generator`` from fresh entropy."""
        self.examples = examples
        self.sample_rate = sample_rate
        self.batches = batches
        self.most = examples if most is None else most
        self.generator = generator if generator is not None else fresh_generator(torch.device("cpu"))
        self._words = words_of(self.generator)

    def __len__(self) -> int:
        """Logical batches in a pass."""
        return self.batches

    def __iter__(self) -> Iterator[list[int]]:
        """Draw the batches of one pass."""
        for _ in range(self.batches):
            yield some_of(included(self.examples, self.sample_rate, self._words), self.most, self._words).tolist()


class SecurePoissonSampler(PoissonSampler):
    """The same from bits that nobody can predict: what privacy gains by sampling, it gains since nobody knows who was drawn.

    The rate is ``sample_rate`` exactly, as it is for a generator: never above.
    """

    def __init__(
        self, examples: int, sample_rate: float, batches: int, read: ReadBytes = secret_bytes, *, most: int | None = None
    ) -> None:
        """Draw ``batches`` index lists from ``range(examples)`` a pass; ``read`` is another source in tests only."""
        self.examples = examples
        self.sample_rate = sample_rate
        self.batches = batches
        self.most = examples if most is None else most
        self._words = words_from(read)
