"""Norms of samples over several parameters."""

import math

import torch
from torch import nn

from dp_hooks.privacy.clipping import SampleNorms


def test_norms_over_all_parameters_and_over_some() -> None:
    """The joint norm is the root of all squares, ``over`` that of the chosen ones."""
    a, b, c = (nn.Parameter(torch.zeros(1)) for _ in range(3))
    norms = SampleNorms({a: torch.tensor([9.0, 0.0]), b: torch.tensor([16.0, 0.0]), c: torch.tensor([144.0, 1.0])})
    assert norms.joint.tolist() == [13.0, 1.0]
    assert norms.over([a, b]).tolist() == [5.0, 0.0]
    assert norms.finite.tolist() == [True, True]


def test_a_square_that_cannot_be_one_is_not_hidden_by_others() -> None:
    """Negative, infinite and undefined squares, and sums that overflow, make a sample unusable, and its factor 0."""
    a, b = (nn.Parameter(torch.zeros(1)) for _ in range(2))
    squares = torch.tensor([-1.0, math.inf, math.nan, 3e38, 4.0])
    norms = SampleNorms({a: squares, b: torch.tensor([9.0, 9.0, 9.0, 3e38, 0.0])})
    assert norms.finite.tolist() == [False, False, False, False, True]
    factors = norms.factors(torch.full((5,), 0.5), [b])
    assert list(factors) == [b]
    assert factors[b].tolist() == [0.0, 0.0, 0.0, 0.0, 0.5]
