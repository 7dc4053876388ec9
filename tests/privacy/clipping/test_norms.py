"""Norms of samples over several parameters."""

import math

import pytest
import torch

from dp_hooks.gradients.sample_gradients import added
from dp_hooks.privacy.clipping import SampleNorms


def test_norms_over_all_parameters_and_over_groups() -> None:
    """The joint norm is the root of all squares, those of groups are of their own."""
    norms = SampleNorms([torch.tensor([25.0, 0.0]), torch.tensor([144.0, 1.0])])
    assert norms.joint.tolist() == [13.0, 1.0]
    assert [norm.tolist() for norm in norms.of_groups] == [[5.0, 0.0], [12.0, 1.0]]
    assert norms.finite.tolist() == [True, True]


@pytest.mark.parametrize("together", [True, False])
def test_a_square_that_cannot_be_one_is_not_hidden_by_others(together: bool) -> None:
    """Negative, infinite and undefined squares, and sums that overflow, in one group or in two, make a factor 0."""
    squares = [torch.tensor([-1.0, math.inf, math.nan, 3e38, 4.0]), torch.tensor([9.0, 9.0, 9.0, 3e38, 0.0])]
    norms = SampleNorms([added(squares)] if together else squares)
    assert norms.finite.tolist() == [False, False, False, False, True]
    assert norms.kept(torch.full((5,), 0.5)).tolist() == [0.0, 0.0, 0.0, 0.0, 0.5]
