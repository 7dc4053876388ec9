"""The private loader for a sampling scheme."""

from typing import Any, cast

from torch.utils.data import BatchSampler, DataLoader

from .loader import Consumer, PrivateDataLoader
from .once_per_pass import OncePerPass
from .physical import PartSampler
from .poisson import PoissonSampler
from .scheme import SamplingPlan


def make_loader(
    loader: DataLoader[Any], plan: SamplingPlan, consumer: Consumer, max_physical_batch_size: int | None
) -> PrivateDataLoader:
    """Build the private loader for ``plan`` and report its batches to ``consumer``."""
    logical: PoissonSampler | OncePerPass
    if plan.poisson:
        logical = PoissonSampler(plan.examples, plan.sample_rate, plan.batches_per_pass, loader.generator)
    else:
        logical = OncePerPass(cast(BatchSampler, loader.batch_sampler))

    def limit() -> int | None:
        left = consumer.releases_left()
        if left is None or plan.poisson:
            return left
        return 0 if left == 0 else None  # a pass that has begun is paid for as a whole

    parts = PartSampler(logical, plan.expected_batch_size, max_physical_batch_size, limit)
    return PrivateDataLoader(loader, parts, consumer, plan.sample_rate)
