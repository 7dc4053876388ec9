"""The grid: what it is made of, and what rounding to it can do to two neighbouring sums."""

import math

import pytest
import torch
from torch import Tensor

from dp_hooks.errors import InvalidArgumentError
from dp_hooks.privacy.noise.grid import Grid
from dp_hooks.privacy.noise.rounded_gaussian import MOST_UNITS

SETTINGS = [
    (std, sensitivity, numbers)
    for ratio in (1e-9, 1e-3, 0.3, 1.0, 1.1, 20.0, 1e3)
    for sensitivity in (1e-6, 0.7, 1.0, 3e5)
    for numbers in (1, 3, 5378, 10**6, 10**9)
    for std in [ratio * sensitivity]
]


@pytest.mark.parametrize(("std", "sensitivity", "numbers"), SETTINGS)
def test_noise_pays_for_the_sensitivity_on_the_grid(std: float, sensitivity: float, numbers: int) -> None:
    """The noise on the grid is std / S times S + g sqrt(d) or more, and not more than it has to be."""
    grid = Grid.of(std, sensitivity, numbers)
    due = std / sensitivity * (sensitivity + grid.spacing * math.sqrt(numbers))
    assert math.frexp(grid.spacing)[0] == 0.5  # a power of two
    assert due * (1 - 1e-12) < grid.units * grid.spacing < due + 3 * grid.spacing
    assert (1 << 20) <= grid.units < MOST_UNITS


@pytest.mark.parametrize(("std", "sensitivity", "numbers"), SETTINGS)
def test_rounding_costs_little(std: float, sensitivity: float, numbers: int) -> None:
    """Noise is at most 0.03 % larger for it, unless it has more standard deviations than the grid has points for."""
    grid = Grid.of(std, sensitivity, numbers)
    if std / sensitivity * math.sqrt(numbers) < 2**17:
        assert grid.units * grid.spacing / std < 1.0003


def neighbours(grid: Grid, sensitivity: float, numbers: int) -> tuple[Tensor, Tensor]:
    """Two sums that are S apart, and as far apart on the grid as any: each coordinate goes just over two middles between points."""
    each = math.floor(sensitivity / math.sqrt(numbers) / grid.spacing) * grid.spacing
    start = torch.full((numbers,), grid.spacing * (0.5 - 2.0**-20), dtype=torch.float64)
    return start, start + each + grid.spacing * 2.0**-19


@pytest.mark.parametrize("numbers", [1, 100, 5378, 1 << 20])
@pytest.mark.parametrize("ratio", [0.5, 1.0, 8.0])
def test_the_worst_neighbours_stay_within_the_sensitivity_on_the_grid(numbers: int, ratio: float) -> None:
    """There are sums that rounding moves apart by up to g sqrt(d): noise for S alone is too little, that of the grid is not."""
    grid = Grid.of(ratio, 1.0, numbers)
    a, b = neighbours(grid, 1.0, numbers)
    assert float((a - b).norm()) <= 1.0 + 1e-3 * grid.spacing * math.sqrt(numbers)
    apart = float((grid.points(a) - grid.points(b)).double().norm()) * grid.spacing
    assert 1.0 < apart <= (1.0 + grid.spacing * math.sqrt(numbers)) * (1 + 1e-12)
    assert grid.units * grid.spacing / apart >= ratio


def test_numbers_are_rounded_to_the_nearest_point_exactly() -> None:
    """Halfway cases aside, each number is at most half a spacing from its point, wherever it is; very large ones are cut off."""
    grid = Grid.of(1.0, 1.0, 5378)
    numbers = torch.randn(10_000, dtype=torch.float64) * 2.0 ** torch.randint(-30, 20, (10_000,))
    points = grid.points(numbers)
    assert float((points.double() * grid.spacing - numbers).abs().max()) <= grid.spacing / 2
    assert torch.equal(grid.points(points.double() * grid.spacing), points)
    far = grid.points(torch.tensor([1e30, -1e30, math.inf], dtype=torch.float64))
    assert far.tolist() == [1 << 61, -(1 << 61), 1 << 61]


@pytest.mark.parametrize(("std", "numbers"), [(1e10, 1), (1e6, 10**9), (1e-305, 1), (math.inf, 1)])
def test_noise_out_of_proportion_is_refused(std: float, numbers: int) -> None:
    """Where no grid can be had, nothing less is taken."""
    with pytest.raises(InvalidArgumentError, match=r"noise_multiplier=.*no grid"):
        Grid.of(std, 1.0, numbers)
