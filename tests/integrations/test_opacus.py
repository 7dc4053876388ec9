"""PrivacyEngineHookBased: Opacus's interface, and its updates with the model left as it is."""

import inspect
import math
from itertools import product
from typing import Any

import opacus
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dp_hooks import PrivacyEngineHookBased
from dp_hooks.errors import ScopeError, UnsupportedModelError

from ..models import ConvNet, Net, each_mode, has_hooks, loader_of, values
from ..training.helpers import backward, train
from .helpers import ACCOUNTANTS, DELTA, data_for, loader_for, make, objects_for, sgd, text_model, twice_used

pytestmark = [
    pytest.mark.filterwarnings("ignore:GDP accounting is experimental"),
    pytest.mark.filterwarnings("ignore:Using a non-full backward hook"),
]

METHODS = (
    "__init__ make_private make_private_with_epsilon get_epsilon save_checkpoint load_checkpoint "
    "is_compatible validate get_compatible_module"
).split()

# What differs on purpose. A criterion that is given is checked, and in mode "ghost" None stands for Opacus's CrossEntropyLoss();
# the model is never wrapped; is_compatible and validate do not need what they do not look at.
DIFFERENT_DEFAULTS = {
    *product(("make_private", "make_private_with_epsilon"), ("criterion", "wrap_model")),
    *product(("is_compatible", "validate"), ("optimizer", "data_loader")),
}


@pytest.mark.parametrize("method", METHODS)
def test_signatures_are_those_of_opacus(method: str) -> None:
    """Every parameter of the installed Opacus is there, of the same kind and default but for the listed differences."""
    theirs = inspect.signature(getattr(opacus.PrivacyEngine, method)).parameters
    ours = inspect.signature(getattr(PrivacyEngineHookBased, method)).parameters
    assert [name for name in theirs if name not in ours] == []
    for name, parameter in theirs.items():
        assert ours[name].kind == parameter.kind, name
        if (method, name) not in DIFFERENT_DEFAULTS:
            assert ours[name].default == parameter.default, name
    extra = [n for n, p in ours.items() if n not in theirs and p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    assert extra == []


def test_every_public_method_of_opacus_is_there() -> None:
    """No public method of the installed Opacus engine is missing."""
    public = {name for name in dir(opacus.PrivacyEngine) if not name.startswith("_")}
    assert public - set(dir(PrivacyEngineHookBased)) == set()


LOSSES = {
    "called": (lambda criterion, out, y: criterion(out, y), True),
    "not called": (lambda criterion, out, y: nn.functional.cross_entropy(out, y), False),
    "with another term": (lambda criterion, out, y: criterion(out, y) + out.square().mean(), False),
}


@each_mode
@pytest.mark.parametrize("case", LOSSES)
def test_the_criterion_of_the_engine_is_checked_if_it_is_called(case: str, mode: str) -> None:
    """The report calls the loss verified if the criterion was called and was all of it; it may also stay unused, as in Opacus."""
    loss, verified = LOSSES[case]
    model, criterion = text_model(), nn.CrossEntropyLoss()
    with PrivacyEngineHookBased() as engine:
        _, opt, *_, loader = make(engine, model, grad_sample_mode=mode, criterion=criterion, poisson_sampling=False)
        for x, y in loader:
            opt.zero_grad()
            loss(criterion, model(x), y).backward()
            opt.step()
        assert engine._scopes[0].report().loss_verified == verified
    assert not has_hooks(criterion)


def test_a_criterion_that_mixes_samples_is_refused_by_the_engine() -> None:
    """So is one that is reduced otherwise than declared; calls on the outputs of another model do not count."""

    class Centred(nn.CrossEntropyLoss):
        def forward(self, out: Tensor, y: Tensor) -> Tensor:
            return super().forward(out - out.mean(0), y)

    for criterion in (Centred(), nn.CrossEntropyLoss(reduction="sum")):
        model, teacher = text_model(), text_model()
        with PrivacyEngineHookBased() as engine:
            _, opt, _, loader = make(engine, model, grad_sample_mode="ghost", criterion=criterion, poisson_sampling=False)
            x, y = next(iter(loader))
            criterion(model(x), y).backward()
            criterion(teacher(x[:2]), y[:2])
            with pytest.raises(UnsupportedModelError, match="criterion"):
                opt.step()


@each_mode
def test_the_same_model_object_comes_back(mode: str) -> None:
    """``make_private`` returns the very model, unwrapped; in ghost mode a 4-tuple with the very criterion.

    Opacus's ``rand_on_empty=False`` is accepted, and nothing else is needed, since empty batches always work.
    """
    model, criterion = text_model(), nn.CrossEntropyLoss(label_smoothing=0.1)
    keys, modules = list(model.state_dict()), [id(m) for m in model.modules()]
    with PrivacyEngineHookBased() as engine:
        out = make(engine, model, grad_sample_mode=mode, criterion=criterion, rand_on_empty=False)
        assert len(out) == (4 if mode == "ghost" else 3)
        assert out[0] is model
        assert type(out[0]) is Net
        if mode == "ghost":
            assert out[2] is criterion
        assert isinstance(out[1], torch.optim.Optimizer)
        assert isinstance(out[-1], DataLoader)
        assert list(model.state_dict()) == keys
        train(model, out[1], out[-1])
        assert [id(m) for m in model.modules()] == modules
    assert not any(key.startswith("_module.") for key in model.state_dict())
    assert list(model.state_dict()) == keys


def test_ghost_mode_has_a_default_criterion_and_the_default_mode_is_hooks() -> None:
    """Without a criterion ghost mode gives CrossEntropyLoss; without a mode ``p.grad_sample`` is filled."""
    model = text_model()
    with PrivacyEngineHookBased() as engine:
        assert isinstance(make(engine, model, grad_sample_mode="ghost")[2], nn.CrossEntropyLoss)
    with PrivacyEngineHookBased() as engine:
        make(engine, model)
        backward(model, *(part[:4] for part in data_for(model)))
        assert model.head.weight.grad_sample.shape == (4, 3, 6)


def test_with_epsilon_runs_the_calibrated_steps() -> None:
    """``make_private_with_epsilon`` runs exactly epochs * len(loader) steps and ends within the target."""
    model = text_model()
    with PrivacyEngineHookBased(accountant="rdp") as engine:
        budget = {"target_epsilon": 4.0, "target_delta": DELTA, "epochs": 2, "max_grad_norm": 1.0}
        out, opt, loader = engine.make_private_with_epsilon(**objects_for(model, 5), **budget)
        assert out is model
        for _ in range(2):
            train(model, opt, loader)
        assert engine.accountant.history == [(opt.noise_multiplier, 5 / 12, 6)]
        assert 0.9 * 4 < engine.get_epsilon(DELTA) <= 4
        with pytest.warns(UserWarning, match="budget"):
            assert list(loader) == []


def test_cleanup_twice_leaves_nothing() -> None:
    """``cleanup`` removes every hook and attribute, and may be called again, or without any ``make_private``."""
    engine, model = PrivacyEngineHookBased(), text_model()
    engine.cleanup()
    _, opt, loader = make(engine, model)
    train(model, opt, loader)
    assert has_hooks(model)
    for _ in range(2):
        engine.cleanup()
        assert not has_hooks(model)
    with pytest.raises(ScopeError, match="after the end"):
        opt.step()
    assert engine.accountant.history == [(1.0, 4 / 12, 3)]


def test_context_manager_cleans_up_and_passes_exceptions() -> None:
    """Leaving ``with engine:`` by an exception cleans up and lets the exception through."""
    model = text_model()
    with pytest.raises(KeyError, match="stop"), PrivacyEngineHookBased() as engine:  # noqa: PT012
        make(engine, model)
        backward(model, *data_for(model))
        raise KeyError("stop")
    assert not has_hooks(model)


def test_make_private_again_after_cleanup_goes_on_accounting() -> None:
    """After ``cleanup`` the same engine and model can be made private again; charges add up."""
    engine, model = PrivacyEngineHookBased(), text_model()
    data = loader_for(model)
    for _ in range(2):
        out, opt, loader = make(engine, model, data_loader=data)
        assert out is model
        train(model, opt, loader)
        engine.cleanup()
    assert engine.accountant.history == [(1.0, 4 / 12, 6)]
    assert not has_hooks(model)


def test_make_private_twice_without_cleanup_is_refused() -> None:
    """A model in use cannot be made private a second time; the first time stays intact."""
    model = text_model()
    data = loader_for(model)
    with PrivacyEngineHookBased() as engine:
        _, opt, loader = make(engine, model, data_loader=data)
        for other in (engine, PrivacyEngineHookBased()):
            with pytest.raises(ScopeError, match="cleanup"):
                make(other, model, data_loader=data)
        train(model, opt, loader)
        assert len(engine.accountant.history) == 1
    assert not has_hooks(model)


def test_two_models_with_one_engine() -> None:
    """One engine can hold two models, cleans up both and adds up their charges, with a warning for other data."""
    one, two = text_model(), twice_used()
    with PrivacyEngineHookBased() as engine:
        _, opt1, loader1 = make(engine, one)
        with pytest.warns(UserWarning, match="another dataset"):
            _, opt2, loader2 = make(engine, two)
        train(one, opt1, loader1)
        train(two, opt2, loader2)
        assert engine.accountant.history == [(1.0, 4 / 12, 6)]
    assert not has_hooks(one)
    assert not has_hooks(two)


def test_validation_follows_the_model() -> None:
    """``validate`` and ``is_compatible`` refuse BatchNorm; ``get_compatible_module`` gives a copy that passes."""
    engine = PrivacyEngineHookBased()
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
    loader = loader_of([torch.zeros(4, 1, 4, 4)], 2)
    assert not engine.is_compatible(module=model, optimizer=sgd(model), data_loader=loader)
    with pytest.raises(UnsupportedModelError, match="BatchNorm2d"):
        engine.validate(module=model, optimizer=sgd(model), data_loader=loader)
    fixed = engine.get_compatible_module(model)
    assert fixed is not model
    assert isinstance(model[1], nn.BatchNorm2d)
    assert isinstance(fixed[1], nn.GroupNorm)
    assert engine.is_compatible(module=fixed, optimizer=sgd(fixed), data_loader=loader)
    assert engine.validate(module=fixed) is None


@pytest.mark.parametrize("accountant", ACCOUNTANTS)
def test_epsilon_equals_that_of_opacus(accountant: str) -> None:
    """For one history both engines report the same epsilon."""
    ours, theirs = PrivacyEngineHookBased(accountant=accountant), opacus.PrivacyEngine(accountant=accountant)
    for engine in (ours, theirs):
        engine.accountant.history = [(1.1, 0.02, 150)]
    assert ours.get_epsilon(DELTA) == theirs.get_epsilon(DELTA)
    assert ours.get_epsilon(delta=DELTA) == theirs.get_epsilon(delta=DELTA)
    assert 0 < ours.get_epsilon(DELTA) < math.inf


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("clipping", ["flat", "per_layer"])
@each_mode
@pytest.mark.parametrize("make_model", [text_model, ConvNet, twice_used])
@pytest.mark.filterwarnings("ignore")
def test_clipped_update_equals_that_of_opacus(make_model: Any, mode: str, clipping: str, reduction: str) -> None:
    """On the same batches without noise, each step's gradient is Opacus's to 1e-6 of C, in every mode."""
    torch.manual_seed(3)
    ours, theirs = make_model().double(), make_model().double()
    theirs.load_state_dict(ours.state_dict())
    bound: Any = 0.3 if clipping == "flat" else [0.1 + 0.05 * k for k in range(len(list(ours.parameters())))]
    x, y = data_for(ours)
    data = loader_of([x.double() if x.is_floating_point() else x, y], 4)
    settings = {
        "noise_multiplier": 0.0,
        "max_grad_norm": bound,
        "poisson_sampling": False,
        "loss_reduction": reduction,
        "clipping": clipping,
    }

    def gradients(engine: Any, model: nn.Module, **kwargs: Any) -> list[list[Tensor]]:
        out = engine.make_private(module=model, optimizer=sgd(model), data_loader=data, **settings, **kwargs)
        seen = []
        for xb, yb in out[-1]:
            out[1].zero_grad()
            backward(out[0], xb, yb, reduction=reduction)
            out[1].step()
            seen.append([p.grad.clone() for p in model.parameters()])
        return seen

    with PrivacyEngineHookBased() as engine:
        mine = gradients(engine, ours, grad_sample_mode=mode)
    reference = gradients(opacus.PrivacyEngine(), theirs, wrap_model=True, grad_sample_mode="hooks")
    for a, b in zip(mine, reference, strict=True):
        for ga, gb in zip(a, b, strict=True):
            assert gb.abs().max() > 1e-6
            torch.testing.assert_close(ga, gb, rtol=2e-5 if clipping == "per_layer" else 0, atol=1e-6)
    torch.testing.assert_close(values(ours), values(theirs), rtol=0, atol=1e-6)
