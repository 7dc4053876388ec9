"""The floating-point attack on the noise of DP-SGD: it works against noise in floats, and guesses against noise on a grid.

Jin, McMurtry, Rubinstein and Ohrimenko (arXiv:2112.05307) tell which of two gradient sums was released from which normal numbers
a float generator can make. PyTorch's makes pairs by Box and Muller, ``sqrt(-2 log u) (cos(2 pi v), sin(2 pi v))``, from uniform
u and v that are multiples of 2^-24. Whoever guesses the right sum takes it off, and finds u to be such a multiple; for another
sum what is left is no output of the generator, and u lies anywhere. Pairs with small u tell the most: there multiples are further
apart than rounding is large.
"""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dp_hooks.privacy.noise.gaussian import GaussianNoise
from dp_hooks.privacy.noise.grid import Grid
from dp_hooks.privacy.noise.noise import Noise
from dp_hooks.privacy.noise.rounded_gaussian import rounded_gaussian
from dp_hooks.privacy.noise.secure import SecureNoise

from ...models import drawn
from ..seeded_bytes import SeededBytes

TRIALS, SIZE = 10_000, 512
SUM = 1e-5  # in every coordinate, or 0: too little to be seen in the noise, of standard deviation 1
HONEST = 0.5 * math.erf(SUM * math.sqrt(SIZE) / 2 / math.sqrt(2))  # by how much the likeliest guess beats chance on real numbers


def releases(noise: Noise, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Noised sums ``[TRIALS, SIZE]``, and for each of them whether it is of the second sum."""
    second = torch.rand(TRIALS, generator=drawn(3)) < 0.5
    totals = (second.to(dtype) * SUM).unsqueeze(1).repeat(1, SIZE)
    assert noise.add_([totals], 1.0, sensitivity=1.0)
    return totals, second


def box_muller(noises: Tensor) -> Tensor:
    """How well numbers ``[..., SIZE]`` fit what PyTorch's generator makes: 8 radii times cosines, then the 8 sines."""
    first, last = noises.double().unflatten(-1, (-1, 2, 8)).unbind(-2)
    u = torch.exp(-(first.square() + last.square()) / 2)
    fits = torch.cos(2 * math.pi * u * 2**24)  # 1 at multiples of 2^-24
    return torch.where(u < 0.05, fits, torch.zeros_like(fits)).sum((-1, -2))


def last_digits(spacing: float) -> Callable[[Tensor], Tensor]:
    """How well numbers fit noise on a grid that was added to a sum beside it."""

    def fits(noises: Tensor) -> Tensor:
        return torch.cos(2 * math.pi * noises.double() / spacing).sum(-1)

    return fits


def accuracy(released: Tensor, second: Tensor, fits: Callable[[Tensor], Tensor]) -> float:
    """How often the better fitting of the two sums is the right one; a coin decides where both fit alike."""
    lead = fits(released - torch.tensor(SUM, dtype=released.dtype)) - fits(released)
    coin = torch.rand(TRIALS, generator=drawn(4)) < 0.5
    guess = torch.where(lead == 0, coin, lead > 0)
    return float((guess == second).double().mean())


def test_noise_in_floats_gives_the_sum_away() -> None:
    """Against the ordinary generator the attack is right far more often than the sums themselves, or chance, allow."""
    assert HONEST < 1e-3
    assert accuracy(*releases(GaussianNoise(drawn(1))), box_muller) > 0.95


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_on_the_grid_leaves_the_attack_at_chance(dtype: torch.dtype) -> None:
    """Against secure noise it is right in 50 +- 2 % of 10,000 trials (4 standard deviations of a coin)."""
    assert abs(accuracy(*releases(SecureNoise(SeededBytes(1)), dtype), box_muller) - 0.5) < 0.02


class BesideTheGrid(SecureNoise):
    """Forgets to round the sum: noise on the grid is added to what lies between its points."""

    def _add(self, pieces: list[Tensor], grid: Grid, scale: float) -> Tensor:
        for piece in pieces:
            noise = rounded_gaussian(piece.numel(), grid.units, piece.device, self._read)
            piece.add_(noise.double() * grid.spacing)
        return torch.zeros(())


def test_the_last_digits_tell_nothing_since_the_sum_is_rounded() -> None:
    """Who looks at the digits below the grid guesses, and would know each sum for sure if it were not rounded."""
    spacing = Grid.of(1.0, 1.0, TRIALS * SIZE).spacing
    assert accuracy(*releases(BesideTheGrid(SeededBytes(2)), torch.float64), last_digits(spacing)) == 1.0
    assert abs(accuracy(*releases(SecureNoise(SeededBytes(2)), torch.float64), last_digits(spacing)) - 0.5) < 0.02
