"""A budget that is spent in several runs."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dp_hooks import PrivacyEngineHookBased, PrivateTraining, private_training
from dp_hooks.errors import BudgetExhaustedError, InvalidArgumentError

BUDGET: dict[str, Any] = {"target_epsilon": 2.0, "target_delta": 1e-5, "epochs": 4}


def parts() -> tuple[nn.Module, torch.optim.Optimizer, DataLoader[Any]]:
    """Return a model, its optimizer and a loader with three batches a pass."""
    model = nn.Linear(2, 1)
    data = TensorDataset(torch.ones(12, 2))
    return model, torch.optim.SGD(model.parameters(), lr=0.1), DataLoader(data, batch_size=4)


def scope_over(**kwargs: Any) -> PrivateTraining:
    """Return a scope with the budget of four passes."""
    return private_training(*parts(), max_grad_norm=1.0, self_check=False, **{**BUDGET, "accountant": "rdp", **kwargs})


def steps_of(scope: PrivateTraining, most: int) -> int:
    """Step on batches of the loader until it ends, at most ``most`` times; return how many steps it were."""
    taken = 0
    with scope as (opt, loader):
        while taken < most:
            before = taken
            for (x,) in loader:
                opt.zero_grad()
                scope.model(x).mean().backward()
                opt.step()
                taken += 1
                if taken == most:
                    break
            if taken == before:
                break
    return taken


@pytest.mark.filterwarnings("ignore:the privacy budget is used up")
@pytest.mark.filterwarnings("ignore:GDP accounting is experimental")
@pytest.mark.parametrize(
    ("accountant", "poisson", "first"),
    [("rdp", True, 5), ("rdp", True, 1), ("rdp", True, 12), ("rdp", False, 6), ("prv", True, 5), ("gdp", True, 5)],
)
def test_a_loaded_accountant_goes_on_where_the_budget_stopped(accountant: str, poisson: bool, first: int) -> None:
    """The remedy that the refusal names: a new scope with the saved state allows exactly the releases that are left."""
    kwargs = {"accountant": accountant, "poisson_sampling": poisson}
    earlier = scope_over(**kwargs)
    assert steps_of(earlier, first) == first
    saved = copy.deepcopy(earlier.accountant.state_dict())
    with pytest.raises(InvalidArgumentError, match=r"scope\.accountant\.load_state_dict\(saved\)"):
        scope_over(**{**kwargs, "accountant": earlier.accountant})

    scope = scope_over(**kwargs)
    scope.accountant.load_state_dict(saved)
    assert scope.noise_multiplier == earlier.noise_multiplier
    assert steps_of(scope, 100) == 12 - first
    spent = sum(steps for _, _, steps in scope.accountant.history)
    assert spent == (12 if poisson else 4)
    assert 1.9 < scope.get_epsilon(1e-5) <= 2.0


def test_not_one_release_more_than_is_left() -> None:
    """With a spent state loaded, a step on the batch of a pass that had begun before is refused."""
    earlier = scope_over()
    steps_of(earlier, 11)
    scope = scope_over()
    scope.accountant.load_state_dict(earlier.accountant.state_dict())
    with scope as (opt, loader):
        batches = iter(loader)
        next(batches)
        opt.step_empty()
        with pytest.raises(StopIteration):
            next(batches)
        opt.zero_grad()
        spent = list(scope.accountant.history)
        with pytest.raises(BudgetExhaustedError):
            opt.step_empty()
        assert list(scope.accountant.history) == spent


@pytest.mark.filterwarnings("ignore:the privacy budget is used up")
def test_a_new_engine_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    """The remedy for engines: make_private_with_epsilon of a new one, then load_checkpoint."""

    def run(engine: PrivacyEngineHookBased, most: int, load: bool) -> int:
        model, optimizer, loader = parts()
        arguments = {"module": model, "optimizer": optimizer, "data_loader": loader, "max_grad_norm": 1.0, **BUDGET}
        with engine:
            model, opt, private = engine.make_private_with_epsilon(**arguments, self_check=False)
            if load:
                engine.load_checkpoint(path=tmp_path / "saved.pt", module=model, optimizer=opt)
            taken = 0
            for _ in range(5):
                for (x,) in private:
                    if taken == most:
                        break
                    opt.zero_grad()
                    model(x).mean().backward()
                    opt.step()
                    taken += 1
            engine.save_checkpoint(path=tmp_path / "saved.pt", module=model, optimizer=opt)
        return taken

    first = PrivacyEngineHookBased(accountant="rdp")
    assert run(first, 7, load=False) == 7
    with pytest.raises(InvalidArgumentError, match="load_checkpoint"):
        run(first, 1, load=False)
    assert run(PrivacyEngineHookBased(accountant="rdp"), 100, load=True) == 5
