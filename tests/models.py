"""Small models that all map ``[n, 4]`` to logits, scopes over them, and what a step in one has to do."""

import copy
import io
import pickle
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.data import DataLoader, TensorDataset

from dp_hooks import PrivateTraining, private_training

from . import reference

MODES = ("ghost", "hooks", "functorch")
BOUND = 0.5

each_mode = pytest.mark.parametrize("mode", MODES)


class Net(nn.Module):
    """Runs ``fn(self, *inputs)`` over the given submodules, parameters and buffers."""

    def __init__(self, fn: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.fn = (fn,)
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.fn[0](self, *args, **kwargs)


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.GroupNorm(2, 4)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.norm(self.conv(x.view(-1, 1, 2, 2)))).flatten(1))


class TiedNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, 5)
        self.decoder = nn.Linear(5, 8)
        self.decoder.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        ids = (x > 0).long() + 2 * torch.arange(4)
        return self.decoder(torch.tanh(self.embedding(ids).mean(1)))


class LstmNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(2, 3, batch_first=True)
        self.head = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x.view(-1, 2, 2))[0][:, -1])


class AttentionNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lift = nn.Linear(2, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.lift(x.view(-1, 2, 2))
        return self.head(self.attention(h, h, h, need_weights=False)[0].mean(1))


class OwnerNet(nn.Module):
    """Owns parameters itself, next to a child that owns others."""

    def __init__(self) -> None:
        super().__init__()
        self.child = nn.Linear(4, 3)
        self.scale = nn.Parameter(torch.rand(3) + 0.5)
        self.shift = nn.Parameter(torch.rand(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.child(x) * self.scale + self.shift


def mlp() -> nn.Module:
    """Two linear layers."""
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def weight_normed() -> nn.Module:
    """A linear layer with the weight-norm parametrization, and a plain one."""
    return nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 3))


BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "mlp": mlp,
    "conv": ConvNet,
    "tied": TiedNet,
    "lstm": LstmNet,
    "attention": AttentionNet,
    "owner": OwnerNet,
    "weight_norm": weight_normed,
}


def build(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Build the model ``name`` from a fixed seed."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return BUILDERS[name]().to(dtype)


def drawn(seed: int = 0) -> torch.Generator:
    """Return a seeded generator."""
    return torch.Generator().manual_seed(seed)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def examples(n: int = 6, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Return inputs ``[n, 4]`` and class labels ``[n]`` from a fixed seed."""
    generator = drawn(2)
    x = torch.randn(n, 4, generator=generator, dtype=torch.float64) * 2
    return x.to(dtype), torch.randint(0, 3, (n,), generator=generator)


def loader_of(tensors: Sequence[Tensor], batch_size: int | None = None) -> DataLoader[Any]:
    """Return a loader that hands out the rows of ``tensors`` in their order, by default in one batch."""
    return DataLoader(TensorDataset(*tensors), batch_size=batch_size or len(tensors[0]))


def in_order(n: int = 6, batch_size: int | None = None) -> DataLoader[Any]:
    """Return a loader that hands out :func:`examples` in their order."""
    return loader_of(examples(n), batch_size)


def scope_over(
    model: nn.Module, *, optimizer: torch.optim.Optimizer | None = None, loader: DataLoader[Any] | None = None, **options: Any
) -> PrivateTraining:
    """Return a scope without noise in which one step of size 1 moves the parameters by the clipped sum."""
    options = {"noise_multiplier": 0.0, "max_grad_norm": BOUND, "poisson_sampling": False, **options}
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=1.0)
    return private_training(model, optimizer, loader or in_order(), **options)


def sample_gradients(
    model: nn.Module, x: Tensor, y: Tensor, loss: Callable[[nn.Module, Tensor, Tensor], Tensor] | None = None
) -> list[list[Tensor]]:
    """Return, for every sample, its gradient for each parameter by plain autograd on that sample alone."""
    loss = loss or (lambda m, a, b: F.cross_entropy(m(a), b))
    return [list(row) for row in zip(*reference.sample_grads(model, loss, x, y).values(), strict=True)]


def norm_of(tensors: Iterable[Tensor]) -> Tensor:
    """Return the Euclidean norm over all ``tensors``."""
    return torch.cat([t.flatten() for t in tensors]).norm()


def clipped_sum(rows: list[list[Tensor]], bound: float | list[float]) -> list[Tensor]:
    """Clip every sample by hand, over all parameters or (with a list of bounds) one by one, and add up."""
    grads = {k: torch.stack(column) for k, column in enumerate(zip(*rows, strict=True))}
    if isinstance(bound, float):
        return list(reference.clipped_sum(grads, bound).values())
    return [reference.clipped_sum({k: g}, bound[k])[k] for k, g in grads.items()]


def expected_move(model: nn.Module) -> list[Tensor]:
    """Return the mean of the clipped gradients of the six examples, by hand."""
    return [g / 6 for g in clipped_sum(sample_gradients(model, *examples()), BOUND)]


def charges(scope: PrivateTraining) -> int:
    """Return the number of releases the accountant was charged with."""
    return sum(steps for _, _, steps in scope.accountant.history)


def values(model: nn.Module) -> list[Tensor]:
    """Return copies of the parameters' values."""
    return [p.detach().clone() for p in model.parameters()]


def put(model: nn.Module, before: list[Tensor]) -> None:
    """Put the values ``before`` back."""
    with torch.no_grad():
        for p, value in zip(model.parameters(), before, strict=True):
            p.copy_(value)


def moved(before: list[Tensor], model: nn.Module) -> list[Tensor]:
    """Return by how much the parameters went down since ``before``."""
    return [b - p.detach() for b, p in zip(before, model.parameters(), strict=True)]


def has_hooks(model: nn.Module) -> bool:
    """Whether anything of a scope is on a module of ``model``, or on a parameter."""
    return any(
        value
        for module in model.modules()
        for key, value in vars(module).items()
        if key in ("__getstate__", "__deepcopy__") or (key.startswith(("_forward_", "_backward_")) and "hooks" in key)
    ) or any(vars(p) or p._post_accumulate_grad_hooks for p in model.parameters())


def saved_and_loaded(thing: Any) -> Any:
    """Copy through ``torch.save``."""
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda thing: pickle.loads(pickle.dumps(thing)), "torch.save": saved_and_loaded}


def equal_trees(a: Any, b: Any) -> bool:
    """Whether two nested structures hold equal tensors and values."""
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal_trees(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(equal_trees(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def assert_same(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-9) -> None:
    """Compare two lists of tensors."""
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
