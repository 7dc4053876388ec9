"""secure_mode: noise on a grid, from bits that nobody can draw again."""

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from dp_hooks import PrivacyEngineHookBased, private_training
from dp_hooks.errors import InvalidArgumentError, ScopeError
from dp_hooks.privacy.noise import make
from dp_hooks.privacy.noise.grid import Grid
from dp_hooks.privacy.noise.rounded_gaussian import rounded_gaussian
from dp_hooks.privacy.noise.secure import SecureNoise
from dp_hooks.privacy.sampling.poisson import SecurePoissonSampler

from ...models import build, drawn, each_mode, in_order, scope_over
from ..gaussian import COUNT, NEVER, Wide, assert_fits_only, correlation, noise_of, noises_of, released, wide_scope
from ..seeded_bytes import SeededBytes, no_noise
from .test_grid import neighbours

SECURE: dict[str, Any] = {"secure_mode": True, "noise_generator": None}


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> SeededBytes:
    """Scopes draw their noise from this in place of the operating system."""
    source = SeededBytes(1)
    monkeypatch.setattr(make, "SecureNoise", lambda: SecureNoise(source))
    return source


@pytest.mark.parametrize(("sigma", "bound"), [(1.0, 1.0), (0.7, 3.0), (4.0, 0.25), (50.0, 1e-3)])
@each_mode
def test_sum_has_noise_of_sigma_times_bound(mode: str, sigma: float, bound: float, read: SeededBytes) -> None:
    """The released gradient has noise of std sigma * C, and of no other: 0.95 and 1.05 of it are rejected."""
    noise = noise_of(Wide(), noise_multiplier=sigma, max_grad_norm=bound, grad_sample_mode=mode, **SECURE)
    assert_fits_only(noise["a.weight"], sigma * bound)


def test_mean_divides_the_noise_by_the_expected_batch_size(read: SeededBytes) -> None:
    """With loss_reduction "mean" the std is sigma * C / (q N)."""
    noise = noise_of(Wide(), noise_multiplier=1.5, max_grad_norm=2.0, loss_reduction="mean", **SECURE)
    assert_fits_only(noise["a.weight"], 1.5 * 2.0 / (10 * NEVER))


def test_steps_and_parameters_have_independent_noise(read: SeededBytes) -> None:
    """Noise of two steps, and of two parameters in one step, is uncorrelated; a repetition would not be."""
    first, second = noises_of(Wide(), 2, **SECURE)
    assert correlation(first["a.weight"], second["a.weight"]) < 4.5
    assert correlation(first["a.weight"][:1], first["b.weight"]) < 4.5
    assert correlation(first["a.weight"][0], first["a.weight"][1]) < 4.5
    assert correlation(first["a.weight"], first["a.weight"]) > 100


def test_noise_of_many_steps_adds_up_independently(read: SeededBytes) -> None:
    """The sum of 25 steps has 5 times the std of one."""
    model = Wide()
    with wide_scope(model, sample_rate=NEVER, noise_multiplier=0.5, **SECURE) as (opt, loader):
        for _, _ in zip(range(25), loader, strict=False):
            opt.step()
    assert_fits_only(-model.a.weight.detach(), 0.5 * 5)


def test_no_seed_and_no_state_brings_noise_back() -> None:
    """After the same ``torch.manual_seed``, and from the same saved state, noise is another; the state has nothing random in it."""
    states, found = [], []
    for _ in range(2):
        torch.manual_seed(7)
        model = Wide()
        scope = wide_scope(model, sample_rate=NEVER, **SECURE)
        if states:
            scope.load_state_dict(states[0])
        with scope as (opt, loader):
            next(iter(loader))
            found.append(released(model, opt)["a.weight"])
        states.append(scope.state_dict())
    assert correlation(*found) < 5.5
    assert states[0] == {**states[1], "history": states[0]["history"], "steps": 1}


COPIED: dict[str, Callable[[Any], Any]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
}


@pytest.mark.parametrize("how", COPIED)
def test_a_copy_draws_other_numbers(how: str) -> None:
    """Copies of the source of noise, and of the sampler, have nothing to draw again from."""
    noise, sampler = SecureNoise(), SecurePoissonSampler(500, 0.5, 1)
    found = []
    for own in (noise, COPIED[how](noise)):
        total = torch.zeros(1000)
        assert own.add_([total], 1.0, sensitivity=1.0)
        found.append(total)
    assert correlation(*found) < 5.5
    assert list(sampler) != list(COPIED[how](sampler))


# ---------------------------------------------------------------- on the grid


def on_grid(numbers: Tensor, spacing: float) -> bool:
    """Whether all are multiples of ``spacing``."""
    points = numbers.double() / spacing
    return torch.equal(points, points.round())


SHAPES: dict[str, Callable[[], list[Tensor]]] = {
    "one": lambda: [torch.randn(())],
    "small ones": lambda: [torch.randn(3, 4), torch.randn(5), torch.randn(0), torch.randn(2, 1, 3)],
    "large": lambda: [torch.randn(300, 200), torch.randn(7)],
    "other order": lambda: [
        torch.randn(40, 30).t(),
        torch.randn(30, 50)[:, ::2],
        torch.randn(8, 3, 5, 5).to(memory_format=torch.channels_last),
    ],
    "double": lambda: [torch.randn(50, dtype=torch.float64), torch.randn(20)],
    "complex": lambda: [torch.randn(50, dtype=torch.complex64), torch.randn(9, 9, dtype=torch.complex128)],
    "half": lambda: [torch.randn(60, dtype=torch.bfloat16)],
}


@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("shapes", SHAPES)
def test_sums_are_rounded_to_the_grid_and_stay_in_their_places(shapes: str, scale: float) -> None:
    """With bits that make no noise, each number is the point nearest to its sum, times the scale, in any shape and dtype."""
    totals = SHAPES[shapes]()
    before = [torch.view_as_real(t).clone() if t.is_complex() else t.clone() for t in totals]
    grid = Grid.of(1.0, 1.0, sum(t.numel() for t in before))
    assert SecureNoise(no_noise).add_(totals, 1.0, scale, sensitivity=1.0)
    for found, was in zip(totals, before, strict=True):
        real = torch.view_as_real(found) if found.is_complex() else found
        expected = ((was.double() / grid.spacing).round() * grid.spacing * scale).to(was.dtype)
        assert torch.equal(real, expected)


@pytest.mark.parametrize("shapes", SHAPES)
def test_every_number_has_noise_of_its_own(shapes: str) -> None:
    """No two numbers, nor two parts of a complex one, get the same noise; all of it is on the grid."""
    totals = [total.zero_() for total in SHAPES[shapes]()]
    assert SecureNoise(SeededBytes(2)).add_(totals, 1.0, sensitivity=1.0)
    real = [torch.view_as_real(t) if t.is_complex() else t for t in totals]
    found = torch.cat([t.flatten().double() for t in real])
    assert len(found.unique()) >= (0.95 if shapes != "half" else 0.3) * found.numel()
    assert on_grid(found, Grid.of(1.0, 1.0, found.numel()).spacing)


def test_what_is_released_in_double_precision_is_on_the_grid(read: SeededBytes) -> None:
    """Every number that a step releases is a multiple of g, with and without examples in the batch; ordinary noise is not."""
    grid = Grid.of(1.0, 1.0, COUNT + COUNT // 2)
    for options in (SECURE, {}):
        model = Wide(torch.float64)
        with wide_scope(model, sample_rate=1.0, **options) as (opt, loader):
            (x,) = next(iter(loader))
            model(x + torch.rand_like(x)).sum().backward()
            before = [p.detach().clone() for p in model.parameters()]
            assert not any(b.any() for b in before)
            opt.step()
            assert all(on_grid(p.detach(), grid.spacing) == bool(options) for p in model.parameters())


def test_nothing_of_the_sum_but_its_rounding_is_in_what_is_released() -> None:
    """Two sums that round to the same points are released as the same numbers, to the last digit, from the same bits."""
    grid = Grid.of(1.0, 1.0, 5000)
    middle = torch.randint(-1000, 1000, (5000,)).double() * grid.spacing
    found = []
    for seed in (1, 2):
        total = (
            middle
            + grid.spacing * (torch.rand(5000, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 0.5) * 0.99
        )
        assert SecureNoise(SeededBytes(5)).add_([total], 1.0, 0.1, sensitivity=1.0)
        found.append(total)
    assert torch.equal(*found)


@pytest.mark.parametrize("numbers", [100, 5378])
@pytest.mark.parametrize("sigma", [0.5, 2.0])
def test_the_worst_neighbours_get_the_noise_that_is_charged(numbers: int, sigma: float) -> None:
    """Two sums that are S apart are released, without noise, further apart: the noise on them is still sigma times that."""
    grid = Grid.of(sigma, 1.0, numbers)
    low, high = neighbours(grid, 1.0, numbers)
    for total in (low, high):
        assert SecureNoise(no_noise).add_([total], sigma, sensitivity=1.0)
    apart = float((high - low).norm())
    assert apart > 1.0
    assert grid.units * grid.spacing >= sigma * apart
    total, drawn_units = (
        torch.zeros(numbers, dtype=torch.float64),
        rounded_gaussian(numbers, grid.units, low.device, SeededBytes(3)),
    )
    assert SecureNoise(SeededBytes(3)).add_([total], sigma, sensitivity=1.0)
    assert torch.equal(total, drawn_units.double() * grid.spacing)  # it is that noise


@pytest.mark.parametrize("std", [1.0, 0.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", [0, 1, 2])
def test_what_is_not_finite_is_told_and_stays_so(where: int, bad: float, std: float) -> None:
    """A NaN or an infinity in any of the sums makes the answer False, and the sum can be told from the others."""
    totals = [torch.zeros(5), torch.zeros(70_000), torch.zeros(40, 40).t()]
    totals[where][(-1,) if where < 2 else (3, 7)] = bad
    assert not SecureNoise(SeededBytes(1)).add_(totals, std, sensitivity=1.0)
    assert [bool(t.isfinite().all()) for t in totals] == [k != where for k in range(3)]


def test_noise_multiplier_zero_adds_nothing() -> None:
    """With sigma = 0 an empty batch moves nothing at all, and epsilon is infinite."""
    assert not any(noise.any() for noise in noise_of(Wide(), noise_multiplier=0.0, **SECURE).values())


def test_a_step_that_has_no_grid_releases_nothing() -> None:
    """Noise so large that no grid carries it is refused before the charge."""
    model = Wide()
    with wide_scope(model, noise_multiplier=1e9, sample_rate=NEVER, **SECURE) as (opt, loader):
        next(iter(loader))
        with pytest.raises(InvalidArgumentError, match="no grid"):
            opt.step()
        assert opt.noise_multiplier == 1e9
    assert not any(p.any() for p in model.parameters())


def test_default_devices_do_not_matter() -> None:
    """Under another default device, numbers of the CPU get their noise."""
    total = torch.zeros(20_000)
    with torch.device("meta"):
        assert SecureNoise(SeededBytes(1)).add_([total], 1.0, sensitivity=1.0)
        assert len(list(SecurePoissonSampler(50, 0.5, 2))) == 2
    assert_fits_only(total, 1.0)


# ---------------------------------------------------------------- what draws from it, and what is said


def test_the_count_of_adaptive_clipping_is_noised_from_the_same_bits(read: SeededBytes) -> None:
    """A step reads bits for each parameter, and then 12 bytes for the count, whose noise moves the bound."""
    options: dict[str, Any] = {
        "clipping": "adaptive",
        "clipping_options": {"unclipped_num_std": 5.0},
        "noise_multiplier": 1.0,
        "max_grad_norm": 0.5,
    }
    bounds = []
    for _ in range(2):
        with scope_over(build("mlp"), loader=in_order(), poisson_sampling=True, accountant="rdp", secure_mode=True, **options) as (
            opt,
            loader,
        ):
            next(iter(loader))
            opt.step_empty()
            bounds.append(opt.max_grad_norm)
        assert read.asked.count(12) == 1
        read.asked.clear()
    assert bounds[0] != bounds[1]


def test_batches_are_drawn_from_secret_bits_and_no_generator() -> None:
    """The loader's batches do not follow ``torch.manual_seed``, nor take from PyTorch's generator of random numbers."""
    found = []
    for _ in range(2):
        torch.manual_seed(1)
        with wide_scope(Wide(), sample_rate=0.5, **SECURE) as (_, loader):
            sampler = loader.batch_sampler.logical
            assert type(sampler) is SecurePoissonSampler
            state = torch.get_rng_state()
            found.append([next(iter(sampler)) for _ in range(20)])
            assert torch.equal(torch.get_rng_state(), state)
    assert found[0] != found[1]


def test_the_report_says_where_random_numbers_are_from() -> None:
    """With secure_mode they are secure, and their secrecy is not among what is not covered; else it is."""
    secure, plain, given = (wide_scope(Wide(), **more).report() for more in (SECURE, {"noise_generator": None}, {}))
    assert "secure: " in secure.random_numbers
    assert "os.urandom" in secure.random_numbers
    assert not [line for line in secure.not_covered if "secrecy" in line]
    assert len(secure.not_covered) == len(plain.not_covered)
    assert "fresh entropy" in plain.random_numbers
    assert "noise_generator" in given.random_numbers
    for report in (plain, given):
        assert report.random_numbers.startswith("not secure")
        assert [line for line in report.not_covered if "secrecy" in line]
    assert secure.random_numbers in str(secure)
    assert secure.as_dict()["random_numbers"] == secure.random_numbers


@each_mode
def test_the_engine_has_secure_mode_as_well(mode: str, read: SeededBytes) -> None:
    """``PrivacyEngineHookBased(secure_mode=True)`` draws the noise of its steps from the same source."""
    model = Wide()
    data = wide_scope(Wide())._original_loader
    options: dict[str, Any] = {
        "noise_multiplier": 2.0,
        "max_grad_norm": 1.0,
        "loss_reduction": "sum",
        "sample_rate": NEVER,
        "grad_sample_mode": mode,
    }
    with PrivacyEngineHookBased(accountant="rdp", secure_mode=True) as engine:
        _, opt, *_, loader = engine.make_private(
            module=model, optimizer=torch.optim.SGD(model.parameters(), lr=1.0), data_loader=data, **options
        )
        next(iter(loader))
        assert_fits_only(released(model, opt)["a.weight"], 2.0)
    assert read.asked


def test_devices_without_double_precision_are_refused() -> None:
    """MPS has no float64 to round sums in."""
    SecureNoise().check_devices({torch.device("cpu"), torch.device("cuda", 0)})
    with pytest.raises(InvalidArgumentError, match=r"secure_mode=True.*float64.*MPS"):
        SecureNoise().check_devices({torch.device("mps")})


def test_sums_that_are_not_finite_are_not_released(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the parameter whose sum it is."""
    model = Wide()
    with wide_scope(model, sample_rate=NEVER, **SECURE) as (opt, loader):
        next(iter(loader))
        monkeypatch.setattr(
            torch, "zeros_like", lambda p, **more: torch.full(p.shape, math.nan if p is model.b.weight else 0.0, **more)
        )
        with pytest.raises(ScopeError, match=r"clipped sum of b\.weight is not finite"):
            opt.step_empty()
        monkeypatch.undo()
    assert not any(p.any() for p in model.parameters())


def test_a_loader_in_its_own_order_may_have_a_generator(read: SeededBytes) -> None:
    """Without Poisson sampling nothing is gained by sampling, and an order that can be repeated gives nothing away."""
    data = DataLoader(TensorDataset(torch.zeros(10, COUNT // 2)), batch_size=5, shuffle=True, generator=drawn(1))
    model = Wide()
    options: dict[str, Any] = {
        "noise_multiplier": 1.0,
        "max_grad_norm": 1.0,
        "loss_reduction": "sum",
        "accountant": "rdp",
        "poisson_sampling": False,
        "secure_mode": True,
    }
    with private_training(model, torch.optim.SGD(model.parameters(), lr=1.0), data, **options) as (opt, loader):
        (x,) = next(iter(loader))
        model(x).sum().backward()
        assert_fits_only(released(model, opt)["a.weight"], 1.0)
