"""Whole models: what they are called with and return, checkpoints, adapters, experts, tiny transformers."""

from dataclasses import dataclass, replace
from typing import Any

import peft
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..models import BUILDERS, Net
from ..reference import losses_of
from . import case, ids, net, param, rows
from .followed import linear

T = D = 4


@dataclass
class Output:
    """What a module returns."""

    hidden: Tensor
    extra: Any


def by_keyword(s, x):
    """A submodule called with keyword inputs only, and without the input that it ignores."""
    return s.lin(input=s.block(hidden=x, scale=x.cos(), flag="plus")) + s.block(hidden=x)


def keywords_only(s, *, hidden, scale=None, flag=None):
    return s.w * hidden if scale is None else s.w * hidden * scale


def structured(s, x):
    """Submodules that return tuples, dataclasses and nested containers, and take numbers, strings and None."""
    out = s.block(x, 2, "a", None)
    return s.head(out.hidden + out.extra["a"][0]) + s.pair(x)[1]


def structure(s, x, power, name, nothing):
    return Output(s.lin(x) ** power, {name: [s.w * x, (nothing, 3)]})


def vision(dropout):
    """Class token, position embeddings and layer scale, owned by the model itself."""

    def forward(s, x):
        x = torch.cat([s.cls_token.expand(len(x), -1, -1), s.proj(x)], 1) + s.position_embeddings
        x = F.dropout(x, dropout, s.training)
        return s.head(x + s.gamma * s.mlp(x).tanh())

    tokens = {"cls_token": param(1, 1, D), "position_embeddings": param(1, T + 1, D), "gamma": param(D)}
    return Net(forward, **tokens, proj=linear(), mlp=linear(), head=linear())


def routed(mean_load=False):
    """Tokens of the whole batch go to one of two experts, by their values; with ``mean_load`` the loss balances the load."""

    def forward(s, x):
        flat = s.proj(x).flatten(0, 1)
        gate = s.router(flat).softmax(-1)
        out = torch.zeros_like(flat)
        for e, expert in enumerate(s.experts):
            chosen = gate.argmax(-1) == e
            out[chosen] = expert(flat[chosen]) * gate[chosen, e, None]
        out = out.view(x.shape)
        return (out, (gate.mean(0) ** 2).sum()) if mean_load else out

    return Net(forward, proj=linear(), router=nn.Linear(D, 2), experts=nn.ModuleList([linear(), linear()]))


class LoRA(nn.Module):
    """A frozen linear layer with a trainable low-rank addition."""

    def __init__(self):
        super().__init__()
        self.base = linear().requires_grad_(False)
        self.down, self.up = nn.Linear(D, 2, bias=False), nn.Linear(2, D, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def adapted():
    base = Net(lambda s, x: s.b(s.a(x).tanh()), a=linear(), b=linear())
    base.config = {"tie_word_embeddings": False}
    config = peft.LoraConfig(r=2, target_modules=["a"], modules_to_save=["b"])
    return peft.get_peft_model(base, config).to("cpu")


SMALL = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 8}
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def gpt2():
    still = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=7, n_positions=8, n_embd=8, n_layer=1, n_head=2, **still)
    )


def bert():
    config = transformers.BertConfig(vocab_size=7, max_position_embeddings=8, **SMALL, **STILL)
    return transformers.BertForTokenClassification(config)


def t5():
    config = transformers.T5Config(vocab_size=7, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, dropout_rate=0.0)
    return transformers.T5EncoderModel(config)


def of_first_output(model, i):
    """Per-sample losses of a model that returns an output object."""
    return losses_of(lambda i: model(i)[0], i)


def kept_on_cpu(model, x):
    """Per-sample losses that keep everything the backward pass needs in the memory of the CPU."""
    with torch.autograd.graph.save_on_cpu():
        return losses_of(model, x)


def body():
    return nn.Sequential(linear(), nn.GELU(), linear())


class Block(nn.Module):
    """Owns parameters next to a layer."""

    def __init__(self):
        super().__init__()
        self.scale, self.shift, self.inner = param(D), param(1, T, D), linear()

    def forward(self, x):
        return self.inner(x + self.shift.exp()).tanh() * self.scale


def owned(s, h):
    return s.a(h * s.gain + s.positions).tanh() * s.gain


def checkpointed(use_reentrant):
    """Return the rows of models with checkpoints."""

    def run(part, h):
        return checkpoint(part, h, use_reentrant=use_reentrant)

    def row(name, forward, *inputs, **parts):
        return net(f"checkpoint {name}{', reentrant' * use_reentrant}", forward, *inputs, first=linear, **parts)

    def owners(s, x):
        """Blocks that own parameters."""
        return run(s.two, run(s.one, s.first(x)))

    def twice(s, x):
        """A block that is called twice."""
        return run(s.last, run(s.block, run(s.block, s.first(x))))

    def closures(s, x):
        """Functions that read parameters of the module around them, once with a layer in between."""
        h = s.first(x)
        for function in (lambda h: owned(s, h), lambda h: h * s.gain, lambda h: owned(s, h)):
            h = run(function, h)
        return s.b((h + F.linear(h, s.a.weight)) * s.gain)

    return [
        row("in the middle", lambda s, x: s.b(run(s.a, s.first(x))), rows(T, D), a=body, b=linear),
        row("of the last layers", lambda s, x: run(s.a, s.first(x)), rows(T, D), a=body),
        row("around owners of parameters", owners, rows(T, D), one=Block, two=Block),
        row("called twice", twice, rows(D), block=lambda: nn.Sequential(linear(), nn.Tanh(), nn.LayerNorm(D)), last=linear),
        row("around closures", closures, rows(T, D), a=linear, b=linear, gain=(D,), positions=(T, D)),
    ]


MODELS = [
    *(case(name, make, rows(4)) for name, make in BUILDERS.items()),
    *(case(f"{name}, evaluating", lambda make=make: make().eval(), rows(4)) for name, make in BUILDERS.items()),
    net("keywords", by_keyword, rows(T, D), lin=linear, block=lambda: Net(keywords_only, w=param(D))),
    net(
        "structures",
        structured,
        rows(T, D),
        block=lambda: Net(structure, lin=linear(), w=param(D)),
        pair=lambda: Net(lambda s, x: (x, s.lin(x)), lin=linear()),
        head=linear,
    ),
    net("added-in-place", lambda s, x: s.b(s.a(x).add_(x)).tanh_(), rows(T, D), a=linear, b=linear),
    net("flattened-tokens", lambda s, x: s.b(s.a(x.flatten(0, 1)).tanh()).view(x.shape), rows(T, D), a=linear, b=linear),
    case("vision", lambda: vision(0.0), rows(T, D)),
    case("routed", routed, rows(T, D)),
    case("low-rank-additions", lambda: nn.Sequential(LoRA(), nn.Tanh(), LoRA()), rows(T, D)),
    case("peft", adapted, rows(T, D)),
    case("gpt2", gpt2, ids(T), loss=of_first_output, empty=False),
    case("bert", bert, ids(T), loss=of_first_output, empty=False),
    case("t5", t5, ids(T), loss=of_first_output, empty=False, tolerance=1e-5),  # whose norms are in float32
    case("kept-on-cpu", lambda: nn.Sequential(linear(), nn.Tanh(), nn.Linear(D, 3)), rows(T, D), loss=kept_on_cpu),
    *checkpointed(False),
    *checkpointed(True),
    replace(checkpointed(False)[0], name="checkpoint, and the rest kept on the CPU", loss=kept_on_cpu),
]
