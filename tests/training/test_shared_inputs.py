"""Inputs that all samples share and that have rows of their own: the input that counts samples may come after them."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dp_hooks.errors import ScopeError

from ..models import Net, drawn, each_mode
from ..reference import rows_by_backward
from .helpers import POISSON, Run

N, NODES = 8, 6
ADJACENCY = torch.rand(NODES, NODES, generator=drawn(7), dtype=torch.float64)


def graph_net() -> nn.Module:
    """A graph convolution, called with the adjacency matrix of all samples and features of the nodes of each."""
    return Net(lambda m, adjacency, x: m.b((adjacency @ m.a(x)).relu().mean(1)), a=nn.Linear(4, 5), b=nn.Linear(5, 3)).double()


def graphs() -> TensorDataset:
    return TensorDataset(torch.randn(N, NODES, 4, generator=drawn(8), dtype=torch.float64), torch.arange(N) % 3)


def losses(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(ADJACENCY, x), y, reduction="none")


def by_loop(model: nn.Module, opt: Any, x: Tensor, y: Tensor) -> None:
    losses(model, x, y).mean().backward()
    opt.step()


@each_mode
@pytest.mark.parametrize("checked", [True, False], ids=["checked", "unchecked"])
@pytest.mark.parametrize("parts", [None, 3], ids=["whole", "in parts"])
def test_an_adjacency_matrix_may_be_the_first_input(parts: int | None, checked: bool, mode: str) -> None:
    """How many samples a call is on is told by the input that has as many rows as the batch (R8)."""
    options = {"grad_sample_mode": mode, "self_check": checked, "max_physical_batch_size": parts}
    run = Run(graph_net(), loader=DataLoader(graphs(), batch_size=N), **options)
    run.trained(by=by_loop)
    x, y = graphs().tensors
    rows = rows_by_backward(run.first, [losses(run.first, x[i : i + 1], y[i : i + 1]).sum() for i in range(N)])
    run.assert_moved(rows, divided_by=N)


def test_rows_of_the_batch_are_not_taken_for_what_is_shared() -> None:
    """A call on a part of the batch is told as such, also beside an input with all labels."""
    run = Run(Net(lambda m, x, labels: m.a(x), a=nn.Linear(4, 3)).double(), loader=DataLoader(graphs(), batch_size=N), **POISSON)
    with run as (model, _, loader):
        x, y = next(iter(loader))
        with pytest.raises(ScopeError, match=f"on 4 rows, but the private loader handed out {N} examples"):
            F.cross_entropy(model(x[:4, 0], y), y[:4]).backward()
    run.assert_untouched()


MADE_OF_THE_BATCH = {"its mean": lambda x: x.mean(0, keepdim=True), "all and one more": lambda x: torch.cat([x, x[:1]])}


@pytest.mark.parametrize("made", MADE_OF_THE_BATCH)
def test_what_was_made_of_the_batch_is_no_shared_input(made: str) -> None:
    """A first input whose rows are such as the batch has is counted, whatever comes after it."""
    net = Net(lambda m, bank, x: m.b((m.a(x) @ bank.T).softmax(-1) @ m.a(bank)), a=nn.Linear(4, 4), b=nn.Linear(4, 3)).double()
    run = Run(net, loader=DataLoader(graphs(), batch_size=N), **POISSON)
    with run as (model, _, loader):
        x, y = next(iter(loader))
        x = x[:, 0].clone()
        with pytest.raises(ScopeError, match=f"but the private loader handed out {N} examples"):
            F.cross_entropy(model(MADE_OF_THE_BATCH[made](x), x), y).backward()
    run.assert_untouched()
