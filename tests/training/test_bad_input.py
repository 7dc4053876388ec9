"""Arguments that cannot be used: each is refused by name, value and remedy, before anything is attached or spent."""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from opacus import GradSampleModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dp_hooks import PrivacyEngineHookBased, private_training
from dp_hooks.errors import DPHooksError, InvalidArgumentError, UnsupportedModelError


class _Net(nn.Module):
    """Two trainable tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 2, bias=False)
        self.b = nn.Linear(2, 1, bias=False)

    def forward(self, x: Any) -> Any:
        return self.b(self.a(x))


def _loader(n: int = 8, batch: int = 4, **kwargs: Any) -> DataLoader:
    return DataLoader(TensorDataset(torch.zeros(n, 3)), batch_size=batch, **kwargs)


def _sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def _frozen(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = _sgd(model)
    model.requires_grad_(False)
    return optimizer


def _scope(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> Any:
    """Return a scope with good arguments."""
    return private_training(model, optimizer or _sgd(model), _loader(), noise_multiplier=1.0, max_grad_norm=1.0)


def _private(model: nn.Module) -> Any:
    with _scope(model) as (opt, _):
        return opt


EPSILON = {"noise_multiplier": None, "target_epsilon": 3.0, "target_delta": 1e-5, "epochs": 2}

NAN, INF = math.nan, math.inf
Row = tuple[str, dict[str, Any], list[str]]


def each(name: str, values: Sequence[Any], *parts: str, shown: Callable[[Any], str] | None = None, **others: Any) -> list[Row]:
    """Return rows in which the argument ``name`` is each of ``values``; the message shows it and contains ``parts``."""
    shown = shown or (lambda v: f"{name}={v!r}")
    label = f"{name} {' '.join(map(str, others.values()))} "
    return [(f"{label}{v!r}", {**others, name: v}, [shown(v), *parts]) for v in values]


def options(clipping: str, name: str, values: Sequence[Any], *parts: str) -> list[Row]:
    """Return rows in which one option of a clipping function is each of ``values``."""
    good = {"unclipped_num_std": 9.0} if clipping == "adaptive" else {}
    rows = [{**good, name: v} for v in values]
    return each("clipping_options", rows, *parts, shown=lambda v: f"clipping_options['{name}']={v[name]!r}", clipping=clipping)


def bound_at(key: Any) -> Callable[[Any], str]:
    """Return what shows one of several bounds."""
    return lambda bounds: f"max_grad_norm[{key!r}]={bounds[key]!r}"


UNUSABLE = (0.0, -1.0, NAN, INF, "1", None, True)
MAPPING = ("max_grad_norm", "mapping from name patterns")
GAMMA = {"gamma": 0.01}
EACH = "each of the 2 trainable tensors"
UNMATCHED = "no pattern matches the trainable parameters"
OUTSIDE = ("max_grad_norm=1.0", "outside [min_clipbound, max_clipbound]", "Start within")
POSITIVE = "greater than 0"
CHEAP = ("2 * unclipped_num_std", "Pass clipping_options")


def adaptive(options: dict[str, Any] | None, *parts: str, **others: Any) -> Row:
    """Return a row with options of adaptive clipping."""
    more = {} if options is None else {"clipping_options": options}
    return f"adaptive {options} {others}", {"clipping": "adaptive", **more, **others}, list(parts)


# What is passed instead of good arguments (a function gets the model), and what the message must contain.
PLAIN: list[Row] = [
    *each("noise_multiplier", (-1, -1e-9, NAN, INF, -INF, "1", True, False, 1j, [1.0]), "standard deviation"),
    *each("max_grad_norm", (0, 0.0, -1.0, NAN, INF, "1", True, None, [1.0, 1.0], {"*": 1.0}), POSITIVE),
    ("no sigma, no epsilon", {"noise_multiplier": None}, ["noise_multiplier=None", "neither", "exactly one"]),
    (
        "sigma and epsilon",
        {**EPSILON, "noise_multiplier": 1.0},
        ["noise_multiplier=1.0", "both", "target_epsilon=3.0", "exactly one"],
    ),
    *each("target_delta", (0, 0.0, 1, 1.0, -1e-5, 1.5, NAN, "1e-5", True, None), "between 0 and 1", **EPSILON),
    *each("target_delta", (2,), "between 0 and 1"),
    *each("target_epsilon", (0, -1.0, NAN, INF, "3", True), POSITIVE, **EPSILON),
    *each("epochs", (0, -2, NAN, INF, "2", True, None), "epochs", **EPSILON),
    *each("epochs", (2,), "target_epsilon"),
    *each("grad_sample_mode", ("ew", "Ghost", "", None, 1), "'functorch', 'ghost', 'hooks'"),
    *each("loss_reduction", ("none", "MEAN", None, True), "'mean', 'sum'"),
    *each("clipping", ("ghost", None, 1), "'adaptive', 'automatic', 'flat'", "'per_layer'"),
    *each("max_grad_norm", ([1.0], [1.0, 1.0, 1.0], [], 1.0, "ab"), "max_grad_norm", EACH, shown=repr, clipping="per_layer"),
    *each("max_grad_norm", (1.0, [1.0, 1.0], "*", None, {0: 1.0}, {None: 1.0}), *MAPPING, shown=repr, clipping="per_group"),
    *each("max_grad_norm", [[1.0, v] for v in (0.0, -1.0, NAN, "1")], EACH, shown=bound_at(1), clipping="per_layer"),
    *[
        row
        for clipping in ("per_layer", "per_group")
        for v, parts in (
            ({}, (f"{UNMATCHED} a.weight, b.weight", '"*" at the end')),
            ({"a.*": 1.0}, (f"{UNMATCHED} b.weight", '"*" at the end')),
            ({"A.*": 1.0, "b.*": 1.0}, (f"{UNMATCHED} a.weight",)),
            ({"*": 1.0, "c.*": 1.0}, ("'c.*' matches no trainable parameter", "there are a.weight, b.weight")),
            ({"*": 1.0, "a.*": 1.0}, ("'a.*' comes too late", "Move it up")),
        )
        for row in each("max_grad_norm", (v,), *parts, clipping=clipping)
    ],
    *each("max_grad_norm", [{"a.*": 1.0, "*": v} for v in UNUSABLE], POSITIVE, shown=bound_at("*"), clipping="per_group"),
    *each("max_grad_norm", (0.0, NAN, None, [1.0, 1.0], {"*": 1.0}), POSITIVE, clipping="automatic"),
    *each("max_grad_norm", (0.0, NAN, None, [1.0, 1.0], {"*": 1.0}), POSITIVE, clipping="adaptive"),
    *each("clipping_options", (0.01, "gamma", ["gamma"]), "a dictionary", clipping="automatic"),
    *[
        row
        for kind, c in (("flat", 1.0), ("per_layer", [1.0, 1.0]), ("per_group", {"*": 1.0}))
        for row in each(
            "clipping_options", [GAMMA], f"clipping={kind!r} has no options", "leave it out", clipping=kind, max_grad_norm=c
        )
    ],
    (
        "option of another",
        {"clipping": "automatic", "clipping_options": {"min_clipbound": 1.0}},
        ["no 'min_clipbound'", "clipping='automatic' are 'gamma'"],
    ),
    adaptive({"gamma": 0.5}, "no 'gamma'", "'target_unclipped_quantile', 'clipbound_learning_rate', 'unclipped_num_std'"),
    *options("automatic", "gamma", (0.0, -0.01, NAN, INF, "1", None, True), POSITIVE),
    *options("adaptive", "target_unclipped_quantile", (0.0, 1.0, 1, -0.5, NAN, "0.5", None), "between 0 and 1"),
    *options("adaptive", "clipbound_learning_rate", (0.0, -0.2, INF, "0.2", None), POSITIVE),
    *options("adaptive", "unclipped_num_std", (0.0, -1.0, NAN, "20"), POSITIVE),
    *options("adaptive", "min_clipbound", (0.0, -1.0, NAN, None), POSITIVE),
    *options("adaptive", "max_clipbound", (0.0, -1.0, INF, None), POSITIVE),
    adaptive({"min_clipbound": 2.0, "max_clipbound": 2.0}, "clipping_options['min_clipbound']=2.0", "smaller than max_clipbound=2"),
    adaptive({"min_clipbound": 1.5}, *OUTSIDE),
    adaptive({"max_clipbound": 0.5}, *OUTSIDE),
    # 2 sigma_b = z is refused as well: nothing would be left for the gradients. A batch of 4 gives sigma_b = 0.2.
    *[
        adaptive(v, f"noise_multiplier={z!r}", f"{CHEAP[0]} = {most}", std, CHEAP[1], noise_multiplier=z)
        for z, v, most, std in (
            (1.0, None, "0.4", "unclipped_num_std=0.2"),
            (1.0, {"unclipped_num_std": None}, "0.4", "unclipped_num_std=0.2"),
            (1.0, {"unclipped_num_std": 0.5}, "1 ", "unclipped_num_std=0.5"),
            (3.0, {"unclipped_num_std": 1.25}, "2.5", "unclipped_num_std=1.25"),
        )
    ],
    adaptive(None, "noise_multiplier=", f"{CHEAP[0]} = 0.4", CHEAP[1], **EPSILON),
    *each("max_physical_batch_size", (0, -1, 2.0, "4", True), "1 or more"),
    *each("sample_rate", (0, -0.1, 1.01, 2, NAN, "0.1", True), "in (0, 1]"),
    *each("sample_rate", (0.5,), "poisson_sampling=False", poisson_sampling=False),
    *each("batch_first", (1, 0, "no", None), "True or False"),
    *each("poisson_sampling", (1, 0, "no"), "True or False"),
    *each("self_check", (1,), "True or False"),
    *each("spot_check_rate", (-0.1, 1.5, True, "often", float("nan")), "0 to 1"),
    *each("noise_generator", (7,), "torch.Generator"),
    *each("noise_generator", (torch.Generator,), "torch.Generator", shown=lambda v: "noise_generator="),
    # the model, the optimizer and the data
    ("model None", {"model": lambda m: None}, ["model=None", "torch.nn.Module"]),
    ("model class", {"model": lambda m: nn.Linear}, ["model=", "torch.nn.Module"]),
    ("Opacus wrapper", {"model": GradSampleModule}, ["model='GradSampleModule'", "pass the module inside"]),
    ("DataParallel", {"model": nn.DataParallel}, ["model='DataParallel'", "pass the module inside"]),
    (
        "compiled wrapper",
        {"model": lambda m: torch.compile(nn.DataParallel(m))},
        ["model='DataParallel'", "pass the module inside"],
    ),
    ("optimizer None", {"optimizer": lambda m: None}, ["optimizer=None", "torch.optim.Optimizer"]),
    ("optimizer class", {"optimizer": lambda m: torch.optim.SGD}, ["optimizer=", "torch.optim.Optimizer"]),
    ("foreign", {"optimizer": lambda m: _sgd(_Net())}, ["optimizer='SGD'", "2 of its 2", "model.parameters()"]),
    (
        "one foreign parameter",
        {"optimizer": lambda m: torch.optim.SGD([*m.parameters(), nn.Parameter(torch.zeros(5))], lr=0.1)},
        ["optimizer='SGD'", "1 of its 3", "(5,)", "model.parameters()"],
    ),
    ("all frozen", {"optimizer": _frozen}, ["optimizer='SGD'", "trainable", "requires_grad_(True)"]),
    ("LBFGS", {"optimizer": lambda m: torch.optim.LBFGS(m.parameters())}, ["optimizer=", "LBFGS", "SGD"]),
    ("SparseAdam", {"optimizer": lambda m: torch.optim.SparseAdam(list(m.parameters()))}, ["SparseAdam", "Use Adam"]),
    ("private optimizer", {"optimizer": _private}, ["optimizer='PrivateOptimizer'", "made from"]),
    ("loader None", {"loader": lambda m: None}, ["loader=None", "DataLoader"]),
    ("dataset", {"loader": lambda m: TensorDataset(torch.zeros(4, 3))}, ["loader=", "DataLoader"]),
    ("empty dataset", {"loader": lambda m: _loader(0)}, ["loader=", "empty", "nothing to train on"]),
    ("batch too large", {"loader": lambda m: _loader(8, 9)}, ["loader=", "batch_size=9", "8 examples"]),
]
SCOPE_ONLY: list[Row] = [
    ("criterion function", {"criterion": torch.nn.functional.mse_loss}, ["criterion=", "dp_step"]),
    *each("accountant", ("PRV", "moments", None, 3), "'gdp', 'pld', 'prv', 'rdp'"),
    *each("secure_mode", (1, "yes", None), "True or False"),
    ("repeatable noise", {"secure_mode": True, "noise_generator": torch.Generator()}, ["noise_generator=", "leave out one"]),
    (
        "repeatable batches",
        {"secure_mode": True, "loader": lambda m: _loader(generator=torch.Generator())},
        ["loader=", "without generator="],
    ),
]


class _Case:
    """Good objects, a bad argument, and what must not change."""

    def __init__(self, bad: dict[str, Any] | None = None, model: nn.Module | None = None) -> None:
        self.model = model or _Net()
        self.arguments: dict[str, Any] = {"noise_multiplier": 1.0, "max_grad_norm": 1.0}
        self.objects = {"model": self.model, "optimizer": _sgd(self.model), "loader": _loader()}
        for name, value in (bad or {}).items():
            if name in self.objects:
                self.objects[name] = value(self.model)
            else:
                self.arguments[name] = value
        self.before = self.state()

    def state(self) -> list[Any]:
        things = [*self.model.modules(), *self.model.parameters(), self.objects["optimizer"]]
        return [
            {key: copy.copy(value) if isinstance(value, dict) else id(value) for key, value in vars(thing).items()}
            for thing in things
            if hasattr(thing, "__dict__") and not isinstance(thing, type)
        ] + [p.grad for p in self.model.parameters()]

    def scope(self) -> Any:
        return private_training(**self.objects, **self.arguments)

    def engine(self, engine: PrivacyEngineHookBased, **more: Any) -> Any:
        """The same by the engine's names."""
        model, optimizer, loader = self.objects.values()
        objects = {"module": model, "optimizer": optimizer, "data_loader": loader}
        arguments = {**self.arguments, **more}
        if arguments["noise_multiplier"] is None and arguments.get("target_epsilon") is not None:
            del arguments["noise_multiplier"]
            return engine.make_private_with_epsilon(**objects, **arguments)
        return engine.make_private(**objects, **arguments)

    def refused(self, call: Callable[[], Any], parts: Sequence[str]) -> InvalidArgumentError:
        """Assert that the call names all ``parts`` and changes nothing."""
        with pytest.raises(InvalidArgumentError) as caught:
            call()
        assert [part for part in parts if part not in str(caught.value)] == []
        assert self.state() == self.before
        return caught.value


def _names(table: list[Row]) -> list[Any]:
    return [pytest.param(bad, parts, id=name) for name, bad, parts in table]


@pytest.mark.parametrize(("bad", "parts"), _names(PLAIN + SCOPE_ONLY))
def test_private_training_refuses(bad: dict[str, Any], parts: list[str]) -> None:
    """``private_training`` names argument, value and remedy in a ValueError and changes nothing."""
    case = _Case(bad)
    error = case.refused(case.scope, parts)
    assert isinstance(error, ValueError)
    assert isinstance(error, DPHooksError)


@pytest.mark.parametrize(("bad", "parts"), _names(PLAIN))
def test_engine_refuses(bad: dict[str, Any], parts: list[str]) -> None:
    """The engine refuses the same arguments, spends nothing, and can be used afterwards."""
    case, engine = _Case(bad), PrivacyEngineHookBased(accountant="rdp")
    good = _Case() if set(bad) & set(case.objects) else _Case(model=case.model)
    case.refused(lambda: case.engine(engine), parts)
    assert engine.accountant.history == []
    assert engine.dataset is None
    assert engine.get_epsilon(1e-5) == 0
    with engine:
        assert good.engine(engine)[0] is good.model


@pytest.mark.parametrize("accountant", ["PRV", "", None, 3])
def test_engine_refuses_an_unknown_accountant(accountant: Any) -> None:
    """An engine with an accountant that does not exist is not built."""
    with pytest.raises(InvalidArgumentError, match=rf"accountant={accountant!r}.*'gdp', 'pld', 'prv', 'rdp'"):
        PrivacyEngineHookBased(accountant=accountant)


@pytest.mark.parametrize(
    ("engine", "more", "error", "match"),
    [
        *[({}, {"wrap_model": v}, InvalidArgumentError, rf"wrap_model={v!r}.*leave the argument out") for v in (True, None, 1)],
        (
            {"secure_mode": True},
            {"noise_generator": torch.Generator()},
            InvalidArgumentError,
            r"noise_generator=.*secure_mode=True",
        ),
        ({}, {"max_gradient_norm": 1.0}, TypeError, "max_gradient_norm"),
    ],
)
def test_engine_refuses_what_it_cannot_do(engine: Any, more: Any, error: type[Exception], match: str) -> None:
    """Wrapping, secure noise from a generator and misspelt arguments are refused rather than swallowed, and nothing changes."""
    case = _Case()
    with pytest.raises(error, match=match):
        case.engine(PrivacyEngineHookBased(**engine), **more)
    assert case.state() == case.before


def _frozen_norm() -> nn.Module:
    return nn.BatchNorm1d(3).eval().requires_grad_(False)


def _after_linear(module: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 3), module)


UNSUPPORTED: list[tuple[Callable[[], nn.Module], list[str]]] = [
    (lambda: _after_linear(nn.BatchNorm1d(3)), ["1 (BatchNorm1d)", "GroupNorm"]),
    (lambda: _after_linear(nn.BatchNorm1d(3, track_running_stats=False).eval()), ["1 (BatchNorm1d)"]),
    (lambda: _after_linear(_frozen_norm().train()), ["1 (BatchNorm1d)"]),
    (lambda: _after_linear(nn.InstanceNorm1d(3, track_running_stats=True)), ["1 (InstanceNorm1d)", "track_running_stats=False"]),
    (lambda: nn.Sequential(nn.Embedding(5, 3, max_norm=1.0)), ["0 (Embedding)", "max_norm=None"]),
    (lambda: nn.Sequential(nn.EmbeddingBag(5, 3, scale_grad_by_freq=True)), ["0 (EmbeddingBag)", "scale_grad_by_freq=False"]),
    (lambda: nn.BatchNorm1d(3), ["the model itself (BatchNorm1d)"]),
    # two faults of one module are both shown, so that one correction is enough
    (
        lambda: nn.Sequential(nn.Embedding(5, 3, max_norm=1.0, scale_grad_by_freq=True)),
        ["0 (Embedding)", "max_norm", "scale_grad_by_freq"],
    ),
]


@pytest.mark.parametrize(("build", "parts"), UNSUPPORTED, ids=[u[1][0] for u in UNSUPPORTED])
def test_models_that_cannot_be_private_are_refused(build: Any, parts: list[str]) -> None:
    """A module that mixes samples or leaks them is named with class, reason and remedy, and stays without hooks."""
    model = build()
    optimizer, keys = _sgd(model), [set(vars(m)) for m in model.modules()]
    with pytest.raises(UnsupportedModelError) as caught:
        _scope(model, optimizer)
    assert [part for part in [*parts, "Remedy"] if part not in str(caught.value)] == []
    assert isinstance(caught.value, NotImplementedError)
    assert keys == [set(vars(m)) for m in model.modules()]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not PrivacyEngineHookBased().is_compatible(module=model)
    engine = PrivacyEngineHookBased()
    with pytest.raises(UnsupportedModelError):
        engine.validate(module=model)
    case = _Case({"model": lambda _: model, "optimizer": lambda _: optimizer})
    with pytest.raises(UnsupportedModelError):
        case.engine(engine)
    assert engine.dataset is None
    assert engine.accountant.history == []


def test_the_first_three_offending_modules_are_named_and_all_are_counted() -> None:
    """Two BatchNorms, an InstanceNorm with statistics and a bad embedding are in one error; a mask is no reason."""
    fine = nn.Linear(3, 3)
    fine.register_buffer("mask", torch.ones(()))
    model = nn.ModuleDict(
        {
            "table": nn.Embedding(5, 3, max_norm=1.0),
            "fine": fine,
            "block": nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3), nn.BatchNorm2d(4)),
            "style": nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
        }
    )
    with pytest.raises(UnsupportedModelError) as caught:
        _scope(model)
    message = str(caught.value)
    named = ["table (Embedding)", "block.0 (BatchNorm1d)", "block.2 (BatchNorm2d)", "style (InstanceNorm2d)"]
    assert [name for name in named if name not in message] == named[3:]
    assert "... and 1 more" in message
    assert "fine" not in message
    assert message.startswith("4 module(s)")


@pytest.mark.parametrize(
    "module",
    [
        nn.InstanceNorm1d(3, affine=True),
        nn.GroupNorm(1, 3),
        _frozen_norm(),
        nn.Embedding(5, 3, max_norm=1.0).requires_grad_(False),
        nn.LSTM(3, 3),
    ],
    ids=lambda m: type(m).__name__,
)
def test_harmless_modules_are_accepted(module: nn.Module) -> None:
    """Neither frozen offenders nor modules that treat samples one by one are refused."""
    model = nn.Sequential(nn.Linear(3, 3), module)
    params = [p for p in model.parameters() if p.requires_grad]
    engine = PrivacyEngineHookBased()
    assert engine.is_compatible(module=model)
    with _scope(model, torch.optim.SGD(params, lr=0.1)) as (opt, _):
        assert len(opt.params) == len(params)


def test_a_refused_model_can_be_corrected_and_used() -> None:
    """After a refusal the same model, with the offender put in eval mode and frozen, enters without complaint."""
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    optimizer = _sgd(model)
    with pytest.raises(UnsupportedModelError):
        _scope(model, optimizer)
    model[1].eval().requires_grad_(False)
    with _scope(model, optimizer) as (opt, _):
        assert len(opt.params) == 2
