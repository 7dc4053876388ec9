"""Every known trap of per-sample gradients, by number: the private step is right, or refused before anything happens."""

# mypy: disable-error-code="no-any-return"

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dp_hooks import PrivateTraining, dp_step
from dp_hooks.errors import DPHooksError

from .. import laws
from ..cases import N, param
from ..cases.followed import FOLLOWED, linear
from ..cases.layers import LAYERS
from ..cases.models import MODELS, D, T, routed, vision
from ..models import BUILDERS, Net, assert_same, charges, clipped_sum, loader_of, moved, norm_of, randn, scope_over, values
from ..reference import losses_of as losses
from ..reference import rows_by_backward
from ..snapshot import Snapshot

Losses = Callable[..., Tensor]


@dataclass
class Run:
    """One private step in the making: what a training loop sees."""

    model: Any
    opt: Any
    loader: Any
    losses: Losses
    prepared: Any = None
    passes: int = 0

    def backward(self, batch: Any) -> None:
        """Back-propagate the mean of the per-sample losses."""
        self.losses(self.model, *batch).mean().backward()


def ordinary(run: Run, batch: Any) -> None:
    """Run one pass of an ordinary loop."""
    run.opt.zero_grad()
    run.backward(batch)
    run.opt.step()


def by_function(fn: Callable[[nn.Module, Any], Tensor]) -> Callable[[Run, Any], None]:
    """Return a step that ``fn`` under ``dp_step`` takes."""
    step = dp_step(fn)
    return lambda run, batch: step(run.model, batch)  # type: ignore[func-returns-value]


@dataclass
class Trap:
    """A model, its data and a step; ``refused`` is what the error has to name, or empty where the step must be right.

    ``before`` runs ahead of the scope. ``exact`` is off where only the bound on every sample's contribution can be told.
    ``together``: the reference differentiates each loss of one batched forward pass (where random numbers are drawn).
    """

    model: Callable[[], nn.Module]
    data: Callable[[], list[Tensor]]
    refused: str = ""
    step: Callable[..., None] = ordinary
    losses: Losses = losses
    error: type[BaseException] | tuple[type[BaseException], ...] = DPHooksError
    before: Callable[[nn.Module, list[Tensor]], Any] = lambda model, data: None
    together: bool = False
    exact: bool = True
    tolerance: float = 1e-7
    dtype: torch.dtype = torch.float64
    passes: int = 1
    options: dict[str, Any] = field(default_factory=dict)


def tokens() -> list[Tensor]:
    return [randn(N, T, D)]


def seeded(model: nn.Module, *batch: Any) -> Tensor:
    """Per-sample losses that draw the same random numbers every time."""
    torch.manual_seed(5)
    return losses(model, *batch)


def mlp() -> nn.Module:
    return nn.Sequential(linear(), nn.Tanh(), nn.Linear(D, 3))


def mixing(mix: Callable[[Tensor], Tensor]) -> nn.Module:
    return Net(lambda s, x: s.b(mix(s.a(x))), a=linear(), b=linear())


def with_loss() -> nn.Module:
    """Returns its own mean loss over samples."""

    def forward(s: Any, x: Tensor) -> Any:
        out = s.net(x)
        return {"loss": out.square().flatten(1).sum(1).mean(), "logits": out}

    return Net(forward, net=mlp())


def token_mean(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    """A mean over all labels of the batch that are not padding."""
    return F.cross_entropy(model(x).flatten(0, 1), labels.flatten(), ignore_index=-100)


def padded() -> list[Tensor]:
    """Tokens with labels, fewer and fewer of which count."""
    labels = torch.randint(0, 3, (N, T))
    for i in range(N):
        labels[i, T - i :] = -100
    return [randn(N, T, D), labels]


def unfreezing(run: Run, batch: Any) -> None:
    run.model[0].requires_grad_(True)
    ordinary(run, batch)


def forward_only(run: Run, batch: Any) -> None:
    """Run the model on batches of all sizes before, between and after loss and backward pass, and keep what comes out."""
    kept = []

    def look() -> None:
        kept.extend(run.model(*(torch.cat([part, part])[:size] for part in batch)) for size in (2, N, 2 * N))

    look()
    loss = run.losses(run.model, *batch).mean()
    look()
    loss.backward()
    look()
    run.opt.step()


def two_passes(run: Run, batch: Any) -> None:
    """Back-propagate half of the loss twice, through the same graph."""
    loss = run.losses(run.model, *batch).mean() / 2
    loss.backward(retain_graph=True)
    loss.backward()
    run.opt.step()


def two_losses(run: Run, batch: Any) -> None:
    """Back-propagate two losses of one forward pass."""
    out = run.model(*batch)
    for part in (0.25, 0.75):
        (part * run.losses(lambda *_: out).mean()).backward(retain_graph=True)
    run.opt.step()


def two_forwards(run: Run, batch: Any) -> None:
    """Back-propagate two losses, from two forward passes."""
    for part in (0.25, 0.75):
        (part * run.losses(run.model, *batch).mean()).backward()
    run.opt.step()


def adversarial(model: nn.Module, x: Tensor) -> Tensor:
    """Per-sample losses of inputs that were moved along the gradient of their own loss."""
    probe = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(losses(model, probe).sum(), probe)
    return losses(model, (probe + slope).detach())


def penalised(run: Run, batch: Any) -> None:
    (x,) = batch
    probe = x.clone().requires_grad_()
    loss = run.losses(run.model, probe).mean()
    (slope,) = torch.autograd.grad(loss, probe, create_graph=True)
    (loss + slope.square().sum()).backward()
    run.opt.step()


def scaled(run: Run, batch: Any, enabled: bool = True, unscale: bool = False) -> None:
    """Step as in mixed precision, with a gradient scaler, perhaps with the gradients unscaled before."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=enabled)
    scaler.scale(run.losses(run.model, *batch).mean()).backward()
    if unscale:
        scaler.unscale_(run.opt)
    scaler.step(run.opt)
    scaler.update()


def autocast_losses(model: nn.Module, *batch: Any) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        out = model(*batch)
    return out.float().square().flatten(1).sum(1)


def under_autocast(run: Run, batch: Any) -> None:
    run.opt.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        run.backward(batch)
        run.opt.step()


def by_list(run: Run, batch: Any) -> None:
    losses(run.model, list(batch[0])).mean().backward()
    run.opt.step()


def made_sparse(run: Run, batch: Any) -> None:
    losses(run.model, batch[0].to_sparse_coo()).mean().backward()
    run.opt.step()


def made_nested(run: Run, batch: Any) -> None:
    nested = torch.nested.nested_tensor([x[: 1 + i] for i, x in enumerate(batch[0])], layout=torch.jagged)
    torch.nested.to_padded_tensor(run.model(nested), 0.0).square().flatten(1).sum(1).mean().backward()
    run.opt.step()


def packed() -> nn.Module:
    """A recurrent network over sequences that the loader sorted by length, as PyTorch wants them by default."""

    def forward(s: Any, x: Tensor, lengths: Tensor) -> Tensor:
        _, (hidden, _) = s.r(nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True))
        return s.head(hidden[-1])

    return Net(forward, r=nn.LSTM(D, 3, batch_first=True), head=nn.Linear(3, 2))


def sequences() -> list[Tensor]:
    return [randn(N, T, D), torch.arange(N, 0, -1) + 1]


def own_loss(run: Run, batch: Any) -> None:
    run.model(*batch)["loss"].backward()
    run.opt.step()


def looked_at(run: Run, batch: Any) -> None:
    """Look at ``p.grad`` in all the usual ways between ``backward`` and the step."""
    run.backward(batch)
    assert all(p.grad is None for p in run.model.parameters())
    assert float(nn.utils.clip_grad_norm_(run.model.parameters(), 1e-3)) == 0
    run.opt.step()


def discarded(run: Run, batch: Any) -> None:
    """Drop backward passes by ``zero_grad`` of either form."""
    for set_to_none in (True, False):
        (7 * run.losses(run.model, *batch).mean()).backward()
        run.opt.zero_grad(set_to_none)
    run.backward(batch)
    run.opt.step()


def continued(run: Run, batch: Any) -> None:
    """Leave the batches of the first pass and of the last after ``backward``, without a step."""
    run.opt.zero_grad()
    (7 * run.losses(run.model, *batch).mean()).backward()
    if run.passes == 1:
        ordinary(run, batch)
    run.passes += 1


def compiled_before(model: nn.Module, data: list[Tensor], in_place: bool = False) -> Any:
    """Compile the model, perhaps by its own ``compile``, and run it forwards and backwards."""
    torch._dynamo.reset()
    made = model if in_place else torch.compile(model, backend="eager")
    if in_place:
        model.compile(backend="eager")
    losses(made, *data).mean().backward()
    model.zero_grad()
    return made


def compiled(run: Run, batch: Any) -> None:
    """Train with what was compiled, in the scope if not before."""
    if run.prepared is None:
        torch._dynamo.reset()
    made = run.prepared or torch.compile(run.model, backend="eager")
    run.losses(made, *batch).mean().backward()
    run.opt.step()


def times_own(self: Any, x: Tensor) -> Tensor:
    """A network on inputs times a parameter of its owner."""
    return self.net(x * self.g)


def far_off() -> list[Tensor]:
    """Tokens whose mean is ten thousand standard deviations."""
    return [1e4 + torch.randn(N, 8, 64)]


def cancelling(model: nn.Module, x: Tensor) -> Tensor:
    """Per-sample losses with token gradients that nearly cancel."""
    signs = torch.tensor([1.0, -1.0]).repeat(4)[:, None] * torch.linspace(1, 1.001, 64)
    return (model(x) * signs).sum((1, 2)) * 1e3


def written_later(s: Any, x: Tensor) -> Tensor:
    """Change the input of a layer in place after the layer has used it."""
    h = x.exp()
    out = s.a(h)
    h.add_(1)
    return out + s.b(x)


# Traps that are models: every law holds for these cases, in every mode.
OBEYED = {
    "G1": ["positions-1xt", "positions-t", "positions-t-equals-n", "positions-1xt-equals-n", "bert"],
    "G2": ["relative-positions", "relative-positions-t-equals-n", "t5"],
    "G3": ["gpt2"],
    "G4": ["tied-linears", "tied-to-a-subclass-of-one-forward", "tied-to-subclass"],
    "G5": ["weight-of-another-module"],
    "G6": ["keywords"],
    "G7": ["relu-in-place", "added-in-place"],
    "G8": ["structures"],
    "G9": ["vision"],
    "G10": ["linear-4d-deep", "layer-norm-no-bias", "embedding-padding", "convolutions", "embedding-bag"],
    "G11": ["lstm-two-layers", "gru-two-layers", "rnn-two-layers", "attention"],
    "G12": [
        "checkpoint in the middle",
        "checkpoint in the middle, reentrant",
        "kept-on-cpu",
        "checkpoint, and the rest kept on the CPU",
    ],
    "G27": ["vector-products"],
    "G28": ["written-by-another"],
    "G29": ["spectral", "complex-products"],
    "G30": ["vector-products"],
    "G31": ["torch-func-vmap", "torch-func-energy", "torch-func-jvp"],
    "G18": ["routed", "flattened-tokens", "windows", "time-first-lstm"],
    "G19": ["low-rank-additions", "peft", "weight-norm"],
    "G21": ["checkpoint of the last layers, reentrant"],
}

# Traps that are loops, losses or refusals.
TRAPS: dict[str, Trap] = {
    "G5 weight used in the loop": Trap(
        mlp, tokens, losses=lambda model, x: losses(lambda x: F.linear(model[0](x), model[0].weight), x), refused=r"0\.weight"
    ),
    "G5 weight of a layer that is not called": Trap(
        lambda: Net(lambda s, x: s.a(x), a=linear(), b=linear()),
        tokens,
        losses=lambda model, x: losses(lambda x: F.linear(model(x), model.b.weight), x),
        refused=r"^b\.weight: used where no hook saw it",
    ),
    "G9 class token with dropout": Trap(lambda: vision(0.5), tokens, losses=seeded, together=True),
    "G13 forward passes without backward": Trap(mlp, tokens, step=forward_only),
    "G14 unfreezing": Trap(
        lambda: nn.Sequential(linear().requires_grad_(False), linear()), tokens, step=unfreezing, refused=r"0\.weight"
    ),
    "G15 BatchNorm": Trap(lambda: nn.Sequential(linear(), nn.BatchNorm1d(T), linear()), tokens, refused=r"1 \(BatchNorm1d\)"),
    "G15 batch statistics by hand": Trap(lambda: mixing(lambda h: h - h.mean(0)), tokens, refused=r"the model|a\.weight"),
    "G15 in-batch negatives": Trap(
        lambda: mixing(lambda h: ((h.flatten(1) @ h.flatten(1).T).softmax(-1) @ h.flatten(1)).view(h.shape)),
        tokens,
        refused=r"the model|a\.weight",
    ),
    "G15 contrastive loss": Trap(
        mlp,
        tokens,
        step=by_function(lambda m, b: F.cross_entropy(m(b[0])[:, 0] @ m(b[0])[:, 0].T, torch.arange(len(b[0])))),
        refused="train function",
    ),
    "G15 load balancing": Trap(
        lambda: routed(True),
        tokens,
        step=by_function(lambda m, b: m(b[0])[0].square().flatten(1).sum(1).mean() + m(b[0])[1]),
        refused="train function|router",
    ),
    "G15 load balancing in a bare loop": Trap(
        lambda: Net(lambda s, x: (lambda r: (r[0], r[1]))(s.inner(x)), inner=routed(True)),
        tokens,
        losses=lambda m, x: (lambda r: r[0].square().flatten(1).sum(1) + r[1])(m(x)),
        refused="the model|router",
    ),
    "G16 token mean in a train function": Trap(
        mlp, padded, step=by_function(lambda m, b: token_mean(m, *b)), refused="train function"
    ),
    "G16 token mean in the model": Trap(
        lambda: Net(lambda s, x, y: {"loss": token_mean(s.net, x, y)}, net=mlp()), padded, step=own_loss, refused="the model"
    ),
    "G17 sum for mean in a train function": Trap(
        mlp, tokens, step=by_function(lambda m, b: losses(m, *b).sum()), refused="loss_reduction='mean'"
    ),
    "G17 mean for sum in a train function": Trap(
        mlp,
        tokens,
        step=by_function(lambda m, b: losses(m, *b).mean()),
        options={"loss_reduction": "sum"},
        refused="loss_reduction='sum'",
    ),
    "G17 mean for sum in the model": Trap(
        with_loss, tokens, step=own_loss, options={"loss_reduction": "sum"}, refused="loss_reduction='sum'"
    ),
    "G20 autocast": Trap(mlp, lambda: [torch.randn(N, T, D)], losses=autocast_losses, dtype=torch.float32, tolerance=5e-3),
    "N4 backward under autocast": Trap(
        mlp, lambda: [torch.randn(N, T, D)], step=under_autocast, losses=autocast_losses, dtype=torch.float32, tolerance=5e-3
    ),
    "N7 a parameter that is also summed alone": Trap(
        lambda: Net(lambda s, x: (x * s.g.exp()).tanh() + s.g.sum(), g=param(D)), tokens
    ),
    "R8 a list of tensors": Trap(
        lambda: Net(lambda s, x: s.net(torch.stack(list(x)) if isinstance(x, list) else x), net=mlp()),
        tokens,
        step=by_list,
        refused="list of",
    ),
    "V7 sparse": Trap(mlp, lambda: [randn(N, D)], step=made_sparse, refused="sparse tensor"),
    "V7 nested": Trap(mlp, tokens, step=made_nested, refused="nested tensor"),
    "V7 sequences sorted by length": Trap(packed, sequences),
    "G20 gradient scaler": Trap(mlp, tokens, step=scaled, refused="GradScaler"),
    "G20 gradient scaler, unscaled": Trap(mlp, tokens, step=partial(scaled, unscale=True), refused="GradScaler"),
    "G20 gradient scaler, switched off": Trap(mlp, tokens, step=partial(scaled, unscale=True, enabled=False)),
    "G21 one graph twice, tokens": Trap(mlp, tokens, step=two_passes),
    "G21 two forward passes, vision": Trap(lambda: vision(0.0), tokens, step=two_forwards),
    **{
        f"G21 {by.__name__.replace('_', ' ')}, {name}": Trap(BUILDERS[name], lambda: [randn(N, D)], step=by)
        for name in ("mlp", "tied", "owner")
        for by in (two_passes, two_losses, two_forwards)
    },
    "G22 gradient of the input": Trap(mlp, tokens, losses=adversarial),
    "G23 gradient penalty": Trap(mlp, tokens, step=penalised, refused="create_graph"),
    "G24 means of 1e4": Trap(lambda: nn.Linear(64, 64), far_off, losses=cancelling, dtype=torch.float32, exact=False),
    "G25 input written later": Trap(
        lambda: Net(written_later, a=linear(), b=linear()), tokens, error=RuntimeError, refused="modified by an inplace"
    ),
    "G26 compiled and run before": Trap(mlp, tokens, before=compiled_before, step=compiled),
    "G26 compiled in place and run before": Trap(mlp, tokens, before=partial(compiled_before, in_place=True), step=compiled),
    "G26 compiled inside": Trap(lambda: Net(times_own, net=mlp(), g=param(D)), tokens, step=compiled),
    "P6 the loss of the output object": Trap(
        with_loss, tokens, step=own_loss, losses=lambda m, x: m(x)["logits"].square().flatten(1).sum(1)
    ),
    "P9 gradients looked at": Trap(mlp, tokens, step=looked_at),
    "L9 zero_grad": Trap(mlp, tokens, step=discarded),
    "L9 continue": Trap(mlp, tokens, step=continued, passes=3),
}

# Two passes are taken by train functions only, never by loops.
each_mode = pytest.mark.parametrize("mode", [mode for mode in laws.MODES if not mode.two_pass], ids=str)
NUMBERS = {f"G{k}" for k in range(1, 32)} | {"P6", "P9", "L9", "N4", "N7", "R8", "V7"}


def train(trap: Trap, run: Run) -> None:
    """Take the row's step for every batch."""
    for _ in range(trap.passes):
        for batch in run.loader:
            trap.step(run, batch)


def made(name: str) -> tuple[Trap, nn.Module, list[Tensor]]:
    """Build the model and the data of a row, the same every time."""
    trap = TRAPS[name]
    with torch.random.fork_rng():
        torch.manual_seed(1)
        data = [t.to(trap.dtype) if t.is_floating_point() else t for t in trap.data()]
        model = trap.model().to(trap.dtype)
    return trap, model, data


def gradients(name: str) -> list[list[Tensor]]:
    """Return every sample's gradient for each parameter by plain autograd: one sample at a time, or all in one graph."""
    trap, model, data = made(name)
    if trap.together:
        return rows_by_backward(model, trap.losses(model, *data), retain_graph=True)
    return rows_by_backward(model, (trap.losses(model, *(t[i : i + 1] for t in data)).sum() for i in range(len(data[0]))))


def scope_of(trap: Trap, model: nn.Module, data: list[Tensor], bound: float, mode: str) -> PrivateTraining:
    """Return a scope without noise whose batches hold every example, in order."""
    options = {"max_grad_norm": bound, "poisson_sampling": True, "accountant": "rdp", **trap.options}
    return scope_over(model, loader=loader_of(data), grad_sample_mode=mode, **options)


def summed(name: str, bound: float, mode: laws.Mode, without: int | None = None) -> list[Tensor]:
    """Take the row's private step, on all samples or without one, and return the clipped sum that it released."""
    trap, model, data = made(name)
    if without is not None:
        data = [torch.cat([t[:without], t[without + 1 :]]) for t in data]
    prepared = trap.before(model, data)
    start, own = values(model), [set(vars(p)) for p in model.parameters()]
    with mode.on() as way:
        scope = scope_of(trap, model, data, bound, way)
        with scope as (opt, loader):
            train(trap, Run(model, opt, loader, trap.losses, prepared))
            for p, before in zip(model.parameters(), own, strict=True):
                assert vars(p).keys() - before <= {"grad_sample", "__getstate__"}
    assert charges(scope) == 1
    return [len(data[0]) * change for change in moved(start, model)]


def test_every_trap_has_a_row() -> None:
    """The table names every trap of gradients and those of the loop that belong with them."""
    assert {name.split()[0] for name in TRAPS} | OBEYED.keys() == NUMBERS
    assert {name for names in OBEYED.values() for name in names} <= {case.name for case in [*LAYERS, *FOLLOWED, *MODELS]}


@pytest.mark.filterwarnings("ignore:.*None of the inputs have requires_grad")
@pytest.mark.filterwarnings("ignore:the loss did not reach")
@each_mode
@pytest.mark.parametrize("name", [name for name, trap in TRAPS.items() if not trap.refused])
def test_a_trap_is_passed(name: str, mode: laws.Mode) -> None:
    """The step moves by the sum of clipped single-sample gradients, and no sample contributes more than 1.001 C."""
    trap, rows = TRAPS[name], gradients(name)
    norms = [float(norm_of(row)) for row in rows]
    bound = sorted(norms)[len(norms) // 2]
    whole = summed(name, bound, mode)
    if trap.exact:
        expected = clipped_sum(rows, bound)
        size = max(float(t.abs().max()) for t in expected)
        for found, want in zip(whole, expected, strict=True):
            torch.testing.assert_close(found, want, rtol=trap.tolerance, atol=trap.tolerance * size)
    if trap.together:  # the others draw other numbers without it
        return
    largest = norms.index(max(norms))
    rest = summed(name, bound, mode, without=largest)
    contribution = float(norm_of([a - b for a, b in zip(whole, rest, strict=True)]))
    assert contribution <= 1.001 * bound
    assert contribution > 0.9 * bound


@each_mode
@pytest.mark.parametrize("name", [name for name, trap in TRAPS.items() if trap.refused])
def test_a_trap_is_refused(name: str, mode: laws.Mode) -> None:
    """The error says what is wrong and where; nothing moved, nothing was charged, and nothing is left on the model."""
    trap, model, data = made(name)
    prepared = trap.before(model, data)
    start = values(model)
    trainable = [p.requires_grad for p in model.parameters()]
    before = Snapshot(model)
    charged = None
    with mode.on() as way, pytest.raises(trap.error) as caught:  # noqa: PT012
        scope = scope_of(trap, model, data, 1.0, way)
        charged = scope.accountant.history
        with scope as (opt, loader):
            train(trap, Run(model, opt, loader, trap.losses, prepared))
    assert re.search(trap.refused, str(caught.value)), str(caught.value)
    assert_same(values(model), start)
    assert not charged
    for p, was in zip(model.parameters(), trainable, strict=True):
        assert p.grad is None  # also of those that the loop unfroze
        p.requires_grad_(was)
    assert before.differences() == []


@pytest.mark.parametrize("trainable", [True, False])
@each_mode
def test_a_batch_of_one_behind_batch_norm_is_right(mode: laws.Mode, trainable: bool) -> None:
    """A lone sample gets the gradients it has in a batch of two: plain PyTorch's are wrong in some orders of memory (G32)."""
    torch.manual_seed(0)

    def forward(s: Any, x: Tensor) -> Tensor:
        tokens = s.norm(s.conv(x)).flatten(2).transpose(1, 2)
        return F.layer_norm(tokens, (D,)).pow(3) * s.scale

    model = Net(forward, conv=nn.Conv2d(3, D, 3), norm=nn.BatchNorm2d(D), scale=param(D)).double().eval()
    model.norm.requires_grad_(trainable)
    model.norm.running_mean.normal_()
    x = randn(2, 3, 5, 5)
    managed = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(losses(model, x)[0], managed)
    alone = torch.autograd.grad(losses(model, x[:1])[0], managed)
    size = norm_of(list(expected))
    start = [p.detach().clone() for p in managed]
    optimizer = torch.optim.SGD(managed, lr=1.0)
    with (
        mode.on() as way,
        scope_over(model, optimizer=optimizer, loader=loader_of([x[:1]]), max_grad_norm=float(2 * size), grad_sample_mode=way) as (
            opt,
            loader,
        ),
    ):
        for (batch,) in loader:
            losses(model, batch).mean().backward()
            opt.step()
    found = [before - p.detach() for before, p in zip(start, managed, strict=True)]
    assert_same(found, list(expected))
    # Once this fails PyTorch has mended it, and nothing needs to be done any more.
    assert float(norm_of([a - b for a, b in zip(alone, expected, strict=True)]) / size) > 0.1
