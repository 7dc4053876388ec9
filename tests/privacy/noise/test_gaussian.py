"""The noise in what is released: its size, its independence, and where it goes.

Every example's gradient is zero in these tests, or the batch is empty, so that what a step of SGD with learning rate 1
subtracts from the parameters is the released noise itself.
"""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dp_hooks import private_training
from dp_hooks.errors import InvalidArgumentError, ScopeError
from dp_hooks.privacy.noise.gaussian import GaussianNoise

from ...models import drawn, each_mode
from ..gaussian import COUNT, NEVER, Wide, assert_fits_only, correlation, fits, noise_of, noises_of, released, wide_scope


@pytest.mark.parametrize(("sigma", "bound"), [(1.0, 1.0), (0.7, 3.0), (4.0, 0.25), (50.0, 1e-3)])
@each_mode
def test_sum_has_noise_of_sigma_times_bound(mode: str, sigma: float, bound: float) -> None:
    """With loss_reduction "sum" the released gradient has noise of std sigma * C, and no other std fits."""
    noise = noise_of(Wide(), noise_multiplier=sigma, max_grad_norm=bound, grad_sample_mode=mode)
    assert_fits_only(noise["a.weight"], sigma * bound)


@pytest.mark.parametrize(("rate", "expected"), [(None, 4.0), (0.25, 2.5), (1.0, 10.0)])
def test_mean_divides_the_noise_by_the_expected_batch_size(rate: float | None, expected: float) -> None:
    """With loss_reduction "mean" the std is sigma * C / (q N): the expected size, neither drawn nor truncated."""
    model = Wide()
    scope = wide_scope(model, noise_multiplier=1.5, max_grad_norm=2.0, loss_reduction="mean", sample_rate=rate)
    with scope as (opt, loader):
        (x,) = next(iter(loader))
        model(x).mean().backward()
        noise = released(model, opt)
    assert_fits_only(noise["a.weight"], 1.5 * 2.0 / expected)


def test_noise_of_many_steps_adds_up_independently() -> None:
    """The sum of 25 steps has 5 times the std of one: noise of different steps is independent."""
    model = Wide()
    with wide_scope(model, sample_rate=1 / 25 * 1e-9, noise_multiplier=0.5) as (opt, loader):
        for _, _ in zip(range(25), loader, strict=False):
            opt.step()
    assert_fits_only(-model.a.weight.detach(), 0.5 * 5)


@pytest.mark.parametrize("later", [0.25, 1.0, 2.0])
def test_noise_is_added_once_for_a_logical_batch_in_parts(later: float) -> None:
    """Five physical parts get the noise of one release, at the end, for the C of all parts: it cannot change before."""
    model = Wide()
    with wide_scope(model, sample_rate=1.0, max_physical_batch_size=2) as (opt, loader):
        moved = []
        for (x,) in loader:
            model(x).sum().backward()
            opt.step()
            moved.append(bool(model.a.weight.any()))
            opt.zero_grad()
            if not moved[-1]:
                with pytest.raises(ScopeError, match="middle of a logical batch"):
                    opt.max_grad_norm = later
    assert moved == [False] * 4 + [True]
    assert_fits_only(-model.a.weight.detach(), 1.0)


def test_changed_bound_changes_the_noise_of_the_next_step() -> None:
    """A gradient-clipping schedule moves the noise with C."""
    model = Wide()
    with wide_scope(model, sample_rate=NEVER) as (opt, loader):
        for bound, _ in zip((1.0, 3.0), loader, strict=False):
            opt.max_grad_norm = bound
            assert_fits_only(released(model, opt)["a.weight"], bound)


def test_noise_multiplier_zero_adds_nothing() -> None:
    """With sigma = 0 an empty batch moves nothing at all."""
    assert not any(noise.any() for noise in noise_of(Wide(), noise_multiplier=0.0).values())


@pytest.mark.parametrize("generator", [None, drawn])
def test_steps_and_parameters_have_independent_noise(generator: Any) -> None:
    """Noise of two steps, and of two parameters in one step, is uncorrelated; a repetition would not be."""
    first, second = noises_of(Wide(), 2, noise_generator=generator and generator())
    assert correlation(first["a.weight"], second["a.weight"]) < 5.5
    assert correlation(first["a.weight"][:1], first["b.weight"]) < 5.5
    assert correlation(first["a.weight"][0], first["a.weight"][1]) < 5.5
    assert correlation(first["a.weight"], first["a.weight"]) > 5.5


def test_global_seed_does_not_fix_the_noise() -> None:
    """Two scopes after the same ``torch.manual_seed`` draw different, uncorrelated noise of the right size."""
    found = []
    for _ in range(2):
        torch.manual_seed(7)
        found.append(noise_of(Wide(), noise_generator=None)["a.weight"])
    assert correlation(*found) < 5.5
    assert all(abs(x.std().item() - 1) < 0.05 for x in found)


def test_noise_leaves_the_global_random_state_alone() -> None:
    """Drawing noise, from either source, takes nothing from PyTorch's global generator."""
    for generator in (None, drawn()):
        model = Wide()
        with wide_scope(model, sample_rate=NEVER, noise_generator=generator) as (opt, loader):
            next(iter(loader))
            state = torch.get_rng_state()
            opt.step()
            assert torch.equal(torch.get_rng_state(), state)


def test_noise_generator_fixes_the_noise() -> None:
    """The same seed gives the same noise, another seed other noise."""
    one, same, other = (noise_of(Wide(), noise_generator=drawn(s)) for s in (3, 3, 4))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert correlation(one["a.weight"], other["a.weight"]) < 5.5


def test_two_scopes_with_one_generator_go_on_drawing() -> None:
    """A generator used for two scopes is not rewound: the second draws fresh noise."""
    generator = drawn(3)
    one, two = (noise_of(Wide(), noise_generator=generator)["a.weight"] for _ in range(2))
    assert correlation(one, two) < 5.5


def test_unused_parameters_get_noise() -> None:
    """A trainable parameter that the loss did not reach gets full noise, and is named once in a warning."""
    model = Wide()
    with wide_scope(model, sample_rate=1.0) as (opt, loader):
        model.b(next(iter(loader))[0]).sum().backward()
        with pytest.warns(UserWarning, match=r"a\.weight"):
            noise = released(model, opt)
    assert_fits_only(noise["a.weight"], 1.0)
    assert fits(noise["b.weight"], 1.0)


def test_frozen_parameters_and_those_of_no_optimizer_get_none() -> None:
    """Neither a frozen parameter nor one that is frozen and in no optimizer is moved."""
    model = Wide()
    model.b.weight.requires_grad_(False)
    noise = noise_of(model)
    assert not noise["b.weight"].any()
    assert_fits_only(noise["a.weight"], 1.0)
    model = nn.Sequential(Wide(), nn.Linear(1, 1))
    data = DataLoader(TensorDataset(torch.zeros(4, COUNT // 2)), batch_size=2)
    model[0].requires_grad_(False)
    head = torch.optim.SGD(model[1].parameters(), lr=1.0)
    scope = private_training(model, head, data, noise_multiplier=1.0, max_grad_norm=1.0, sample_rate=NEVER)
    with scope as (opt, loader):
        next(iter(loader))
        noise = released(model, opt)
    assert not noise["0.a.weight"].any()
    assert noise["1.weight"].all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_parameters_get_noise_drawn_in_float32(dtype: torch.dtype) -> None:
    """The noise of a half-precision parameter is a float32 draw, rounded once."""
    noise = noise_of(Wide(dtype), noise_multiplier=3.0, noise_generator=drawn(9))
    draw = torch.empty(2, COUNT // 2).normal_(0.0, 3.0, generator=drawn(9))
    assert torch.equal(noise["a.weight"], draw.to(dtype).double())
    assert_fits_only(noise["a.weight"], 3.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_noise_is_added_to_half_precision_sums_before_rounding(dtype: torch.dtype) -> None:
    """A half-precision sum plus noise is rounded once; rounding the noise first would give other numbers."""
    total = torch.empty(COUNT).normal_(0.0, 1.0, generator=drawn(1)).to(dtype)
    draw = torch.empty(COUNT).normal_(0.0, 3.0, generator=drawn(9))
    noised = total.clone()
    GaussianNoise(drawn(9)).add_([noised], 3.0)
    assert torch.equal(noised, (total.float() + draw).to(dtype))
    assert not torch.equal(noised, (total.float() + draw.to(dtype).float()).to(dtype))


def test_float64_parameters_get_noise_drawn_in_float64() -> None:
    """The noise of a float64 parameter has more digits than float32 holds."""
    noise = noise_of(Wide(torch.float64))["a.weight"]
    assert_fits_only(noise, 1.0)
    assert (noise != noise.float().double()).double().mean() > 0.99


def test_both_parts_of_complex_numbers_get_noise_of_their_own() -> None:
    """A complex parameter is as many real numbers as it has parts: each has the full standard deviation, without correlation."""
    total = torch.zeros(200, 100, dtype=torch.complex64).T  # not contiguous
    GaussianNoise(drawn(3)).add_([total], 2.0, 0.5)
    parts = torch.view_as_real(total).reshape(-1, 2)
    assert (parts.std(0) - 1.0).abs().max() < 0.03
    assert abs(float((parts[:, 0] * parts[:, 1]).mean())) < 0.03
    with pytest.raises(RuntimeError):  # what is conjugated lazily would get noise in a copy
        GaussianNoise(drawn(3)).add_([total.conj()], 2.0)


def test_noise_reaches_parameters_in_any_memory_layout() -> None:
    """A transposed (non-contiguous) tensor gets noise in all its places."""
    total = torch.zeros(100, 200).T
    GaussianNoise(drawn()).add_([total], 2.0)
    assert not total.is_contiguous()
    assert_fits_only(total, 2.0)


def _flipped(*shape: int) -> Tensor:
    return torch.ones(*shape).movedim(1, -1)


@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("threads", [1, 3])
def test_every_number_gets_noise_once_however_it_is_shared_out(
    threads: int, dtype: torch.dtype, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many tensors of odd sizes, on any number of threads: sum and noise are scaled together, none twice, none left out."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    totals = [_flipped(3, 5, 7), torch.ones(40_001), torch.ones(0), torch.ones(1), _flipped(101, 71, 130)]
    totals = [total.to(dtype) for total in totals]
    noise = GaussianNoise()
    noise.add_(totals, 2.0, scale)
    assert len(noise._fresh[torch.device("cpu")]) == threads
    for total in totals[1::3]:
        assert_fits_only((total / scale - 1).double(), 2.0)
    values = torch.cat([total.flatten() for total in totals]).double()
    assert (values != scale).double().mean() > (0.99 if dtype != torch.bfloat16 else 0.9)
    block = totals[4].flatten()[: 1 << 16].double()
    for lag in (1 << 13, 1 << 14, 1 << 15):  # streams that repeat each other would be in step at some block
        assert correlation(block[lag:] - scale, block[:-lag] - scale) < 5.5


@pytest.mark.parametrize("std", [0.0, 2.0])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_told_wherever_it_is(bad: float, threads: int, std: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """One bad number in any tensor, layout, dtype or block is reported; sums without one are not."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)

    def sums() -> list[Tensor]:
        wide = torch.ones(600_000)
        return [
            _flipped(3, 5, 7),
            wide,
            torch.ones(0),
            torch.ones(4, 2, dtype=torch.complex64),
            torch.ones(9).bfloat16(),
            wide[::7],
        ]

    assert GaussianNoise().add_([total.clone() for total in sums()], std)
    for which, at in [(0, (2, 1, 3)), (1, (0,)), (1, (599_999,)), (3, (1, 1)), (4, (8,)), (5, (700,))]:
        totals = sums()
        totals[which][at] = bad
        assert not GaussianNoise().add_(totals, std)


@pytest.mark.parametrize("devices", [{"cuda"}, {"cpu", "cuda"}, {"meta"}])
def test_generator_on_another_device_is_refused(devices: set[str]) -> None:
    """A generator that cannot serve every parameter's device is refused by name; no such device is needed to see it."""
    noise = GaussianNoise(drawn())
    with pytest.raises(InvalidArgumentError, match=r"noise_generator=.*lives on cpu"):
        noise.check_devices({torch.device(d) for d in devices})
    noise.check_devices({torch.device("cpu")})
    GaussianNoise().check_devices({torch.device(d) for d in devices})


def test_scope_checks_the_generator_against_the_parameters() -> None:
    """A scope over parameters on another device than the generator's is refused before anything is attached."""
    model = nn.Linear(2, 1, device="meta")
    loader = DataLoader(TensorDataset(torch.zeros(4, 2)), batch_size=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with pytest.raises(InvalidArgumentError, match="noise_generator="):
        private_training(model, optimizer, loader, noise_multiplier=1.0, max_grad_norm=1.0, noise_generator=drawn())
    assert not model._forward_hooks


@pytest.mark.parametrize("numel", [1, 5, 1 << 13, (1 << 13) + 1, 1 << 17])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
@pytest.mark.parametrize("std", [0.0, 1e-6])
def test_sums_of_every_size_are_divided_as_the_noise_is(std: float, dtype: torch.dtype, numel: int) -> None:
    """The sum itself is multiplied with the scale: where noise is drawn for several sums at once, in blocks, or not at all."""
    before = [torch.linspace(-8, 8, numel, dtype=dtype), torch.full((3, 2), 5.0, dtype=dtype)]
    totals = [total.clone() for total in before]
    assert GaussianNoise(None).add_(totals, std, 0.125)
    for total, first in zip(totals, before, strict=True):
        torch.testing.assert_close(total, 0.125 * first, rtol=0, atol=1e-5)


@pytest.mark.parametrize("numel", [0, 4, 1 << 17])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_sums_that_are_not_finite_are_told_whatever_their_size(bad: float, numel: int) -> None:
    """One number among all is enough, in small tensors and large ones; an empty tensor beside is no reason."""
    totals = [torch.zeros(numel), torch.zeros(3)]
    assert GaussianNoise(None).add_(totals, 1.0, 0.5)
    totals[0 if numel else 1][-1] = bad
    assert not GaussianNoise(None).add_(totals, 1.0, 0.5)


def test_sums_in_one_memory_get_noise_of_their_own() -> None:
    """Sums side by side, in any order and with gaps, get independent noise in every number, and what lies between gets none."""
    flat = torch.zeros(60_000)
    views = [flat[30_000:34_000], flat[:5_000].view(50, 100), flat[5_000:9_000], flat[40_000:48_000].view(80, 100).mT]
    totals = [*views, torch.zeros(3_000)]
    assert GaussianNoise(drawn()).add_(totals, 2.0, 0.5)
    for total in totals:
        assert fits(total, 1.0)
        assert not (total == 0).any()
    numbers = torch.cat([total.flatten() for total in totals])
    assert len(numbers.unique()) > 0.999 * len(numbers)
    assert not flat[9_000:30_000].any()
    assert not flat[34_000:40_000].any()
    assert not flat[48_000:].any()
