"""Poisson sampling: every example is in a batch or not, independently."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import Sampler

from ..._no_randomness import undisturbed_generators
from ..noise.entropy import fresh_generator
from ..noise.secret_bytes import ReadBytes, secret_bytes

_AT_ONCE = 1 << 20  # examples that secret bits are drawn for at a time, 8 MB of them


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
            yield self._present().nonzero().flatten().tolist()

    def _present(self) -> Tensor:
        with undisturbed_generators():  # the user's generator may be one of PyTorch's own
            uniform = torch.rand(self.examples, dtype=torch.float64, device=self.generator.device, generator=self.generator)
        return uniform < self.sample_rate


class SecurePoissonSampler(PoissonSampler):
    """The same from bits that nobody can predict: what privacy gains by sampling, it gains since nobody knows who was drawn.

    An example is present if 64 bits of its own, as a whole number, are below ``sample_rate * 2^64``, cut off: at the rate q exactly
    from 2^-12 on, and below that less often than q by at most 2^-64, never more often.
    """

    def __init__(self, examples: int, sample_rate: float, batches: int, read: ReadBytes = secret_bytes) -> None:
        """Draw ``batches`` index lists from ``range(examples)`` a pass; ``read`` is another source in tests only."""
        self.examples = examples
        self.sample_rate = sample_rate
        self.batches = batches
        self._read = read

    def _present(self) -> Tensor:
        below = int(math.ldexp(self.sample_rate, 64)) - (1 << 63)  # bits are read as signed numbers, from -2^63 on
        if below == 1 << 63:
            return torch.ones(self.examples, dtype=torch.bool, device="cpu")
        counts = [min(_AT_ONCE, self.examples - begin) for begin in range(0, self.examples, _AT_ONCE)]
        return torch.cat([torch.frombuffer(self._read(8 * count), dtype=torch.int64) < below for count in counts])
