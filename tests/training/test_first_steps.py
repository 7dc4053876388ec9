"""What a new user writes first, and what is said when it is not quite right."""

import inspect
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dp_hooks import PrivateTraining, private_training
from dp_hooks.errors import ScopeError


def scope_over(model: nn.Module, **kwargs: Any) -> PrivateTraining:
    """Return a scope over ``model`` and twelve examples, four to a batch."""
    data = TensorDataset(torch.randn(12, 3), torch.randn(12, 1))
    kwargs = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, "accountant": "rdp", **kwargs}
    return private_training(model, torch.optim.SGD(model.parameters(), lr=0.1), DataLoader(data, batch_size=4), **kwargs)


def train(model: nn.Module, scope: PrivateTraining) -> None:
    """Take the steps of one pass."""
    with scope as (opt, loader):
        for x, y in loader:
            opt.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
            opt.step()


@pytest.mark.parametrize("use", [lambda scope: tuple(scope), lambda scope: scope(nn.Linear(3, 1)), list, iter])
def test_a_scope_that_is_not_entered_says_how_to(use: Any) -> None:
    """Unpacking, iterating or calling a scope names the with statement; the scope can be entered afterwards."""
    model = nn.Linear(3, 1)
    scope = scope_over(model)
    with pytest.raises(ScopeError, match=r"with private_training\(\.\.\.\) as \(opt, loader\):"):
        use(scope)
    train(model, scope)
    assert scope.steps == 3


def test_opt_and_loader_come_from_the_with_statement() -> None:
    """``opt, loader = private_training(...)`` is the mistake, and the error shows the line to write."""
    with pytest.raises(ScopeError, match=r"with private_training\(\.\.\.\) as \(opt, loader\):"):
        _opt, _loader = scope_over(nn.Linear(3, 1))


def test_the_signature_and_the_help_show_every_argument() -> None:
    """``inspect.signature(private_training)`` has all arguments and defaults, and the docstring has a line for each."""
    parameters = inspect.signature(private_training).parameters
    doc = inspect.getdoc(private_training)
    assert doc is not None
    assert list(parameters)[:3] == ["model", "optimizer", "loader"]
    assert parameters["grad_sample_mode"].default == "ghost"
    assert parameters["max_grad_norm"].default is inspect.Parameter.empty
    assert [name for name in parameters if f"\n    {name}: " not in doc] == []
    assert "Guarantee: " in doc


def test_a_private_scope_is_a_private_training() -> None:
    """What ``private_training`` returns is the class that annotations name."""
    assert isinstance(scope_over(nn.Linear(3, 1)), PrivateTraining)


@pytest.mark.parametrize("checked", [True, False])
def test_the_report_says_in_plain_words_whether_the_loss_was_checked(checked: bool) -> None:
    """With a criterion the loss is verified; without one the report says what to do, and nothing that sounds like failure."""
    model, criterion = nn.Linear(3, 1), nn.MSELoss()
    scope = scope_over(model, criterion=criterion if checked else None)
    with scope as (opt, loader):
        for x, y in loader:
            opt.zero_grad()
            criterion(model(x), y).backward()
            opt.step()
    (line,) = [line for line in str(scope.report()).splitlines() if line.split()[0] == "loss"]
    said = line.split(maxsplit=1)[1]
    assert said == ("verified" if checked else "not checked (pass criterion=..., or train with @dp_step)")


def test_the_loader_refuses_by_itself_after_the_end() -> None:
    """A pass that began inside the scope, and one that begins after it, are refused; the original loader goes on."""
    model = nn.Linear(3, 1)
    with scope_over(model, sample_rate=1.0) as (_, loader):
        began = iter(loader)
        with scope_over(nn.Linear(3, 1)) as (_, other):
            next(iter(other))
        next(began)
        again = iter(loader)
    for use in (lambda: next(again), lambda: iter(loader)):
        with pytest.raises(ScopeError, match="private loader was used after the end of its scope"):
            use()


class Many(nn.Module):
    """A layer that is used, and many that are not."""

    def __init__(self, unused: int) -> None:
        super().__init__()
        self.used = nn.Linear(3, 1)
        self.spare = nn.ModuleList(nn.Linear(1, 1) for _ in range(unused))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.used(x)


def test_unused_parameters_are_named_once_and_cheaply(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fifty unused layers give one warning at the user's own line, and the names in the model are not looked up for each."""
    model, walks = Many(50), []
    named = nn.Module.named_parameters
    with scope_over(model, self_check=False, sample_rate=1.0) as (opt, loader):
        (x, y), *_ = loader
        nn.functional.mse_loss(model(x), y).backward()

        def counted(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            walks.append(module)
            return named(module, *args, **kwargs)

        monkeypatch.setattr(nn.Module, "named_parameters", counted)
        with pytest.warns(UserWarning, match=r"the loss did not reach spare\.0\.weight, .*, 97 more: such") as caught:
            opt.step()
        monkeypatch.undo()
        assert caught[0].filename == __file__
        assert len(walks) <= 8
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for x, y in loader:
                opt.zero_grad()
                nn.functional.mse_loss(model(x), y).backward()
                opt.step()


def test_a_step_without_examples_calls_no_parameter_unused() -> None:
    """A step of noise alone has no loss that could have reached anything: no warning, be the batch drawn empty or not."""
    with scope_over(nn.Linear(3, 1), self_check=False, sample_rate=1.0) as (opt, loader), warnings.catch_warnings():
        warnings.simplefilter("error")
        next(iter(loader))
        opt.step_empty()
