"""Checkpoints: to Opacus and back, safe to load, and what is spent stays spent."""

import copy
import io
import warnings
from typing import Any

import opacus
import pytest
import torch
from opacus.schedulers import StepGradClip, StepNoise
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dp_hooks import PrivacyEngineHookBased
from dp_hooks.errors import InvalidArgumentError, ScopeError

from ..models import drawn, equal_trees
from ..training.helpers import train
from .helpers import ACCOUNTANTS, DELTA, data_for, make, text_model

pytestmark = pytest.mark.filterwarnings("ignore:GDP accounting is experimental")


def _opacus(model: nn.Module, wrap: bool, accountant: str) -> Any:
    engine = opacus.PrivacyEngine(accountant=accountant)
    return engine, *make(engine, model, poisson_sampling=False, wrap_model=wrap)


def schedulers(opt: Any) -> dict[str, Any]:
    return {
        "noise_scheduler": StepNoise(opt, step_size=1, gamma=0.1),
        "grad_clip_scheduler": StepGradClip(opt, step_size=1, gamma=0.1),
    }


def states(given: dict[str, Any]) -> dict[str, Any]:
    return {name: scheduler.state_dict() for name, scheduler in given.items()}


@pytest.mark.parametrize("accountant", ACCOUNTANTS)
@pytest.mark.parametrize("wrap", [True, False])
@pytest.mark.filterwarnings("ignore")
def test_checkpoint_of_opacus_loads_here_and_back(wrap: bool, accountant: str) -> None:
    """Model, momentum, accountant and schedulers travel from Opacus to here and back to Opacus unchanged."""
    model, first, second = text_model(), io.BytesIO(), io.BytesIO()
    theirs, hooked, opt, loader = _opacus(model, wrap, accountant)
    train(hooked if wrap else model, opt, loader)
    if accountant != "gdp":
        theirs.accountant.step(noise_multiplier=0.7, sample_rate=0.1)
    given = {
        "noise_scheduler": StepNoise(opt, step_size=2, gamma=0.5),
        "grad_clip_scheduler": StepGradClip(opt, step_size=3, gamma=0.9),
    }
    for scheduler in given.values():
        scheduler.step()
    more = {"module": hooked if wrap else model, "optimizer": opt, "checkpoint_dict": {"epoch": 7}}
    theirs.save_checkpoint(path=first, **more, **given)
    first.seek(0)
    fresh = text_model()
    with PrivacyEngineHookBased(accountant=accountant) as ours:
        _, our_opt, _ = make(ours, fresh)
        our = schedulers(our_opt)
        rest = ours.load_checkpoint(path=first, module=fresh, optimizer=our_opt, **our)
        assert rest["epoch"] == 7
        assert equal_trees(dict(fresh.state_dict()), dict(model.state_dict()))
        assert equal_trees(our_opt.state_dict(), opt.state_dict())
        assert [tuple(entry) for entry in ours.accountant.history] == theirs.accountant.history
        assert ours.get_epsilon(DELTA) == theirs.get_epsilon(DELTA)
        assert states(our) == states(given)
        ours.save_checkpoint(path=second, module=fresh, optimizer=our_opt, checkpoint_dict={"epoch": 8}, **our)
    second.seek(0)
    third = text_model()
    back, _, opt_back, _ = _opacus(third, wrap, accountant)
    back_again = schedulers(opt_back)
    # The keys are those of the bare model, which is also there when Opacus has wrapped it.
    rest = back.load_checkpoint(path=second, module=third, optimizer=opt_back, **back_again)
    assert rest["epoch"] == 8
    assert equal_trees(dict(third.state_dict()), dict(model.state_dict()))
    assert equal_trees(opt_back.state_dict(), opt.state_dict())
    assert back.accountant.history == theirs.accountant.history
    assert states(back_again) == states(given)


def test_checkpoint_keys_have_no_prefix_and_no_random_state(tmp_path: Any) -> None:
    """A checkpoint holds plain keys, optimizer and accountant, and no generator state of noise or sampling."""
    model, path, generator = text_model(), tmp_path / "checkpoint.pt", drawn(5)
    data = DataLoader(TensorDataset(*data_for(model)), batch_size=4, generator=drawn(6))
    with PrivacyEngineHookBased() as engine:
        _, opt, loader = make(engine, model, noise_generator=generator, data_loader=data)
        train(model, opt, loader)
        engine.save_checkpoint(path=path, module=model, optimizer=opt)
        states = [generator.get_state(), data.generator.get_state(), torch.get_rng_state()]
    saved = torch.load(path, weights_only=True)
    assert set(saved) == {"module_state_dict", "optimizer_state_dict", "privacy_accountant_state_dict"}
    assert list(saved["module_state_dict"]) == list(text_model().state_dict())

    def tensors(tree: Any) -> list[Tensor]:
        if isinstance(tree, Tensor):
            return [tree]
        items = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (list, tuple)) else []
        return [t for item in items for t in tensors(item)]

    found = tensors(saved)
    assert len(found) == 2 * len(list(model.parameters()))
    assert all(t.dtype != torch.uint8 for t in found)
    raw = path.read_bytes()
    assert not any(state.numpy().tobytes() in raw for state in states)
    plain = text_model()
    plain.load_state_dict(saved["module_state_dict"])
    assert equal_trees(dict(plain.state_dict()), dict(model.state_dict()))


class _Payload:
    """An object that only a full unpickling would build."""


@pytest.mark.filterwarnings("ignore:the checkpoint is older")
def test_checkpoint_with_an_object_is_refused_by_default(tmp_path: Any) -> None:
    """Loading is ``weights_only=True``: an arbitrary object is refused, changing nothing, until it is allowed."""
    path, model, fresh = tmp_path / "checkpoint.pt", text_model(), text_model()
    PrivacyEngineHookBased().save_checkpoint(path=path, module=model, checkpoint_dict={"mine": _Payload()})
    engine = PrivacyEngineHookBased()
    engine.accountant.history = [(2.0, 0.1, 3)]
    before = copy.deepcopy(fresh.state_dict())
    with pytest.raises(Exception, match=r"(?i)weights.only"):
        engine.load_checkpoint(path=path, module=fresh)
    assert equal_trees(dict(before), dict(fresh.state_dict()))
    assert engine.accountant.history == [(2.0, 0.1, 3)]
    rest = engine.load_checkpoint(path=path, module=fresh, torch_load_kwargs={"weights_only": False})
    assert isinstance(rest["mine"], _Payload)
    assert equal_trees(dict(model.state_dict()), dict(fresh.state_dict()))
    assert engine.accountant.history == [(2.0, 0.1, 3)]  # spent stays spent


@pytest.mark.parametrize("part", ["optimizer", "noise_scheduler", "grad_clip_scheduler"])
@pytest.mark.parametrize("saved", [True, False])
def test_parts_only_on_one_side_are_mentioned(saved: bool, part: str) -> None:
    """State that is saved but not asked for, or asked for but not saved, is mentioned in a warning by its name."""
    file, model = io.BytesIO(), text_model()
    with PrivacyEngineHookBased() as engine:
        _, opt, _ = make(engine, model)
        given = {part: {"optimizer": opt, **schedulers(opt)}[part]}
        engine.save_checkpoint(path=file, module=model, **(given if saved else {}))
        file.seek(0)
        with pytest.warns(UserWarning, match=rf"checkpoint has {'a' if saved else 'no'} {part} state"):
            engine.load_checkpoint(path=file, module=model, **({} if saved else given))


def test_resumed_training_goes_on_as_if_never_stopped(tmp_path: Any) -> None:
    """Without noise, saving and loading between two passes gives the parameters of an uninterrupted run."""
    path, start = tmp_path / "checkpoint.pt", text_model()

    def passes(model: nn.Module, count: int, load: bool = False, save: bool = False) -> None:
        with PrivacyEngineHookBased() as engine, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _, opt, loader = make(engine, model, noise_multiplier=0.0, poisson_sampling=False)
            if load:
                engine.load_checkpoint(path=path, module=model, optimizer=opt)
            for _ in range(count):
                train(model, opt, loader)
            if save:
                engine.save_checkpoint(path=path, module=model, optimizer=opt)

    whole, half, rest = copy.deepcopy(start), copy.deepcopy(start), text_model()
    passes(whole, 2)
    passes(half, 1, save=True)
    passes(rest, 1, load=True)
    assert equal_trees(dict(whole.state_dict()), dict(rest.state_dict()))


@pytest.mark.filterwarnings("ignore:the checkpoint is older")
def test_going_back_to_a_checkpoint_does_not_refill_the_budget(tmp_path: Any) -> None:
    """Loading an earlier checkpoint of the same run restores the model; the steps taken since stay charged."""
    path, model = tmp_path / "checkpoint.pt", text_model()
    with PrivacyEngineHookBased(accountant="rdp") as engine:
        _, opt, loader = make(engine, model)
        engine.save_checkpoint(path=path, module=model, optimizer=opt)
        train(model, opt, loader)
        spent, epsilon = list(engine.accountant.history), engine.get_epsilon(DELTA)
        assert epsilon > 0
        engine.load_checkpoint(path=path, module=model, optimizer=opt)
        assert engine.accountant.history == spent
        assert engine.get_epsilon(DELTA) == epsilon


REFUSED = [("rdp", [(3.0, 0.5, 4)], ScopeError, "knows nothing of"), ("prv", [], ValueError, "prv")]


@pytest.mark.parametrize(("accountant", "history", "error", "match"), REFUSED)
def test_a_checkpoint_of_another_run_is_refused(accountant: str, history: Any, error: Any, match: str) -> None:
    """A checkpoint of another accountant, or without what was spent here, changes neither model nor charges."""
    file, model, fresh = io.BytesIO(), text_model(), text_model()
    other, engine = PrivacyEngineHookBased(accountant=accountant), PrivacyEngineHookBased(accountant="rdp")
    other.accountant.history, engine.accountant.history = history, [(1.0, 0.1, 2)]
    other.save_checkpoint(path=file, module=model)
    file.seek(0)
    before = copy.deepcopy(fresh.state_dict())
    with pytest.raises(error, match=match):
        engine.load_checkpoint(path=file, module=fresh)
    assert engine.accountant.history == [(1.0, 0.1, 2)]
    assert equal_trees(dict(before), dict(fresh.state_dict()))


@pytest.mark.parametrize(("theirs", "own"), [(1, 1), (1, 2), (2, 1)])
def test_what_two_runs_have_spent_is_not_taken_for_one_run(theirs: int, own: int, tmp_path: Any) -> None:
    """An engine that has taken steps loads no checkpoint of another engine, also where one history begins as the other."""
    path = tmp_path / "theirs.pt"
    with PrivacyEngineHookBased(accountant="rdp") as first:
        model = text_model()
        _, opt, loader = make(first, model)
        for _ in range(theirs):
            train(model, opt, loader)
        first.save_checkpoint(path=path, module=model, optimizer=opt)
    with PrivacyEngineHookBased(accountant="rdp") as second:
        model = text_model()
        _, opt, loader = make(second, model)
        for _ in range(own):
            train(model, opt, loader)
        spent, weights = list(second.accountant.history), copy.deepcopy(model.state_dict())
        with pytest.raises(ScopeError, match="knows nothing of"):
            second.load_checkpoint(path=path, module=model, optimizer=opt)
        assert second.accountant.history == spent
        assert equal_trees(dict(weights), dict(model.state_dict()))


def test_a_checkpoint_that_could_not_be_loaded_is_not_what_a_run_began_with(tmp_path: Any) -> None:
    """Steps that are taken after a failed load do not belong to the run of that checkpoint."""
    path = tmp_path / "other.pt"
    other = PrivacyEngineHookBased(accountant="rdp")
    other.accountant.history = [(1.0, 1 / 3, 3)]
    other.save_checkpoint(path=path, module=nn.Linear(2, 2))
    with PrivacyEngineHookBased(accountant="rdp") as engine:
        model = text_model()
        _, opt, loader = make(engine, model)
        with pytest.raises(InvalidArgumentError, match="state_dict"):
            engine.load_checkpoint(path=path, module=model)
        assert engine.accountant.history == []
        train(model, opt, loader)
        assert engine.accountant.history == [(1.0, 1 / 3, 3)]
        with pytest.raises(ScopeError, match="knows nothing of"):
            engine.load_checkpoint(path=path, module=nn.Linear(2, 2))


@pytest.mark.filterwarnings("ignore:the checkpoint is older")
def test_a_run_goes_back_to_what_it_saved_and_to_what_it_began_with(tmp_path: Any) -> None:
    """After further steps an engine loads its own checkpoint, and the one it went on from: all stays spent."""
    paths = [tmp_path / f"{number}.pt" for number in range(2)]
    with PrivacyEngineHookBased(accountant="rdp") as first:
        model = text_model()
        _, opt, loader = make(first, model)
        train(model, opt, loader)
        first.save_checkpoint(path=paths[0], module=model, optimizer=opt)
    with PrivacyEngineHookBased(accountant="rdp") as second:
        model = text_model()
        _, opt, loader = make(second, model)
        second.load_checkpoint(path=paths[0], module=model, optimizer=opt)
        train(model, opt, loader)
        second.save_checkpoint(path=paths[1], module=model, optimizer=opt)
        train(model, opt, loader)
        spent = list(second.accountant.history)
        for path in (*paths, *paths):
            second.load_checkpoint(path=path, module=model, optimizer=opt)
            assert second.accountant.history == spent
