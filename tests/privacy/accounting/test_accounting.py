"""What is charged, when, and how a budget ends a run (traps P1-P3, P5, P13, P14)."""

import copy
import math
from typing import Any

import pytest
import torch
from opacus.accountants import IAccountant, RDPAccountant, create_accountant
from opacus.schedulers import StepNoise
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dp_hooks import PrivacyEngineHookBased, private_training
from dp_hooks.errors import BudgetExhaustedError, InvalidArgumentError, ScopeError
from dp_hooks.privacy.accounting.meter import epsilon_of

from .gaussian import NEVER
from .models import equal_trees

DELTA = 1e-5
ACCOUNTANTS = ["prv", "rdp", "gdp"]

pytestmark = pytest.mark.filterwarnings("ignore:GDP accounting is experimental")


class Net(nn.Module):
    """Two layers, small enough that the accountant is the slow part."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(2, 2)
        self.b = nn.Linear(2, 1)

    def forward(self, x: Any) -> Any:
        return self.b(torch.tanh(self.a(x)))


def _loader_of(n: int = 12, batch: int = 4, **kwargs: Any) -> DataLoader:
    g = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(n, 2, generator=g), torch.randn(n, 1, generator=g))
    return DataLoader(data, batch_size=batch, generator=g, **kwargs)


def _scope_over(model: nn.Module, loader: Any = None, optimizer: Any = None, **kwargs: Any) -> Any:
    loader = _loader_of() if loader is None else loader
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9) if optimizer is None else optimizer
    if "target_epsilon" not in kwargs:
        kwargs.setdefault("noise_multiplier", 1.0)
    return private_training(model, optimizer, loader, **{"max_grad_norm": 1.0, **kwargs})


def _backward(model: nn.Module, batch: Any) -> None:
    x, y = batch
    (model(x) - y).square().mean().backward()


def _train(model: nn.Module, opt: Any, loader: Any, stop: int | None = None) -> int:
    """One pass, or its first ``stop`` batches; returns how many batches there were."""
    count = 0
    for count, batch in enumerate(loader, start=1):
        opt.zero_grad()
        _backward(model, batch)
        opt.step()
        if count == stop:
            break
    return count


def _train_until_used_up(model: nn.Module, opt: Any, loader: Any, passes: int) -> None:
    """Some passes, in one of which the budget ends."""
    with pytest.warns(UserWarning, match="the privacy budget is used up"):  # noqa: PT031
        for _ in range(passes):
            _train(model, opt, loader)


def _fresh(mechanism: str, history: list[tuple[float, float, int]]) -> IAccountant:
    """An Opacus accountant with ``history`` written by hand."""
    accountant = create_accountant(mechanism=mechanism)
    accountant.history = history
    return accountant


def _gaussian_epsilon(sigma: float, delta: float) -> float:
    """Exact epsilon of one Gaussian mechanism of sensitivity 1 (Balle and Wang, ICML 2018, theorem 8)."""

    def phi(t: float) -> float:
        return 0.5 * math.erfc(-t / math.sqrt(2))

    def spent(epsilon: float) -> float:
        a, b = 0.5 / sigma, epsilon * sigma
        return phi(a - b) - math.exp(epsilon) * phi(-a - b)

    low, high = 0.0, 100.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if spent(middle) > delta else (low, middle)
    return high


def _snapshot(model: nn.Module, opt: Any, accountant: Any) -> Any:
    return copy.deepcopy((model.state_dict(), opt.state_dict(), list(accountant.history)))


# ---------------------------------------------------------------- Poisson steps


@pytest.mark.parametrize("accountant", ACCOUNTANTS)
def test_epsilon_of_poisson_steps_equals_a_fresh_opacus_accountant(accountant: str) -> None:
    """Three epochs of Poisson batches cost what Opacus says for nine steps at q = batch_size / N."""
    model = Net()
    scope = _scope_over(model, noise_multiplier=1.3, accountant=accountant)
    with scope as (opt, loader):
        for _ in range(3):
            _train(model, opt, loader)
    assert scope.steps == 9
    assert scope.accountant.history == [(1.3, 4 / 12, 9)]
    assert scope.get_epsilon(DELTA) == _fresh(accountant, [(1.3, 4 / 12, 9)]).get_epsilon(DELTA)
    assert scope.report(DELTA).epsilon == scope.get_epsilon(DELTA)


def test_rate_is_batch_size_over_dataset_size_not_one_over_length() -> None:
    """For 1000 examples in batches of 300, a step is charged q = 0.3, not the 0.25 of ``1 / len(loader)``."""
    model = Net()
    scope = _scope_over(model, _loader_of(1000, 300))
    with scope as (opt, loader):
        _train(model, opt, loader)
        assert opt.expected_batch_size == 300
    assert scope.accountant.history == [(1.0, 0.3, 4)]
    assert scope.get_epsilon(DELTA) > _fresh("prv", [(1.0, 0.25, 4)]).get_epsilon(DELTA) + 0.1


def test_given_sample_rate_is_charged() -> None:
    """With ``sample_rate`` that rate is used for drawing and for charging."""
    model = Net()
    scope = _scope_over(model, sample_rate=0.2)
    with scope as (opt, loader):
        assert _train(model, opt, loader) == 5
    assert scope.accountant.history == [(1.0, 0.2, 5)]


@pytest.mark.parametrize("accountant", ACCOUNTANTS)
def test_no_noise_means_infinite_epsilon(accountant: str) -> None:
    """With sigma = 0 epsilon is infinite after one step, for every accountant, in scope and report."""
    model = Net()
    scope = _scope_over(model, noise_multiplier=0.0, accountant=accountant)
    with scope as (opt, loader):
        assert scope.get_epsilon(DELTA) == 0
        _train(model, opt, loader, stop=1)
    assert scope.get_epsilon(DELTA) == math.inf
    assert scope.report().epsilon == math.inf
    assert "infinite" in str(scope.report())


@pytest.mark.parametrize("accountant", ["prv", "rdp"])
def test_one_step_without_noise_among_others_means_infinite_epsilon(accountant: str) -> None:
    """A single release without noise makes epsilon infinite, whatever came before and after."""
    model = Net()
    scope = _scope_over(model, accountant=accountant)
    with scope as (opt, loader):
        _train(model, opt, loader, stop=1)
        assert 0 < scope.get_epsilon(DELTA) < math.inf
        opt.noise_multiplier = 0.0
        _train(model, opt, loader, stop=1)
        opt.noise_multiplier = 1.0
        _train(model, opt, loader, stop=1)
    assert [entry[0] for entry in scope.accountant.history] == [1.0, 0.0, 1.0]
    assert scope.get_epsilon(DELTA) == math.inf


@pytest.mark.parametrize("poisson", [True, False])
@pytest.mark.parametrize("accountant", ACCOUNTANTS)
def test_epsilon_is_zero_before_the_first_step(accountant: str, poisson: bool) -> None:
    """Nothing is spent by building a scope, entering it, or running the model."""
    model = Net()
    scope = _scope_over(model, accountant=accountant, poisson_sampling=poisson)
    assert scope.get_epsilon(DELTA) == 0
    with scope as (opt, _):
        _backward(model, _loader_of().dataset[:4])
        opt.zero_grad()
        assert scope.get_epsilon(DELTA) == 0
    assert scope.report().epsilon == 0


@pytest.mark.parametrize("delta", [0, 1, -0.1, 2.0, math.nan, "1e-5", None])
def test_epsilon_at_an_impossible_delta_is_refused(delta: Any) -> None:
    """``get_epsilon`` of scope and engine name a delta outside (0, 1), spent budget or not."""
    scope = _scope_over(Net())
    for get_epsilon in (scope.get_epsilon, PrivacyEngineHookBased().get_epsilon):
        with pytest.raises(InvalidArgumentError, match="delta="):
            get_epsilon(delta)


def test_empty_batches_are_charged() -> None:
    """A logical batch without examples costs what any other costs, also when nothing is back-propagated for it."""
    model = Net()
    scope = _scope_over(model, sample_rate=NEVER)
    with scope as (opt, loader):
        batches = iter(loader)
        _backward(model, next(batches))
        opt.step()
        next(batches)
        opt.step()
    assert scope.accountant.history == [(1.0, NEVER, 2)]


def test_batches_without_a_step_are_not_charged() -> None:
    """With Poisson sampling only releases cost: a batch that is skipped or zeroed away is free."""
    model = Net()
    scope = _scope_over(model)
    with scope as (opt, loader):
        for i, batch in enumerate(loader):
            _backward(model, batch)
            if i == 1:
                opt.step()
            opt.zero_grad()
    assert scope.accountant.history == [(1.0, 4 / 12, 1)]


def test_a_logical_batch_in_parts_is_charged_once() -> None:
    """Physical parts add up to one charge each logical batch, at the logical rate."""
    model = Net()
    scope = _scope_over(model, _loader_of(12, 6), max_physical_batch_size=2)
    with scope as (opt, loader):
        parts = _train(model, opt, loader)
    assert parts > 2
    assert scope.accountant.history == [(1.0, 0.5, 2)]


# ---------------------------------------------------------------- order-based passes


def test_first_pass_without_poisson_sampling_is_one_gaussian_mechanism() -> None:
    """One pass in the loader's order costs the exact Gaussian epsilon, 4.377 for sigma = 1, with no amplification."""
    model = Net()
    scope = _scope_over(model, poisson_sampling=False)
    with scope as (opt, loader):
        assert _train(model, opt, loader) == 3
    exact = _gaussian_epsilon(1.0, DELTA)
    assert exact == pytest.approx(4.377, abs=5e-4)
    assert exact <= scope.get_epsilon(DELTA) <= exact + 0.02
    assert scope.accountant.history == [(1.0, 1.0, 1)]
    report = scope.report()
    assert report.sample_rate == 1.0
    assert "add/remove" in report.sampling


@pytest.mark.parametrize(
    ("stops", "passes"),
    [([None], 1), ([None, None], 2), ([1], 1), ([1, 1, 1], 3), ([2, None, 1], 3)],
)
def test_every_started_pass_is_charged(stops: list[int | None], passes: int) -> None:
    """Without Poisson sampling each pass that hands out a batch costs one full-rate release, broken off or not."""
    model = Net()
    scope = _scope_over(model, poisson_sampling=False, noise_multiplier=2.0, accountant="rdp")
    with scope as (opt, loader):
        for stop in stops:
            _train(model, opt, loader, stop)
    assert scope.accountant.history == [(2.0, 1.0, passes)]


def test_a_pass_is_charged_before_its_first_batch_arrives() -> None:
    """The charge of a pass is there when its first batch is seen; an exception in the first step does not undo it."""
    model = Net()
    scope = _scope_over(model, poisson_sampling=False)
    with scope as (_, loader):
        with pytest.raises(KeyError):  # noqa: PT012
            for _ in loader:
                assert scope.accountant.history == [(1.0, 1.0, 1)]
                raise KeyError
        iter(loader)  # handed out nothing
    assert scope.accountant.history == [(1.0, 1.0, 1)]


def test_noise_cannot_be_lowered_amid_a_charged_pass() -> None:
    """Without Poisson sampling sigma may fall only between passes: a step below what was charged is refused."""
    model = Net()
    scope = _scope_over(model, poisson_sampling=False, noise_multiplier=2.0)
    with scope as (opt, loader):
        before = _snapshot(model, opt, scope.accountant)
        _backward(model, next(iter(loader)))
        opt.noise_multiplier = 1.0
        with pytest.raises(ScopeError, match=r"noise_multiplier=1\.0"):
            opt.step()
        assert equal_trees(before[:2], _snapshot(model, opt, scope.accountant)[:2])
        opt.zero_grad()
        _train(model, opt, loader)
    assert scope.accountant.history == [(2.0, 1.0, 1), (1.0, 1.0, 1)]


@pytest.mark.parametrize("epochs", [1, 3, 2.5])
def test_budget_without_poisson_sampling_counts_passes(epochs: float) -> None:
    """Without Poisson sampling a budget lasts for the calibrated passes; then the loader is empty."""
    model = Net()
    scope = _scope_over(
        model, poisson_sampling=False, target_epsilon=4.0, target_delta=DELTA, epochs=epochs, accountant="rdp"
    )
    with scope as (opt, loader):
        for _ in range(math.ceil(epochs)):
            assert _train(model, opt, loader) == 3
        with pytest.warns(UserWarning, match="budget"):
            assert _train(model, opt, loader) == 0
    assert scope.accountant.history == [(scope.noise_multiplier, 1.0, math.ceil(epochs))]
    assert 0.9 * 4.0 < scope.get_epsilon(DELTA) <= 4.0


# ---------------------------------------------------------------- batches from elsewhere


@pytest.mark.parametrize("poisson", [True, False])
def test_foreign_batches_are_charged_without_amplification_and_reported(poisson: bool) -> None:
    """A step on a batch that the loader did not hand out costs a full-rate release, with a warning and a report line."""
    model = Net()
    scope = _scope_over(model, poisson_sampling=poisson)
    with scope as (opt, _):
        for _ in range(2):
            _backward(model, _loader_of().dataset[:4])
            if scope.steps == 0:
                with pytest.warns(UserWarning, match="without amplification"):
                    opt.step()
            else:
                opt.step()
    assert scope.accountant.history == [(1.0, 1.0, 2)]
    assert scope.report().foreign_steps == 2
    assert "2 steps, charged without amplification" in str(scope.report())


def test_foreign_step_beyond_the_budget_is_refused() -> None:
    """Under a budget a foreign step that alone would exceed it raises before anything is touched."""
    model = Net()
    scope = _scope_over(model, target_epsilon=1.0, target_delta=DELTA, epochs=1, accountant="rdp")
    with scope as (opt, _):
        _backward(model, _loader_of().dataset[:4])
        before = _snapshot(model, opt, scope.accountant)
        with pytest.raises(BudgetExhaustedError, match="did not come from the private loader"):
            opt.step()
        assert equal_trees(before, _snapshot(model, opt, scope.accountant))
        assert all(p.grad is None for p in model.parameters())


@pytest.mark.filterwarnings("ignore:a step was taken on a batch")
def test_foreign_steps_and_loader_steps_together_stay_within_the_budget() -> None:
    """What a foreign step spent is missing for the loader's batches: epsilon never passes the target."""
    model = Net()
    target = 8.0
    scope = _scope_over(model, _loader_of(12, 8), target_epsilon=target, target_delta=DELTA, epochs=3, accountant="rdp")
    with scope as (opt, loader):
        _backward(model, _loader_of().dataset[:4])
        opt.step()
        assert 0.1 * target < scope.get_epsilon(DELTA) < target
        _train_until_used_up(model, opt, loader, 5)
    assert scope.get_epsilon(DELTA) <= target


def test_spent_budget_loaded_from_a_checkpoint_counts_against_the_target(tmp_path: Any) -> None:
    """A run resumed under ``target_epsilon`` counts the loaded charges: epsilon never passes the target."""
    target, path = 3.0, tmp_path / "checkpoint.pt"

    def engine_for(model: nn.Module) -> Any:
        engine = PrivacyEngineHookBased(accountant="rdp")
        _, opt, loader = engine.make_private_with_epsilon(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            data_loader=_loader_of(),
            target_epsilon=target,
            target_delta=DELTA,
            epochs=4,
            max_grad_norm=1.0,
        )
        return engine, opt, loader

    first, second = Net(), Net()
    engine, opt, loader = engine_for(first)
    with engine:
        for _ in range(3):
            _train(first, opt, loader)
        engine.save_checkpoint(path=path, module=first, optimizer=opt)
    engine, opt, loader = engine_for(second)
    with engine:
        engine.load_checkpoint(path=path, module=second, optimizer=opt)
        _train_until_used_up(second, opt, loader, 4)
        assert engine.get_epsilon(DELTA) <= target


@pytest.mark.filterwarnings("ignore:a step was taken on a batch")
@pytest.mark.parametrize("kind", ["foreign batch", "other noise"])
def test_charges_survive_a_gdp_accountant_that_cannot_add_one(kind: str) -> None:
    """Where the GDP accountant cannot mix rates or sigmas, the step fails and what was spent before stays on record."""
    model = Net()
    scope = _scope_over(model, accountant="gdp")
    spent = [(1.0, 4 / 12, 1)]
    with scope as (opt, loader):
        if kind == "foreign batch":
            scope.accountant.history = list(spent)
            batch = _loader_of().dataset[:4]
        else:
            batches = iter(loader)
            _backward(model, next(batches))
            opt.step()
            opt.noise_multiplier = 2.0
            batch = next(batches)
        _backward(model, batch)
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ScopeError, match="the 'gdp' accountant cannot add a step"):
            opt.step()
        assert equal_trees(before, model.state_dict())
    assert scope.accountant.history == spent
    assert scope.get_epsilon(DELTA) == _fresh("gdp", spent).get_epsilon(DELTA)


# ---------------------------------------------------------------- budgets


BUDGETS = [
    # examples, batch, epochs, steps: 225 batches is where "epochs / q" is truncated to 224 steps elsewhere
    (225, 1, 1, 225),
    (100, 7, 3, 45),
    (1000, 300, 2, 8),
    (49, 1, 1, 49),
    (29, 3, 1.5, 15),
    (10, 3, 2.2, 9),
    (5, 5, 1, 1),
]


@pytest.mark.parametrize(("examples", "batch", "epochs", "steps"), BUDGETS)
def test_exactly_the_calibrated_steps_are_run(examples: int, batch: int, epochs: float, steps: int) -> None:
    """All epochs together run the calibrated number of steps, within the target and close to it; then nothing goes."""
    model = Net()
    target = 2.0
    scope = _scope_over(
        model, _loader_of(examples, batch), target_epsilon=target, target_delta=DELTA, epochs=epochs, accountant="rdp"
    )
    with scope as (opt, loader):
        run = sum(_train(model, opt, loader) for _ in range(math.ceil(epochs)))
        assert run == scope.steps == steps
        assert scope.accountant.history == [(scope.noise_multiplier, batch / examples, steps)]
        assert 0.9 * target < scope.get_epsilon(DELTA) <= target
        before = _snapshot(model, opt, scope.accountant)
        with pytest.warns(UserWarning, match="budget"):
            assert list(loader) == []
        with pytest.raises(BudgetExhaustedError, match=r"epsilon=2\.0 at delta=1e-05"):
            opt.step()
        assert equal_trees(before, _snapshot(model, opt, scope.accountant))
    more = _fresh("rdp", [(scope.noise_multiplier, batch / examples, max(steps + 1, int(steps * 1.1)))])
    assert more.get_epsilon(DELTA) > target or steps == 1


@pytest.mark.parametrize("accountant", ACCOUNTANTS)
def test_budget_with_every_accountant(accountant: str) -> None:
    """Each accountant calibrates to its own epsilon: within the target at the end, and above nine tenths of it."""
    model = Net()
    scope = _scope_over(model, target_epsilon=3.0, target_delta=DELTA, epochs=3, accountant=accountant)
    with scope as (opt, loader):
        for _ in range(3):
            _train(model, opt, loader)
    assert scope.steps == 9
    assert 0.9 * 3.0 < scope.get_epsilon(DELTA) <= 3.0
    assert scope.get_epsilon(DELTA) == _fresh(accountant, [(scope.noise_multiplier, 4 / 12, 9)]).get_epsilon(DELTA)


def _exhausted(model: nn.Module, optimizer: Any) -> tuple[Any, Any, Any]:
    scope = _scope_over(
        model, _loader_of(4, 4), optimizer, target_epsilon=2.0, target_delta=DELTA, epochs=1, accountant="rdp"
    )
    opt, loader = scope.__enter__()
    assert _train(model, opt, loader) == 1
    return scope, opt, loader


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_step_beyond_the_budget_touches_nothing(optimizer: Any) -> None:
    """The step after the last raises with parameters, momentum, gradients, history and the closure untouched."""
    model = Net()
    scope, opt, _ = _exhausted(model, optimizer(model.parameters(), lr=0.1))
    opt.zero_grad()
    _backward(model, _loader_of().dataset[:4])
    before = _snapshot(model, opt, scope.accountant)
    calls: list[int] = []
    with pytest.raises(BudgetExhaustedError, match="used up after 1 steps"):
        opt.step()
    with pytest.raises(BudgetExhaustedError):
        opt.step(lambda: calls.append(1))
    assert calls == []
    assert equal_trees(before, _snapshot(model, opt, scope.accountant))
    assert all(p.grad is None for p in model.parameters())
    assert scope.steps == 1
    scope.__exit__(None, None, None)


def test_iterators_opened_early_cannot_outlive_the_budget() -> None:
    """Two iterators opened while the whole budget was left still share it: the surplus step is refused."""
    model = Net()
    scope = _scope_over(model, _loader_of(8, 4), target_epsilon=2.0, target_delta=DELTA, epochs=1, accountant="rdp")
    with scope as (opt, loader):
        one, two = iter(loader), iter(loader)
        for batches in (one, one):
            _backward(model, next(batches))
            opt.step()
        _backward(model, next(two))
        with pytest.raises(BudgetExhaustedError):
            opt.step()
    assert scope.accountant.history == [(scope.noise_multiplier, 0.5, 2)]


def test_budget_needs_an_accountant_without_charges() -> None:
    """Calibrating for an accountant that already holds charges is refused, since they would be left out."""
    used = RDPAccountant()
    used.history = [(1.0, 0.1, 5)]
    with pytest.raises(InvalidArgumentError, match=r"target_epsilon=2\.0.*already holds"):
        _scope_over(Net(), target_epsilon=2.0, target_delta=DELTA, epochs=1, accountant=used)
    assert used.history == [(1.0, 0.1, 5)]


def test_accountant_object_goes_on_with_what_was_spent() -> None:
    """A second scope with the first one's accountant adds to the same history."""
    model = Net()
    first = _scope_over(model)
    with first as (opt, loader):
        _train(model, opt, loader)
    second = _scope_over(model, accountant=first.accountant)
    with second as (opt, loader):
        _train(model, opt, loader, stop=2)
    assert second.accountant is first.accountant
    assert second.accountant.history == [(1.0, 4 / 12, 5)]


# ---------------------------------------------------------------- sigma in force


def test_noise_multiplier_is_fixed_under_a_budget() -> None:
    """With ``target_epsilon`` neither the attribute nor a noise scheduler can change sigma; the same value may be set."""
    model = Net()
    scope = _scope_over(model, target_epsilon=2.0, target_delta=DELTA, epochs=1, accountant="rdp")
    with scope as (opt, _):
        sigma = opt.noise_multiplier
        for value in (0.0, sigma / 2, 2 * sigma):
            with pytest.raises(ScopeError, match="noise_multiplier="):
                opt.noise_multiplier = value
        opt.noise_multiplier = sigma
        scheduler = StepNoise(opt, step_size=1, gamma=0.5)
        with pytest.raises(ScopeError, match="target_epsilon"):
            scheduler.step()
        assert opt.noise_multiplier == sigma


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf, "1", None, True])
def test_noise_multiplier_cannot_be_set_to_nonsense(value: Any) -> None:
    """Setting an impossible sigma raises and leaves the one in force."""
    with _scope_over(Net()) as (opt, _):
        with pytest.raises(InvalidArgumentError, match="noise_multiplier="):
            opt.noise_multiplier = value
        assert opt.noise_multiplier == 1.0


def test_scheduled_noise_is_charged_with_the_value_in_force() -> None:
    """Under a noise scheduler every step is charged with the sigma of its noise."""
    model = Net()
    scope = _scope_over(model, noise_multiplier=4.0)
    with scope as (opt, loader):
        scheduler = StepNoise(opt, step_size=1, gamma=0.5)
        for _ in range(3):
            _train(model, opt, loader, stop=2)
            scheduler.step()
    history = [(4.0, 4 / 12, 2), (2.0, 4 / 12, 2), (1.0, 4 / 12, 2)]
    assert scope.accountant.history == history
    assert scope.get_epsilon(DELTA) == _fresh("prv", history).get_epsilon(DELTA)


# ---------------------------------------------------------------- charge first, release afterwards


class Broken(RDPAccountant):
    """An accountant whose storage fails."""

    def step(self, *, noise_multiplier: float, sample_rate: float) -> None:
        raise OSError("no space left on device")


def test_failing_charge_releases_nothing() -> None:
    """If the charge raises, no parameter and no optimizer state has moved and ``p.grad`` is still None."""
    model = Net()
    scope = _scope_over(model, accountant=Broken())
    with scope as (opt, loader):
        before = _snapshot(model, opt, scope.accountant)
        _backward(model, next(iter(loader)))
        with pytest.raises(OSError, match="no space left"):
            opt.step()
        assert all(p.grad is None for p in model.parameters())
        assert equal_trees(before, _snapshot(model, opt, scope.accountant))
        assert scope.steps == 0


def test_failing_charge_hands_out_no_batch() -> None:
    """Without Poisson sampling a pass whose charge raises hands out nothing."""
    with _scope_over(Net(), accountant=Broken(), poisson_sampling=False) as (_, loader):
        batches = iter(loader)
        with pytest.raises(OSError, match="no space left"):
            next(batches)


class Failing(torch.optim.SGD):
    """An optimizer that fails after looking at the gradients."""

    def step(self, closure: Any = None) -> None:
        raise ArithmeticError("diverged")


def test_charge_stays_when_the_optimizer_fails() -> None:
    """If the user's optimizer raises, the release it could see is on record."""
    model = Net()
    scope = _scope_over(model, optimizer=Failing(model.parameters(), lr=0.1))
    with scope as (opt, loader):
        _backward(model, next(iter(loader)))
        with pytest.raises(ArithmeticError, match="diverged"):
            opt.step()
    assert scope.accountant.history == [(1.0, 4 / 12, 1)]


def test_charge_precedes_step_hooks_and_update() -> None:
    """A step hook finds the charge made and the parameters not yet moved."""
    model = Net()
    scope = _scope_over(model)
    seen = []
    with scope as (opt, loader):
        before = copy.deepcopy(model.state_dict())
        opt.attach_step_hook(
            lambda o: seen.append((list(scope.accountant.history), equal_trees(before, model.state_dict())))
        )
        _train(model, opt, loader, stop=1)
    assert seen == [([(1.0, 4 / 12, 1)], True)]


@pytest.mark.parametrize("accountant", ACCOUNTANTS)
def test_epsilon_of_an_accountant_object(accountant: str) -> None:
    """The helper agrees with Opacus for noisy histories and is 0 or infinite where Opacus fails or is finite."""
    history = [(1.1, 0.01, 100)]
    assert epsilon_of(_fresh(accountant, history), DELTA) == _fresh(accountant, history).get_epsilon(DELTA)
    assert epsilon_of(_fresh(accountant, []), DELTA) == 0
    assert epsilon_of(_fresh(accountant, [(0.0, 0.01, 1)]), DELTA) == math.inf


# ---------------------------------------------------------------- calibration


@pytest.mark.parametrize("accountant", ["prv", "rdp", "gdp"])
@pytest.mark.parametrize("target", [0.2, 1.0, 8.0, 60.0])
def test_calibration_uses_the_budget_and_no_more(target: float, accountant: str) -> None:
    """For small and large targets epsilon of the calibrated run is below the target, and close to it."""
    scope = _scope_over(Net(), accountant=accountant, target_epsilon=target, target_delta=DELTA, epochs=3)
    spent = _fresh(accountant, [(scope.noise_multiplier, scope.plan.sample_rate, scope.plan.releases(3))])
    assert 0.99 * target <= spent.get_epsilon(DELTA) <= target


@pytest.mark.parametrize(("target", "accountant"), [(0.005, "prv"), (0.05, "rdp"), (1e4, "prv"), (1e4, "gdp")])
def test_a_budget_that_no_noise_can_meet_or_that_means_nothing_is_refused(target: float, accountant: str) -> None:
    """Targets below an accountant's resolution, or absurdly large, are errors at once instead of an endless search."""
    with pytest.raises(InvalidArgumentError, match="target_epsilon="):
        _scope_over(Net(), accountant=accountant, target_epsilon=target, target_delta=DELTA, epochs=3)


def test_interleaved_passes_in_the_loaders_own_order_are_refused() -> None:
    """Without Poisson sampling an older pass cannot go on after a new one has begun, with noise of its own."""
    with _scope_over(Net(), poisson_sampling=False) as (_, loader):
        first = iter(loader)
        next(first)
        next(iter(loader))
        with pytest.raises(ScopeError, match="interleaved"):
            next(first)
