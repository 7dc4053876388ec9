"""What a refusal says: the cause that users have to find, and what they can do instead, each by its name."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.ao import quantization
from torch.utils.data import DataLoader, TensorDataset

from dp_hooks import private_training
from dp_hooks.errors import DPHooksError

from ..models import Net, randn, scope_over, values

N = 8


def time_first(rows: list[Any]) -> Any:
    return torch.stack([x for x, _ in rows], 1), torch.stack([y for _, y in rows])


def recurrent(self: Any, x: Tensor) -> Tensor:
    h = x.new_zeros(x.shape[1], 5)
    for now in x:
        h = (self.a(now) + self.b(h)).tanh()
    return self.c(h)


def last_of_lstm(self: Any, x: Tensor) -> Tensor:
    return self.c(self.rnn(x)[0][-1])


def mean_over_time(self: Any, x: Tensor) -> Tensor:
    return self.c(self.a(x).tanh().mean(0))


def attention(self: Any, x: Tensor) -> Tensor:
    return self.c(self.a(self.encoder(x)).mean(0))


SEQUENCES = {
    "written out": lambda: Net(recurrent, a=nn.Linear(4, 5), b=nn.Linear(5, 5), c=nn.Linear(5, 3)),
    "nn.LSTM": lambda: Net(last_of_lstm, rnn=nn.LSTM(4, 5), c=nn.Linear(5, 3)),
    "mean over time": lambda: Net(mean_over_time, a=nn.Linear(4, 5), c=nn.Linear(5, 3)),
    "transformer": lambda: Net(
        attention, encoder=nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0), a=nn.Linear(4, 5), c=nn.Linear(5, 3)
    ),
}


def message(model: nn.Module, data: Tensor, backward: Callable[[nn.Module, Tensor, Tensor], None], **loader: Any) -> str:
    """What a first step is refused with; nothing moves."""
    before = values(model)
    dataset = TensorDataset(data, torch.arange(len(data)) % 3)

    def step(model: nn.Module, opt: Any, x: Tensor, y: Tensor) -> None:
        backward(model, x, y)
        opt.step()

    options: dict[str, Any] = {"poisson_sampling": False, "noise_multiplier": 1.0, "max_grad_norm": 1.0}
    opt = torch.optim.SGD(model.parameters(), lr=1.0)
    with private_training(model, opt, DataLoader(dataset, batch_size=N, **loader), **options) as (opt, own):
        x, y = next(iter(own))
        with pytest.raises(DPHooksError) as refused:
            step(model, opt, x, y)
    assert all(torch.equal(a, b) for a, b in zip(before, values(model), strict=True))
    return str(refused.value)


def cross_entropy(model: nn.Module, x: Tensor, y: Tensor) -> None:
    F.cross_entropy(model(x), y).backward()


@pytest.mark.parametrize("steps", [5, N], ids=["fewer steps than examples", "as many steps as examples"])
@pytest.mark.parametrize("model", SEQUENCES)
def test_a_sample_axis_that_was_not_declared_is_named(model: str, steps: int) -> None:
    """Time-first sequences without ``batch_first=False`` are refused with that cause, also where both axes are as long."""
    assert "batch_first=False" in message(SEQUENCES[model](), randn(2 * N, steps, 4).float(), cross_entropy, collate_fn=time_first)


PENALTIES = {
    "on a parameter": lambda model: 1e-3 * model.weight.square().sum(),
    "on all parameters": lambda model: 1e-3 * sum(p.abs().sum() for p in model.parameters()),
    "on a norm": lambda model: 1e-3 * torch.linalg.matrix_norm(model.weight, 2),
}


@pytest.mark.parametrize("penalty", PENALTIES)
def test_a_penalty_on_the_weights_names_weight_decay(penalty: str) -> None:
    """A loss with a term of the weights alone is refused with what takes its place."""

    def penalised(model: nn.Module, x: Tensor, y: Tensor) -> None:
        (F.cross_entropy(model(x), y) + PENALTIES[penalty](model)).backward()

    assert "weight_decay" in message(nn.Linear(4, 3), randn(2 * N, 4).float(), penalised)


def quantised(observing: bool) -> nn.Module:
    """A model prepared for quantisation-aware training, whose ranges were calibrated before."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the module is going to move
        model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).train()
        model.qconfig = quantization.get_default_qat_qconfig("fbgemm")
        quantization.prepare_qat(model, inplace=True)
        model(randn(N, 4).float())
    return model if observing else model.apply(quantization.disable_observer)


def test_observers_of_quantisation_are_named() -> None:
    """Ranges that follow private samples are refused by the names of buffers, and trained on once they are kept (V7)."""
    for _ in range(2):
        assert "an observer" in message(quantised(True), randn(2 * N, 4).float(), cross_entropy)
    model = quantised(False)
    before = values(model)
    data = TensorDataset(randn(N, 4).float(), torch.arange(N) % 3)
    with scope_over(model, loader=DataLoader(data, batch_size=N)) as (opt, loader):
        for x, y in loader:
            cross_entropy(model, x, y)
            opt.step()
    assert any(not torch.equal(a, b) for a, b in zip(before, values(model), strict=True))
