"""Small calls of layers that are alike are computed as one: the same numbers as one by one."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dp_hooks import HookController, errors
from dp_hooks.gradients import sinks
from dp_hooks.gradients.stacked import stacked
from dp_hooks.rules import Call, Rule

from ..models import Net, loader_of, randn, scope_over, values
from ..reference import losses_of, sample_grads

N, T, D = 3, 5, 4


def scaled_norm(eps: float) -> nn.Module:
    norm = nn.LayerNorm(D, eps=eps)
    nn.init.normal_(norm.weight)
    return norm


# Layers of one kind, and one that is unlike them in something that gradients depend on.
LAYERS: dict[str, Callable[[], list[nn.Module]]] = {
    "linear": lambda: [nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D, bias=False), nn.Linear(D, D)],
    "norms": lambda: [scaled_norm(1e-5), scaled_norm(1e-5), scaled_norm(0.5), nn.RMSNorm(D, eps=1e-5), nn.RMSNorm(D, eps=0.5)],
    "groups": lambda: [nn.GroupNorm(1, T), nn.GroupNorm(5, T), nn.GroupNorm(5, T), nn.InstanceNorm1d(T, affine=True)],
    "convolutions": lambda: [
        nn.Conv1d(T, T, 3, padding=1),
        nn.Conv1d(T, T, 3, padding=1),
        nn.Conv1d(T, T, 3, padding=2, dilation=2),
        nn.Conv1d(T, T, 3, padding=1, padding_mode="circular"),
        nn.ConvTranspose1d(T, T, 3, padding=1),
    ],
}


def chained(layers: list[nn.Module]) -> nn.Module:
    def forward(s: Any, x: Tensor) -> Tensor:
        for layer in s.layers:
            x = x + layer(x).tanh()
        return x

    return Net(forward, layers=nn.ModuleList(layers)).double()


@pytest.mark.parametrize("case", LAYERS)
def test_layers_that_are_alike_get_each_its_own_gradients(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums, norms and single gradients are those of plain autograd; and fewer calls of rules than layers were made."""
    model, x = chained(LAYERS[case]()), randn(N, T, D)
    expected = dict(zip(model.parameters(), sample_grads(model, losses_of, x).values(), strict=True))
    calls: list[int] = []

    def counted(waiting: Any) -> Any:
        for term in stacked(waiting):
            calls.append(len(term.params))
            yield term

    monkeypatch.setattr(sinks, "stacked", counted)
    controller = HookController(model, grad_sample_mode="ghost", loss_reduction="sum")
    losses_of(model, x).sum().backward()
    found = controller.take()
    assert found is not None
    params = list(model.parameters())
    (norms,) = found.group_sq_norms([params])
    factors = torch.rand(N, dtype=torch.float64)
    sums = found.weighted_sums(dict.fromkeys(params, factors), torch.ones(N, dtype=torch.bool))
    assert sum(calls) == len(params)
    assert len(calls) < len(params)
    squares = torch.stack([expected[p].flatten(1).square().sum(1) for p in params]).sum(0)
    torch.testing.assert_close(norms, squares, rtol=1e-10, atol=0)
    for p in params:
        torch.testing.assert_close(sums[p], torch.tensordot(factors, expected[p], 1), rtol=1e-9, atol=1e-12)
    controller.cleanup()


def test_time_first_layers_are_computed_as_one_too() -> None:
    """Where samples are along the second axis, those of one layer stay together."""
    model, x = chained([nn.Linear(D, D) for _ in range(3)]), randn(T, N, D)
    params = list(model.parameters())
    single = [torch.autograd.grad(model(x[:, i : i + 1]).square().sum(), params) for i in range(N)]
    expected = torch.stack([torch.stack([g.square().sum() for g in grads]).sum() for grads in single])
    controller = HookController(model, grad_sample_mode="ghost", loss_reduction="sum", batch_first=False)
    model(x).square().sum().backward()
    found = controller.take()
    assert found is not None
    torch.testing.assert_close(found.group_sq_norms([params])[0], expected, rtol=1e-10, atol=0)
    controller.cleanup()


def test_layers_in_groups_of_their_own_bound() -> None:
    """Clipping by layers: each layer's gradients are clipped by its own norm, computed as one with others or not."""
    model, x = chained([nn.Linear(D, D) for _ in range(3)]), randn(N, T, D)
    expected = dict(zip(model.parameters(), sample_grads(model, losses_of, x).values(), strict=True))
    before = values(model)
    bounds = {f"layers.{i}.*": 0.1 * (i + 1) for i in range(3)}
    options: dict[str, Any] = {"clipping": "per_group", "max_grad_norm": bounds, "loss_reduction": "sum"}
    with scope_over(model, loader=loader_of([x]), **options) as (opt, loader):
        for (batch,) in loader:
            losses_of(model, batch).sum().backward()
            opt.step()
    for i, layer in enumerate(model.layers):  # type: ignore[arg-type, var-annotated]
        own = [expected[p] for p in layer.parameters()]
        norm = torch.stack([g.flatten(1).square().sum(1) for g in own]).sum(0).sqrt()
        factors = (0.1 * (i + 1) / norm).clamp(max=1)
        for k, (p, g) in enumerate(zip(layer.parameters(), own, strict=True)):
            torch.testing.assert_close(before[2 * i + k] - p.detach(), torch.tensordot(factors, g, 1), rtol=1e-9, atol=1e-12)


def test_a_rule_that_does_not_say_so_is_called_for_each_layer() -> None:
    """What the gradients of a rule depend on is not guessed."""

    def grad_samples(call: Call) -> dict[str, Tensor]:
        raise NotImplementedError

    assert Rule("own", grad_samples).alike is None


@pytest.mark.parametrize("width", [D, 300])
@pytest.mark.parametrize("passes", [1, 2])
def test_what_is_overwritten_after_the_backward_pass_is_used_as_it_was_or_refused(width: int, passes: int) -> None:
    """A static input buffer: small calls have been computed by then; a large one would read what is there at the step."""
    model = chained([nn.Linear(width, width) for _ in range(2)])
    x, buffer = randn(N, T, width), torch.empty(N, T, width, dtype=torch.float64)
    rows = [torch.zeros(N, *p.shape, dtype=torch.float64) for p in model.parameters()]
    for k in range(passes):
        for total, grads in zip(rows, sample_grads(model, losses_of, x / (k + 1)).values(), strict=True):
            total += grads
    factors = (0.1 / torch.stack([g.flatten(1).square().sum(1) for g in rows]).sum(0).sqrt()).clamp(max=1)
    before = values(model)
    with scope_over(model, loader=loader_of([x]), max_grad_norm=0.1, loss_reduction="sum", self_check=False) as (opt, loader):
        for (batch,) in loader:
            for k in range(passes):
                buffer.copy_(batch / (k + 1))
                losses_of(model, buffer).sum().backward()
            buffer.zero_()
            if width > D:
                with pytest.raises(errors.ScopeError, match="changed in place after the backward pass"):
                    opt.step()
                return
            opt.step()
    for p, old, g in zip(model.parameters(), before, rows, strict=True):
        torch.testing.assert_close(old - p.detach(), torch.tensordot(factors, g, 1), rtol=1e-9, atol=1e-12)


def test_settings_are_those_of_the_backward_pass() -> None:
    """They may be others for the next pass, and at the step."""
    norms = [scaled_norm(1e-5) for _ in range(2)]
    model, x = chained(list(norms)), randn(N, T, D)
    expected = []
    for eps in (1e-5, 0.5):
        for norm in norms:
            norm.eps = eps  # type: ignore[assignment]
        expected.append(list(sample_grads(model, losses_of, x).values()))
    controller = HookController(model, grad_sample_mode="ghost", loss_reduction="sum")
    for eps in (1e-5, 0.5, 7.0):
        for norm in norms:
            norm.eps = eps  # type: ignore[assignment]
        if eps < 1:
            losses_of(model, x).sum().backward()
    found = controller.take()
    assert found is not None
    for p, one, two in zip(model.parameters(), *expected, strict=True):
        torch.testing.assert_close(found.grads(p), one + two, rtol=1e-9, atol=1e-12)
    controller.cleanup()


def test_settings_that_cannot_be_compared_are_no_obstacle() -> None:
    """Lists, where PyTorch takes tuples as well."""
    norm = nn.LayerNorm(D)
    norm.normalized_shape = [D]  # type: ignore[assignment]
    model, x = chained([norm, nn.LayerNorm(D)]), randn(N, T, D)
    expected = sample_grads(model, losses_of, x)
    controller = HookController(model, grad_sample_mode="ghost", loss_reduction="sum")
    losses_of(model, x).sum().backward()
    found = controller.take()
    assert found is not None
    for p, grads in zip(model.parameters(), expected.values(), strict=True):
        torch.testing.assert_close(found.grads(p), grads, rtol=1e-9, atol=1e-12)
    controller.cleanup()
