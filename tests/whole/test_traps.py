"""Every known trap of per-sample gradients, by number: the private step is right, or refused before anything happens."""

# mypy: disable-error-code="no-any-return"

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from dp_hooks import PrivateTraining, dp_step
from dp_hooks.errors import DPHooksError

from . import models
from .models import Net, Snapshot, assert_same, clipped_sum, each_mode, loader_of, moved, norm_of, randn, values
from .reference import losses_of as losses
from .reference import rows_by_backward

N, T, D = 3, 4, 4

Losses = Callable[..., Tensor]


@dataclass
class Run:
    """One private step in the making: what a training loop sees."""

    model: Any
    opt: Any
    loader: Any
    losses: Losses
    prepared: Any = None

    def backward(self, batch: Any) -> None:
        """Back-propagate the mean of the per-sample losses."""
        self.losses(self.model, *batch).mean().backward()


def ordinary(run: Run) -> None:
    """Run one pass of an ordinary loop."""
    for batch in run.loader:
        run.opt.zero_grad()
        run.backward(batch)
        run.opt.step()


def by_function(fn: Callable[[nn.Module, Any], Tensor]) -> Callable[[Run], None]:
    """Return a loop in which ``fn`` under ``dp_step`` takes the step."""

    def loop(run: Run) -> None:
        step = dp_step(fn)
        for batch in run.loader:
            step(run.model, batch)

    return loop


@dataclass
class Trap:
    """A model, its data and a loop; ``refused`` is what the error has to name, or empty where the step must be right.

    ``before`` runs ahead of the scope. ``exact`` is off where only the bound on every sample's contribution can be told.
    ``together``: the reference differentiates each loss of one batched forward pass (where random numbers are drawn).
    """

    model: Callable[[], nn.Module]
    data: Callable[[], list[Tensor]]
    refused: str = ""
    loop: Callable[[Run], None] = ordinary
    losses: Losses = losses
    error: type[BaseException] | tuple[type[BaseException], ...] = DPHooksError
    before: Callable[[nn.Module, list[Tensor]], Any] = lambda model, data: None
    together: bool = False
    exact: bool = True
    tolerance: float = 1e-7
    dtype: torch.dtype = torch.float64
    options: dict[str, Any] = field(default_factory=dict)


def tokens() -> list[Tensor]:
    return [randn(N, T, D)]


def ids() -> list[Tensor]:
    return [torch.randint(0, 7, (N, T))]


def param(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


def linear() -> nn.Linear:
    return nn.Linear(D, D)


# ---------------------------------------------------------------- models


def positions(at: Callable[[], Tensor], length: int = T) -> nn.Module:
    """Token embeddings plus position embeddings that are looked up once for all samples."""
    return Net(lambda s, i: s.word(i) + s.place(at()), word=nn.Embedding(7, D), place=nn.Embedding(length, D))


def relative(length: int) -> nn.Module:
    """Attention with a table of relative positions, looked up once for all samples."""

    def forward(s: Any, x: Tensor) -> Tensor:
        at = torch.arange(length)
        bias = s.table(at[None] - at[:, None] + length - 1).permute(2, 0, 1)
        q, k, v = s.qkv(x).view(len(x), length, 3, 2, 2).permute(2, 0, 3, 1, 4)
        return s.out((((q @ k.mT + bias).softmax(-1)) @ v).transpose(1, 2).reshape(len(x), length, D))

    return Net(forward, table=nn.Embedding(2 * length - 1, 2), qkv=nn.Linear(D, 3 * D), out=linear())


def transformer(kind: str) -> nn.Module:
    """A tiny model of the transformers library that maps ids to one row of numbers per token."""
    off = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
    small = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 8}
    made: nn.Module
    if kind == "gpt2":
        config = transformers.GPT2Config(vocab_size=7, n_positions=8, n_embd=8, n_layer=1, n_head=2, **off)
        made = transformers.GPT2LMHeadModel(config)
    elif kind == "bert":
        none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        config = transformers.BertConfig(vocab_size=7, max_position_embeddings=8, **small, **none)
        made = transformers.BertForTokenClassification(config)
    else:
        config = transformers.T5Config(
            vocab_size=7, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, dropout_rate=0.0
        )
        made = transformers.T5EncoderModel(config)
    return made


def first_output(model: nn.Module, i: Tensor) -> Tensor:
    """Per-sample losses of a model that returns an output object."""
    return losses(lambda i: model(i)[0], i)


class Linear(nn.Linear):
    """A subclass with the same forward."""


def tied(other: type[nn.Linear]) -> nn.Module:
    first, second = linear(), other(D, D)
    second.weight = first.weight
    return Net(lambda s, x: s.b(s.a(x).tanh()), a=first, b=second)


@dataclass
class Output:
    """What a submodule returns."""

    hidden: Tensor
    extra: Any


def by_keyword() -> nn.Module:
    """A submodule called with keyword inputs only, and one without the input that it ignores."""

    def inner(s: Any, *, hidden: Tensor, scale: Tensor | None = None) -> Tensor:
        return s.w * hidden if scale is None else s.w * hidden * scale

    def forward(s: Any, x: Tensor) -> Tensor:
        return s.lin(input=s.block(hidden=x, scale=x.cos())) + s.block(hidden=x)

    return Net(forward, lin=linear(), block=Net(inner, w=param(D)))


def structured() -> nn.Module:
    """Submodules that return tuples, dataclasses and nested containers, and take numbers, strings and None."""

    def inner(s: Any, x: Tensor, power: int, name: str, nothing: None) -> Any:
        return Output(s.lin(x) ** power, {name: [s.w * x, (nothing, 3)]})

    def forward(s: Any, x: Tensor) -> Tensor:
        out = s.block(x, 2, "a", None)
        return s.head(out.hidden + out.extra["a"][0]) + s.pair(x)[1]

    pair = Net(lambda s, x: (x, s.lin(x)), lin=linear())
    return Net(forward, block=Net(inner, lin=linear(), w=param(D)), head=linear(), pair=pair)


def vision(dropout: float) -> nn.Module:
    """Class token, position embeddings and layer scale, owned by the model itself."""

    def forward(s: Any, x: Tensor) -> Tensor:
        x = torch.cat([s.cls_token.expand(len(x), -1, -1), s.proj(x)], 1) + s.position_embeddings
        x = F.dropout(x, dropout, s.training)
        return s.head(x + s.gamma * s.mlp(x).tanh())

    return Net(
        forward,
        cls_token=param(1, 1, D),
        position_embeddings=param(1, T + 1, D),
        gamma=param(D),
        proj=linear(),
        mlp=linear(),
        head=linear(),
    )


def seeded(model: nn.Module, *batch: Any) -> Tensor:
    """Per-sample losses that draw the same random numbers every time."""
    torch.manual_seed(5)
    return losses(model, *batch)


def attention() -> nn.Module:
    return Net(lambda s, x: s.m(x, x, x, need_weights=False)[0], m=nn.MultiheadAttention(D, 2, batch_first=True))


def recurrent(kind: Any) -> nn.Module:
    return Net(lambda s, x: s.r(x)[0], r=kind(D, 3, num_layers=2, batch_first=True))


def checkpointed(use_reentrant: bool, last: bool = False) -> nn.Module:
    def forward(s: Any, x: Tensor) -> Tensor:
        h = checkpoint(s.body, s.first(x), use_reentrant=use_reentrant)
        return h if last else s.out(h)

    parts = {} if last else {"out": linear()}
    return Net(forward, first=linear(), body=nn.Sequential(linear(), nn.GELU(), linear()), **parts)


def mlp() -> nn.Module:
    return nn.Sequential(linear(), nn.Tanh(), nn.Linear(D, 3))


def mixing(mix: Callable[[Tensor], Tensor]) -> nn.Module:
    return Net(lambda s, x: s.b(mix(s.a(x))), a=linear(), b=linear())


def routed(mean_load: bool = False) -> nn.Module:
    """Tokens of the whole batch go to one of two experts, by their values; with ``mean_load`` the loss balances the load."""

    def forward(s: Any, x: Tensor) -> Any:
        flat = s.proj(x).flatten(0, 1)
        gate = s.router(flat).softmax(-1)
        out = torch.zeros_like(flat)
        for e, expert in enumerate(s.experts):
            rows = gate.argmax(-1) == e
            out[rows] = expert(flat[rows]) * gate[rows, e, None]
        out = out.view(x.shape)
        return (out, (gate.mean(0) ** 2).sum()) if mean_load else out

    return Net(forward, proj=linear(), router=nn.Linear(D, 2), experts=nn.ModuleList([linear(), linear()]))


def windows() -> nn.Module:
    """Windows flattened into the batch, with one bias for all of them."""

    def forward(s: Any, x: Tensor) -> Tensor:
        w = s.proj(x.reshape(len(x) * 2, T // 2, D)) + s.bias
        return s.norm(w).reshape(x.shape)

    return Net(forward, proj=linear(), bias=param(1, T // 2, D), norm=nn.LayerNorm(D))


class LoRA(nn.Module):
    """A frozen linear layer with a trainable low-rank addition."""

    def __init__(self) -> None:
        super().__init__()
        self.base = linear().requires_grad_(False)
        self.down, self.up = nn.Linear(D, 2, bias=False), nn.Linear(2, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def peft_model() -> nn.Module:
    base: Any = Net(lambda s, x: s.b(s.a(x).tanh()), a=linear(), b=linear())
    base.config = {"tie_word_embeddings": False}
    config = peft.LoraConfig(r=2, target_modules=["a"], modules_to_save=["b"])
    return peft.get_peft_model(base, config).to("cpu")


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


# ---------------------------------------------------------------- loops


def unfreezing(run: Run) -> None:
    run.model[0].requires_grad_(True)
    ordinary(run)


def forward_only(run: Run) -> None:
    """Evaluate in training mode on the batch and on other rows, then train."""
    for batch in run.loader:
        run.model(*batch)
        run.model(*(part[:2] for part in batch))
        run.backward(batch)
        run.opt.step()


def two_passes(run: Run) -> None:
    """Back-propagate half of the loss twice, through the same graph."""
    for batch in run.loader:
        loss = run.losses(run.model, *batch).mean() / 2
        loss.backward(retain_graph=True)
        loss.backward()
        run.opt.step()


def two_losses(run: Run) -> None:
    """Back-propagate two losses, from two forward passes."""
    for batch in run.loader:
        for part in (0.25, 0.75):
            (part * run.losses(run.model, *batch).mean()).backward()
        run.opt.step()


def adversarial(run: Run) -> None:
    """Ask for the gradient of the input first."""
    for (x,) in run.loader:
        probe = x.clone().requires_grad_()
        torch.autograd.grad(run.losses(run.model, probe).sum(), probe)
        run.backward([x])
        run.opt.step()


def penalised(run: Run) -> None:
    for (x,) in run.loader:
        probe = x.clone().requires_grad_()
        loss = run.losses(run.model, probe).mean()
        (slope,) = torch.autograd.grad(loss, probe, create_graph=True)
        (loss + slope.square().sum()).backward()
        run.opt.step()


def scaled(run: Run) -> None:
    """The loop of mixed precision with a gradient scaler."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for batch in run.loader:
        scaler.scale(run.losses(run.model, *batch).mean()).backward()
        scaler.step(run.opt)
        scaler.update()


def unscaling(run: Run, enabled: bool = False) -> None:
    """The same with the gradients unscaled before the step."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=enabled)
    for batch in run.loader:
        scaler.scale(run.losses(run.model, *batch).mean()).backward()
        scaler.unscale_(run.opt)
        scaler.step(run.opt)
        scaler.update()


def unscaled(run: Run) -> None:
    unscaling(run, enabled=True)


def autocast_losses(model: nn.Module, *batch: Any) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        out = model(*batch)
    return out.float().square().flatten(1).sum(1)


def own_loss(run: Run) -> None:
    for batch in run.loader:
        run.model(*batch)["loss"].backward()
        run.opt.step()


def looked_at(run: Run) -> None:
    """Look at ``p.grad`` in all the usual ways between ``backward`` and the step."""
    for batch in run.loader:
        run.backward(batch)
        assert all(p.grad is None for p in run.model.parameters())
        assert float(nn.utils.clip_grad_norm_(run.model.parameters(), 1e-3)) == 0
        run.opt.step()


def discarded(run: Run) -> None:
    """Drop one backward pass by ``zero_grad``."""
    for batch in run.loader:
        (7 * run.losses(run.model, *batch).mean()).backward()
        run.opt.zero_grad()
        run.backward(batch)
        run.opt.step()


def continued(run: Run) -> None:
    """Leave one batch after ``backward`` without a step, and take the step for the next."""
    for k, batch in enumerate([b for _ in range(2) for b in run.loader]):
        (7 * run.losses(run.model, *batch).mean()).backward()
        if k == 0:
            run.opt.zero_grad()
            continue
        run.opt.zero_grad()
        run.backward(batch)
        run.opt.step()


def compiled_before(model: nn.Module, data: list[Tensor]) -> Any:
    """Compile the model, and run it forwards and backwards."""
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    losses(compiled, *data).mean().backward()
    model.zero_grad()
    return compiled


def compiled_in_place(model: nn.Module, data: list[Tensor]) -> Any:
    """The same, with the model's own ``compile``."""
    torch._dynamo.reset()
    model.compile(backend="eager")
    losses(model, *data).mean().backward()
    model.zero_grad()
    return model


def compiled_inside(run: Run) -> None:
    """Compile the model in the scope, and train with that."""
    torch._dynamo.reset()
    compiled(dataclasses.replace(run, prepared=torch.compile(run.model, backend="eager")))


def compiled(run: Run) -> None:
    """Train with what was compiled."""
    for batch in run.loader:
        run.losses(run.prepared, *batch).mean().backward()
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


def saved_on_cpu(run: Run) -> None:
    """Keep everything that the backward pass needs in the memory of the CPU."""
    for batch in run.loader:
        with torch.autograd.graph.save_on_cpu():
            loss = run.losses(run.model, *batch).mean()
        loss.backward()
        run.opt.step()


def written_later(s: Any, x: Tensor) -> Tensor:
    """Change the input of a layer in place after the layer has used it."""
    h = x.exp()
    out = s.a(h)
    h.add_(1)
    return out + s.b(x)


# ---------------------------------------------------------------- the table

TRAPS: dict[str, Trap] = {
    "G1 position ids [1, t]": Trap(lambda: positions(lambda: torch.arange(T)[None]), ids),
    "G1 position ids [t]": Trap(lambda: positions(lambda: torch.arange(T)), ids),
    "G1 position ids, t = n": Trap(
        lambda: positions(lambda: torch.arange(N)[None], N), lambda: [torch.randint(0, 7, (N, N))]
    ),
    "G1 BERT": Trap(lambda: transformer("bert"), ids, losses=first_output),
    "G2 relative positions": Trap(lambda: relative(T), tokens),
    "G2 relative positions, t = n": Trap(lambda: relative(N), lambda: [randn(N, N, D)]),
    "G2 T5": Trap(lambda: transformer("t5"), ids, losses=first_output),
    "G3 GPT-2": Trap(lambda: transformer("gpt2"), ids, losses=first_output),
    "G4 tied with a subclass": Trap(lambda: tied(Linear), tokens),
    "G4 tied with the same class": Trap(lambda: tied(nn.Linear), tokens),
    "G5 weight of another module": Trap(
        lambda: Net(lambda s, i: F.linear(s.mid(s.emb(i)), s.emb.weight), emb=nn.Embedding(7, D), mid=linear()), ids
    ),
    "G5 weight used in the loop": Trap(
        mlp,
        tokens,
        losses=lambda model, x: losses(lambda x: F.linear(model[0](x), model[0].weight), x),
        refused=r"0\.weight",
    ),
    "G6 keyword inputs": Trap(by_keyword, tokens),
    "G7 in-place ReLU": Trap(lambda: nn.Sequential(linear(), nn.ReLU(inplace=True), linear(), nn.Tanh()), tokens),
    "G7 in-place addition": Trap(lambda: Net(lambda s, x: s.b(s.a(x).add_(x)).tanh_(), a=linear(), b=linear()), tokens),
    "G8 structures": Trap(structured, tokens),
    "G9 class token": Trap(lambda: vision(0.0), tokens),
    "G9 class token with dropout": Trap(lambda: vision(0.5), tokens, losses=seeded, together=True),
    "G10 linear on [n, a, b, i]": Trap(
        lambda: nn.Sequential(linear(), nn.Tanh(), linear()), lambda: [randn(N, 2, 3, D)]
    ),
    "G10 layer norm without bias": Trap(lambda: nn.Sequential(linear(), nn.LayerNorm(D, bias=False)), tokens),
    "G10 padding index": Trap(lambda: nn.Sequential(nn.Embedding(7, D, padding_idx=2), linear()), ids),
    "G10 convolutions": Trap(
        lambda: nn.Sequential(
            nn.Conv1d(T, 4, 3, padding=2, dilation=2, groups=2), nn.ConvTranspose1d(4, 2, 3, stride=2, padding=1)
        ),
        tokens,
    ),
    "G10 embedding bag": Trap(lambda: nn.Sequential(nn.EmbeddingBag(7, D, mode="sum"), linear()), ids),
    "G11 LSTM": Trap(lambda: recurrent(nn.LSTM), tokens),
    "G11 GRU": Trap(lambda: recurrent(nn.GRU), tokens),
    "G11 RNN": Trap(lambda: recurrent(nn.RNN), tokens),
    "G11 attention": Trap(attention, tokens),
    "G12 checkpointing": Trap(lambda: checkpointed(False), tokens),
    "G12 reentrant checkpointing": Trap(lambda: checkpointed(True), tokens),
    "G12 activations saved on the CPU": Trap(mlp, tokens, loop=saved_on_cpu),
    "G12 checkpointing, and the rest saved on the CPU": Trap(lambda: checkpointed(False), tokens, loop=saved_on_cpu),
    "G13 forward passes without backward": Trap(mlp, tokens, loop=forward_only),
    "G14 unfreezing": Trap(
        lambda: nn.Sequential(linear().requires_grad_(False), linear()), tokens, loop=unfreezing, refused=r"0\.weight"
    ),
    "G15 BatchNorm": Trap(
        lambda: nn.Sequential(linear(), nn.BatchNorm1d(T), linear()), tokens, refused=r"1 \(BatchNorm1d\)"
    ),
    "G15 batch statistics by hand": Trap(
        lambda: mixing(lambda h: h - h.mean(0)), tokens, refused=r"the model|a\.weight"
    ),
    "G15 in-batch negatives": Trap(
        lambda: mixing(lambda h: ((h.flatten(1) @ h.flatten(1).T).softmax(-1) @ h.flatten(1)).view(h.shape)),
        tokens,
        refused=r"the model|a\.weight",
    ),
    "G15 contrastive loss": Trap(
        mlp,
        tokens,
        loop=by_function(lambda m, b: F.cross_entropy(m(b[0])[:, 0] @ m(b[0])[:, 0].T, torch.arange(len(b[0])))),
        refused="train function",
    ),
    "G15 load balancing": Trap(
        lambda: routed(True),
        tokens,
        loop=by_function(lambda m, b: m(b[0])[0].square().flatten(1).sum(1).mean() + m(b[0])[1]),
        refused="train function|router",
    ),
    "G15 load balancing in a bare loop": Trap(
        lambda: Net(lambda s, x: (lambda r: (r[0], r[1]))(s.inner(x)), inner=routed(True)),
        tokens,
        losses=lambda m, x: (lambda r: r[0].square().flatten(1).sum(1) + r[1])(m(x)),
        refused="the model|router",
    ),
    "G16 token mean in a train function": Trap(
        mlp, padded, loop=by_function(lambda m, b: token_mean(m, *b)), refused="train function"
    ),
    "G16 token mean in the model": Trap(
        lambda: Net(lambda s, x, y: {"loss": token_mean(s.net, x, y)}, net=mlp()),
        padded,
        loop=own_loss,
        refused="the model",
    ),
    "G17 sum for mean in a train function": Trap(
        mlp, tokens, loop=by_function(lambda m, b: losses(m, *b).sum()), refused="loss_reduction='mean'"
    ),
    "G17 mean for sum in a train function": Trap(
        mlp,
        tokens,
        loop=by_function(lambda m, b: losses(m, *b).mean()),
        options={"loss_reduction": "sum"},
        refused="loss_reduction='sum'",
    ),
    "G17 mean for sum in the model": Trap(
        with_loss, tokens, loop=own_loss, options={"loss_reduction": "sum"}, refused="loss_reduction='sum'"
    ),
    "G18 routed tokens": Trap(routed, tokens),
    "G18 flattened tokens": Trap(
        lambda: Net(lambda s, x: s.b(s.a(x.flatten(0, 1)).tanh()).view(x.shape), a=linear(), b=linear()), tokens
    ),
    "G18 windows": Trap(windows, tokens),
    "G18 time-first recurrence": Trap(
        lambda: Net(lambda s, x: s.r(x.transpose(0, 1))[0].transpose(0, 1), r=nn.LSTM(D, 3)), tokens
    ),
    "G19 low-rank additions": Trap(lambda: nn.Sequential(LoRA(), nn.Tanh(), LoRA()), tokens),
    "G19 peft": Trap(peft_model, tokens),
    "G19 weight norm": Trap(lambda: nn.Sequential(parametrizations.weight_norm(linear()), nn.Tanh(), linear()), tokens),
    "G20 autocast": Trap(
        mlp, lambda: [torch.randn(N, T, D)], losses=autocast_losses, dtype=torch.float32, tolerance=5e-3
    ),
    "G20 gradient scaler": Trap(mlp, tokens, loop=scaled, refused="GradScaler"),
    "G20 gradient scaler, unscaled": Trap(mlp, tokens, loop=unscaled, refused="GradScaler"),
    "G20 gradient scaler, switched off": Trap(mlp, tokens, loop=unscaling),
    "G21 one graph twice": Trap(mlp, tokens, loop=two_passes),
    "G21 two losses": Trap(lambda: vision(0.0), tokens, loop=two_losses),
    "G21 reentrant checkpointing of the last layers": Trap(lambda: checkpointed(True, last=True), tokens),
    "G22 gradient of the input": Trap(mlp, tokens, loop=adversarial),
    "G23 gradient penalty": Trap(mlp, tokens, loop=penalised, refused="create_graph"),
    "G24 means of 1e4": Trap(lambda: nn.Linear(64, 64), far_off, losses=cancelling, dtype=torch.float32, exact=False),
    "G25 input written later": Trap(
        lambda: Net(written_later, a=linear(), b=linear()), tokens, error=RuntimeError, refused="modified by an inplace"
    ),
    "G26 compiled and run before": Trap(mlp, tokens, before=compiled_before, loop=compiled),
    "G26 compiled in place and run before": Trap(mlp, tokens, before=compiled_in_place, loop=compiled),
    "G26 compiled inside": Trap(lambda: Net(times_own, net=mlp(), g=param(D)), tokens, loop=compiled_inside),
    "P6 the loss of the output object": Trap(
        with_loss, tokens, loop=own_loss, losses=lambda m, x: m(x)["logits"].square().flatten(1).sum(1)
    ),
    "P9 gradients looked at": Trap(mlp, tokens, loop=looked_at),
    "L9 zero_grad": Trap(mlp, tokens, loop=discarded),
    "L9 continue": Trap(mlp, tokens, loop=continued),
}

NUMBERS = {f"G{k}" for k in range(1, 27)} | {"P6", "P9", "L9"}


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
    return rows_by_backward(
        model, (trap.losses(model, *(t[i : i + 1] for t in data)).sum() for i in range(len(data[0])))
    )


def scope_over(trap: Trap, model: nn.Module, data: list[Tensor], bound: float, mode: str) -> PrivateTraining:
    """Return a scope without noise whose batches hold every example, in order."""
    options = {"max_grad_norm": bound, "poisson_sampling": True, "accountant": "rdp", **trap.options}
    return models.scope_over(model, loader=loader_of(data), grad_sample_mode=mode, **options)


def summed(name: str, bound: float, mode: str, without: int | None = None) -> list[Tensor]:
    """Take the row's private step, on all samples or without one, and return the clipped sum that it released."""
    trap, model, data = made(name)
    if without is not None:
        data = [torch.cat([t[:without], t[without + 1 :]]) for t in data]
    prepared = trap.before(model, data)
    start, own = values(model), [set(vars(p)) for p in model.parameters()]
    with scope_over(trap, model, data, bound, mode) as (opt, loader):
        trap.loop(Run(model, opt, loader, trap.losses, prepared))
        for p, before in zip(model.parameters(), own, strict=True):
            assert vars(p).keys() - before <= {"grad_sample", "__getstate__"}
    return [len(data[0]) * change for change in moved(start, model)]


def test_every_trap_has_a_row() -> None:
    """The table names every trap of gradients and those of the loop that belong with them."""
    assert {name.split()[0] for name in TRAPS} == NUMBERS


@pytest.mark.filterwarnings("ignore:.*None of the inputs have requires_grad")
@pytest.mark.filterwarnings("ignore:the loss did not reach")
@each_mode
@pytest.mark.parametrize("name", [name for name, trap in TRAPS.items() if not trap.refused])
def test_a_trap_is_passed(name: str, mode: str) -> None:
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
def test_a_trap_is_refused(name: str, mode: str) -> None:
    """The error says what is wrong and where; nothing moved, nothing was charged, and nothing is left on the model."""
    trap, model, data = made(name)
    prepared = trap.before(model, data)
    start = values(model)
    trainable = [p.requires_grad for p in model.parameters()]
    before = Snapshot(model)
    charged = None

    def train() -> None:
        nonlocal charged
        scope = scope_over(trap, model, data, 1.0, mode)
        charged = scope.accountant.history
        with scope as (opt, loader):
            trap.loop(Run(model, opt, loader, trap.losses, prepared))

    with pytest.raises(trap.error) as caught:
        train()
    assert re.search(trap.refused, str(caught.value)), str(caught.value)
    assert_same(values(model), start)
    assert not charged
    for p, was in zip(model.parameters(), trainable, strict=True):
        assert p.grad is None  # also of those that the loop unfroze
        p.requires_grad_(was)
    assert before.differences() == []
