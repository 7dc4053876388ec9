"""The state of a scope: what was spent goes on in another one, and nothing else can be loaded for it."""

import copy
import io
import json
from typing import Any

import pytest
import torch

from dp_hooks import private_training
from dp_hooks.errors import InvalidArgumentError, ScopeError

from ..models import build, drawn, in_order, scope_over
from .helpers import sgd, train

BUDGET: dict[str, Any] = {"noise_multiplier": None, "target_epsilon": 5.0, "target_delta": 1e-5, "epochs": 6, "accountant": "rdp"}
POISSON: dict[str, Any] = {"poisson_sampling": True}


def scope_of(**options: Any) -> Any:
    """Return a scope with a budget of six passes, of two batches each."""
    return scope_over(build("mlp"), loader=in_order(6, 3), **{**POISSON, **BUDGET, **options})


def after(passes: int, **options: Any) -> Any:
    """Return a scope in which so many passes were trained."""
    with (scope := scope_of(**options)) as (opt, loader):
        for _ in range(passes):
            train(scope.model, opt, loader, by=lambda model, opt, x, y: opt.step_empty())
    return scope


def kept(state: dict[str, Any], way: str) -> Any:
    """Return what comes back of a state that was kept."""
    if way == "json":
        return json.loads(json.dumps(state))
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("way", ["json", "torch.save"])
def test_a_budget_goes_on_to_the_steps_it_was_calculated_for(way: str) -> None:
    """Four of twelve steps were taken: a scope that loads the state takes eight more, and ends at the same epsilon."""
    first = after(2)
    second = scope_of()
    second.load_state_dict(kept(first.state_dict(), way))
    assert second.steps == 4
    with second as (opt, loader):
        for _ in range(6):
            train(second.model, opt, loader, by=lambda model, opt, x, y: opt.step_empty())
        with pytest.raises(ScopeError, match="budget"):
            opt.step_empty()
    assert second.steps == 12
    assert second.get_epsilon(1e-5) == pytest.approx(after(6).get_epsilon(1e-5))


def test_a_state_holds_no_generator_and_nothing_of_the_data() -> None:
    """It is numbers, names and lists: the same for other data, noise and weights."""
    states = [after(1, noise_generator=drawn(seed)).state_dict() for seed in (1, 2)]
    assert states[0] == states[1] == json.loads(json.dumps(states[0]))


def test_a_bound_that_followed_the_norms_goes_on_where_it_was() -> None:
    """Adaptive clipping does not begin at C again."""
    options = {"clipping": "adaptive", "noise_multiplier": 0.5, "accountant": "rdp", "clipping_options": {"unclipped_num_std": 2.0}}
    model = build("mlp")

    def scope() -> Any:
        return private_training(model, sgd(model), in_order(), max_grad_norm=1.0, **options)

    with (first := scope()) as (opt, loader):
        train(model, opt, loader)
        bound = opt.max_grad_norm
    second = scope()
    second.load_state_dict(first.state_dict())
    with second as (opt, _):
        assert opt.max_grad_norm == bound != 1.0


def test_what_is_spent_already_and_goes_further_is_kept() -> None:
    """An accountant that has gone on since stays as it is; one that knows nothing of the state is refused."""
    first = after(2)
    early = first.state_dict()
    second = scope_of()
    second.load_state_dict(after(3).state_dict())
    second.load_state_dict(early)
    assert sum(steps for *_, steps in second.accountant.history) == 6
    other = scope_of(noise_multiplier=3.0, target_epsilon=None, target_delta=None, epochs=None)
    other.accountant.step(noise_multiplier=3.0, sample_rate=0.1)
    with pytest.raises(ScopeError, match="knows nothing of"):
        other.load_state_dict({**early, "budget": None})


@pytest.mark.parametrize(("theirs", "own"), [(1, 1), (1, 2), (2, 1)])
def test_what_another_run_has_spent_is_not_taken_for_what_this_one_has(theirs: int, own: int) -> None:
    """With an accountant that has counted one run, the state of another is refused, also where one begins as the other."""
    plain: dict[str, Any] = {"noise_multiplier": 1.0, "target_epsilon": None, "target_delta": None, "epochs": None}
    state, first = after(theirs, **plain).state_dict(), after(own, **plain)
    second = scope_of(**{**plain, "accountant": first.accountant})
    with pytest.raises(ScopeError, match="knows nothing of"):
        second.load_state_dict(state)
    second.load_state_dict(first.state_dict())
    assert sum(steps for *_, steps in second.accountant.history) == 2 * own


def test_a_scope_that_was_entered_loads_nothing() -> None:
    """A step could have come first; after the end there is nothing to go on with."""
    state = after(1).state_dict()
    scope = scope_of()
    with scope, pytest.raises(ScopeError, match="before `with`"):
        scope.load_state_dict(state)
    with pytest.raises(ScopeError, match="before `with`"):
        scope.load_state_dict(state)


FAULTS: dict[str, Any] = {
    "nothing": None,
    "a list": [],
    "empty": {},
    "of another version": {"format": "dp_hooks scope 0"},
    "without a history": {"history": None},
    "with a torn entry": {"history": [[1.0, 0.5]]},
    "with an entry of text": {"history": [["1", "0.5", "2"]]},
    "with negative steps": {"history": [[1.0, 0.5, -2]]},
    "with half a step": {"history": [[1.0, 0.5, 0.5]]},
    "with a rate above one": {"history": [[1.0, 1.5, 2]]},
    "with noise that is no number": {"history": [[float("nan"), 0.5, 2]]},
    "with steps that are no number": {"steps": "4"},
    "with steps below zero": {"steps": -1},
    "of a run in a ledger without a name": {"ledger_run": ["no name"]},
    "of other data": {"dataset_size": 7},
    "of another accountant": {"accountant": "prv"},
    "of another clipping": {"clipping": "adaptive"},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_or_foreign_state_is_refused_and_changes_nothing(fault: str) -> None:
    """The error names the state; the scope can still be used."""
    scope = scope_of()
    change = FAULTS[fault]
    state = {**after(1).state_dict(), **change} if isinstance(change, dict) and change else change
    with pytest.raises(InvalidArgumentError, match="state="):
        scope.load_state_dict(copy.deepcopy(state))
    assert scope.steps == 0
    assert scope.accountant.history == []


def test_a_budget_is_not_left_behind() -> None:
    """A state with a budget asks for a scope with one."""
    scope = scope_of(noise_multiplier=1.0, target_epsilon=None, target_delta=None, epochs=None)
    with pytest.raises(InvalidArgumentError, match=r"target_epsilon=5\.0"):
        scope.load_state_dict(after(1).state_dict())
