"""PrivacyEngineHookBased: Opacus's interface, checkpoints and updates, with the model left as it is."""

import copy
import inspect
import io
import math
import warnings
from typing import Any

import opacus
import pytest
import torch
import torch.nn.functional as F
from opacus.schedulers import StepGradClip, StepNoise
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dp_hooks import PrivacyEngineHookBased
from dp_hooks.errors import InvalidArgumentError, ScopeError, UnsupportedModelError

from .models import drawn, equal_trees

DELTA = 1e-5
ACCOUNTANTS = ["prv", "rdp", "gdp"]

pytestmark = [
    pytest.mark.filterwarnings("ignore:GDP accounting is experimental"),
    pytest.mark.filterwarnings("ignore:Using a non-full backward hook"),
]


class _Net(nn.Module):
    """A small text-like model: embedding, norm, two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 4)
        self.norm = nn.LayerNorm(4)
        self.hidden = nn.Linear(4, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.hidden(self.norm(self.table(ids)))).mean(1))


class _Conv(nn.Module):
    """A small image model."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.GroupNorm(2, 4)
        self.head = nn.Linear(4 * 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.norm(self.conv(x))).flatten(1))


class _Tied(nn.Module):
    """One layer used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(torch.tanh(self.layer(x))))


def _data(model: nn.Module, n: int = 12) -> TensorDataset:
    g = drawn(1)
    if isinstance(model, _Net):
        x = torch.randint(0, 10, (n, 5), generator=g)
    elif isinstance(model, _Conv):
        x = torch.randn(n, 1, 4, 4, generator=g)
    else:
        x = torch.randn(n, 4, generator=g)
    return TensorDataset(x, torch.randint(0, 3, (n,), generator=g))


def _loader(model: nn.Module, batch: int = 4) -> DataLoader:
    return DataLoader(_data(model), batch_size=batch)


def _sgd(model: nn.Module, lr: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


def _make(engine: Any, model: nn.Module, **kwargs: Any) -> Any:
    kwargs = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, "noise_generator": drawn(5), **kwargs}
    objects = {"module": model, "optimizer": _sgd(model), "data_loader": _loader(model)}
    return engine.make_private(**{**objects, **kwargs})


def _train(model: nn.Module, opt: Any, loader: Any) -> None:
    for x, y in loader:
        opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        opt.step()


def _no_hooks(model: nn.Module) -> bool:
    return not any(
        m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or "__getstate__" in vars(m)
        for m in model.modules()
    ) and not any(vars(p) or p._post_accumulate_grad_hooks for p in model.parameters())


# ---------------------------------------------------------------- interface

METHODS = [
    "__init__",
    "make_private",
    "make_private_with_epsilon",
    "get_epsilon",
    "save_checkpoint",
    "load_checkpoint",
    "is_compatible",
    "validate",
    "get_compatible_module",
]

# What differs on purpose. The criterion is only used in mode "ghost", where None stands for Opacus's CrossEntropyLoss();
# the model is never wrapped; is_compatible and validate do not need what they do not look at.
DIFFERENT_DEFAULTS = {
    ("make_private", "criterion"),
    ("make_private", "wrap_model"),
    ("make_private_with_epsilon", "criterion"),
    ("make_private_with_epsilon", "wrap_model"),
    ("is_compatible", "optimizer"),
    ("is_compatible", "data_loader"),
    ("validate", "optimizer"),
    ("validate", "data_loader"),
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


@pytest.mark.parametrize("mode", ["hooks", "functorch", "ghost"])
def test_the_same_model_object_comes_back(mode: str) -> None:
    """``make_private`` returns the very model, unwrapped; in ghost mode a 4-tuple with the very criterion."""
    model, criterion = _Net(), nn.CrossEntropyLoss(label_smoothing=0.1)
    keys, modules = list(model.state_dict()), [id(m) for m in model.modules()]
    with PrivacyEngineHookBased() as engine:
        out = _make(engine, model, grad_sample_mode=mode, criterion=criterion)
        assert len(out) == (4 if mode == "ghost" else 3)
        assert out[0] is model
        assert type(out[0]) is _Net
        if mode == "ghost":
            assert out[2] is criterion
        assert isinstance(out[1], torch.optim.Optimizer)
        assert isinstance(out[-1], DataLoader)
        assert list(model.state_dict()) == keys
        _train(model, out[1], out[-1])
        assert [id(m) for m in model.modules()] == modules
    assert not any(key.startswith("_module.") for key in model.state_dict())
    assert list(model.state_dict()) == keys


def test_ghost_mode_has_a_default_criterion_and_the_default_mode_is_hooks() -> None:
    """Without a criterion ghost mode gives CrossEntropyLoss; without a mode ``p.grad_sample`` is filled."""
    model = _Net()
    with PrivacyEngineHookBased() as engine:
        assert isinstance(_make(engine, model, grad_sample_mode="ghost")[2], nn.CrossEntropyLoss)
    with PrivacyEngineHookBased() as engine:
        _make(engine, model)
        x, y = _data(model)[:4]
        F.cross_entropy(model(x), y).backward()
        assert model.head.weight.grad_sample.shape == (4, 3, 6)


def test_with_epsilon_runs_the_calibrated_steps() -> None:
    """``make_private_with_epsilon`` runs exactly epochs * len(loader) steps and ends within the target."""
    model = _Net()
    with PrivacyEngineHookBased(accountant="rdp") as engine:
        out, opt, loader = engine.make_private_with_epsilon(
            module=model,
            optimizer=_sgd(model),
            data_loader=_loader(model, 5),
            target_epsilon=4.0,
            target_delta=DELTA,
            epochs=2,
            max_grad_norm=1.0,
        )
        assert out is model
        for _ in range(2):
            _train(model, opt, loader)
        assert engine.accountant.history == [(opt.noise_multiplier, 5 / 12, 6)]
        assert 0.9 * 4 < engine.get_epsilon(DELTA) <= 4
        with pytest.warns(UserWarning, match="budget"):
            assert list(loader) == []


def test_rand_on_empty_is_taken_as_opacus_takes_it() -> None:
    """Opacus's ``rand_on_empty=False`` is accepted; nothing else is needed, since empty batches always work."""
    model = _Net()
    with PrivacyEngineHookBased() as engine:
        assert _make(engine, model, rand_on_empty=False)[0] is model


# ---------------------------------------------------------------- lifetime


def test_cleanup_twice_leaves_nothing() -> None:
    """``cleanup`` removes every hook and attribute, and may be called again, or without any ``make_private``."""
    engine, model = PrivacyEngineHookBased(), _Net()
    engine.cleanup()
    _, opt, loader = _make(engine, model)
    _train(model, opt, loader)
    assert not _no_hooks(model)
    for _ in range(2):
        engine.cleanup()
        assert _no_hooks(model)
    with pytest.raises(ScopeError, match="after the end"):
        opt.step()
    assert engine.accountant.history == [(1.0, 4 / 12, 3)]


def test_context_manager_cleans_up_and_passes_exceptions() -> None:
    """Leaving ``with engine:`` by an exception cleans up and lets the exception through."""
    model = _Net()
    with pytest.raises(KeyError, match="stop"), PrivacyEngineHookBased() as engine:  # noqa: PT012
        _make(engine, model)
        F.cross_entropy(model(_data(model)[:4][0]), _data(model)[:4][1]).backward()
        raise KeyError("stop")
    assert _no_hooks(model)


def test_make_private_again_after_cleanup_goes_on_accounting() -> None:
    """After ``cleanup`` the same engine and model can be made private again; charges add up."""
    engine, model = PrivacyEngineHookBased(), _Net()
    data = _loader(model)
    for _ in range(2):
        out, opt, loader = _make(engine, model, data_loader=data)
        assert out is model
        _train(model, opt, loader)
        engine.cleanup()
    assert engine.accountant.history == [(1.0, 4 / 12, 6)]
    assert _no_hooks(model)


def test_make_private_twice_without_cleanup_is_refused() -> None:
    """A model in use cannot be made private a second time; the first time stays intact."""
    model = _Net()
    data = _loader(model)
    with PrivacyEngineHookBased() as engine:
        _, opt, loader = _make(engine, model, data_loader=data)
        for other in (engine, PrivacyEngineHookBased()):
            with pytest.raises(ScopeError, match="cleanup"):
                _make(other, model, data_loader=data)
        _train(model, opt, loader)
        assert len(engine.accountant.history) == 1
    assert _no_hooks(model)


def test_two_models_with_one_engine() -> None:
    """One engine can hold two models, cleans up both and adds up their charges, with a warning for other data."""
    one, two = _Net(), _Tied()
    with PrivacyEngineHookBased() as engine:
        _, opt1, loader1 = _make(engine, one)
        with pytest.warns(UserWarning, match="another dataset"):
            _, opt2, loader2 = _make(engine, two)
        _train(one, opt1, loader1)
        _train(two, opt2, loader2)
        assert engine.accountant.history == [(1.0, 4 / 12, 6)]
    assert _no_hooks(one)
    assert _no_hooks(two)


@pytest.mark.parametrize(
    "wrong", [{"noise_multiplier": -1}, {"clipping": "x"}, {"module": nn.Sequential(nn.BatchNorm1d(3))}]
)
def test_failing_make_private_leaves_nothing(wrong: dict[str, Any]) -> None:
    """A refused ``make_private`` attaches nothing, claims nothing and remembers no dataset."""
    engine, model = PrivacyEngineHookBased(), _Net()
    bad = wrong.get("module", model)
    with pytest.raises((InvalidArgumentError, UnsupportedModelError)):
        _make(engine, bad, **{"optimizer": _sgd(bad), **wrong})
    assert _no_hooks(model)
    assert _no_hooks(bad)
    assert engine.dataset is None
    assert engine.accountant.history == []
    with engine:
        _make(engine, model)


def test_validation_follows_the_model() -> None:
    """``validate`` and ``is_compatible`` refuse BatchNorm; ``get_compatible_module`` gives a copy that passes."""
    engine = PrivacyEngineHookBased()
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
    loader = DataLoader(TensorDataset(torch.zeros(4, 1, 4, 4)), batch_size=2)
    arguments = {"optimizer": _sgd(model), "data_loader": loader}
    assert not engine.is_compatible(module=model, **arguments)
    with pytest.raises(UnsupportedModelError, match="BatchNorm2d"):
        engine.validate(module=model, **arguments)
    fixed = engine.get_compatible_module(model)
    assert fixed is not model
    assert isinstance(model[1], nn.BatchNorm2d)
    assert isinstance(fixed[1], nn.GroupNorm)
    assert engine.is_compatible(module=fixed, optimizer=_sgd(fixed), data_loader=loader)
    assert engine.validate(module=fixed) is None


# ---------------------------------------------------------------- accounting


@pytest.mark.parametrize("accountant", ACCOUNTANTS)
def test_epsilon_equals_that_of_opacus(accountant: str) -> None:
    """For one history both engines report the same epsilon."""
    ours, theirs = PrivacyEngineHookBased(accountant=accountant), opacus.PrivacyEngine(accountant=accountant)
    for engine in (ours, theirs):
        engine.accountant.history = [(1.1, 0.02, 150)]
    assert ours.get_epsilon(DELTA) == theirs.get_epsilon(DELTA)
    assert ours.get_epsilon(delta=DELTA) == theirs.get_epsilon(delta=DELTA)
    assert 0 < ours.get_epsilon(DELTA) < math.inf


# ---------------------------------------------------------------- checkpoints


def _opacus(model: nn.Module, wrap: bool, accountant: str) -> Any:
    engine = opacus.PrivacyEngine(accountant=accountant)
    kwargs = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, "poisson_sampling": False, "wrap_model": wrap}
    out, opt, loader = engine.make_private(
        module=model, optimizer=_sgd(model), data_loader=_loader(model), noise_generator=drawn(), **kwargs
    )
    return engine, out, opt, loader


@pytest.mark.parametrize("accountant", ACCOUNTANTS)
@pytest.mark.parametrize("wrap", [True, False])
@pytest.mark.filterwarnings("ignore")
def test_checkpoint_of_opacus_loads_here_and_back(wrap: bool, accountant: str) -> None:
    """Model, momentum, accountant and schedulers travel from Opacus to here and back to Opacus unchanged."""
    model = _Net()
    theirs, hooked, opt, loader = _opacus(model, wrap, accountant)
    _train(hooked if wrap else model, opt, loader)
    if accountant != "gdp":
        theirs.accountant.step(noise_multiplier=0.7, sample_rate=0.1)
    noise, clip = StepNoise(opt, step_size=2, gamma=0.5), StepGradClip(opt, step_size=3, gamma=0.9)
    noise.step()
    clip.step()
    first = io.BytesIO()
    theirs.save_checkpoint(
        path=first,
        module=hooked if wrap else model,
        optimizer=opt,
        noise_scheduler=noise,
        grad_clip_scheduler=clip,
        checkpoint_dict={"epoch": 7},
    )
    first.seek(0)
    fresh = _Net()
    second = io.BytesIO()
    with PrivacyEngineHookBased(accountant=accountant) as ours:
        _, our_opt, _ = _make(ours, fresh)
        our_noise, our_clip = StepNoise(our_opt, step_size=1, gamma=0.1), StepGradClip(our_opt, step_size=1, gamma=0.1)
        rest = ours.load_checkpoint(
            path=first, module=fresh, optimizer=our_opt, noise_scheduler=our_noise, grad_clip_scheduler=our_clip
        )
        assert rest["epoch"] == 7
        assert equal_trees(dict(fresh.state_dict()), dict(model.state_dict()))
        assert equal_trees(our_opt.state_dict(), opt.state_dict())
        assert [tuple(entry) for entry in ours.accountant.history] == theirs.accountant.history
        assert ours.get_epsilon(DELTA) == theirs.get_epsilon(DELTA)
        assert our_noise.state_dict() == noise.state_dict()
        assert our_clip.state_dict() == clip.state_dict()
        ours.save_checkpoint(
            path=second,
            module=fresh,
            optimizer=our_opt,
            noise_scheduler=our_noise,
            grad_clip_scheduler=our_clip,
            checkpoint_dict={"epoch": 8},
        )
    second.seek(0)
    third = _Net()
    back, _, opt_back, _ = _opacus(third, wrap, accountant)
    noise_back = StepNoise(opt_back, step_size=1, gamma=0.1)
    # The keys are those of the bare model, which is also there when Opacus has wrapped it.
    rest = back.load_checkpoint(path=second, module=third, optimizer=opt_back, noise_scheduler=noise_back)
    assert rest["epoch"] == 8
    assert equal_trees(dict(third.state_dict()), dict(model.state_dict()))
    assert equal_trees(opt_back.state_dict(), opt.state_dict())
    assert back.accountant.history == theirs.accountant.history
    assert noise_back.state_dict() == noise.state_dict()


def test_checkpoint_keys_have_no_prefix_and_no_random_state(tmp_path: Any) -> None:
    """A checkpoint holds plain keys, optimizer and accountant, and no generator state of noise or sampling."""
    model, path, generator = _Net(), tmp_path / "checkpoint.pt", drawn(5)
    data = DataLoader(_data(model), batch_size=4, generator=drawn(6))
    with PrivacyEngineHookBased() as engine:
        _, opt, loader = _make(engine, model, noise_generator=generator, data_loader=data)
        _train(model, opt, loader)
        engine.save_checkpoint(path=path, module=model, optimizer=opt)
        states = [generator.get_state(), data.generator.get_state(), torch.get_rng_state()]
    saved = torch.load(path, weights_only=True)
    assert set(saved) == {"module_state_dict", "optimizer_state_dict", "privacy_accountant_state_dict"}
    assert list(saved["module_state_dict"]) == list(_Net().state_dict())

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
    plain = _Net()
    plain.load_state_dict(saved["module_state_dict"])
    assert equal_trees(dict(plain.state_dict()), dict(model.state_dict()))


class _Payload:
    """An object that only a full unpickling would build."""


@pytest.mark.filterwarnings("ignore:the checkpoint is older")
def test_checkpoint_with_an_object_is_refused_by_default(tmp_path: Any) -> None:
    """Loading is ``weights_only=True``: an arbitrary object is refused, changing nothing, until it is allowed."""
    path, model, fresh = tmp_path / "checkpoint.pt", _Net(), _Net()
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


def test_checkpoint_of_another_accountant_changes_nothing() -> None:
    """A checkpoint for another accountant is refused before model or optimizer have changed."""
    file, model, fresh = io.BytesIO(), _Net(), _Net()
    PrivacyEngineHookBased(accountant="rdp").save_checkpoint(path=file, module=model)
    file.seek(0)
    before = copy.deepcopy(fresh.state_dict())
    with pytest.raises(ValueError, match="rdp"):
        PrivacyEngineHookBased(accountant="prv").load_checkpoint(path=file, module=fresh)
    assert equal_trees(dict(before), dict(fresh.state_dict()))


@pytest.mark.parametrize("part", ["optimizer", "noise_scheduler", "grad_clip_scheduler"])
@pytest.mark.parametrize("saved", [True, False])
def test_parts_only_on_one_side_are_mentioned(saved: bool, part: str) -> None:
    """State that is saved but not asked for, or asked for but not saved, is mentioned in a warning by its name."""
    file, model = io.BytesIO(), _Net()
    with PrivacyEngineHookBased() as engine:
        _, opt, _ = _make(engine, model)
        given = {
            "optimizer": opt,
            "noise_scheduler": StepNoise(opt, step_size=1, gamma=0.5),
            "grad_clip_scheduler": StepGradClip(opt, step_size=1, gamma=0.5),
        }[part]
        engine.save_checkpoint(path=file, module=model, **({part: given} if saved else {}))
        file.seek(0)
        with pytest.warns(UserWarning, match=rf"checkpoint has {'a' if saved else 'no'} {part} state"):
            engine.load_checkpoint(path=file, module=model, **({} if saved else {part: given}))


def test_resumed_training_goes_on_as_if_never_stopped(tmp_path: Any) -> None:
    """Without noise, saving and loading between two passes gives the parameters of an uninterrupted run."""
    path, start = tmp_path / "checkpoint.pt", _Net()

    def passes(model: nn.Module, count: int, load: bool = False, save: bool = False) -> None:
        with PrivacyEngineHookBased() as engine, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _, opt, loader = _make(engine, model, noise_multiplier=0.0, poisson_sampling=False)
            if load:
                engine.load_checkpoint(path=path, module=model, optimizer=opt)
            for _ in range(count):
                _train(model, opt, loader)
            if save:
                engine.save_checkpoint(path=path, module=model, optimizer=opt)

    whole, half, rest = copy.deepcopy(start), copy.deepcopy(start), _Net()
    passes(whole, 2)
    passes(half, 1, save=True)
    passes(rest, 1, load=True)
    assert equal_trees(dict(whole.state_dict()), dict(rest.state_dict()))


# ---------------------------------------------------------------- parity


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("clipping", ["flat", "per_layer"])
@pytest.mark.parametrize("mode", ["hooks", "functorch", "ghost"])
@pytest.mark.parametrize("build", [_Net, _Conv, _Tied])
@pytest.mark.filterwarnings("ignore")
def test_clipped_update_equals_that_of_opacus(build: Any, mode: str, clipping: str, reduction: str) -> None:
    """On the same batches without noise, each step's gradient is Opacus's to 1e-6 of C, in every mode."""
    torch.manual_seed(3)
    ours, theirs = build().double(), build().double()
    theirs.load_state_dict(ours.state_dict())
    count = len(list(ours.parameters()))
    bound: Any = 0.3 if clipping == "flat" else [0.1 + 0.05 * k for k in range(count)]
    x, y = _data(ours)[:]
    x = x if build is _Net else x.double()
    settings = {
        "noise_multiplier": 0.0,
        "max_grad_norm": bound,
        "poisson_sampling": False,
        "loss_reduction": reduction,
        "clipping": clipping,
    }

    def gradients(engine: Any, model: nn.Module, **kwargs: Any) -> list[list[Tensor]]:
        data = DataLoader(TensorDataset(x, y), batch_size=4)
        out = engine.make_private(module=model, optimizer=_sgd(model), data_loader=data, **settings, **kwargs)
        seen = []
        for xb, yb in out[-1]:
            out[1].zero_grad()
            F.cross_entropy(out[0](xb), yb, reduction=reduction).backward()
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
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=0, atol=1e-6)


# ---------------------------------------------------------------- what is spent stays spent


@pytest.mark.filterwarnings("ignore:the checkpoint is older")
def test_going_back_to_a_checkpoint_does_not_refill_the_budget(tmp_path: Any) -> None:
    """Loading an earlier checkpoint of the same run restores the model; the steps taken since stay charged."""
    path, model = tmp_path / "checkpoint.pt", _Net()
    with PrivacyEngineHookBased(accountant="rdp") as engine:
        _, opt, loader = _make(engine, model)
        engine.save_checkpoint(path=path, module=model, optimizer=opt)
        _train(model, opt, loader)
        spent, epsilon = list(engine.accountant.history), engine.get_epsilon(DELTA)
        assert epsilon > 0
        engine.load_checkpoint(path=path, module=model, optimizer=opt)
        assert engine.accountant.history == spent
        assert engine.get_epsilon(DELTA) == epsilon


def test_a_checkpoint_that_knows_nothing_of_what_was_spent_is_refused(tmp_path: Any) -> None:
    """An engine with charges of its own does not load a checkpoint with other ones, and stays as it is."""
    path, model = tmp_path / "checkpoint.pt", _Net()
    other = PrivacyEngineHookBased(accountant="rdp")
    other.accountant.history = [(3.0, 0.5, 4)]
    other.save_checkpoint(path=path, module=model)
    engine = PrivacyEngineHookBased(accountant="rdp")
    engine.accountant.history = [(1.0, 0.1, 2)]
    with pytest.raises(ScopeError, match="knows nothing of"):
        engine.load_checkpoint(path=path, module=model)
    assert engine.accountant.history == [(1.0, 0.1, 2)]
