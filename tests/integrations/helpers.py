"""Models made private by the engine that has Opacus's interface."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..models import Net, drawn, examples, loader_of

DELTA = 1e-5
ACCOUNTANTS = ["prv", "rdp", "gdp"]


def text_model() -> nn.Module:
    """Embedding, norm and two linear layers over token ids."""
    return Net(
        lambda m, ids: m.head(torch.tanh(m.hidden(m.norm(m.table(ids)))).mean(1)),
        table=nn.Embedding(10, 4),
        norm=nn.LayerNorm(4),
        hidden=nn.Linear(4, 6),
        head=nn.Linear(6, 3),
    )


def twice_used() -> nn.Module:
    """One layer used twice."""
    return Net(lambda m, x: m.head(m.layer(torch.tanh(m.layer(x)))), layer=nn.Linear(4, 4), head=nn.Linear(4, 3))


def data_for(model: nn.Module) -> tuple[Tensor, Tensor]:
    """Return twelve inputs and labels."""
    x, y = examples(12, torch.float32)
    return torch.randint(0, 10, (12, 5), generator=drawn(1)) if hasattr(model, "table") else x, y


def loader_for(model: nn.Module, batch: int = 4) -> DataLoader:
    return loader_of(data_for(model), batch)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def objects_for(model: nn.Module, batch: int = 4) -> dict[str, Any]:
    return {"module": model, "optimizer": sgd(model), "data_loader": loader_for(model, batch)}


def make(engine: Any, model: nn.Module, **kwargs: Any) -> Any:
    """Make the model private, with sigma 1 and C = 1 unless given."""
    kwargs = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, "noise_generator": drawn(5), **kwargs}
    return engine.make_private(**{**objects_for(model), **kwargs})
