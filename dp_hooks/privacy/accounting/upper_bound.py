"""An upper bound of epsilon that answers at once for any history: where an accountant takes too long, or gives up."""

import math
from collections.abc import Iterable, Sequence

from .history import Charge
from .rates import Rate, raised, unamplified

_ORDERS = (*range(2, 65), 80, 96, 128, 192, 256, 384, 512)


def gathered(history: Iterable[Charge], groups: int) -> list[Charge]:
    """Return ``history`` with at most ``groups`` entries (at least 4), which spends as much, or more.

    Equal charges are counted together. Where too many are left, sigma is rounded down and the rate up, on the finest
    logarithmic grid that does: either only makes a release more revealing.
    """
    counts: dict[tuple[float, Rate], int] = {}
    for sigma, rate, steps in history:
        counts[sigma, rate] = counts.get((sigma, rate), 0) + steps
    per_octave = 1024.0
    while len(counts) > groups:
        rounded: dict[tuple[float, Rate], int] = {}
        for (sigma, rate), steps in counts.items():
            sigma = 2 ** (math.floor(math.log2(sigma) * per_octave) / per_octave)
            rate = raised(rate, per_octave)
            rounded[sigma, rate] = rounded.get((sigma, rate), 0) + steps
        counts, per_octave = rounded, per_octave / 2
    return [(sigma, rate, steps) for (sigma, rate), steps in counts.items()]


def epsilon_bound(history: Sequence[Charge], delta: float) -> float:
    """Return an epsilon, at ``delta``, that Gaussian releases certainly do not exceed.

    The least of three bounds for the relation of one record added or removed: Renyi divergences of integer orders, and the
    exact Gaussian curve once without amplification by sampling and once for as many uses of an example as there are, but for
    a probability of ``delta / 2``. Takes well below a second. Every sigma has to be positive. Samplings other than Poisson's count
    as none.
    """
    groups = gathered(((sigma, unamplified(rate), steps) for sigma, rate, steps in history if steps > 0), 128)
    plain = [(sigma, float(rate), steps) for sigma, rate, steps in groups if not isinstance(rate, tuple)]
    if not plain:
        return 0.0
    whole = gaussian_epsilon(math.sqrt(sum(steps / sigma**2 for sigma, _, steps in plain)), delta)
    share = delta / 2 / len(plain)
    uses = sum(_most_uses(rate, steps, share) / sigma**2 for sigma, rate, steps in plain)
    return min(whole, gaussian_epsilon(math.sqrt(uses), delta / 2), _renyi_epsilon(plain, delta))


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Return epsilon of one Gaussian release whose sensitivity is ``mu`` standard deviations.

    Source: Balle and Wang, ICML 2018 (arXiv:1805.06530), Theorem 8. Composition of releases with mu_1, mu_2, ... has
    ``mu^2 = mu_1^2 + mu_2^2 + ...``.
    """
    if mu == 0:
        return 0.0

    def too_small(epsilon: float) -> bool:
        first, second = _log_cdf(mu / 2 - epsilon / mu), epsilon + _log_cdf(-mu / 2 - epsilon / mu)
        return math.exp(first) - math.exp(min(second, first)) > delta

    low, high = 0.0, 1.0 + mu**2
    while too_small(high):
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if too_small(middle) else (low, middle)
    return high


def _log_cdf(x: float) -> float:
    """Return the logarithm of the normal distribution function; far below 0 by Laplace's continued fraction of Mills' ratio."""
    if x > -10:
        return math.log(math.erfc(-x / math.sqrt(2)) / 2)
    fraction = 0.0
    for k in range(60, 0, -1):
        fraction = k / (fraction - x)
    return -x * x / 2 - math.log((fraction - x) * math.sqrt(2 * math.pi))


def _most_uses(rate: float, steps: int, probability: float) -> int:
    """How often an example is drawn at most, but for ``probability``, by Chernoff's bound in its relative-entropy form."""

    def exponent(uses: int) -> float:
        share = uses / steps
        rest = 0.0 if share == 1 else (1 - share) * math.log((1 - share) / (1 - rate))
        return steps * (share * math.log(share / rate) + rest)

    low, high = math.floor(rate * steps), steps
    if rate == 1 or exponent(steps) < -math.log(probability):
        return steps
    while high - low > 1:  # more than `high - 1` uses are too unlikely
        middle = (low + high) // 2
        low, high = (low, middle) if exponent(middle) >= -math.log(probability) else (middle, high)
    return high - 1


def _renyi_epsilon(history: Sequence[tuple[float, float, int]], delta: float) -> float:
    """By Renyi divergences of integer orders.

    Sources: Mironov, Talwar and Zhang, 2019 (arXiv:1908.10530), Section 3.3; Balle et al., AISTATS 2020
    (arXiv:1905.09982), Theorem 21 for the conversion.
    """
    import torch  # where it is needed: commands are done before it would be there

    orders = torch.tensor(_ORDERS, dtype=torch.float64, device="cpu")[:, None]
    k = torch.arange(max(_ORDERS) + 1, dtype=torch.float64, device="cpu")
    binomial = torch.lgamma(orders + 1) - torch.lgamma(k + 1) - torch.lgamma((orders - k).clamp(min=0) + 1)
    binomial = binomial.masked_fill(k > orders, -math.inf)
    divergence = torch.zeros(len(_ORDERS), dtype=torch.float64, device="cpu")
    for sigma, rate, steps in history:
        if rate == 1:
            divergence += steps * orders[:, 0] / (2 * sigma**2)
            continue
        terms = binomial + k * math.log(rate) + (orders - k).clamp(min=0) * math.log1p(-rate) + (k * k - k) / (2 * sigma**2)
        divergence += steps * torch.logsumexp(terms, 1) / (orders[:, 0] - 1)
    a = orders[:, 0]
    epsilon = divergence - (math.log(delta) + a.log()) / (a - 1) + torch.log1p(-1 / a)
    return max(0.0, float(epsilon.min()))
