"""A model with a fixed seed in a scope without noise, ordinary training over it, and what has to come of it."""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dp_hooks import PrivateTraining

from ..models import BOUND, assert_same, build, charges, clipped_sum, drawn, examples, moved, sample_gradients, scope_over, values
from ..snapshot import Snapshot

# With Poisson sampling at rate 1 every batch holds all six examples, and every step is one charge.
POISSON = {"poisson_sampling": True, "accountant": "rdp"}
NOISY = {**POISSON, "loss_reduction": "sum", "noise_multiplier": 2.0}


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    """Return an optimizer whose step of size 1 is the released gradient."""
    return torch.optim.SGD(model.parameters(), lr=1.0)


Step = Callable[[nn.Module, Any, Tensor, Tensor], Any]


def backward(model: nn.Module, x: Tensor, y: Tensor, scale: float = 1.0, reduction: str = "mean") -> None:
    """Back-propagate the ordinary loss."""
    (scale * F.cross_entropy(model(x), y, reduction=reduction)).backward()


def step(model: nn.Module, opt: Any, x: Tensor, y: Tensor) -> None:
    """Take an ordinary step."""
    opt.zero_grad()
    backward(model, x, y)
    opt.step()


def train(model: nn.Module, opt: Any, loader: Any, *, stop: int | None = None, by: Step = step) -> int:
    """Run one pass, or its first ``stop`` batches; return how many batches there were."""
    count = 0
    for count, (x, y) in enumerate(loader, start=1):
        by(model, opt, x, y)
        if count == stop:
            break
    return count


class Run:
    """A model, a scope over it, and how far its parameters went since."""

    def __init__(
        self,
        model: str | nn.Module = "mlp",
        *,
        prepare: Callable[[nn.Module], Any] = values,
        optimizer: Callable[[nn.Module], torch.optim.Optimizer] = sgd,
        **options: Any,
    ) -> None:
        self.model = build(model) if isinstance(model, str) else model
        self.first, self.start = copy.deepcopy(self.model), values(self.model)
        prepare(self.model)
        self.original = optimizer(self.model)
        self.before = Snapshot(self.model, self.original)
        if options.get("noise_multiplier"):
            options.setdefault("noise_generator", drawn(5))
        self.scope: PrivateTraining = scope_over(self.model, optimizer=self.original, **options)

    def __enter__(self) -> tuple[nn.Module, Any, Any]:
        return (self.model, *self.scope.__enter__())

    def __exit__(self, *error: Any) -> Any:
        return self.scope.__exit__(*error)

    def trained(self, *, passes: int = 1, by: Step = step) -> "Run":
        """Enter, train, and leave."""
        with self as (model, opt, loader):
            for _ in range(passes):
                train(model, opt, loader, by=by)
        return self

    @property
    def moved(self) -> list[Tensor]:
        return moved(self.start, self.model)

    def rows(self, *batch: Tensor, **more: Any) -> list[list[Tensor]]:
        """Return the gradients of single samples, by default of the six examples, at the parameters of the start."""
        return sample_gradients(self.first, *(batch or examples()), **more)

    def assert_moved(self, rows: list[list[Tensor]] | None = None, divided_by: int = 6) -> None:
        """Assert that the parameters moved by the clipped sum of ``rows``, by default of the six examples, divided."""
        assert_same(self.moved, [g / divided_by for g in clipped_sum(rows or self.rows(), BOUND)])

    def assert_moved_by_noise(self) -> None:
        """Assert that the parameters moved by the noise of one release, which was charged once."""
        assert charges(self.scope) == 1
        replay = drawn(5)
        flat = torch.empty(sum(p.numel() for p in self.start), dtype=self.start[0].dtype)
        parts = flat.normal_(0.0, 2.0 * BOUND, generator=replay).split([p.numel() for p in self.start])  # all are small: one draw
        assert_same(self.moved, [part.view_as(p) for part, p in zip(parts, self.start, strict=True)])

    def assert_untouched(self) -> None:
        """Assert that nothing was released, charged or left in ``p.grad``."""
        assert_same(values(self.model), self.start)
        assert charges(self.scope) == 0
        assert all(p.grad is None for p in self.model.parameters())
