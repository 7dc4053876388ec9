"""Arguments that cannot be used: each is refused by name, value and remedy, before anything is attached or spent."""

import copy
import math
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


def _private(model: nn.Module) -> Any:
    scope = private_training(model, _sgd(model), _loader(), noise_multiplier=1.0, max_grad_norm=1.0)
    with scope as (opt, _):
        return opt


EPSILON = {"noise_multiplier": None, "target_epsilon": 3.0, "target_delta": 1e-5, "epochs": 2}

# What is passed instead of good arguments (a function gets the model), and what the message must contain.
PLAIN: list[tuple[str, dict[str, Any], list[str]]] = [
    *[
        (f"sigma {v!r}", {"noise_multiplier": v}, [f"noise_multiplier={v!r}", "standard deviation"])
        for v in (-1, -1e-9, math.nan, math.inf, -math.inf, "1", True, False, 1j, [1.0])
    ],
    *[
        (f"C {v!r}", {"max_grad_norm": v}, [f"max_grad_norm={v!r}", "greater than 0"])
        for v in (0, 0.0, -1.0, math.nan, math.inf, "1", True, None, [1.0, 1.0])
    ],
    ("no sigma, no epsilon", {"noise_multiplier": None}, ["noise_multiplier=None", "neither", "exactly one"]),
    (
        "sigma and epsilon",
        {**EPSILON, "noise_multiplier": 1.0},
        ["noise_multiplier=1.0", "both", "target_epsilon=3.0", "exactly one"],
    ),
    *[
        (f"delta {v!r}", {**EPSILON, "target_delta": v}, [f"target_delta={v!r}", "between 0 and 1"])
        for v in (0, 0.0, 1, 1.0, -1e-5, 1.5, math.nan, "1e-5", True, None)
    ],
    ("delta 2 without epsilon", {"target_delta": 2}, ["target_delta=2", "between 0 and 1"]),
    *[
        (f"epsilon {v!r}", {**EPSILON, "target_epsilon": v}, [f"target_epsilon={v!r}", "greater than 0"])
        for v in (0, -1.0, math.nan, math.inf, "3", True)
    ],
    *[
        (f"epochs {v!r}", {**EPSILON, "epochs": v}, [f"epochs={v!r}", "epochs"])
        for v in (0, -2, math.nan, math.inf, "2", True, None)
    ],
    ("epochs without epsilon", {"epochs": 2}, ["epochs=2", "target_epsilon"]),
    *[
        (f"mode {v!r}", {"grad_sample_mode": v}, [f"grad_sample_mode={v!r}", "'functorch', 'ghost', 'hooks'"])
        for v in ("ew", "Ghost", "", None, 1)
    ],
    *[
        (f"reduction {v!r}", {"loss_reduction": v}, [f"loss_reduction={v!r}", "'mean', 'sum'"])
        for v in ("none", "MEAN", None, True)
    ],
    *[
        (f"clipping {v!r}", {"clipping": v}, [f"clipping={v!r}", "'adaptive', 'automatic', 'flat'", "'per_layer'"])
        for v in ("ghost", None, 1)
    ],
    *[
        (
            f"per layer {v!r}",
            {"clipping": "per_layer", "max_grad_norm": v},
            ["max_grad_norm", repr(v), "each of the 2 trainable tensors"],
        )
        for v in ([1.0], [1.0, 1.0, 1.0], [], 1.0, "ab")
    ],
    *[
        (
            f"per layer {v!r}",
            {"clipping": "per_layer", "max_grad_norm": [1.0, v]},
            [f"max_grad_norm[1]={v!r}", "each of the 2 trainable tensors"],
        )
        for v in (0.0, -1.0, math.nan, "1")
    ],
    *[
        (
            f"per group {v!r}",
            {"clipping": "per_group", "max_grad_norm": v},
            ["max_grad_norm=", repr(v), "mapping from name patterns"],
        )
        for v in (1.0, [1.0, 1.0], "*", None, {0: 1.0}, {None: 1.0})
    ],
    *[
        (
            f"{clipping} {v!r}",
            {"clipping": clipping, "max_grad_norm": v},
            [f"max_grad_norm={v!r}", *parts],
        )
        for clipping in ("per_layer", "per_group")
        for v, parts in (
            ({}, ["no pattern matches the trainable parameters a.weight, b.weight", '"*" at the end']),
            ({"a.*": 1.0}, ["no pattern matches the trainable parameters b.weight", '"*" at the end']),
            ({"A.*": 1.0, "b.*": 1.0}, ["no pattern matches the trainable parameters a.weight"]),
            ({"*": 1.0, "c.*": 1.0}, ["'c.*' matches no trainable parameter", "there are a.weight, b.weight"]),
            ({"*": 1.0, "a.*": 1.0}, ["'a.*' comes too late", "Move it up"]),
        )
    ],
    *[
        (
            f"per group bound {v!r}",
            {"clipping": "per_group", "max_grad_norm": {"a.*": 1.0, "*": v}},
            [f"max_grad_norm['*']={v!r}", "greater than 0"],
        )
        for v in (0.0, -1.0, math.nan, math.inf, "1", None, True)
    ],
    *[
        (
            f"{clipping} C {v!r}",
            {"clipping": clipping, "max_grad_norm": v},
            [f"max_grad_norm={v!r}", "greater than 0"],
        )
        for clipping in ("automatic", "adaptive")
        for v in (0.0, math.nan, None, [1.0, 1.0], {"*": 1.0})
    ],
    ("mapping for flat", {"max_grad_norm": {"*": 1.0}}, ["max_grad_norm={'*': 1.0}", "greater than 0"]),
    *[
        (
            f"options {v!r}",
            {"clipping": "automatic", "clipping_options": v},
            [f"clipping_options={v!r}", "a dictionary"],
        )
        for v in (0.01, "gamma", ["gamma"])
    ],
    *[
        (
            f"options of {clipping}",
            {"clipping": clipping, "max_grad_norm": c, "clipping_options": {"gamma": 0.01}},
            ["clipping_options={'gamma': 0.01}", f"clipping='{clipping}' has no options", "leave it out"],
        )
        for clipping, c in (("flat", 1.0), ("per_layer", [1.0, 1.0]), ("per_group", {"*": 1.0}))
    ],
    (
        "option of another",
        {"clipping": "automatic", "clipping_options": {"min_clipbound": 1.0}},
        ["no 'min_clipbound'", "clipping='automatic' are 'gamma'"],
    ),
    (
        "unknown option",
        {"clipping": "adaptive", "clipping_options": {"gamma": 0.5}},
        ["no 'gamma'", "'target_unclipped_quantile', 'clipbound_learning_rate', 'unclipped_num_std'"],
    ),
    *[
        (
            f"gamma {v!r}",
            {"clipping": "automatic", "clipping_options": {"gamma": v}},
            [f"clipping_options['gamma']={v!r}", "greater than 0"],
        )
        for v in (0.0, -0.01, math.nan, math.inf, "1", None, True)
    ],
    *[
        (
            f"{name} {v!r}",
            {"clipping": "adaptive", "clipping_options": {"unclipped_num_std": 9.0, name: v}},
            [f"clipping_options['{name}']={v!r}", *parts],
        )
        for name, values, parts in (
            ("target_unclipped_quantile", (0.0, 1.0, 1, -0.5, math.nan, "0.5", None), ["between 0 and 1"]),
            ("clipbound_learning_rate", (0.0, -0.2, math.inf, "0.2", None), ["greater than 0"]),
            ("unclipped_num_std", (0.0, -1.0, math.nan, "20"), ["greater than 0"]),
            ("min_clipbound", (0.0, -1.0, math.nan, None), ["greater than 0"]),
            ("max_clipbound", (0.0, -1.0, math.inf, None), ["greater than 0"]),
        )
        for v in values
    ],
    (
        "limits crossed",
        {"clipping": "adaptive", "clipping_options": {"min_clipbound": 2.0, "max_clipbound": 2.0}},
        ["clipping_options['min_clipbound']=2.0", "smaller than max_clipbound=2"],
    ),
    *[
        (
            f"start outside {options}",
            {"clipping": "adaptive", "clipping_options": options},
            ["max_grad_norm=1.0", "outside [min_clipbound, max_clipbound]", "Start within"],
        )
        for options in ({"min_clipbound": 1.5}, {"max_clipbound": 0.5})
    ],
    *[
        (
            f"count too cheap {sigma} {options}",
            {"clipping": "adaptive", "noise_multiplier": sigma, "clipping_options": options},
            [f"noise_multiplier={sigma!r}", most, std, "Pass clipping_options"],
        )
        # 2 sigma_b = z is refused as well: nothing would be left for the gradients. A batch of 4 gives sigma_b = 0.2.
        for sigma, options, most, std in (
            (1.0, None, "2 * unclipped_num_std = 0.4", "unclipped_num_std=0.2"),
            (1.0, {"unclipped_num_std": None}, "2 * unclipped_num_std = 0.4", "unclipped_num_std=0.2"),
            (1.0, {"unclipped_num_std": 0.5}, "2 * unclipped_num_std = 1 ", "unclipped_num_std=0.5"),
            (3.0, {"unclipped_num_std": 1.25}, "2 * unclipped_num_std = 2.5", "unclipped_num_std=1.25"),
        )
    ],
    (
        "count too cheap for epsilon",
        {**EPSILON, "clipping": "adaptive"},
        ["noise_multiplier=", "2 * unclipped_num_std = 0.4", "Pass clipping_options"],
    ),
    *[
        (f"physical {v!r}", {"max_physical_batch_size": v}, [f"max_physical_batch_size={v!r}", "1 or more"])
        for v in (0, -1, 2.0, "4", True)
    ],
    *[
        (f"rate {v!r}", {"sample_rate": v}, [f"sample_rate={v!r}", "in (0, 1]"])
        for v in (0, -0.1, 1.01, 2, math.nan, "0.1", True)
    ],
    ("rate in order", {"sample_rate": 0.5, "poisson_sampling": False}, ["sample_rate=0.5", "poisson_sampling=False"]),
    *[
        (f"{name} {v!r}", {name: v}, [f"{name}={v!r}", "True or False"])
        for name in ("batch_first", "poisson_sampling")
        for v in (1, 0, "no", None)
    ],
    ("ledger", {"ledger": "spent.jsonl"}, ["ledger='spent.jsonl'", "not available"]),
    ("self_check 1", {"self_check": 1}, ["self_check=1", "True or False"]),
    ("generator 7", {"noise_generator": 7}, ["noise_generator=7", "torch.Generator"]),
    ("generator module", {"noise_generator": torch.manual_seed}, ["noise_generator=", "torch.Generator"]),
    # the model, the optimizer and the data
    ("model None", {"model": lambda m: None}, ["model=None", "torch.nn.Module"]),
    ("model class", {"model": lambda m: nn.Linear}, ["model=", "torch.nn.Module"]),
    ("Opacus wrapper", {"model": GradSampleModule}, ["model='GradSampleModule'", "pass the module inside"]),
    ("DataParallel", {"model": nn.DataParallel}, ["model='DataParallel'", "pass the module inside"]),
    ("compiled", {"model": torch.compile}, ["model='OptimizedModule'", "pass the module inside"]),
    ("optimizer None", {"optimizer": lambda m: None}, ["optimizer=None", "torch.optim.Optimizer"]),
    ("optimizer class", {"optimizer": lambda m: torch.optim.SGD}, ["optimizer=", "torch.optim.Optimizer"]),
    (
        "foreign parameters",
        {"optimizer": lambda m: _sgd(_Net())},
        ["optimizer='SGD'", "2 of its 2", "model.parameters()"],
    ),
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
SCOPE_ONLY: list[tuple[str, dict[str, Any], list[str]]] = [
    ("criterion function", {"criterion": torch.nn.functional.mse_loss}, ["criterion=", "dp_step"]),
    *[
        (f"accountant {v!r}", {"accountant": v}, [f"accountant={v!r}", "'gdp', 'prv', 'rdp'"])
        for v in ("PRV", "moments", None, 3)
    ],
    ("secure mode", {"secure_mode": True}, ["secure_mode=True", "secure_mode=False"]),
    *[(f"secure mode {v!r}", {"secure_mode": v}, [f"secure_mode={v!r}", "True or False"]) for v in (1, "yes", None)],
]


class _Case:
    """Good objects, a bad argument, and what must not change."""

    def __init__(self, bad: dict[str, Any]) -> None:
        self.model = _Net()
        self.arguments: dict[str, Any] = {"noise_multiplier": 1.0, "max_grad_norm": 1.0}
        self.objects = {"model": self.model, "optimizer": _sgd(self.model), "loader": _loader()}
        for name, value in bad.items():
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

    def unchanged(self) -> bool:
        return self.state() == self.before


def _names(table: list[tuple[str, dict[str, Any], list[str]]]) -> list[Any]:
    return [pytest.param(bad, parts, id=name) for name, bad, parts in table]


@pytest.mark.parametrize(("bad", "parts"), _names(PLAIN + SCOPE_ONLY))
def test_private_training_refuses(bad: dict[str, Any], parts: list[str]) -> None:
    """``private_training`` names argument, value and remedy in a ValueError and changes nothing."""
    case = _Case(bad)
    with pytest.raises(InvalidArgumentError) as caught:
        private_training(**case.objects, **case.arguments)
    message = str(caught.value)
    assert [part for part in parts if part not in message] == []
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, DPHooksError)
    assert case.unchanged()


@pytest.mark.parametrize(("bad", "parts"), _names(PLAIN))
def test_engine_refuses(bad: dict[str, Any], parts: list[str]) -> None:
    """The engine refuses the same arguments, spends nothing, and can be used afterwards."""
    case = _Case(bad)
    engine = PrivacyEngineHookBased(accountant="rdp")
    arguments = dict(case.arguments)
    if arguments["noise_multiplier"] is None and arguments.get("target_epsilon") is not None:
        make = engine.make_private_with_epsilon
        del arguments["noise_multiplier"]
    else:
        make = engine.make_private
    objects = {
        "module": case.objects["model"],
        "optimizer": case.objects["optimizer"],
        "data_loader": case.objects["loader"],
    }
    with pytest.raises(InvalidArgumentError) as caught:
        make(**objects, **arguments)
    message = str(caught.value)
    assert [part for part in parts if part not in message] == []
    assert case.unchanged()
    assert engine.accountant.history == []
    assert engine.get_epsilon(1e-5) == 0
    model = _Net()
    with engine:
        out, *_ = engine.make_private(
            module=model, optimizer=_sgd(model), data_loader=_loader(), noise_multiplier=1.0, max_grad_norm=1.0
        )
        assert out is model


@pytest.mark.parametrize("accountant", ["PRV", "", None, 3])
def test_engine_refuses_an_unknown_accountant(accountant: Any) -> None:
    """An engine with an accountant that does not exist is not built."""
    with pytest.raises(InvalidArgumentError, match=rf"accountant={accountant!r}.*'gdp', 'prv', 'rdp'"):
        PrivacyEngineHookBased(accountant=accountant)


@pytest.mark.parametrize("wrap", [True, None, 1])
def test_engine_refuses_to_wrap(wrap: Any) -> None:
    """``wrap_model`` is accepted as False only, with what to do."""
    case = _Case({})
    with pytest.raises(InvalidArgumentError, match=rf"wrap_model={wrap!r}.*leave the argument out"):
        PrivacyEngineHookBased().make_private(
            module=case.model,
            optimizer=case.objects["optimizer"],
            data_loader=case.objects["loader"],
            wrap_model=wrap,
            **case.arguments,
        )
    assert case.unchanged()


def test_engine_refuses_secure_mode_when_made_private() -> None:
    """An engine asked for secure noise, which does not exist yet, refuses to train rather than to pretend."""
    case = _Case({})
    with pytest.raises(InvalidArgumentError, match=r"secure_mode=True.*secure_mode=False"):
        PrivacyEngineHookBased(secure_mode=True).make_private(
            module=case.model,
            optimizer=case.objects["optimizer"],
            data_loader=case.objects["loader"],
            **case.arguments,
        )
    assert case.unchanged()


def test_unknown_argument_is_a_type_error() -> None:
    """A misspelt argument is refused, not swallowed by the engine's keyword arguments."""
    case = _Case({})
    with pytest.raises(TypeError, match="max_gradient_norm"):
        PrivacyEngineHookBased().make_private(
            module=case.model,
            optimizer=case.objects["optimizer"],
            data_loader=case.objects["loader"],
            max_gradient_norm=1.0,
            **case.arguments,
        )
    assert case.unchanged()


@pytest.mark.parametrize("delta", [0.0, 1.0, -1.0, math.nan, "x"])
def test_report_refuses_an_impossible_delta(delta: Any) -> None:
    """A report at a delta outside (0, 1) is refused by name."""
    case = _Case({})
    scope = private_training(**case.objects, **case.arguments)
    with pytest.raises(InvalidArgumentError, match="delta="):
        scope.report(delta)


# ---------------------------------------------------------------- models


class _Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.phase = nn.Parameter(torch.zeros(2, dtype=torch.complex64))


def _frozen_norm() -> nn.Module:
    return nn.BatchNorm1d(3).eval().requires_grad_(False)


UNSUPPORTED: list[tuple[str, Any, list[str]]] = [
    ("batch norm", lambda: nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), ["1 (BatchNorm1d)", "GroupNorm"]),
    (
        "batch norm without statistics",
        lambda: nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, track_running_stats=False).eval()),
        ["1 (BatchNorm1d)"],
    ),
    (
        "frozen batch norm in training mode",
        lambda: nn.Sequential(nn.Linear(3, 3), _frozen_norm().train()),
        ["1 (BatchNorm1d)"],
    ),
    (
        "instance norm with statistics",
        lambda: nn.Sequential(nn.Linear(3, 3), nn.InstanceNorm1d(3, track_running_stats=True)),
        ["1 (InstanceNorm1d)", "track_running_stats=False"],
    ),
    ("max_norm", lambda: nn.Sequential(nn.Embedding(5, 3, max_norm=1.0)), ["0 (Embedding)", "max_norm=None"]),
    (
        "scale_grad_by_freq",
        lambda: nn.Sequential(nn.EmbeddingBag(5, 3, scale_grad_by_freq=True)),
        ["0 (EmbeddingBag)", "scale_grad_by_freq=False"],
    ),
    ("complex", lambda: nn.Sequential(nn.Linear(3, 3), _Complex()), ["1.phase", "complex", "freeze"]),
    ("the model itself", lambda: nn.BatchNorm1d(3), ["the model itself (BatchNorm1d)"]),
]


@pytest.mark.parametrize(("build", "parts"), [u[1:] for u in UNSUPPORTED], ids=[u[0] for u in UNSUPPORTED])
def test_models_that_cannot_be_private_are_refused(build: Any, parts: list[str]) -> None:
    """A module that mixes samples or leaks them is named with class, reason and remedy, and stays without hooks."""
    model = build()
    optimizer, keys = _sgd(model), [set(vars(m)) for m in model.modules()]
    with pytest.raises(UnsupportedModelError) as caught:
        private_training(model, optimizer, _loader(), noise_multiplier=1.0, max_grad_norm=1.0)
    assert [part for part in [*parts, "Remedy"] if part not in str(caught.value)] == []
    assert isinstance(caught.value, NotImplementedError)
    assert keys == [set(vars(m)) for m in model.modules()]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not PrivacyEngineHookBased().is_compatible(module=model)
    with pytest.raises(UnsupportedModelError):
        PrivacyEngineHookBased().validate(module=model)


def test_every_offending_module_is_listed() -> None:
    """Two BatchNorms, an InstanceNorm with statistics and a bad embedding are all named in one error."""
    model = nn.ModuleDict(
        {
            "table": nn.Embedding(5, 3, max_norm=1.0),
            "fine": nn.Linear(3, 3),
            "block": nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3), nn.BatchNorm2d(4)),
            "style": nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
        }
    )
    with pytest.raises(UnsupportedModelError) as caught:
        private_training(model, _sgd(model), _loader(), noise_multiplier=1.0, max_grad_norm=1.0)
    message = str(caught.value)
    named = ["table (Embedding)", "block.0 (BatchNorm1d)", "block.2 (BatchNorm2d)", "style (InstanceNorm2d)"]
    assert [name for name in named if name not in message] == []
    assert "fine" not in message
    assert message.startswith("4 module(s)")


def test_an_embedding_with_two_faults_shows_both() -> None:
    """A module refused for two reasons is listed with both, so that one correction is enough."""
    model = nn.Sequential(nn.Embedding(5, 3, max_norm=1.0, scale_grad_by_freq=True))
    with pytest.raises(UnsupportedModelError) as caught:
        private_training(model, _sgd(model), _loader(), noise_multiplier=1.0, max_grad_norm=1.0)
    assert "max_norm" in str(caught.value)
    assert "scale_grad_by_freq" in str(caught.value)


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
    with private_training(
        model, torch.optim.SGD(params, lr=0.1), _loader(), noise_multiplier=1.0, max_grad_norm=1.0
    ) as (opt, _):
        assert len(opt.params) == len(params)


def test_a_refused_model_can_be_corrected_and_used() -> None:
    """After a refusal the same model, with the offender put in eval mode and frozen, enters without complaint."""
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    optimizer = _sgd(model)
    with pytest.raises(UnsupportedModelError):
        private_training(model, optimizer, _loader(), noise_multiplier=1.0, max_grad_norm=1.0)
    model[1].eval().requires_grad_(False)
    with private_training(model, optimizer, _loader(), noise_multiplier=1.0, max_grad_norm=1.0) as (opt, _):
        assert len(opt.params) == 2
