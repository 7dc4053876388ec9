"""Clipping by groups, and automatic clipping: what they do to each sample."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dp_hooks.errors import InvalidArgumentError

from ...models import BUILDERS, assert_same, build, each_mode, norm_of, scope_over
from ...training.helpers import Run
from .helpers import factors_of, made

Factor = Callable[[list[Tensor], int], Any]


def assert_moved_by_hand(run: Run, factor: Factor) -> None:
    """Assert that the samples were added up over six, the gradient of parameter k times ``factor(row, k)``."""
    rows = run.rows()
    totals = [sum(row[k] * float(factor(row, k)) for row in rows) for k in range(len(run.start))]
    assert_same([6 * g for g in run.moved], totals)


def halves(model: nn.Module) -> tuple[dict[str, float], Factor]:
    """Return bounds for the first parameter alone and for all others together, and the factors they mean."""
    first = next(iter(model.named_parameters()))[0]

    def factor(row: list[Tensor], k: int) -> Any:
        norm, bound = (norm_of(row[:1]), 0.05) if k == 0 else (norm_of(row[1:]), 0.3)
        return min(1.0, bound / float(norm)) if norm > 0 else 0.0

    return {first: 0.05, "*": 0.3}, factor


@each_mode
@pytest.mark.parametrize("clipping", ["per_layer", "per_group"])
@pytest.mark.parametrize("name", list(BUILDERS))
def test_each_group_is_clipped_jointly_to_its_bound(name: str, clipping: str, mode: str) -> None:
    """With a mapping the step is the sum of gradients clipped group by group, by hand."""
    bounds, factor = halves(build(name))
    run = Run(name, clipping=clipping, max_grad_norm=bounds, grad_sample_mode=mode).trained()
    assert_moved_by_hand(run, factor)


@pytest.mark.parametrize(
    ("name", "bounds", "groups"),
    [
        ("mlp", {"*": 1.0}, [0, 0, 0, 0]),
        ("mlp", {"0.*": 1.0, "2.*": 2.0}, [0, 0, 1, 1]),
        ("mlp", {"2.*": 1.0, "0.*": 2.0}, [1, 1, 0, 0]),
        ("mlp", {"*.bias": 1.0, "*": 2.0}, [1, 0, 1, 0]),
        ("mlp", {"0.*": 1.0, "*.weight": 2.0, "*": 3.0}, [0, 0, 1, 2]),
        ("mlp", {"[02].weight": 1.0, "?.bias": 2}, [0, 1, 0, 1]),
        ("owner", {"s*": 1.0, "child.*": 2.0}, [0, 0, 1, 1]),
        # a shared tensor goes by any of its names
        ("tied", {"decoder.*": 1.0}, [0, 0]),
        ("tied", {"embedding.*": 1.0, "decoder.*": 2.0}, [0, 1]),
        ("tied", {"decoder.bias": 1.0, "decoder.weight": 2.0}, [1, 0]),
    ],
)
def test_the_first_pattern_that_matches_counts(name: str, bounds: dict[str, float], groups: list[int]) -> None:
    """Parameters go to the group of the first pattern, in the mapping's order, that matches one of their names."""
    model = build(name)
    function = made("per_group", bounds, model)
    assert [function.group_of[p] for p in model.parameters()] == groups
    assert function.max_grad_norm == bounds
    assert function.sensitivity == pytest.approx(math.sqrt(sum(c * c for c in bounds.values())))


def test_a_list_is_one_bound_per_tensor() -> None:
    """A list and a mapping with one pattern per tensor are the same clipping."""
    bounds = [0.1, 0.2, 0.05, 0.3]
    found = []
    for value in (bounds, dict(zip(["0.weight", "0.bias", "2.weight", "2.bias"], bounds, strict=True))):
        run = Run(clipping="per_layer", max_grad_norm=value).trained()
        found.append(run.moved)
        assert run.scope.optimizer.max_grad_norm == value
        assert run.scope.optimizer.sensitivity == pytest.approx(math.sqrt(sum(c * c for c in bounds)))
    assert_same(*found)


def test_frozen_parameters_need_no_pattern() -> None:
    """Only trainable parameters have to be matched, and a pattern for frozen ones alone is refused."""
    model = build("mlp")
    model[0].requires_grad_(False)
    with scope_over(model, clipping="per_group", max_grad_norm={"2.*": 1.0}) as (opt, _):
        assert opt.sensitivity == 1.0
    with pytest.raises(InvalidArgumentError, match=r"'0\.\*' matches no trainable parameter"):
        scope_over(model, clipping="per_group", max_grad_norm={"0.*": 1.0, "2.*": 1.0})


@each_mode
@pytest.mark.parametrize(
    ("name", "bound", "options", "gamma"),
    [*[(name, 0.5, None, 0.01) for name in BUILDERS], *[("mlp", 2.0, {"gamma": v}, v) for v in (1e-4, 0.1, 3)]],
)
def test_automatic_clipping_divides_by_norm_plus_gamma(
    name: str, bound: float, options: dict[str, float] | None, gamma: float, mode: str
) -> None:
    """The step is the sum of C g / (|g| + gamma), by hand, with 0.01 or the gamma that ``clipping_options`` sets."""
    more = {"clipping": "automatic", "clipping_options": options, "grad_sample_mode": mode}
    assert_moved_by_hand(Run(name, max_grad_norm=bound, **more).trained(), lambda row, _: bound / (norm_of(row) + gamma))


def test_automatic_factors_of_extreme_norms() -> None:
    """A zero gradient gets C / gamma, a huge one C / |g|, one that is not finite 0."""
    model = build("mlp")
    p, *_ = model.parameters()
    norms = torch.tensor([0.0, 1e-30, 1e30, math.inf, math.nan], dtype=torch.float64)
    (found,) = factors_of(made("automatic", 2.0, model), {p: norms}).values()
    torch.testing.assert_close(found, torch.tensor([200.0, 200.0, 2e-15, 0, 0], dtype=torch.float64))
