"""The privacy loss of a batch of which surplus examples are dropped: truncated Poisson sampling."""

import math

from .binomial import at_least, exactly
from .mixed_loss import MixedLoss
from .privacy_loss import Loss, PrivacyLoss

_UP = 1 + 1e-8  # more than the error of a binomial probability


def truncated_loss(sigma: float, rate: float, examples: int, most: int, *, removed: bool, outside: float) -> Loss:
    """Return a privacy loss that dominates one release of truncated Poisson sampling.

    The release: each of N = ``examples`` is drawn with probability q = ``rate``; of more than B = ``most`` drawn ones a uniformly
    random subset W of B is kept; their clipped gradients (of length 1 at most) are added up, with noise sigma. The relation is that
    of this library: one example is replaced by a null record *that keeps its place*. It is drawn as the example would be, takes
    one of the B places, and adds nothing. So draws have the same distribution in both runs, and the runs differ by the gradient of
    the example, in the batches that have it. There are two bounds, each for either direction and for every composition, of which
    the one with the smaller variance of the likelihood ratio is taken. Gradients may be chosen by what was released before.

    1. *The others of the batch are known.* Let R be W without the example. Its distribution is the same in both runs, and given R a
       release is Poisson sampling of sensitivity 1, at the rate at which the example is in W. By symmetry that depends on the size
       of R alone. If it is below B - 1, nothing was dropped: rate q. If it is B, there is no place left: rate 0. If it is B - 1,
       nothing was dropped without the example, but perhaps with it:
       ``a = (B / N) P(|W| = B) / ((B / N) P(|W| = B) + (1 - (B - 1) / N) P(|W| = B - 1))``, some times q. Knowing R makes
       no divergence smaller (joint convexity).
    2. *One of the others is exchanged for the example*, the way of Ganesh et al., "It's My Data Too", 2025 (arXiv:2508.15089), and
       of dp_accounting, which are for an example that is added or removed; better where examples are dropped often. Let D be those
       drawn of the others. If ``|D| < B`` nothing is dropped: rate q. Else, with probability tau, the example is in W with the
       conditional probability ``r = (B / N) P(Bin(N, q) > B) / tau``. If it is, the others in W are a uniform subset V of B - 1 of
       the others; if not, a uniform subset of B: V and one more, j, uniform among the rest. Given V and j the runs are mixtures of
       normal distributions about ``(1 - r) [h] + r [g]`` with the example and ``(1 - r) [h] + r [0]`` without, g being its
       gradient and h that of j. Distances are at most 2 from g to h, and 1 from 0 to either. By advanced joint convexity (Balle,
       Barthe and Gaboardi, NeurIPS 2018, Theorem 2), for every alpha >= 1, either way round, ``H_alpha <= r H_a([2] | [0])`` with
       ``a = 1 + (alpha - 1) / r``, which is Poisson sampling at rate r of sensitivity 2; for alpha < 1 it follows from
       ``H_alpha(p | p') = 1 - alpha + alpha H_{1 / alpha}(p' | p)``. A loss with these divergences: above 0 that of (mixture,
       normal), below 0 that of (normal, mixture), 0 with what is left.
    """
    tau = at_least(most, examples - 1, rate)
    plain = PrivacyLoss(sigma, rate, removed=removed, outside=outside)
    if tau * _UP <= outside:  # as if everything came out then
        return MixedLoss([(1.0, plain)], lost=tau * _UP)
    share, full = most / examples, at_least(most, examples, rate)
    last = share * full + (1 - (most - 1) / examples) * exactly(most - 1, examples, rate)  # R has B - 1
    taken = min(1.0, share * full / last * _UP)
    kept = min(1.0, share * at_least(most + 1, examples, rate) / tau * _UP)
    one, two = (math.expm1(min(700.0, (length / sigma) ** 2)) for length in (1, 2))
    below = max(0.0, 1 - last - (1 - share) * full) + 1e-8 * (last + full)
    if below * rate**2 * one + last * taken**2 * one <= (1 - tau) * rate**2 * one + tau * kept**2 * two:
        certain = PrivacyLoss(sigma, taken, removed=removed, outside=outside)
        return MixedLoss([(below, plain), (last * _UP, certain)], (1 - share) * full * _UP)
    upper = PrivacyLoss(sigma / 2, kept, removed=True, outside=outside, side=1)
    lower = PrivacyLoss(sigma / 2, kept, removed=False, outside=outside, side=-1)
    parts: list[tuple[float, Loss]] = [(tau * _UP, upper), (tau * _UP, lower)]
    if tau < 1:
        parts.append((1 - tau + 1e-8 * tau, plain))
    return MixedLoss(parts, tau * _UP * (1 - kept) * math.erf(1 / (math.sqrt(2) * sigma)))
