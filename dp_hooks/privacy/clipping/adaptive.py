"""A clipping bound that follows a quantile of the gradient norms, at a price that is accounted for."""

import math

import torch
from torch import Tensor

from ..._validate import bad
from ..noise.noise import Noise
from .fixed import FlatClipping
from .norms import SampleNorms

_COUNT_SENSITIVITY = 0.5  # one sample adds b_i - 1/2 to the count, that is 1/2 or -1/2; a null record adds 0


class AdaptiveClipping(FlatClipping):
    """Flat clipping to a bound C that is learned: C follows the quantile ``target_unclipped_quantile`` of the norms.

    Andrew, Thakkar, McMahan and Ramaswamy, "Differentially Private Learning with Adaptive Clipping", NeurIPS 2021. Every
    release of a logical batch, empty ones included, is followed by::

        b = (sum_i (b_i - 1/2) + N(0, sigma_b^2)) / expected_batch_size + 1/2,    b_i = 1 if |g_i| <= C, else 0
        C = C * exp(-eta_C * (b - gamma)),    kept within [min_clipbound, max_clipbound]

    where ``gamma`` is ``target_unclipped_quantile``, ``eta_C`` is ``clipbound_learning_rate`` and ``sigma_b`` is
    ``unclipped_num_std``. C is constant within a logical batch, whatever its physical parts. A sample whose norm is not
    finite is dropped like a null record: it adds 0 to both sums.

    Noise: the noise multiplier z of the scope is what the accountant is charged with, and it pays for both queries. By
    Theorem 1 of the paper the clipped sum gets noise of standard deviation ``z_delta * C`` with::

        z_delta = (z^-2 - (2 sigma_b)^-2)^(-1/2)

    since the pair (sum of clipped gradients / (z_delta C), count / sigma_b) has sensitivity
    ``sqrt(z_delta^-2 + (1 / (2 sigma_b))^2) = 1 / z`` with noise of standard deviation 1. This needs ``2 sigma_b > z``. With
    z = 0 neither query gets noise, and epsilon is infinite.

    Guarantee: C is a function of what was released before with noise, and of nothing else. A release is thus one
    Gaussian mechanism with noise multiplier z, chosen by looking at earlier releases only, as the parameters are anyway:

    - With Poisson sampling the steps compose adaptively, as those of plain DP-SGD.
    - Without it, all releases of a pass over the loader are together charged as one. That holds for the learned bound as
      well. The order of the loader does not depend on the data, and each example is in at most one logical batch of the
      pass, say the k-th. Write the probability density of all releases of the pass as the product of
      ``p_t(o_t | o_1 ... o_(t-1))``: factor t depends on the dataset through batch t only, and on earlier batches through
      their outputs only (parameters, C). Two datasets that differ in that example differ in factor k only; all others
      cancel in the likelihood ratio, and given ``o_1 ... o_(k-1)``, whose distribution is the same for both, factor k is a
      Gaussian mechanism with noise multiplier z. So is, at most, the whole pass.
    """

    learns = True

    def __init__(
        self,
        max_grad_norm: float,
        *,
        expected_batch_size: float,
        device: torch.device,
        target_unclipped_quantile: float = 0.5,
        clipbound_learning_rate: float = 0.2,
        unclipped_num_std: float | None = None,
        min_clipbound: float = 1e-6,
        max_clipbound: float = 1e6,
    ) -> None:
        """Start at C = ``max_grad_norm``; the arguments come checked from ``make_clipping``.

        On ``device`` the count gets its noise. The default of ``unclipped_num_std`` is the paper's, ``expected_batch_size / 20``.
        """
        super().__init__(max_grad_norm)
        self.expected_batch_size = expected_batch_size
        self.device = device
        self.target_unclipped_quantile = target_unclipped_quantile
        self.clipbound_learning_rate = clipbound_learning_rate
        self.unclipped_num_std = expected_batch_size / 20 if unclipped_num_std is None else unclipped_num_std
        self.min_clipbound = min_clipbound
        self.max_clipbound = max_clipbound

    def check_noise(self, noise_multiplier: float) -> None:
        """Raise unless ``noise_multiplier < 2 * unclipped_num_std``: the count alone would cost more than is charged."""
        most = self.unclipped_num_std / _COUNT_SENSITIVITY
        if noise_multiplier >= most:
            raise bad(
                "noise_multiplier",
                noise_multiplier,
                f'with clipping="adaptive" it must be below 2 * unclipped_num_std = {most:g} '
                f"(unclipped_num_std={self.unclipped_num_std:g}, expected batch size {self.expected_batch_size:g}), or the "
                "count of unclipped samples alone would cost more than is charged. Pass clipping_options="
                f'{{"unclipped_num_std": ...}} well above {noise_multiplier / 2:g}, or use larger batches.',
            )

    def gradient_noise_multiplier(self, noise_multiplier: float) -> float:
        """Return z_delta for z = ``noise_multiplier``."""
        self.check_noise(noise_multiplier)
        # (z^-2 - (2 sigma_b)^-2)^(-1/2), written so that z = 0 gives 0.
        share = noise_multiplier * _COUNT_SENSITIVITY / self.unclipped_num_std
        return noise_multiplier / math.sqrt((1 - share) * (1 + share))

    def statistic(self, norms: SampleNorms) -> Tensor:
        """Return ``sum_i (b_i - 1/2)`` over the samples with a finite norm."""
        # Exact in float32 up to 2^23 samples.
        halves = (norms.joint <= self._bound).to(torch.float32) - 0.5
        return torch.where(norms.finite, halves, torch.zeros_like(halves)).sum().to(self.device)

    def update(self, statistic: Tensor | None, noise: Noise, noise_multiplier: float) -> None:
        """Add noise to the count, and move C."""
        count = torch.zeros((), device=self.device) if statistic is None else statistic.clone()
        if noise_multiplier > 0:
            noise.add_([count], self.unclipped_num_std, sensitivity=_COUNT_SENSITIVITY)
        unclipped = float(count) / self.expected_batch_size + 0.5
        move = self.clipbound_learning_rate * (unclipped - self.target_unclipped_quantile)
        log_bound = math.log(self._bound) - move  # the exponential of a large move alone might overflow
        if log_bound <= math.log(self.min_clipbound):
            self._bound = self.min_clipbound
        elif log_bound >= math.log(self.max_clipbound):
            self._bound = self.max_clipbound
        else:
            self._bound = math.exp(log_bound)

    def details(self, noise_multiplier: float) -> dict[str, float]:
        """Return how the noise is split, and how the bound moves."""
        return {
            "gradient_noise_multiplier": self.gradient_noise_multiplier(noise_multiplier),
            "unclipped_num_std": self.unclipped_num_std if noise_multiplier > 0 else 0.0,
            "target_unclipped_quantile": self.target_unclipped_quantile,
            "clipbound_learning_rate": self.clipbound_learning_rate,
            "min_clipbound": self.min_clipbound,
            "max_clipbound": self.max_clipbound,
        }
