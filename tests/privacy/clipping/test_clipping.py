"""Clipping functions: what they do to each sample, the sensitivity they declare, and the bound that learns.

Where norms have to be known, the model is one weight w and the loss ``sum_i w . x_i``: the gradient of a sample is its row x_i.
"""

import math
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dp_hooks import PrivacyEngineHookBased, PrivateTraining, dp_step, private_training
from dp_hooks.errors import InvalidArgumentError, ScopeError
from dp_hooks.privacy.clipping import AdaptiveClipping, AutomaticClipping, FlatClipping, GroupClipping, make_clipping
from dp_hooks.privacy.noise.gaussian import GaussianNoise

from .gaussian import NEVER, Wide, fits, noise_of
from .models import (
    BUILDERS,
    assert_same,
    build,
    drawn,
    each_mode,
    examples,
    in_order,
    moved,
    norm_of,
    sample_gradients,
    scope_over,
    values,
)


def names_of(model: nn.Module) -> dict[nn.Parameter, list[str]]:
    """Return the names of every parameter."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(p, []).append(name)
    return names


def made(clipping: str, bound: Any, model: nn.Module, **options: float) -> Any:
    """Build a clipping function for ``model``."""
    return make_clipping(
        clipping,
        bound,
        list(model.parameters()),
        names=names_of(model),
        expected_batch_size=20.0,
        options=options or None,
    )


def by_hand(rows: list[list[Tensor]], factor: Callable[[list[Tensor], int], Any]) -> list[Tensor]:
    """Add up the samples, the gradient of parameter k times ``factor(row, k)``."""
    return [sum(row[k] * float(factor(row, k)) for row in rows) for k in range(len(rows[0]))]


def one_pass(model: nn.Module, scope: PrivateTraining, scale: float = 1.0) -> list[Tensor]:
    """Take one pass of the scope; return by how much the parameters went down, times the six samples."""
    start = values(model)
    with scope as (opt, loader):
        for x, y in loader:
            opt.zero_grad()
            (scale * F.cross_entropy(model(x), y)).backward()
            opt.step()
    return [6 * g for g in moved(start, model)]


# ---------------------------------------------------------------- groups


def halves(model: nn.Module) -> tuple[dict[str, float], Callable[[list[Tensor], int], Any]]:
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
    model = build(name)
    bounds, factor = halves(model)
    found = one_pass(model, scope_over(model, clipping=clipping, max_grad_norm=bounds, grad_sample_mode=mode))
    assert_same(found, by_hand(sample_gradients(build(name), *examples()), factor))


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
        model = build("mlp")
        scope = scope_over(model, clipping="per_layer", max_grad_norm=value)
        found.append(one_pass(model, scope))
        assert scope.optimizer.max_grad_norm == value
        assert scope.optimizer.sensitivity == pytest.approx(math.sqrt(sum(c * c for c in bounds)))
    assert_same(*found)


def test_frozen_parameters_need_no_pattern() -> None:
    """Only trainable parameters have to be matched, and a pattern for frozen ones alone is refused."""
    model = build("mlp")
    model[0].requires_grad_(False)
    with scope_over(model, clipping="per_group", max_grad_norm={"2.*": 1.0}) as (opt, _):
        assert opt.sensitivity == 1.0
    with pytest.raises(InvalidArgumentError, match=r"'0\.\*' matches no trainable parameter"):
        scope_over(model, clipping="per_group", max_grad_norm={"0.*": 1.0, "2.*": 1.0})


# ---------------------------------------------------------------- automatic


@each_mode
@pytest.mark.parametrize("name", list(BUILDERS))
def test_automatic_clipping_divides_by_norm_plus_gamma(name: str, mode: str) -> None:
    """The step is the sum of C g / (|g| + 0.01), by hand."""
    model = build(name)
    scope = scope_over(model, clipping="automatic", max_grad_norm=0.5, grad_sample_mode=mode)
    rows = sample_gradients(build(name), *examples())
    assert_same(one_pass(model, scope), by_hand(rows, lambda row, _: 0.5 / (norm_of(row) + 0.01)))


@each_mode
@pytest.mark.parametrize("gamma", [1e-4, 0.1, 3])
def test_gamma_is_an_option(gamma: float, mode: str) -> None:
    """``clipping_options`` sets gamma."""
    model = build("mlp")
    options = {"clipping": "automatic", "clipping_options": {"gamma": gamma}, "grad_sample_mode": mode}
    found = one_pass(model, scope_over(model, max_grad_norm=2.0, **options))
    rows = sample_gradients(build("mlp"), *examples())
    assert_same(found, by_hand(rows, lambda row, _: 2.0 / (norm_of(row) + gamma)))


def test_automatic_factors_of_extreme_norms() -> None:
    """A zero gradient gets C / gamma, a huge one C / |g|, one that is not finite 0."""
    model = build("mlp")
    p, *_ = model.parameters()
    norms = torch.tensor([0.0, 1e-30, 1e30, math.inf, math.nan], dtype=torch.float64)
    (found,) = made("automatic", 2.0, model).factors({p: norms}).values()
    torch.testing.assert_close(found, torch.tensor([200.0, 200.0, 2e-15, 0, 0], dtype=torch.float64))


# ---------------------------------------------------------------- sensitivity

KINDS: dict[str, tuple[dict[str, Any], float]] = {
    "flat": ({"max_grad_norm": 0.5}, 0.5),
    "per_layer": ({"clipping": "per_layer", "max_grad_norm": [0.3, 0.4, 1.2, 0.84]}, math.sqrt(2.3956)),
    "per_group": ({"clipping": "per_group", "max_grad_norm": {"0.*": 0.3, "*": 0.4}}, 0.5),
    "automatic": ({"clipping": "automatic", "max_grad_norm": 0.5}, 0.5),
    "adaptive": ({"clipping": "adaptive", "max_grad_norm": 0.5}, 0.5),
}
each_kind = pytest.mark.parametrize("kind", list(KINDS))


@each_mode
@each_kind
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e7])
def test_one_sample_contributes_at_most_the_sensitivity_and_can_reach_it(kind: str, scale: float, mode: str) -> None:
    """No gradient exceeds the declared sensitivity, and a huge one reaches it: half of it would be a false claim."""
    model, start = build("mlp"), values(build("mlp"))
    options, sensitivity = KINDS[kind]
    with scope_over(model, grad_sample_mode=mode, loader=in_order(1), **options) as (opt, loader):
        assert opt.sensitivity == pytest.approx(sensitivity, rel=1e-12)
        for x, y in loader:
            (scale * F.cross_entropy(model(x), y)).backward()
            opt.step()
    contribution = float(norm_of(moved(start, model)))
    assert contribution <= sensitivity * (1 + 1e-9)
    if scale > 1:
        assert contribution >= sensitivity * (1 - 1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@each_kind
def test_factors_keep_random_gradients_within_the_sensitivity(kind: str, dtype: torch.dtype) -> None:
    """Over norms of forty orders of magnitude, factor times norm stays within the sensitivity up to rounding."""
    model = build("mlp", dtype)
    options, sensitivity = KINDS[kind]
    function = made(options.get("clipping", "flat"), options["max_grad_norm"], model)
    generator = drawn(3)
    norms = {p: 10 ** (torch.rand(2000, generator=generator) * 36 - 18).to(dtype) for p in model.parameters()}
    factors = function.factors({p: norm.square() for p, norm in norms.items()})
    contributions = sum((factors[p].double() * norms[p].double()).square() for p in norms).sqrt()
    assert float(contributions.max()) <= sensitivity * (1 + 4 * torch.finfo(dtype).eps)


@each_kind
def test_a_sample_without_a_usable_norm_is_dropped_everywhere(kind: str) -> None:
    """NaN, infinite and negative squared norms, in any one parameter, give factor 0 in all of them; the others go on."""
    model = build("mlp")
    options, _ = KINDS[kind]
    function = made(options.get("clipping", "flat"), options["max_grad_norm"], model)
    bad = [math.nan, math.inf, -math.inf, -1e-12]
    for target in model.parameters():
        norms = {p: torch.ones(len(bad) + 1) for p in model.parameters()}
        norms[target][: len(bad)] = torch.tensor(bad)
        for factors in function.factors(norms).values():
            assert factors[: len(bad)].tolist() == [0.0] * len(bad)
            assert 0 < float(factors[-1]) <= 1


# ---------------------------------------------------------------- noise


@pytest.mark.parametrize(
    ("options", "std", "wrong"),
    [
        # right: sqrt(3^2 + 4^2); wrong: the sum, one of them, half
        ({"clipping": "per_group", "max_grad_norm": {"a.*": 3.0, "*": 4.0}}, 5.0, (7.0, 3.0, 4.0, 2.5)),
        ({"clipping": "per_layer", "max_grad_norm": {"a.*": 3.0, "*": 4.0}}, 5.0, (7.0, 3.0, 4.0, 2.5)),
        ({"clipping": "per_layer", "max_grad_norm": [3.0, 4.0]}, 5.0, (7.0, 3.0, 4.0, 2.5)),
        ({"clipping": "per_group", "max_grad_norm": {"*": 2.0}}, 2.0, (2.0 * math.sqrt(2), 1.0)),
        ({"clipping": "automatic", "max_grad_norm": 3.0}, 3.0, (1.5, 0.03, 1.0)),
        # right: z_delta = (1 - 1 / (2 * 0.8)^2)^(-1/2) = 1.281; wrong: z itself, and sensitivity 1 for the count
        (
            {"clipping": "adaptive", "max_grad_norm": 2.0, "clipping_options": {"unclipped_num_std": 0.8}},
            2.0 / math.sqrt(1 - 1 / 1.6**2),
            (2.0, 2.0 / math.sqrt(1 - 1 / 3.2**2), 1.0),
        ),
    ],
)
def test_noise_is_scaled_by_the_sensitivity(options: dict[str, Any], std: float, wrong: tuple[float, ...]) -> None:
    """At sigma 1 the released noise has the declared sensitivity as its std, and no other fits."""
    noise = noise_of(Wide(), **options)["a.weight"]
    assert fits(noise, std)
    for other in (*wrong, std * 1.2, std / 1.2, std * 1.05):
        assert not fits(noise, other)


# ---------------------------------------------------------------- adaptive


class Rows(nn.Module):
    """A weight w and the outputs ``w . x_i``."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.w = nn.Linear(width, 1, bias=False, dtype=torch.float64)
        nn.init.zeros_(self.w.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.w(x).squeeze(1)


NORMS = [0.2, 0.4, 0.9, 1.05, 1.5, 2.0, 4.0, 8.0]


def rows_with(norms: list[float] | Tensor) -> Tensor:
    """Return rows ``[n, 3]`` of these norms, in random directions."""
    norms = torch.as_tensor(norms, dtype=torch.float64)
    rows = torch.randn(len(norms), 3, generator=drawn(11), dtype=torch.float64)
    return F.normalize(rows) * norms[:, None]


def adaptive(model: nn.Module, norms: list[float] | Tensor, batch: int, **kwargs: Any) -> PrivateTraining:
    """Return a scope with adaptive clipping over rows of the given norms; options of clipping by their names."""
    words = ("target_unclipped_quantile", "clipbound_learning_rate", "unclipped_num_std", "min_clipbound")
    options = {key: kwargs.pop(key) for key in (*words, "max_clipbound") if key in kwargs}
    kwargs = {
        "noise_multiplier": 0.0,
        "max_grad_norm": 1.0,
        "poisson_sampling": False,
        "loss_reduction": "sum",
        "accountant": "rdp",
        **kwargs,
    }
    data = DataLoader(TensorDataset(rows_with(norms)), batch_size=batch)
    sgd = torch.optim.SGD(model.parameters(), lr=1.0)
    return private_training(model, sgd, data, clipping="adaptive", clipping_options=options, **kwargs)


def over_many_rows(model: nn.Module, **kwargs: Any) -> PrivateTraining:
    """Return a scope over 160 rows in Poisson batches of 40."""
    data = DataLoader(TensorDataset(rows_with(NORMS * 20)), batch_size=40)
    return private_training(model, torch.optim.SGD(model.parameters(), lr=0.1), data, max_grad_norm=1.0, **kwargs)


def run(model: nn.Module, scope: PrivateTraining, passes: int = 1) -> list[float]:
    """Train, and return C after every step (one entry per physical part)."""
    bounds = []
    with scope as (opt, loader):
        for _ in range(passes):
            for (x,) in loader:
                opt.zero_grad()
                model(x).sum().backward()
                opt.step()
                bounds.append(opt.max_grad_norm)
    return bounds


def trajectory(batches: list[list[float]], c: float, eta: float, gamma: float, expected: float) -> list[float]:
    """Work out C after every batch without noise, from the norms of the batches."""
    out = []
    for norms in batches:
        fraction = sum(0.5 if norm <= c else -0.5 for norm in norms) / expected + 0.5
        c *= math.exp(-eta * (fraction - gamma))
        out.append(c)
    return out


@each_mode
@pytest.mark.parametrize(("eta", "gamma"), [(0.2, 0.5), (0.7, 0.5), (0.2, 0.9)])
@pytest.mark.parametrize("start", [0.05, 1.1, 30.0])
def test_the_bound_follows_the_geometric_rule(start: float, eta: float, gamma: float, mode: str) -> None:
    """Without noise, C after every step and the clipped sums are those worked out by hand."""
    model = Rows()
    options = {"clipbound_learning_rate": eta, "target_unclipped_quantile": gamma, "max_grad_norm": start}
    found = run(model, adaptive(model, NORMS, 4, grad_sample_mode=mode, **options), passes=3)
    batches = [NORMS[:4], NORMS[4:]] * 3
    expected = trajectory(batches, start, eta, gamma, 4)
    assert found == pytest.approx(expected, rel=1e-9)
    total = torch.zeros(3, dtype=torch.float64)
    for step, c in enumerate([start, *expected[:-1]]):
        rows = rows_with(NORMS)[4 * (step % 2) :][:4]
        total += (rows * (c / rows.norm(dim=1)).clamp(max=1)[:, None]).sum(0)
    assert_same([-model.w.weight.detach()[0]], [total])


def test_a_last_batch_that_is_smaller_counts_against_the_expected_size() -> None:
    """The denominator is the expected batch size, never the drawn one: 5 and 3 samples, both over 5."""
    model = Rows()
    found = run(model, adaptive(model, NORMS, 5, max_grad_norm=1.2))
    assert found == pytest.approx(trajectory([NORMS[:5], NORMS[5:]], 1.2, 0.2, 0.5, 5), rel=1e-9)


@each_mode
@pytest.mark.parametrize("sigma", [0.0, 0.3])
@pytest.mark.parametrize("size", [1, 3, 4, 8])
def test_physical_parts_give_the_bounds_and_steps_of_whole_batches(size: int, sigma: float, mode: str) -> None:
    """C is constant within a logical batch, and counts all its parts once: same C, same steps as without parts."""
    found = []
    for physical in (None, size):
        model = Rows()
        scope = adaptive(
            model,
            NORMS,
            8,
            max_physical_batch_size=physical,
            noise_multiplier=sigma,
            noise_generator=drawn(),
            max_grad_norm=0.95,
            grad_sample_mode=mode,
        )
        bounds = run(model, scope, passes=4)
        parts = 1 if physical is None else math.ceil(8 / physical)
        last = bounds[parts - 1 :: parts]
        assert bounds == [
            c for before, after in zip([0.95, *last], last, strict=False) for c in [before] * (parts - 1) + [after]
        ]
        found.append((last, values(model)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-12)
    assert_same(found[0][1], found[1][1])


@pytest.mark.parametrize("poisson", [False, True])
def test_the_trajectory_with_noise_is_that_of_the_generator(poisson: bool) -> None:
    """Gradients get z_delta C from the scope's generator, then the count sigma_b: steps and C can be computed by hand."""
    model, z, sigma_b = Rows(), 0.5, 0.7
    options = {"poisson_sampling": poisson, "unclipped_num_std": sigma_b, "noise_multiplier": z}
    scope = adaptive(model, NORMS, 8, noise_generator=drawn(5), max_grad_norm=1.2, **options)
    torch.manual_seed(0)
    found = run(model, scope, passes=4)
    generator, c, rows = drawn(5), 1.2, rows_with(NORMS)
    z_delta = (z**-2 - (2 * sigma_b) ** -2) ** -0.5
    total, expected = torch.zeros(1, 3, dtype=torch.float64), []
    for _ in range(4):
        total += (rows * (c / rows.norm(dim=1)).clamp(max=1)[:, None]).sum(0)
        total += torch.empty(1, 3, dtype=torch.float64).normal_(0.0, z_delta * c, generator=generator)
        count = sum(0.5 if norm <= c else -0.5 for norm in NORMS)
        count += float(torch.empty(()).normal_(0.0, sigma_b, generator=generator))
        c *= math.exp(-0.2 * (count / 8 + 0.5 - 0.5))
        expected.append(c)
    assert found == pytest.approx(expected, rel=1e-6)
    assert_same([-model.w.weight.detach()], [total], tolerance=1e-5)


@pytest.mark.parametrize("gamma", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("start", [0.05, 20.0])
def test_the_bound_converges_to_the_quantile_of_the_norms(start: float, gamma: float) -> None:
    """From far below and far above, with noise, C comes to leave the chosen share of samples unclipped."""
    norms = torch.randn(400, generator=drawn(2)).exp()
    options = {"poisson_sampling": True, "sample_rate": 0.5, "noise_multiplier": 0.5, "noise_generator": drawn(1)}
    model = Rows()
    scope = adaptive(model, norms, 200, max_grad_norm=start, target_unclipped_quantile=gamma, **options)
    torch.manual_seed(3)
    bounds = run(model, scope, passes=75)
    settled = [float((norms <= c).double().mean()) for c in bounds[-30:]]
    assert sum(settled) / 30 == pytest.approx(gamma, abs=0.03)


def test_noise_is_split_between_gradients_and_count_as_stated() -> None:
    """Over many steps gradients get z_delta C and the count sigma_b, independently; a factor of 1.2 off fits neither."""
    model, steps, z, sigma_b, eta = Rows(8), 1500, 1.2, 0.8, 0.01
    data = DataLoader(TensorDataset(torch.zeros(8, 8, dtype=torch.float64)), batch_size=8)
    scope = private_training(
        model,
        torch.optim.SGD(model.parameters(), lr=1.0),
        data,
        noise_multiplier=z,
        max_grad_norm=100.0,
        clipping="adaptive",
        clipping_options={"unclipped_num_std": sigma_b, "clipbound_learning_rate": eta},
        loss_reduction="sum",
        accountant="rdp",
        noise_generator=drawn(7),
    )
    bounds, gradients = [100.0], []
    with scope as (opt, loader):
        while scope.steps < steps:
            for (x,) in loader:
                before = model.w.weight.detach().clone()
                model(x).sum().backward()
                opt.step()
                gradients.append((before - model.w.weight.detach()).flatten() / bounds[-1])
                bounds.append(opt.max_grad_norm)
    logs = torch.tensor(bounds, dtype=torch.float64).log()
    count = 8 * (logs[:-1] - logs[1:]) / eta - 4  # all 8 norms are 0, below C: the count itself is 4
    noise = torch.stack(gradients)
    z_delta = (z**-2 - (2 * sigma_b) ** -2) ** -0.5
    assert z_delta > 1.4 * z
    for numbers, std, others in ((noise, z_delta, (z,)), (count, sigma_b, (2 * sigma_b, sigma_b / 2))):
        assert fits(numbers, std)
        assert not any(fits(numbers, wrong) for wrong in (std * 1.2, std / 1.2, *others))
    for a, b in ((count, noise[:, 0]), (count[1:], noise[:-1, 0]), (count[1:], count[:-1])):
        assert abs(float(a @ b / (a.norm() * b.norm()))) * math.sqrt(len(a)) < 4.5


@pytest.mark.parametrize("sigma_b", [0.6, 1.0, 20.0])
@pytest.mark.parametrize("z", [0.0, 1e-4, 0.5, 1.0, 1.19])
def test_the_two_queries_cost_the_charged_noise_multiplier(z: float, sigma_b: float) -> None:
    """With sensitivities C and 1/2, noise of z_delta C and sigma_b together is worth exactly z."""
    function = made("adaptive", 3.0, build("mlp"), unclipped_num_std=sigma_b)
    z_delta = function.gradient_noise_multiplier(z)
    if z == 0:
        assert z_delta == 0
    else:
        assert (z_delta**-2 + (0.5 / sigma_b) ** 2) ** -0.5 == pytest.approx(z, rel=1e-9)
        assert z_delta > z


@pytest.mark.parametrize("norm", [0.0, 0.5, 1.0, 1.0001, 7.0, 1e200, math.inf, math.nan])
def test_one_sample_moves_the_count_by_at_most_half(norm: float) -> None:
    """Against a null record, which adds nothing, a sample changes the count by 1/2, or by 0 if it is dropped."""
    model = build("mlp")
    function = made("adaptive", 1.0, model)
    squares = torch.tensor([0.1, 9.0, 1.0, 2.0, norm], dtype=torch.float64).square()

    def count(rows: Tensor) -> float:
        zeros = torch.zeros_like(rows)
        return float(function.statistic({p: rows if k == 1 else zeros for k, p in enumerate(model.parameters())}))

    change = count(squares) - count(squares[:-1])
    assert change == (0.0 if not math.isfinite(norm) or norm == 1e200 else 0.5 if norm <= 1 else -0.5)


def test_the_default_count_noise_is_a_twentieth_of_the_expected_batch() -> None:
    """sigma_b is the exact expected batch size over 20, unless it is given."""
    model = Rows()
    with adaptive(model, NORMS * 20, 50, noise_multiplier=1.0, poisson_sampling=True, sample_rate=0.3) as (opt, _):
        assert opt.clipping_details["unclipped_num_std"] == pytest.approx(0.3 * 160 / 20)
    with adaptive(model, NORMS, 4, unclipped_num_std=3.0, noise_multiplier=1.0) as (opt, _):
        assert opt.clipping_details["unclipped_num_std"] == 3.0


# ---------------------------------------------------------------- adaptive: what is charged


def test_the_accountant_is_charged_with_the_stated_noise_multiplier() -> None:
    """The history holds z per step, not z_delta, and epsilon is that of flat clipping."""
    histories, epsilons = [], []
    for clipping in ("flat", "adaptive"):
        model = Rows()
        scope = over_many_rows(model, noise_multiplier=1.0, clipping=clipping, accountant="rdp")
        run(model, scope, passes=2)
        histories.append(scope.accountant.history)
        epsilons.append(scope.get_epsilon(1e-5))
    assert histories[0] == histories[1] == [(1.0, 0.25, 8)]
    assert epsilons[0] == epsilons[1]


@pytest.mark.filterwarnings("ignore:the privacy budget is used up")
@pytest.mark.filterwarnings("ignore:GDP accounting is experimental")
def test_a_target_epsilon_buys_the_same_noise_multiplier_as_without() -> None:
    """Calibration is for the total z; the gradients then get more, and the budget is not exceeded."""
    found = {}
    for clipping in ("flat", "adaptive"):
        model = Rows()
        scope = over_many_rows(
            model, target_epsilon=4.0, target_delta=1e-5, epochs=3, clipping=clipping, accountant="gdp"
        )
        run(model, scope, passes=4)
        found[clipping] = (scope.noise_multiplier, scope.steps, scope.get_epsilon(1e-5))
    assert found["flat"] == found["adaptive"]
    assert found["adaptive"][2] <= 4.0
    z = found["adaptive"][0]
    assert scope.report().clipping_details["gradient_noise_multiplier"] == pytest.approx((z**-2 - 4.0**-2) ** -0.5)


def test_without_poisson_sampling_a_pass_is_one_charge() -> None:
    """Two passes in order are two full-rate releases at z, and C goes on from one to the next."""
    model = Rows()
    scope = adaptive(model, NORMS, 2, noise_multiplier=0.1, noise_generator=drawn())
    bounds = run(model, scope, passes=2)
    assert scope.accountant.history == [(0.1, 1.0, 2)]
    assert len(set(bounds)) == 8


def test_without_noise_epsilon_is_infinite_and_nothing_is_drawn() -> None:
    """With sigma = 0 the noise of both queries is off, and epsilon says so."""
    model, generator = Rows(), drawn(9)
    state = generator.get_state()
    scope = adaptive(model, NORMS, 4, noise_generator=generator)
    run(model, scope)
    assert torch.equal(generator.get_state(), state)
    assert scope.get_epsilon(1e-5) == math.inf
    assert scope.report().clipping_details["gradient_noise_multiplier"] == 0
    assert scope.report().clipping_details["unclipped_num_std"] == 0


@pytest.mark.parametrize("generator", [None, drawn])
def test_the_noise_of_the_count_comes_from_the_scope(generator: Any) -> None:
    """The global generator is neither used nor does its seed fix C; the scope's own generator does."""
    found = []
    for _ in range(2):
        torch.manual_seed(4)
        state = torch.get_rng_state()
        model = Rows()
        scope = adaptive(model, NORMS, 8, noise_multiplier=0.5, noise_generator=generator and generator(6))
        with scope as (opt, loader):
            (x,) = next(iter(loader))
            torch.set_rng_state(state)
            model(x).sum().backward()
            opt.step()
            assert torch.equal(torch.get_rng_state(), state)
            found.append(opt.max_grad_norm)
    assert (found[0] == found[1]) == (generator is not None)


# ---------------------------------------------------------------- adaptive: out of the ordinary


@pytest.mark.parametrize("backward", [True, False])
@pytest.mark.parametrize("sigma", [0.0, 1e-12])
def test_an_empty_logical_batch_moves_the_bound(sigma: float, backward: bool) -> None:
    """No sample counts as an unclipped share of 1/2, plus noise: C moves by exp(-eta (1/2 - gamma)) on average."""
    model = Rows()
    options = {"poisson_sampling": True, "sample_rate": NEVER, "target_unclipped_quantile": 0.3}
    scope = adaptive(
        model, NORMS, 4, noise_multiplier=sigma, unclipped_num_std=1e-12, noise_generator=drawn(), **options
    )
    with scope as (opt, loader):
        (x,) = next(iter(loader))
        if backward:
            model(x).sum().backward()
        opt.step()
    quiet = math.exp(-0.2 * 0.2)
    if sigma == 0:
        assert opt.max_grad_norm == pytest.approx(quiet, rel=1e-12)
    else:  # the noise of 1e-12 is over an expected batch of 8e-12
        assert opt.max_grad_norm != pytest.approx(quiet, rel=1e-6)
        assert abs(math.log(opt.max_grad_norm / quiet)) < 5 * 0.2 / 8
    assert scope.accountant.history == [(sigma, NEVER, 1)]


@each_mode
def test_a_sample_that_is_not_finite_is_not_counted(mode: str) -> None:
    """NaN and infinite gradients add nothing to the count, as if the sample were not there."""
    model = Rows()
    with adaptive(model, NORMS, 8, self_check=False, grad_sample_mode=mode) as (opt, loader):
        (x,) = next(iter(loader))
        x = x.clone()
        x[0, 1], x[5, 0] = math.nan, math.inf
        model(x).sum().backward()
        opt.step()
    rest = [norm for i, norm in enumerate(NORMS) if i not in (0, 5)]
    assert opt.max_grad_norm == pytest.approx(trajectory([rest], 1.0, 0.2, 0.5, 8)[0], rel=1e-9)


def test_a_logical_batch_that_was_left_early_is_not_counted() -> None:
    """Parts of a batch that was broken off, and gradients that zero_grad dropped, do not reach C."""
    model = Rows()
    with adaptive(model, NORMS, 8, max_physical_batch_size=3) as (opt, loader):
        for (x,) in loader:
            model(x).sum().backward()
            opt.step()
            break
        assert opt.max_grad_norm == 1.0
        for (x,) in loader:
            model(x).sum().backward()
            opt.zero_grad()
            model(x).sum().backward()
            opt.step()
    assert opt.max_grad_norm == pytest.approx(trajectory([NORMS], 1.0, 0.2, 0.5, 8)[0], rel=1e-9)


def test_a_release_that_fails_is_not_counted_twice() -> None:
    """If a step hook raises, C stays, and the samples of that step are forgotten with it."""
    model, fail = Rows(), [True]
    with adaptive(model, NORMS, 4) as (opt, loader):
        opt.attach_step_hook(lambda _: 1 / 0 if fail.pop() else None)
        batches = iter(loader)
        (x,) = next(batches)
        model(x).sum().backward()
        with pytest.raises(ZeroDivisionError):
            opt.step()
        assert opt.max_grad_norm == 1.0
        fail.append(False)
        (x,) = next(batches)
        model(x).sum().backward()
        opt.step()
    assert opt.max_grad_norm == pytest.approx(trajectory([NORMS[4:]], 1.0, 0.2, 0.5, 4)[0], rel=1e-9)


@pytest.mark.filterwarnings("ignore:a step was taken on a batch that did not come")
def test_batches_from_elsewhere_are_counted_once_each() -> None:
    """Without the private loader every step is a logical batch of its own, and its count ends with it."""
    model, x = Rows(), rows_with(NORMS)
    with adaptive(model, NORMS, 8) as (opt, _):
        for rows in (x[:3], x[3:]):
            model(rows).sum().backward()
            opt.step()
    assert opt.max_grad_norm == pytest.approx(trajectory([NORMS[:3], NORMS[3:]], 1.0, 0.2, 0.5, 8)[1], rel=1e-9)


def test_two_backward_passes_count_a_sample_once() -> None:
    """The norm that is compared with C is that of the gradients added up."""
    model = Rows()
    with adaptive(model, NORMS, 8) as (opt, loader):
        (x,) = next(iter(loader))
        model(x).sum().backward()
        model(x).sum().backward()
        opt.step()
    doubled = [2 * norm for norm in NORMS]
    assert opt.max_grad_norm == pytest.approx(trajectory([doubled], 1.0, 0.2, 0.5, 8)[0], rel=1e-9)


@pytest.mark.parametrize(("limits", "end"), [({"min_clipbound": 0.7}, 0.7), ({"max_clipbound": 1.5}, 1.5), ({}, None)])
def test_the_bound_stays_within_its_limits(limits: dict[str, float], end: float | None) -> None:
    """C stops at min_clipbound and max_clipbound, and can leave them again."""
    norms = [1e3 if "max_clipbound" in limits else 1e-3] * 4
    model = Rows()
    with adaptive(model, norms, 4, **limits) as (opt, loader):
        for _ in range(8):
            for (x,) in loader:
                model(x).sum().backward()
                opt.step()
        last = opt.max_grad_norm
        (x,) = next(iter(loader))
        model((1e3 if "min_clipbound" in limits else 0) * x).sum().backward()
        opt.step()
    if end is None:
        assert last == pytest.approx(math.exp(-0.1 * 8), rel=1e-9)
    else:
        assert last == end
        assert opt.max_grad_norm == pytest.approx(end * math.exp(0.1 if "min_clipbound" in limits else -0.1), rel=1e-9)


def test_enormous_count_noise_neither_overflows_nor_ends_the_bound() -> None:
    """With sigma_b of 1e12, C jumps between its limits and stays a positive number."""
    function = made("adaptive", 1.0, build("mlp"), unclipped_num_std=1e12)
    noise, seen = GaussianNoise(drawn()), set()
    for _ in range(20):
        function.update(None, noise, 1.0)
        seen.add(function.max_grad_norm)
    assert seen == {1e-6, 1e6}


# ---------------------------------------------------------------- setting bounds and noise inside a scope


def test_setting_the_bound_starts_adaptive_clipping_afresh() -> None:
    """``opt.max_grad_norm = v`` is the C of the next step, which then moves on; a value outside the limits is refused."""
    model = Rows()
    with adaptive(model, NORMS, 8, max_clipbound=10.0) as (opt, loader):
        for start in (1.0, 3.0, 0.3):
            opt.max_grad_norm = start
            assert opt.max_grad_norm == opt.sensitivity == start
            for (x,) in loader:
                model(x).sum().backward()
                opt.step()
            assert opt.max_grad_norm == pytest.approx(trajectory([NORMS], start, 0.2, 0.5, 8)[0], rel=1e-9)
        kept = opt.max_grad_norm
        for wrong in (11.0, 0.0, "1", [1.0]):
            with pytest.raises(InvalidArgumentError, match="max_grad_norm="):
                opt.max_grad_norm = wrong
        assert opt.max_grad_norm == kept


def test_a_bound_set_in_a_step_hook_holds_for_the_next_step() -> None:
    """A scheduler that runs at the release overrides the learned bound."""
    model = Rows()
    with adaptive(model, NORMS, 8) as (opt, loader):
        opt.attach_step_hook(lambda o: setattr(o, "max_grad_norm", 2.5))
        for (x,) in loader:
            model(x).sum().backward()
            opt.step()
        assert opt.max_grad_norm == 2.5


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("per_layer", [1.0, 2.0, 3.0, 4.0]),
        ("per_layer", {"*.bias": 1.0, "*": 2.0}),
        ("per_group", {"2.*": 5.0, "*": 12.0}),
        ("automatic", 3.0),
        ("adaptive", 0.2),
    ],
)
def test_bounds_can_be_set_and_read(kind: str, value: Any) -> None:
    """Every clipping takes new bounds of its own form; what is read is a copy; bad ones leave the old in force."""
    options, sensitivity = KINDS[kind]
    with scope_over(build("mlp"), **options) as (opt, _):
        assert opt.max_grad_norm == options["max_grad_norm"]
        with pytest.raises(InvalidArgumentError, match="max_grad_norm"):
            opt.max_grad_norm = {"nothing": 1.0}
        assert opt.sensitivity == pytest.approx(sensitivity)
        opt.max_grad_norm = value
        assert opt.max_grad_norm == value
        bounds = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
        wanted = math.sqrt(sum(c * c for c in bounds))
        assert opt.sensitivity == pytest.approx(wanted)
        if isinstance(value, (dict, list)):
            opt.max_grad_norm.clear()
            assert opt.max_grad_norm == value


@each_kind
def test_the_bound_cannot_change_within_a_logical_batch(kind: str) -> None:
    """Between physical parts every clipping refuses a new bound."""
    model = build("mlp")
    options, sensitivity = KINDS[kind]
    with scope_over(model, max_physical_batch_size=3, **options) as (opt, loader):
        x, y = next(iter(loader))
        F.cross_entropy(model(x), y).backward()
        opt.step()
        with pytest.raises(ScopeError, match="middle of a logical batch"):
            opt.max_grad_norm = options["max_grad_norm"]
        assert opt.sensitivity == pytest.approx(sensitivity)


def test_a_noise_multiplier_beyond_the_count_noise_is_refused_inside_the_scope() -> None:
    """A schedule may move z below 2 sigma_b, and the split follows; at or above it is an error and z stays."""
    with adaptive(Rows(), NORMS, 8, unclipped_num_std=0.6, noise_multiplier=1.0) as (opt, _):
        for wrong in (1.2, 5):
            with pytest.raises(InvalidArgumentError, match=rf"noise_multiplier={wrong}.*unclipped_num_std = 1\.2"):
                opt.noise_multiplier = wrong
        assert opt.noise_multiplier == 1.0
        opt.noise_multiplier = 0.9
        assert opt.clipping_details["gradient_noise_multiplier"] == pytest.approx((0.9**-2 - 1.2**-2) ** -0.5)


# ---------------------------------------------------------------- the ways in


@each_mode
@each_kind
def test_dp_step_and_the_engine_clip_as_the_bare_loop(kind: str, mode: str) -> None:
    """The same clipping moves the model the same way in a bare loop, under ``@dp_step`` and through the engine."""
    options, _ = KINDS[kind]
    options = {**options, "grad_sample_mode": mode, "max_physical_batch_size": 4}

    @dp_step
    def step(model: nn.Module, batch: Any) -> Tensor:
        x, y = batch
        return F.cross_entropy(model(x), y, reduction="none")

    found: list[list[Tensor]] = []
    bounds = []
    for way in ("loop", "dp_step", "engine"):
        model = build("mlp")
        start = values(model)
        with ExitStack() as stack:
            if way == "engine":
                engine = stack.enter_context(PrivacyEngineHookBased(accountant="rdp"))
                _, opt, *_, loader = engine.make_private(
                    module=model,
                    optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
                    data_loader=in_order(),
                    noise_multiplier=0.0,
                    poisson_sampling=False,
                    **options,
                )
            else:
                opt, loader = stack.enter_context(scope_over(model, **options))
            for _ in range(2):
                for x, y in loader:
                    if way == "dp_step":
                        step(model, (x, y))
                    else:
                        opt.zero_grad()
                        F.cross_entropy(model(x), y).backward()
                        opt.step()
        found.append(moved(start, model))
        bounds.append(opt.max_grad_norm)
    assert_same(found[0], found[1])
    assert_same(found[0], found[2])
    assert bounds[0] == bounds[1] == bounds[2]
    assert kind != "adaptive" or bounds[0] != 0.5


def test_the_engine_takes_the_options_of_adaptive_clipping_as_opacus_names_them() -> None:
    """Opacus's keywords work as they are; giving options twice, or to another clipping, is refused."""
    words = {
        "target_unclipped_quantile": 0.7,
        "clipbound_learning_rate": 0.1,
        "max_clipbound": 5.0,
        "min_clipbound": 0.5,
        "unclipped_num_std": 3.0,
    }

    def private(**kwargs: Any) -> Any:
        model = build("mlp")
        with PrivacyEngineHookBased(accountant="rdp") as engine:
            return engine.make_private(
                module=model,
                optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
                data_loader=in_order(),
                noise_multiplier=1.0,
                max_grad_norm=1.0,
                **kwargs,
            )[1]

    details = private(clipping="adaptive", **words).clipping_details
    assert {name: details[name] for name in words} == words
    assert private(clipping="adaptive", clipping_options=words).clipping_details == details
    with pytest.raises(InvalidArgumentError, match=r"clipping_options=.*min_clipbound given outside"):
        private(clipping="adaptive", clipping_options={"unclipped_num_std": 3.0}, min_clipbound=0.5)
    with pytest.raises(InvalidArgumentError, match="clipping='flat' has no options"):
        private(min_clipbound=0.5)


@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        ("flat", ["flat, C = 0.5, sensitivity 0.5"]),
        ("per_layer", ["per_layer, C = [0.3, 0.4, 1.2, 0.84], sensitivity 1.547"]),
        ("per_group", ["per_group, C = {'0.*': 0.3, '*': 0.4}, sensitivity 0.5"]),
        ("automatic", ["automatic, C = 0.5, sensitivity 0.5", "gamma 0.01"]),
        (
            "adaptive",
            ["adaptive, C = 0.5, sensitivity 0.5", "gradient_noise_multiplier 0.1048", "unclipped_num_std 0.166"],
        ),
    ],
)
def test_the_report_tells_clipping_bounds_and_the_split_of_noise(kind: str, parts: list[str]) -> None:
    """Before entering, inside and after, the report names clipping, bounds and details, in print and as a dictionary."""
    options, sensitivity = KINDS[kind]
    model = build("mlp")
    loader = in_order(6, 2)
    extra = {"unclipped_num_std": 1 / 6} if kind == "adaptive" else None
    scope = scope_over(model, loader=loader, noise_multiplier=0.1, clipping_options=extra, **options)
    for moment in ("before", "inside", "after"):
        if moment == "inside":
            opt, _ = scope.__enter__()
        if moment == "after":
            scope.__exit__(None, None, None)
        report = scope.report()
        assert [part for part in parts if part not in str(report)] == []
        assert report.as_dict()["max_grad_norm"] == options["max_grad_norm"]
        assert report.sensitivity == pytest.approx(sensitivity)
    assert report.clipping_details == opt.clipping_details


def test_the_report_shows_the_present_bound() -> None:
    """With adaptive clipping C and the sensitivity in the report are those of the next step."""
    model = Rows()
    scope = adaptive(model, NORMS, 8)
    last = run(model, scope, passes=3)[-1]
    assert last != 1.0
    assert scope.report().max_grad_norm == scope.report().sensitivity == last


def test_functions_say_what_they_are() -> None:
    """Each name makes its own kind of function."""
    model = build("mlp")
    kinds = {
        "flat": (1.0, FlatClipping),
        "per_layer": ([1.0] * 4, GroupClipping),
        "per_group": ({"*": 1.0}, GroupClipping),
        "automatic": (1.0, AutomaticClipping),
        "adaptive": (1.0, AdaptiveClipping),
    }
    for name, (bound, kind) in kinds.items():
        assert type(made(name, bound, model)) is kind
