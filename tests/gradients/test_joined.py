"""Small gradients are written out side by side: the same numbers as one by one."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from dp_hooks import HookController
from dp_hooks.gradients.joined import Joined, Piece, is_small
from dp_hooks.gradients.sample_gradients import SampleGradients

from ..models import Net, build


@pytest.fixture
def found() -> Iterator[SampleGradients]:
    """The gradients of a model with vectors, matrices and a number as parameters, one of them used twice."""
    twice = nn.Linear(4, 4)
    layers = {"first": nn.Linear(4, 4), "twice": twice, "norm": nn.LayerNorm(4), "head": nn.Linear(4, 3)}
    model = Net(lambda s, x: s.head(s.norm(s.twice(torch.tanh(s.twice(s.first(x))))) * s.scale), **layers)
    model.scale = nn.Parameter(torch.tensor(1.5))
    controller = HookController(model.double(), grad_sample_mode="ghost")
    model(torch.randn(6, 4, dtype=torch.float64)).square().sum(1).mean().backward()
    gradients = controller.take()
    assert gradients is not None
    yield gradients
    controller.cleanup()


def test_norms_over_groups_are_those_of_their_parameters(found: SampleGradients) -> None:
    """Whatever the groups: the squares of a group are the sum of those of its parameters."""
    params = found.params
    one_by_one = found.sq_norms(params)
    for groups in ([params], [[p] for p in params], [params[::2], params[1::2]]):
        assert [p for some in found._join(params) for p in some.params]  # else nothing would be shown
        for group, squares in zip(groups, found.group_sq_norms(groups), strict=True):
            torch.testing.assert_close(squares, torch.stack([one_by_one[p] for p in group]).sum(0), rtol=1e-12, atol=0)


@pytest.mark.parametrize("dropped", [[], [0, 4], [0, 1, 2, 3, 4, 5]])
@pytest.mark.parametrize("alike", [True, False])
def test_sums_are_those_of_the_samples_one_by_one(found: SampleGradients, alike: bool, dropped: list[int]) -> None:
    """With one factor for all parameters or one for each, and samples that are left out, whatever is in them."""
    params = found.params
    grads = {p: found.grads(p).clone() for p in params}
    finite = torch.ones(6, dtype=torch.bool)
    finite[dropped] = False
    shared = torch.rand(6, dtype=torch.float64)
    factors = {p: (shared if alike else torch.rand(6, dtype=torch.float64)) * finite for p in params}
    if alike:
        factors = dict.fromkeys(params, shared * finite)
    found.group_sq_norms([params] if alike else [[p] for p in params])
    sums = found.weighted_sums(factors, finite)
    assert set(sums) == set(params)
    for p in params:
        expected = torch.tensordot(factors[p], grads[p], 1)
        assert sums[p].shape == p.shape
        torch.testing.assert_close(sums[p], expected, rtol=1e-12, atol=1e-12)


def test_only_what_is_alike_is_joined() -> None:
    """Another dtype or scale makes another piece; a parameter without any number is no reason to fail."""
    params = [nn.Parameter(torch.zeros(shape)) for shape in ((2, 3), (4,), (), (0, 3))]

    def rows(p: nn.Parameter, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.ones(5, p.numel(), dtype=dtype)

    joined = Joined.make([Piece([p], rows(p), 2.0) for p in params])
    assert [some.rows.shape for some in joined] == [(5, 6 + 4 + 1)]
    assert joined[0].sq_norms().tolist() == pytest.approx([11 * 4.0] * 5)
    kinds = [(torch.float32, 1.0), (torch.float64, 1.0), (torch.float32, 2.0)]
    other = [Piece([p], rows(p, dtype), scale) for p, (dtype, scale) in zip(params, kinds, strict=False)]
    assert [some.params for some in Joined.make(other)] == [[p] for p in params[:3]]


def test_what_is_small_depends_on_the_number_of_samples() -> None:
    """A layer is small for a few samples and large for many; complex gradients are left alone."""
    weight = build("mlp")[0].weight
    assert is_small(weight, 2)
    assert not is_small(weight, 1 << 20)
    assert not is_small(nn.Parameter(torch.zeros(2, dtype=torch.complex64)), 2)


def test_factors_of_their_own_count_for_parameters_whose_norms_were_taken_together(found: SampleGradients) -> None:
    """Gradients that lie side by side are told apart by their factors, not by the groups that norms were asked for."""
    params = found.params
    grads = {p: found.grads(p).clone() for p in params}
    found.group_sq_norms([params])
    factors = {p: torch.rand(6, dtype=torch.float64) for p in params}
    sums = found.weighted_sums(factors, torch.ones(6, dtype=torch.bool))
    for p in params:
        torch.testing.assert_close(sums[p], torch.tensordot(factors[p], grads[p], 1), rtol=1e-12, atol=1e-12)
