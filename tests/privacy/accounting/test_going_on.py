"""A budget that is spent in several runs."""

import copy
from pathlib import Path
from typing import Any

import pytest

from dp_hooks import PrivacyEngineHookBased
from dp_hooks.errors import BudgetExhaustedError, InvalidArgumentError

from ...models import build, charges, in_order
from ...training.helpers import sgd, train
from .helpers import DELTA, Charged

# Four passes over three batches: twelve steps.
BUDGET: dict[str, Any] = {"target_epsilon": 2.0, "target_delta": DELTA, "epochs": 4, "max_grad_norm": 1.0, "self_check": False}


def steps_of(model: Any, opt: Any, loader: Any, most: int) -> int:
    """Step on batches of the loader until it has no more, at most ``most`` times; return how many steps it were."""
    taken = 0
    while taken < most and (more := train(model, opt, loader, stop=most - taken)):
        taken += more
    return taken


@pytest.mark.filterwarnings("ignore:the privacy budget is used up")
@pytest.mark.filterwarnings("ignore:GDP accounting is experimental")
@pytest.mark.parametrize(
    ("accountant", "poisson", "first"),
    [
        ("rdp", True, 5),
        ("rdp", True, 1),
        ("rdp", True, 12),
        ("rdp", False, 6),
        ("prv", True, 5),
        ("pld", True, 5),
        ("gdp", False, 6),
    ],
)
def test_a_loaded_accountant_goes_on_where_the_budget_stopped(accountant: str, poisson: bool, first: int) -> None:
    """The remedy that the refusal names: a new scope with the saved state allows exactly the releases that are left."""
    options = {**BUDGET, "accountant": accountant, "poisson_sampling": poisson}
    earlier, run = Charged(**options), Charged(**options)
    with earlier as parts:
        assert steps_of(*parts, first) == first
    saved = copy.deepcopy(earlier.scope.accountant.state_dict())
    with pytest.raises(InvalidArgumentError, match=r"scope\.accountant\.load_state_dict\(saved\)"):
        Charged(**{**options, "accountant": earlier.scope.accountant})
    run.scope.accountant.load_state_dict(saved)
    assert run.scope.noise_multiplier == earlier.scope.noise_multiplier
    with run as parts:
        assert steps_of(*parts, 100) == 12 - first
    assert charges(run.scope) == (12 if poisson else 4)
    assert 1.9 < run.epsilon <= 2.0


def test_not_one_release_more_than_is_left() -> None:
    """With a spent state loaded, a step on the batch of a pass that had begun before is refused."""
    earlier, run = Charged(**BUDGET), Charged(**BUDGET)
    with earlier as parts:
        steps_of(*parts, 11)
    run.scope.accountant.load_state_dict(earlier.scope.accountant.state_dict())
    with run as (_, opt, loader):
        batches = iter(loader)
        next(batches)
        opt.step_empty()
        with pytest.raises(StopIteration):
            next(batches)
        opt.zero_grad()
        spent = list(run.history)
        with pytest.raises(BudgetExhaustedError):
            opt.step_empty()
        assert run.history == spent


@pytest.mark.filterwarnings("ignore:the privacy budget is used up")
@pytest.mark.parametrize("accountant", ["rdp", "pld"])
def test_a_new_engine_goes_on_from_a_checkpoint(accountant: str, tmp_path: Path) -> None:
    """The remedy for engines: make_private_with_epsilon of a new one, then load_checkpoint; epsilon never passes the target."""

    def run(engine: PrivacyEngineHookBased, most: int, load: bool) -> int:
        model = build("mlp")
        objects = {"module": model, "optimizer": sgd(model), "data_loader": in_order(12, 4)}
        with engine:
            _, opt, loader = engine.make_private_with_epsilon(**objects, **BUDGET)
            if load:
                engine.load_checkpoint(path=tmp_path / "saved.pt", module=model, optimizer=opt)
            taken = steps_of(model, opt, loader, most)
            assert engine.get_epsilon(DELTA) <= 2.0
            engine.save_checkpoint(path=tmp_path / "saved.pt", module=model, optimizer=opt)
        return taken

    first = PrivacyEngineHookBased(accountant=accountant)
    assert run(first, 7, load=False) == 7
    with pytest.raises(InvalidArgumentError, match="load_checkpoint"):
        run(first, 1, load=False)
    assert run(PrivacyEngineHookBased(accountant=accountant), 100, load=True) == 5
