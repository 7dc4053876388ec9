"""What ``torch.compile`` returns may be given in the place of the model."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dp_hooks import HookController, PrivacyEngineHookBased, dp_step

from ..models import build, loader_of, randn, scope_over, values
from ..reference import losses_of, sample_grads

N, D, BOUND = 6, 4, 0.3


@pytest.fixture
def both() -> Iterator[tuple[nn.Module, Any]]:
    """A model, and what it was compiled to."""
    torch._dynamo.reset()
    model = build("mlp")
    yield model, torch.compile(model, backend="eager")
    torch._dynamo.reset()


@pytest.mark.parametrize("by_function", [False, True])
def test_a_compiled_model_is_trained_as_the_model_inside(both: tuple[nn.Module, Any], by_function: bool) -> None:
    """In loops and by functions: the clipped sum is that of plain autograd, and names are those of the model."""
    model, compiled = both
    x = randn(N, D)
    grads = list(sample_grads(model, losses_of, x).values())
    factors = (BOUND / torch.stack([g.flatten(1).square().sum(1) for g in grads]).sum(0).sqrt()).clamp(max=1)
    before = values(model)
    step = dp_step(lambda m, batch: losses_of(m, batch[0]))
    optimizer = torch.optim.SGD(compiled.parameters(), lr=1.0)
    with scope_over(compiled, optimizer=optimizer, loader=loader_of([x]), max_grad_norm=BOUND) as (opt, loader):
        for batch in loader:
            if by_function:
                step(compiled, batch)
            else:
                losses_of(compiled, batch[0]).mean().backward()
                opt.step()
    for p, old, g in zip(model.parameters(), before, grads, strict=True):
        torch.testing.assert_close(old - p.detach(), torch.tensordot(factors, g, 1) / N)


def test_engine_and_controller_take_a_compiled_model(both: tuple[nn.Module, Any]) -> None:
    """The engine returns the very object; a controller knows the module inside."""
    model, compiled = both
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    engine = PrivacyEngineHookBased()
    options: dict[str, Any] = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, "poisson_sampling": False}
    made, *_ = engine.make_private(module=compiled, optimizer=optimizer, data_loader=loader_of([randn(N, D)]), **options)
    assert made is compiled
    engine.cleanup()
    controller = HookController(compiled)
    assert controller.model is model
    losses_of(compiled, randn(N, D)).mean().backward()
    grads: list[Tensor] = [p.grad_sample for p in model.parameters()]  # type: ignore[attr-defined]
    assert all(len(g) == N for g in grads)
    controller.cleanup()
