"""What every clipping function promises: its sensitivity, its noise, bounds that can be set, and the ways in."""

import math
from contextlib import ExitStack
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dp_hooks import PrivacyEngineHookBased, dp_step
from dp_hooks.errors import InvalidArgumentError, ScopeError
from dp_hooks.privacy.clipping import AdaptiveClipping, AutomaticClipping, FlatClipping, GroupClipping

from ...models import assert_same, build, drawn, each_mode, in_order, norm_of
from ...training.helpers import Run, backward, sgd, step
from ..gaussian import Wide, assert_fits_only, fits, noise_of
from .helpers import KINDS, factors_of, made

each_kind = pytest.mark.parametrize("kind", list(KINDS))


@each_mode
@each_kind
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e7])
def test_one_sample_contributes_at_most_the_sensitivity_and_can_reach_it(kind: str, scale: float, mode: str) -> None:
    """No gradient exceeds the declared sensitivity, and a huge one reaches it: half of it would be a false claim."""
    options, sensitivity = KINDS[kind]
    run = Run(grad_sample_mode=mode, loader=in_order(1), **options)
    with run as (model, opt, loader):
        assert opt.sensitivity == pytest.approx(sensitivity, rel=1e-12)
        for x, y in loader:
            backward(model, x, y, scale)
            opt.step()
    contribution = float(norm_of(run.moved))
    assert contribution <= sensitivity * (1 + 1e-9)
    if scale > 1:
        assert contribution >= sensitivity * (1 - 1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@each_kind
def test_factors_keep_random_gradients_within_the_sensitivity(kind: str, dtype: torch.dtype) -> None:
    """Over norms of forty orders of magnitude, factor times norm stays within the sensitivity up to rounding."""
    model = build("mlp", dtype)
    options, sensitivity = KINDS[kind]
    function = made(*options.values(), model)
    generator = drawn(3)
    norms = {p: 10 ** (torch.rand(2000, generator=generator) * 36 - 18).to(dtype) for p in model.parameters()}
    factors = factors_of(function, {p: norm.square() for p, norm in norms.items()})
    contributions = sum((factors[p].double() * norms[p].double()).square() for p in norms).sqrt()
    assert float(contributions.max()) <= sensitivity * (1 + 4 * torch.finfo(dtype).eps)


@each_kind
def test_a_sample_without_a_usable_norm_is_dropped_everywhere(kind: str) -> None:
    """NaN, infinite and negative squared norms, in any one parameter, give factor 0 in all of them; the others go on."""
    model = build("mlp")
    options, _ = KINDS[kind]
    function = made(*options.values(), model)
    bad = [math.nan, math.inf, -math.inf, -1e-12]
    for target in model.parameters():
        norms = {p: torch.ones(len(bad) + 1) for p in model.parameters()}
        norms[target][: len(bad)] = torch.tensor(bad)
        for factors in factors_of(function, norms).values():
            assert factors[: len(bad)].tolist() == [0.0] * len(bad)
            assert 0 < float(factors[-1]) <= 1


@pytest.mark.parametrize(
    ("options", "std", "wrong"),
    [
        # right: sqrt(3^2 + 4^2); wrong: the sum, one of them, half
        ({"clipping": "per_group", "max_grad_norm": {"a.*": 3.0, "*": 4.0}}, 5.0, (7.0, 3.0, 4.0, 2.5)),
        ({"clipping": "per_layer", "max_grad_norm": {"a.*": 3.0, "*": 4.0}}, 5.0, (7.0, 3.0, 4.0, 2.5)),
        ({"clipping": "per_layer", "max_grad_norm": [3.0, 4.0]}, 5.0, (7.0, 3.0, 4.0, 2.5)),
        ({"clipping": "per_layer", "max_grad_norm": [3.0, 4.0], "noise_multiplier": 0.8}, 4.0, (5.6, 2.4, 3.2)),
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
    """The noise on every parameter has sigma (mostly 1) times the joint sensitivity as its std, and no other fits."""
    noise = noise_of(Wide(), **options)
    assert_fits_only(noise["a.weight"], std, *wrong, std * 1.2, std / 1.2)
    assert fits(noise["b.weight"], std)
    assert not any(fits(noise["b.weight"], other) for other in wrong)


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
    with Run(**options) as (_, opt, _):
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
    options, sensitivity = KINDS[kind]
    with Run(max_physical_batch_size=3, **options) as (model, opt, loader):
        step(model, opt, *next(iter(loader)))
        with pytest.raises(ScopeError, match="middle of a logical batch"):
            opt.max_grad_norm = options["max_grad_norm"]
        assert opt.sensitivity == pytest.approx(sensitivity)


def made_private(engine: PrivacyEngineHookBased, model: nn.Module, **options: Any) -> Any:
    """Make the model private with the six examples in order."""
    return engine.make_private(module=model, optimizer=sgd(model), data_loader=in_order(), poisson_sampling=False, **options)


@each_mode
@each_kind
def test_dp_step_and_the_engine_clip_as_the_bare_loop(kind: str, mode: str) -> None:
    """The same clipping moves the model the same way in a bare loop, under ``@dp_step`` and through the engine."""
    options, _ = KINDS[kind]
    options = {**options, "grad_sample_mode": mode, "max_physical_batch_size": 4}

    @dp_step
    def dp(model: nn.Module, batch: Any) -> Tensor:
        x, y = batch
        return F.cross_entropy(model(x), y, reduction="none")

    found, bounds = [], []
    for way in ("loop", "dp_step", "engine"):
        run = Run(**options)
        with ExitStack() as stack:
            if way == "engine":
                engine = stack.enter_context(PrivacyEngineHookBased(accountant="rdp"))
                _, opt, *_, loader = made_private(engine, run.model, noise_multiplier=0.0, **options)
            else:
                _, opt, loader = stack.enter_context(run)
            for _ in range(2):
                for batch in loader:
                    dp(run.model, batch) if way == "dp_step" else step(run.model, opt, *batch)
        found.append(run.moved)
        bounds.append(opt.max_grad_norm)
    assert_same(found[0], found[1])
    assert_same(found[0], found[2])
    assert bounds[0] == bounds[1] == bounds[2]
    assert kind != "adaptive" or bounds[0] != 0.5


def test_the_engine_takes_the_options_of_adaptive_clipping_as_opacus_names_them() -> None:
    """Opacus's keywords work as they are, alone as well; giving options twice, or to another clipping, is refused."""
    words = {
        "target_unclipped_quantile": 0.7,
        "clipbound_learning_rate": 0.1,
        "max_clipbound": 5.0,
        "min_clipbound": 0.5,
        "unclipped_num_std": 3.0,
    }

    def private(**kwargs: Any) -> Any:
        with PrivacyEngineHookBased(accountant="rdp") as engine:
            return made_private(engine, build("mlp"), noise_multiplier=1.0, max_grad_norm=1.0, **kwargs)[1]

    details = private(clipping="adaptive", **words).clipping_details
    assert {name: details[name] for name in words} == words
    assert private(clipping="adaptive", clipping_options=words).clipping_details == details
    with pytest.raises(InvalidArgumentError, match=r"clipping_options=.*min_clipbound given outside"):
        private(clipping="adaptive", clipping_options={"unclipped_num_std": 3.0}, min_clipbound=0.5)
    with pytest.warns(UserWarning, match="so clipping='adaptive' is used"):
        assert private(**words).clipping_details == details
    with pytest.raises(InvalidArgumentError, match="options of clipping='automatic' are 'gamma'"):
        private(clipping="automatic", min_clipbound=0.5)


@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        ("flat", ["flat, C = 0.5, sensitivity 0.5"]),
        ("per_layer", ["per_layer, C = [0.3, 0.4, 1.2, 0.84], sensitivity 1.547"]),
        ("per_group", ["per_group, C = {'0.*': 0.3, '*': 0.4}, sensitivity 0.5"]),
        ("automatic", ["automatic, C = 0.5, sensitivity 0.5", "gamma 0.01"]),
        ("adaptive", ["adaptive, C = 0.5, sensitivity 0.5", "gradient_noise_multiplier 0.1048", "unclipped_num_std 0.166"]),
    ],
)
def test_the_report_tells_clipping_bounds_and_the_split_of_noise(kind: str, parts: list[str]) -> None:
    """Before entering, inside and after, the report names clipping, bounds and details, in print and as a dictionary."""
    options, sensitivity = KINDS[kind]
    extra = {"unclipped_num_std": 1 / 6} if kind == "adaptive" else None
    scope = Run(loader=in_order(6, 2), noise_multiplier=0.1, clipping_options=extra, **options).scope
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


def test_functions_say_what_they_are() -> None:
    """Each name makes its own kind of function."""
    model = build("mlp")
    for name, kind in {
        "flat": FlatClipping,
        "per_layer": GroupClipping,
        "per_group": GroupClipping,
        "automatic": AutomaticClipping,
        "adaptive": AdaptiveClipping,
    }.items():
        assert type(made(*KINDS[name][0].values(), model)) is kind
