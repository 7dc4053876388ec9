"""The order of an ordinary sampler, as long as no example comes twice in a pass."""

from collections.abc import Iterator
from typing import Any

from torch.utils.data import BatchSampler, Sampler

from ...errors import ScopeError


class OncePerPass(Sampler[list[int]]):
    """Hands on the batches of an ordinary sampler and stops at the first example that appears twice in a pass."""

    def __init__(self, batches: BatchSampler) -> None:
        """Guard ``batches``."""
        self.batches = batches

    def __len__(self) -> int:
        """Batches in a pass."""
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        """Iterate over one pass."""
        seen: set[Any] = set()
        for batch in self.batches:
            before = len(seen)
            seen.update(batch)
            if len(seen) != before + len(batch):
                raise ScopeError(
                    "the sampler yields an example more than once in a pass, but without Poisson sampling a pass is "
                    "charged as one use of each example. Use poisson_sampling=True, or a sampler without replacement."
                )
            yield list(batch)
