"""How large the noise is."""

import math

import pytest
import torch
from torch import nn

from dp_hooks.privacy.clipping import make_clipping
from dp_hooks.privacy.noise.standard_deviation import standard_deviation


@pytest.mark.parametrize(
    ("clipping", "bound", "expected"),
    [
        ("flat", 0.5, 1.5 * 0.5),
        ("automatic", 2.0, 1.5 * 2.0),
        ("per_layer", [3.0, 4.0], 1.5 * 5.0),
        ("adaptive", 1.0, 1.5 / math.sqrt(1 - (1.5 / (2 * 5.0)) ** 2)),  # the count of unclipped samples is paid for
    ],
)
def test_noise_is_in_units_of_the_sensitivity(clipping: str, bound: float | list[float], expected: float) -> None:
    """The standard deviation is the noise multiplier for the gradients times what one example can change."""
    params = [nn.Parameter(torch.zeros(2)) for _ in range(2)]
    names = {p: [str(k)] for k, p in enumerate(params)}
    function = make_clipping(clipping, bound, params, names=names, expected_batch_size=100)
    found = standard_deviation(function.gradient_noise_multiplier(1.5), function.sensitivity)
    assert found == pytest.approx(expected, rel=1e-12)
