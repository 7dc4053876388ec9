"""Poisson sampling: every example is in a batch or not, independently."""

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

from ..noise.entropy import fresh_generator


class PoissonSampler(Sampler[list[int]]):
    """Draws logical batches in which every example is present independently with probability ``sample_rate``.

    This is the sampling that privacy amplification is proved for (Abadi et al., CCS 2016; Mironov et al., 2019,
    arXiv:1908.10530). The size of a batch varies and can be 0. The draw is made in float64: a float32 uniform has a
    granularity of 6e-8, which would be off by percents at rates near 1e-6.
    """

    def __init__(self, examples: int, sample_rate: float, batches: int, generator: torch.Generator | None = None) -> None:
        """Draw ``batches`` index lists from ``range(examples)`` a pass; without ``generator`` from fresh entropy."""
        self.examples = examples
        self.sample_rate = sample_rate
        self.batches = batches
        self.generator = generator if generator is not None else fresh_generator(torch.device("cpu"))

    def __len__(self) -> int:
        """Logical batches in a pass."""
        return self.batches

    def __iter__(self) -> Iterator[list[int]]:
        """Draw the batches of one pass."""
        for _ in range(self.batches):
            uniform = torch.rand(self.examples, dtype=torch.float64, device=self.generator.device, generator=self.generator)
            yield (uniform < self.sample_rate).nonzero().flatten().tolist()
