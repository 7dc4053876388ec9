"""Truncated Poisson and random allocation on a grid of settings: ``python -m tests.privacy.accounting.sampling_reference``.

Prints every setting out of its bounds, and how close and how fast the accountant is. Truncated Poisson: not below Poisson sampling
at the rate at which an example is kept, which is what a pair of datasets spends whose other examples have no gradient, and at most
1 % above dp_accounting's bound. Random allocation: against itself on grids that are twice as fine, each of which gives an upper
bound, and never above the loss without amplification.
"""

import math
import sys
import time
from collections.abc import Iterator

import torch
from dp_accounting.pld import privacy_loss_distribution as reference

from dp_hooks.privacy.accounting import allocation_loss
from dp_hooks.privacy.accounting.binomial import at_least, most_drawn
from dp_hooks.privacy.accounting.pld import pld_epsilon
from dp_hooks.privacy.accounting.upper_bound import gaussian_epsilon

EXAMPLES = 100_000


def settings(count: int) -> Iterator[tuple[float, float, int, float, float]]:
    """Sigma, rate, steps, delta, and the probability of a batch that is cut: from logarithmic uniform distributions."""
    generator = torch.Generator().manual_seed(14)
    ends = (0.3, 20.0), (1e-4, 0.9), (1, 10**5), (1e-12, 1e-3), (1e-9, 0.5)
    for _ in range(count):
        share = torch.rand(5, dtype=torch.float64, generator=generator).tolist()
        sigma, rate, steps, delta, cut = (a * (b / a) ** x for x, (a, b) in zip(share, ends, strict=True))
        yield sigma, rate, round(steps), delta, cut


def truncated(sigma: float, rate: float, steps: int, delta: float, cut: float) -> tuple[float, float, float]:
    """Return our epsilon, and bounds of it from below and above."""
    most = max(1, most_drawn(EXAMPLES, rate, cut))
    ours = pld_epsilon.__wrapped__(((sigma, ("truncated_poisson", rate, EXAMPLES, most), steps),), delta)
    kept = sum(at_least(k, EXAMPLES, rate) for k in range(1, most + 1)) / EXAMPLES if most < 300 else 0.0
    low = pld_epsilon(((sigma, kept * (1 - 1e-9), steps),), delta) / 1.003 if kept else 0.0
    high, interval = math.inf, max(ours, 1e-3 * rate / sigma) / 500
    largest = 2 * (12 / sigma + 1 / sigma**2)  # of one release, with twice the sensitivity
    for _ in range(2):
        if max(largest, ours) / interval > 1e6:
            break
        try:
            one = reference.from_truncated_subsampled_gaussian_mechanism(
                EXAMPLES, rate, most, sigma, interval, math.log(1e-4 * delta / steps)
            )
            high = min(high, one.self_compose(steps, 1e-4 * delta).get_epsilon_for_delta(delta))
        except (ValueError, OverflowError, MemoryError):  # a grid that is too coarse for its numbers
            pass
        interval /= 4
    return ours, low, high


def allocated(sigma: float, rate: float, steps: int, delta: float, _: float) -> tuple[float, float, float]:
    """Return our epsilon of as many passes as fit into the steps, one on finer grids, and the one without amplification."""
    batches = math.ceil(1 / rate)
    passes = max(1, steps // batches)
    history = ((sigma, ("random_allocation", batches), passes),)
    ours, coarse = pld_epsilon.__wrapped__(history, delta), {}
    for name in ("_OF_ONE", "_WIDEST", "_OF_DEVIATION", "_GROWS"):
        coarse[name] = getattr(allocation_loss, name)
        setattr(allocation_loss, name, coarse[name] / 2)
    allocation_loss._mean_ratio.cache_clear()
    finer = pld_epsilon.__wrapped__(history, delta)
    allocation_loss._mean_ratio.cache_clear()
    for name, value in coarse.items():
        setattr(allocation_loss, name, value)
    return ours, finer, min(finer * 1.01, gaussian_epsilon(math.sqrt(passes) / sigma, delta) * 1.01)


def compare(count: int) -> None:
    """Print what is out of bounds, and a summary, of so many settings of each kind."""
    for kind in (truncated, allocated):
        above, slowest, known, wrong = 0.0, 0.0, 0, 0
        for setting in settings(count):
            start = time.process_time()
            ours, low, high = kind(*setting)
            slowest = max(slowest, time.process_time() - start)
            known += math.isfinite(high)
            if not low * (1 - 1e-9) <= ours <= 1.01 * high:
                wrong += 1
                print("out of bounds:", kind.__name__, setting, ours, low, high, flush=True)
            if math.isfinite(high) and high > 0:
                above = (
                    max(above, ours / (low if kind is allocated else high) - 1) if (low if kind is allocated else high) else above
                )
        print(
            f"{kind.__name__}: {wrong} of {count} out of bounds, {known} with a bound; {above:+.2%} of the reference at most; ",
            end="",
        )
        print(f"{slowest:.1f} s of processor time at most, the reference's with it", flush=True)


if __name__ == "__main__":
    compare(int(sys.argv[1]) if len(sys.argv) > 1 else 200)
