"""Adaptive clipping: the bound that learns, what its count costs, and what is counted.

The model is one weight w and the loss ``sum_i w . x_i``: the gradient of a sample is its row x_i, its norm is known.
"""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dp_hooks.errors import InvalidArgumentError
from dp_hooks.gradients.sample_gradients import added
from dp_hooks.privacy.clipping import SampleNorms
from dp_hooks.privacy.noise.gaussian import GaussianNoise

from ...models import assert_same, build, drawn, each_mode, loader_of, moved, values
from ...training.helpers import Run
from ..gaussian import NEVER, fits
from .helpers import made

NORMS = [0.2, 0.4, 0.9, 1.05, 1.5, 2.0, 4.0, 8.0]
OPTIONS = ("target_unclipped_quantile", "clipbound_learning_rate", "unclipped_num_std", "min_clipbound", "max_clipbound")


class Rows(nn.Module):
    """A weight w and the outputs ``w . x_i``."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.w = nn.Linear(width, 1, bias=False, dtype=torch.float64)
        nn.init.zeros_(self.w.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.w(x).squeeze(1)


def rows_with(norms: list[float] | Tensor) -> Tensor:
    """Return rows ``[n, 3]`` of these norms, in random directions."""
    norms = torch.as_tensor(norms, dtype=torch.float64)
    rows = torch.randn(len(norms), 3, generator=drawn(11), dtype=torch.float64)
    return F.normalize(rows) * norms[:, None]


def step(model: nn.Module, opt: Any, x: Tensor) -> None:
    opt.zero_grad()
    model(x).sum().backward()
    opt.step()


class Learning(Run):
    """Adaptive clipping of rows of the given norms, in order and without noise; options of clipping by their names."""

    def __init__(self, norms: list[float] | Tensor = NORMS, batch: int = 8, *, width: int = 3, **kwargs: Any) -> None:
        options = {key: kwargs.pop(key) for key in OPTIONS if key in kwargs}
        kwargs = {"clipping": "adaptive", "max_grad_norm": 1.0, "loss_reduction": "sum", "accountant": "rdp", **kwargs}
        rows = rows_with(norms) if width == 3 else torch.zeros(len(norms), width, dtype=torch.float64)
        super().__init__(Rows(width), loader=loader_of([rows], batch), clipping_options=options or None, **kwargs)

    def bounds(self, passes: int = 1) -> list[float]:
        """Train, and return C after every step (one entry per physical part)."""
        bounds = []
        with self as (model, opt, loader):
            for _ in range(passes):
                for (x,) in loader:
                    step(model, opt, x)
                    bounds.append(opt.max_grad_norm)
        return bounds


def trajectory(*batches: list[float], c: float = 1.0, eta: float = 0.2, gamma: float = 0.5, expected: float = 8) -> list[float]:
    """Work out C after every batch without noise, from the norms of the batches."""
    out = []
    for norms in batches:
        fraction = sum(0.5 if norm <= c else -0.5 for norm in norms) / expected + 0.5
        c *= math.exp(-eta * (fraction - gamma))
        out.append(c)
    return out


def after(*batches: list[float], **how: float) -> Any:
    """Return what C has to be, but for rounding, after these batches."""
    return pytest.approx(trajectory(*batches, **how)[-1], rel=1e-9)


def clipped(rows: Tensor, c: float) -> Tensor:
    """Return the sum of the rows, clipped by hand."""
    return (rows * (c / rows.norm(dim=1)).clamp(max=1)[:, None]).sum(0)


@each_mode
@pytest.mark.parametrize(("eta", "gamma"), [(0.2, 0.5), (0.7, 0.5), (0.2, 0.9)])
@pytest.mark.parametrize("start", [0.05, 1.1, 30.0])
def test_the_bound_follows_the_geometric_rule(start: float, eta: float, gamma: float, mode: str) -> None:
    """Without noise, C after every step and the clipped sums are those worked out by hand."""
    options = {"clipbound_learning_rate": eta, "target_unclipped_quantile": gamma, "max_grad_norm": start}
    run = Learning(NORMS, 4, grad_sample_mode=mode, **options)
    found, expected = run.bounds(3), trajectory(*[NORMS[:4], NORMS[4:]] * 3, c=start, eta=eta, gamma=gamma, expected=4)
    assert found == pytest.approx(expected, rel=1e-9)
    halves = rows_with(NORMS).split(4) * 3
    total = sum(clipped(rows, c) for rows, c in zip(halves, [start, *expected[:-1]], strict=True))
    assert_same(run.moved, [total[None]])


def test_a_last_batch_that_is_smaller_counts_against_the_expected_size() -> None:
    """The denominator is the expected batch size, never the drawn one: 5 and 3 samples, both over 5."""
    found = Learning(NORMS, 5, max_grad_norm=1.2).bounds()
    assert found == pytest.approx(trajectory(NORMS[:5], NORMS[5:], c=1.2, expected=5), rel=1e-9)


@each_mode
@pytest.mark.parametrize("sigma", [0.0, 0.3])
@pytest.mark.parametrize("size", [1, 3, 4, 8])
def test_physical_parts_give_the_bounds_and_steps_of_whole_batches(size: int, sigma: float, mode: str) -> None:
    """C is constant within a logical batch, and counts all its parts once: same C, same steps as without parts."""
    found, options = [], {"noise_multiplier": sigma, "max_grad_norm": 0.95, "grad_sample_mode": mode}
    for physical in (None, size):
        run = Learning(max_physical_batch_size=physical, **options)
        bounds = run.bounds(4)
        parts = 1 if physical is None else math.ceil(8 / physical)
        last = bounds[parts - 1 :: parts]
        pairs = zip([0.95, *last], last, strict=False)
        assert bounds == [c for before, now in pairs for c in [before] * (parts - 1) + [now]]
        found.append((last, run.moved))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-12)
    assert_same(found[0][1], found[1][1])


@pytest.mark.parametrize("poisson", [False, True])
def test_the_trajectory_with_noise_is_that_of_the_generator(poisson: bool) -> None:
    """Gradients get z_delta C from the scope's generator, then the count sigma_b: steps and C can be computed by hand."""
    z, sigma_b = 0.5, 0.7
    run = Learning(max_grad_norm=1.2, poisson_sampling=poisson, unclipped_num_std=sigma_b, noise_multiplier=z)
    found = run.bounds(4)
    generator, c, rows = drawn(5), 1.2, rows_with(NORMS)
    z_delta = (z**-2 - (2 * sigma_b) ** -2) ** -0.5
    total, expected = torch.zeros(1, 3, dtype=torch.float64), []
    for _ in range(4):
        total += clipped(rows, c) + torch.empty(1, 3, dtype=torch.float64).normal_(0.0, z_delta * c, generator=generator)
        count = sum(0.5 if norm <= c else -0.5 for norm in NORMS)
        count += float(torch.empty(()).normal_(0.0, sigma_b, generator=generator))
        c *= math.exp(-0.2 * (count / 8 + 0.5 - 0.5))
        expected.append(c)
    assert found == pytest.approx(expected, rel=1e-6)
    assert_same(run.moved, [total], tolerance=1e-5)


@pytest.mark.parametrize("gamma", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("start", [0.05, 20.0])
def test_the_bound_converges_to_the_quantile_of_the_norms(start: float, gamma: float) -> None:
    """From far below and far above, with noise, C comes to leave the chosen share of samples unclipped."""
    norms = torch.randn(400, generator=drawn(2)).exp()
    options = {"poisson_sampling": True, "sample_rate": 0.5, "noise_multiplier": 0.5, "noise_generator": drawn(1)}
    bounds = Learning(norms, 200, max_grad_norm=start, target_unclipped_quantile=gamma, **options).bounds(75)
    settled = [float((norms <= c).double().mean()) for c in bounds[-30:]]
    assert sum(settled) / 30 == pytest.approx(gamma, abs=0.03)


def test_noise_is_split_between_gradients_and_count_as_stated() -> None:
    """Over many steps gradients get z_delta C and the count sigma_b, independently; a factor of 1.2 off fits neither."""
    z, sigma_b, eta = 1.2, 0.8, 0.01
    options = {"poisson_sampling": True, "noise_multiplier": z, "noise_generator": drawn(7), "max_grad_norm": 100.0}
    bounds, gradients = [100.0], []
    run = Learning([0.0] * 8, width=8, unclipped_num_std=sigma_b, clipbound_learning_rate=eta, **options)
    with run as (model, opt, loader):
        while run.scope.steps < 1500:
            for (x,) in loader:
                before = values(model)
                step(model, opt, x)
                gradients.append(moved(before, model)[0].flatten() / bounds[-1])
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
        return float(
            function.statistic(SampleNorms([added([rows if k == 1 else zeros for k, _ in enumerate(model.parameters())])]))
        )

    change = count(squares) - count(squares[:-1])
    assert change == (0.0 if not math.isfinite(norm) or norm == 1e200 else 0.5 if norm <= 1 else -0.5)


def test_the_default_count_noise_is_a_twentieth_of_the_expected_batch() -> None:
    """sigma_b is the exact expected batch size over 20, unless it is given."""
    for run, expected in (
        (Learning(NORMS * 20, 50, noise_multiplier=1.0, poisson_sampling=True, sample_rate=0.3), 0.3 * 160 / 20),
        (Learning(NORMS, 4, unclipped_num_std=3.0, noise_multiplier=1.0), 3.0),
    ):
        with run as (_, opt, _):
            assert opt.clipping_details["unclipped_num_std"] == pytest.approx(expected)


def test_the_accountant_is_charged_with_the_stated_noise_multiplier() -> None:
    """The history holds z per step, not z_delta, and epsilon is that of flat clipping."""
    found = {}
    for clipping in ("flat", "adaptive"):
        run = Learning(NORMS * 20, 40, poisson_sampling=True, noise_multiplier=1.0, clipping=clipping)
        run.bounds(2)
        found[clipping] = (run.scope.accountant.history, run.scope.get_epsilon(1e-5))
    assert found["flat"] == found["adaptive"]
    assert found["flat"][0] == [(1.0, 0.25, 8)]


@pytest.mark.filterwarnings("ignore:the privacy budget is used up")
def test_a_target_epsilon_buys_the_same_noise_multiplier_as_without() -> None:
    """Calibration is for the total z; the gradients then get more, and the budget is not exceeded."""
    found, budget = {}, {"target_epsilon": 4.0, "target_delta": 1e-5, "epochs": 3, "accountant": "rdp"}
    for clipping in ("flat", "adaptive"):
        run = Learning(NORMS * 20, 40, poisson_sampling=True, noise_multiplier=None, clipping=clipping, **budget)
        run.bounds(4)
        scope = run.scope
        found[clipping] = (scope.noise_multiplier, scope.steps, scope.get_epsilon(1e-5))
    assert found["flat"] == found["adaptive"]
    assert found["adaptive"][2] <= 4.0
    z = found["adaptive"][0]
    assert scope.report().clipping_details["gradient_noise_multiplier"] == pytest.approx((z**-2 - 4.0**-2) ** -0.5)


def test_without_poisson_sampling_a_pass_is_one_charge() -> None:
    """Two passes in order are two full-rate releases at z, and C goes on from one to the next."""
    run = Learning(NORMS, 2, noise_multiplier=0.1)
    assert len(set(run.bounds(2))) == 8
    assert run.scope.accountant.history == [(0.1, 1.0, 2)]


def test_without_noise_epsilon_is_infinite_and_nothing_is_drawn() -> None:
    """With sigma = 0 the noise of both queries is off, and epsilon says so."""
    generator = drawn(9)
    state = generator.get_state()
    run = Learning(NORMS, 4, noise_generator=generator)
    run.bounds()
    assert torch.equal(generator.get_state(), state)
    assert run.scope.get_epsilon(1e-5) == math.inf
    details = run.scope.report().clipping_details
    assert details["gradient_noise_multiplier"] == details["unclipped_num_std"] == 0


@pytest.mark.parametrize("generator", [None, drawn])
def test_the_noise_of_the_count_comes_from_the_scope(generator: Any) -> None:
    """The global generator is neither used nor does its seed fix C; the scope's own generator does."""
    found = []
    for _ in range(2):
        torch.manual_seed(4)
        state = torch.get_rng_state()
        run = Learning(noise_multiplier=0.5, noise_generator=generator and generator(6))
        with run as (model, opt, loader):
            (x,) = next(iter(loader))
            torch.set_rng_state(state)
            step(model, opt, x)
            assert torch.equal(torch.get_rng_state(), state)
            found.append(opt.max_grad_norm)
    assert (found[0] == found[1]) == (generator is not None)


@pytest.mark.parametrize("backward", [True, False])
@pytest.mark.parametrize("sigma", [0.0, 1e-12])
def test_an_empty_logical_batch_moves_the_bound(sigma: float, backward: bool) -> None:
    """No sample counts as an unclipped share of 1/2, plus noise: C moves by exp(-eta (1/2 - gamma)) on average."""
    options = {"poisson_sampling": True, "sample_rate": NEVER, "target_unclipped_quantile": 0.3}
    run = Learning(NORMS, 4, noise_multiplier=sigma, unclipped_num_std=1e-12, **options)
    with run as (model, opt, loader):
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
    assert run.scope.accountant.history == [(sigma, NEVER, 1)]


@each_mode
def test_a_sample_that_is_not_finite_is_not_counted(mode: str) -> None:
    """NaN and infinite gradients add nothing to the count, as if the sample were not there."""
    with Learning(self_check=False, grad_sample_mode=mode) as (model, opt, loader):
        x = next(iter(loader))[0].clone()
        x[0, 1], x[5, 0] = math.nan, math.inf
        step(model, opt, x)
    assert opt.max_grad_norm == after([norm for i, norm in enumerate(NORMS) if i not in (0, 5)])


def test_a_logical_batch_that_was_left_early_is_not_counted() -> None:
    """Parts of a batch that was broken off, and gradients that zero_grad dropped, do not reach C."""
    with Learning(max_physical_batch_size=3) as (model, opt, loader):
        for (x,) in loader:
            step(model, opt, x)
            break
        assert opt.max_grad_norm == 1.0
        for (x,) in loader:
            model(x).sum().backward()
            step(model, opt, x)
    assert opt.max_grad_norm == after(NORMS)


def test_a_release_that_fails_is_not_counted_twice() -> None:
    """If a step hook raises, C stays, and the samples of that step are forgotten with it."""
    fail = [True]
    with Learning(NORMS, 4) as (model, opt, loader):
        opt.attach_step_hook(lambda _: 1 / 0 if fail.pop() else None)
        batches = iter(loader)
        model(next(batches)[0]).sum().backward()
        with pytest.raises(ZeroDivisionError):
            opt.step()
        assert opt.max_grad_norm == 1.0
        fail.append(False)
        model(next(batches)[0]).sum().backward()
        opt.step()
    assert opt.max_grad_norm == after(NORMS[4:], expected=4)


@pytest.mark.filterwarnings("ignore:a step was taken on a batch that did not come")
def test_batches_from_elsewhere_are_counted_once_each() -> None:
    """Without the private loader every step is a logical batch of its own, and its count ends with it."""
    x = rows_with(NORMS)
    with Learning() as (model, opt, _):
        for rows in (x[:3], x[3:]):
            step(model, opt, rows)
    assert opt.max_grad_norm == after(NORMS[:3], NORMS[3:])


def test_two_backward_passes_count_a_sample_once() -> None:
    """The norm that is compared with C is that of the gradients added up."""
    with Learning() as (model, opt, loader):
        (x,) = next(iter(loader))
        model(x).sum().backward()
        model(x).sum().backward()
        opt.step()
    assert opt.max_grad_norm == after([2 * norm for norm in NORMS])


@pytest.mark.parametrize(("limits", "end"), [({"min_clipbound": 0.7}, 0.7), ({"max_clipbound": 1.5}, 1.5), ({}, None)])
def test_the_bound_stays_within_its_limits(limits: dict[str, float], end: float | None) -> None:
    """C stops at min_clipbound and max_clipbound, and can leave them again."""
    norms = [1e3 if "max_clipbound" in limits else 1e-3] * 4
    with Learning(norms, 4, **limits) as (model, opt, loader):
        for _ in range(8):
            for (x,) in loader:
                step(model, opt, x)
        last = opt.max_grad_norm
        step(model, opt, (1e3 if "min_clipbound" in limits else 0) * next(iter(loader))[0])
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


def test_setting_the_bound_starts_adaptive_clipping_afresh() -> None:
    """``opt.max_grad_norm = v`` is the C of the next step, which then moves on; a value outside the limits is refused."""
    with Learning(max_clipbound=10.0) as (model, opt, loader):
        for start in (1.0, 3.0, 0.3):
            opt.max_grad_norm = start
            assert opt.max_grad_norm == opt.sensitivity == start
            for (x,) in loader:
                step(model, opt, x)
            assert opt.max_grad_norm == after(NORMS, c=start)
        kept = opt.max_grad_norm
        for wrong in (11.0, 0.0, "1", [1.0]):
            with pytest.raises(InvalidArgumentError, match="max_grad_norm="):
                opt.max_grad_norm = wrong
        assert opt.max_grad_norm == kept


def test_a_bound_set_in_a_step_hook_holds_for_the_next_step() -> None:
    """A scheduler that runs at the release overrides the learned bound."""
    with Learning() as (model, opt, loader):
        opt.attach_step_hook(lambda o: setattr(o, "max_grad_norm", 2.5))
        for (x,) in loader:
            step(model, opt, x)
        assert opt.max_grad_norm == 2.5


def test_a_noise_multiplier_beyond_the_count_noise_is_refused_inside_the_scope() -> None:
    """A schedule may move z below 2 sigma_b, and the split follows; at or above it is an error and z stays."""
    with Learning(unclipped_num_std=0.6, noise_multiplier=1.0) as (_, opt, _):
        for wrong in (1.2, 5):
            with pytest.raises(InvalidArgumentError, match=rf"noise_multiplier={wrong}.*unclipped_num_std = 1\.2"):
                opt.noise_multiplier = wrong
        assert opt.noise_multiplier == 1.0
        opt.noise_multiplier = 0.9
        assert opt.clipping_details["gradient_noise_multiplier"] == pytest.approx((0.9**-2 - 1.2**-2) ** -0.5)


def test_the_report_shows_the_present_bound() -> None:
    """With adaptive clipping C and the sensitivity in the report are those of the next step."""
    run = Learning()
    last, report = run.bounds(3)[-1], run.scope.report()
    assert last != 1.0
    assert report.max_grad_norm == report.sensitivity == last
