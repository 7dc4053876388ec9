"""Parameters used outside layer rules, and calls whose samples are not the rows of axis 0: right, or refused by name."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dp_hooks import HookController, errors, private_training

from .models import Net, Snapshot, randn
from .reference import clipped_sum, losses_of, sample_grads

MODES = ("ghost", "hooks", "functorch")
N = 3


def param(*shape):
    return nn.Parameter(torch.randn(shape))


def ids(*shape):
    return torch.randint(0, 7, shape)


def windows_with_a_class_token():
    """The windows of a sample follow each other, but their class tokens are laid out window by window."""

    def embed(s, x):
        tokens = s.token.expand(len(x), -1, -1).repeat(2, 1, 1)
        return torch.cat([tokens, s.proj(x).reshape(2 * len(x), 2, 4)], 1)

    inner = Net(embed, token=param(1, 1, 4), proj=nn.Linear(4, 4))
    return Net(
        lambda s, x: s.head(torch.tanh(s.inner(x))).reshape(len(x), 6, 3), inner=inner, head=nn.Linear(4, 3, bias=False)
    )


def class_tokens_of_the_first_rows():
    """Each frame gets a class token, and the first rows of all frames are taken for those of the samples."""

    def embed(s, x):
        frames = torch.cat([s.token.expand(len(x) * 2, -1, -1), s.proj(x).reshape(2 * len(x), 2, 4)], 1)
        return torch.cat([frames[: len(x), :1], frames[:, 1:].reshape(len(x), 4, 4)], 1)

    inner = Net(embed, token=param(1, 1, 4), proj=nn.Linear(4, 4))
    return Net(lambda s, x: s.head(torch.tanh(s.inner(x))), inner=inner, head=nn.Linear(4, 3))


def one_output_for_each_sample():
    """A module that is repeated on each sample, since it picks rows, also returns a list that is as long as the batch."""

    def inner(s, x):
        picked = x[..., 0] > 0
        x = x.masked_scatter(picked[..., None].expand_as(x), x[picked] * s.scale)
        return x, list(s.last(x))

    return Net(
        lambda s, x: s.head(s.inner(x)[0]),
        inner=Net(inner, scale=param(4), last=nn.Linear(4, 4)),
        head=nn.Linear(4, 3),
    )


def flat_bags():
    """Ids of all samples in one row, with offsets, and more than one id for each sample."""
    return Net(
        lambda s, i: s.head(s.bag(i.flatten(), torch.arange(0, i.numel(), i.shape[1]))),
        bag=nn.EmbeddingBag(7, 4),
        head=nn.Linear(4, 3),
    )


class Product(torch.autograd.Function):
    """``a * b``, differentiated by hand."""

    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return a * b

    @staticmethod
    def backward(ctx, grad):
        a, b = ctx.saved_tensors
        return (grad * b).sum_to_size(a.shape), (grad * a).sum_to_size(b.shape)


class ProductInTwoParts(Product):
    """The same, in the form whose ``forward`` gets no context."""

    @staticmethod
    def forward(a, b):
        return a * b

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)


class Scaled(Product):
    """``first * rest[0]``, of any number of arguments."""

    @staticmethod
    def forward(ctx, *factors):
        return Product.forward(ctx, *factors)


class ScaledInTwoParts(ProductInTwoParts):
    """``first * rest[0]``, of any number of arguments."""

    @staticmethod
    def forward(*factors):
        return factors[0] * factors[1]


class Clamped(torch.autograd.Function):
    """A copy whose gradient is cut off: the gradients of samples do not add up to that of the batch."""

    @staticmethod
    def forward(ctx, a):
        return a.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad.clamp(-0.1, 0.1)


class Weighed(torch.autograd.Function):
    """A copy of parameters, whose gradient depends on what it was called with besides."""

    @staticmethod
    def forward(ctx, a, x):
        ctx.save_for_backward(x)
        return a.clone()

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * x.square().sum(), None


class OutOfSight(torch.autograd.Function):
    """What it gives back was computed elsewhere than in PyTorch."""

    @staticmethod
    def forward(ctx, a):
        return torch.from_numpy(a.detach().numpy() * 2)

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


class Constant(torch.autograd.Function):
    """Not differentiable."""

    @staticmethod
    def forward(ctx, a):
        out = a * 2
        ctx.mark_non_differentiable(out)
        return out

    @staticmethod
    def backward(ctx, grad):
        return None


def function_of_parameters(product, scaled):
    """Its result only meets what is not trained, and other parameters, before a layer without any."""
    return Net(
        lambda s, x: s.head(torch.tanh(F.linear(x, s.base + product.apply(s.a, s.b) * s.c))),
        a=param(4, 4),
        b=param(4, 4),
        c=param(4),
        base=torch.ones(4, 4),
        head=nn.Linear(4, 3),
    )


def function_of_results(product, scaled):
    inner = Net(lambda s, x: x @ scaled.apply(s.a.exp(), s.b + s.a.t()), a=param(4, 4), b=param(4, 4))
    return Net(lambda s, x: s.head(s.inner(s.first(x))), first=nn.Linear(4, 4), inner=inner, head=nn.Linear(4, 3))


def function_of_the_batch(product, scaled):
    inner = Net(lambda s, x: product.apply(x, s.a) + scaled.apply(x, s.b), a=param(5, 4), b=param(4))
    return Net(lambda s, x: s.head(s.inner(s.first(x))), first=nn.Linear(4, 4), inner=inner, head=nn.Linear(4, 3))


def function_of_another_module(product, scaled):
    """A module uses what is owned elsewhere: repeating that module alone would leave it out."""
    last = nn.Linear(4, 4)
    inner = Net(
        lambda s, x: s.last(x @ product.apply(s.other[0].weight, s.a) + product.apply(x, s.other[0].bias)),
        a=param(4, 4),
        last=nn.Linear(4, 4),
    )
    inner.other = (last,)
    return Net(lambda s, x: s.last(s.inner(s.first(x))), first=nn.Linear(4, 4), inner=inner, last=last)


def cls_token(dropout):
    def forward(s, x):
        x = torch.cat([s.cls.expand(x.shape[0], -1, -1), s.proj(x)], 1) + s.pos
        return s.head(F.dropout(x, dropout, s.training)[:, 0] + x.mean(1))

    return Net(forward, cls=param(1, 1, 4), pos=param(1, 6, 4), proj=nn.Linear(4, 4), head=nn.Linear(4, 3))


def repeated_token():
    return Net(
        lambda s, x: s.inner(torch.cat([s.token.repeat(len(x), 2, 1), x], 1)),
        token=param(1, 1, 4),
        inner=nn.Linear(4, 4),
    )


def attention_bias(length):
    """A relative-position table looked up once for all samples, added to attention scores."""

    def forward(s, x):
        n, t, _ = x.shape
        at = torch.arange(t)
        bias = s.table(at[None, :] - at[:, None] + t - 1).permute(2, 0, 1)
        q, k, v = s.qkv(x).view(n, t, 3, 2, 2).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) + bias.unsqueeze(0)
        return s.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(n, t, 4))

    return Net(forward, table=nn.Embedding(2 * length - 1, 2), qkv=nn.Linear(4, 12), out=nn.Linear(4, 4))


def attention_mask_bias():
    """The table goes into ``scaled_dot_product_attention`` as its mask, with dropout there that is off."""

    def forward(s, x):
        bias = s.table[s.index.view(-1)].view(3, 3, 2).permute(2, 0, 1).unsqueeze(0)
        q = s.q(x).view(len(x), 3, 2, 2).transpose(1, 2)
        return F.scaled_dot_product_attention(q, q, q, attn_mask=bias).transpose(1, 2).flatten(2)

    return Net(forward, table=param(9, 2), index=torch.arange(9).view(3, 3), q=nn.Linear(4, 4))


def windows():
    """Windows flattened into the batch, with a bias table per window position and a module that sees windows only."""

    def forward(s, x):
        n = len(x)
        w = x.view(n, 2, 2, 2, 2, 4).transpose(2, 3).reshape(n * 4, 4, 4)
        w = s.norm(s.proj(w)) + s.bias.unsqueeze(0)
        w = s.conv(w.transpose(1, 2)).transpose(1, 2)
        return w.view(n, 4, 4, 4).sum(1)

    return Net(forward, proj=nn.Linear(4, 4), norm=nn.LayerNorm(4), bias=param(4, 4), conv=nn.Conv1d(4, 4, 1))


def projected_table():
    """As in DeBERTa: the position table goes through the norm and projections that serve the tokens as well."""

    def forward(s, x):
        h = s.norm(s.proj(x))
        table = s.proj(s.norm(s.table.weight))
        return torch.einsum("ntd,pd->ntp", h, table).softmax(-1) @ table

    return Net(forward, table=nn.Embedding(5, 4), norm=nn.LayerNorm(4), proj=nn.Linear(4, 4))


def experts():
    """Raw expert weights and tokens routed to them by their values."""

    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = param(3, 5, 4), param(3, 4, 5)

        def forward(self, x, chosen):
            out = torch.zeros_like(x)
            for e in range(3):
                (rows,) = torch.where(chosen == e)
                out.index_add_(0, rows, F.linear(F.linear(x[rows], self.up[e]).tanh(), self.down[e]))
            return out

    def forward(s, x):
        flat = s.proj(x).flatten(0, 1)
        return (s.experts(flat, s.router(flat).argmax(-1)) + flat).view(x.shape)

    return Net(forward, proj=nn.Linear(4, 4), experts=Experts(), router=nn.Linear(4, 3).requires_grad_(False))


def sorted_experts():
    """Tokens of the whole batch sorted by expert, worked on in one piece, and put back."""

    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = param(3, 4, 4)

        def forward(self, x, chosen):
            order = torch.argsort(chosen)
            out = torch.bmm(self.weight[chosen[order]], x[order].unsqueeze(-1)).squeeze(-1)
            return out[torch.argsort(order)]

    def forward(s, x):
        flat = s.proj(x).flatten(0, 1)
        return s.experts(flat, (flat[:, 0] > 0).long() + (flat[:, 1] > 0).long()).view(x.shape)

    return Net(forward, proj=nn.Linear(4, 4), experts=Experts())


def expert_modules():
    """Experts that are modules, called with the samples that were routed to them."""

    def forward(s, x):
        h = s.proj(x)
        out = torch.zeros_like(h)
        for e, expert in enumerate(s.experts):
            rows = (h[:, 0] > 0).long() == e
            out[rows] = expert(h[rows])
        return out

    return Net(forward, proj=nn.Linear(4, 4), experts=nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]))


def tied_bias():
    """A masked-language-model head: a decoder tied to the embedding, with a bias owned by its parent."""
    model = Net(
        lambda s, i: s.decoder(s.mid(s.emb(i)).tanh()) + s.bias,
        emb=nn.Embedding(7, 4),
        mid=nn.Linear(4, 4),
        decoder=nn.Linear(4, 7, bias=False),
        bias=param(7),
    )
    model.decoder.weight = model.emb.weight
    return model


def lists():
    return Net(
        lambda s, x: sum(torch.einsum("ntd,de->nte", x, w) * s.scales[str(k)] for k, w in enumerate(s.weights)),
        weights=nn.ParameterList([param(4, 4), param(4, 4)]),
        scales=nn.ParameterDict({"0": param(4), "1": param(1)}),
    )


def scan():
    """A state-space layer: parameters pass through exp and softplus before they meet the tokens."""

    def forward(s, x):
        decay = -torch.exp(s.log_decay)
        step = F.softplus(s.dt(x) + s.dt_bias)
        state, out = x.new_zeros(len(x), 4, 2), []
        for t in range(x.shape[1]):
            state = state * torch.exp(step[:, t, :, None] * decay) + x[:, t, :, None]
            out.append((state * s.mix).sum(-1) + s.skip * x[:, t])
        return torch.stack(out, 1)

    return Net(
        forward, log_decay=param(4, 2), dt=nn.Linear(4, 4, bias=False), dt_bias=param(4), mix=param(2), skip=param(4)
    )


def masked_token():
    def forward(s, x):
        h = s.proj(x)
        h[x[..., 0] > 0] = s.token
        return h

    return Net(forward, proj=nn.Linear(4, 4), token=param(4))


def written_in_place():
    """A parameter written into results in several ways."""

    def forward(s, x):
        out = torch.empty_like(x)
        out[:] = x
        out[:, 0] = s.token
        out[:, 1] += s.token
        out[:, 2].copy_(s.token)
        return out + torch.stack([row * first for row, first in zip(s.table, s.table[0], strict=True)])

    return Net(forward, token=param(4), table=param(4, 4))


def tables_of_the_batch_size():
    def forward(s, x):
        n, flat = len(x), x.flatten(0, 1)
        return (flat + s.table.repeat(n, 1) + s.rows(torch.arange(5)).repeat(n, 1)).view_as(x)

    return Net(forward, table=param(5, 4), rows=nn.Embedding(5, 4))


def learned_state():
    def forward(s, x):
        return s.r(x, s.h.expand(1, len(x), 3).contiguous())[0]

    return Net(forward, r=nn.GRU(4, 3, batch_first=True), h=param(1, 1, 3))


def learned_query():
    def forward(s, x):
        return s.m(s.q.expand(len(x), 2, 4), x, x)[0]

    return Net(forward, m=nn.MultiheadAttention(4, 2, batch_first=True), q=param(2, 4))


def time_first_attention():
    return Net(
        lambda s, x: s.m(x.transpose(0, 1), x.transpose(0, 1), x.transpose(0, 1))[0].transpose(0, 1),
        m=nn.MultiheadAttention(4, 2, add_bias_kv=True),
    )


def prelu_scale():
    return Net(
        lambda s, x: torch.where(x > 0, x, s.slope * x) / s.temperature.exp(), slope=param(4), temperature=param()
    )


class Square(nn.Module):
    """Uses the weight of another module in a function."""

    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(7, 4)
        self.mid = nn.Linear(4, 4)

    def forward(self, i):
        return F.linear(self.mid(self.emb(i)), self.emb.weight)


# name: (model, inputs)
CASES = {
    "positions-1xt": (
        lambda: Net(lambda s, i: s.e(i) + s.p(torch.arange(5)[None]), e=nn.Embedding(7, 4), p=nn.Embedding(5, 4)),
        lambda: [ids(N, 5)],
    ),
    "positions-t": (
        lambda: Net(lambda s, i: s.e(i) + s.p(torch.arange(5)), e=nn.Embedding(7, 4), p=nn.Embedding(5, 4)),
        lambda: [ids(N, 5)],
    ),
    "positions-t-equals-n": (
        lambda: Net(lambda s, i: s.e(i) + s.p(torch.arange(N)), e=nn.Embedding(7, 4), p=nn.Embedding(N, 4)),
        lambda: [ids(N, N)],
    ),
    "everything-equals-n": (
        lambda: Net(lambda s, x: s.l(x + s.pos) * s.scale, pos=param(N, N), l=nn.Linear(N, N), scale=param(N)),
        lambda: [randn(N, N, N)],
    ),
    "relative-positions": (lambda: attention_bias(5), lambda: [randn(N, 5, 4)]),
    "relative-positions-t-equals-n": (lambda: attention_bias(N), lambda: [randn(N, N, 4)]),
    "attention-mask-bias": (attention_mask_bias, lambda: [randn(N, 3, 4)]),
    "weight-of-another-module": (Square, lambda: [ids(N, 5)]),
    "cls-token": (lambda: cls_token(0.0), lambda: [randn(N, 5, 4)]),
    "windows-with-a-class-token": (windows_with_a_class_token, lambda: [randn(N, 4, 4)]),
    "class-tokens-of-the-first-rows": (class_tokens_of_the_first_rows, lambda: [randn(N, 4, 4)]),
    "nothing-besides": (
        lambda: Net(
            lambda s, x: s.head(s.inner(x)[0]),
            inner=Net(
                lambda s, x: (
                    s.l(x.transpose(0, 1).flatten(0, 1)).view(5, len(x), 4).transpose(0, 1),
                    x[:, :0],
                ),
                l=nn.Linear(4, 4),
            ),
            head=nn.Linear(4, 3),
        ),
        lambda: [randn(N, 5, 4)],
    ),
    "flat-bags": (flat_bags, lambda: [ids(N, 5)]),
    "repeated-token": (repeated_token, lambda: [randn(N, 2, 4)]),
    "layer-scale": (
        lambda: Net(
            lambda s, x: x + s.gamma * s.l(x) * s.gate.sigmoid(), gamma=param(4), gate=param(), l=nn.Linear(4, 4)
        ),
        lambda: [randn(N, 5, 4)],
    ),
    "in-place-scale": (
        lambda: Net(lambda s, x: s.l(x).mul_(s.gamma).add_(s.beta), gamma=param(4), beta=param(4), l=nn.Linear(4, 4)),
        lambda: [randn(N, 5, 4)],
    ),
    "logit-scale": (
        lambda: Net(lambda s, x: s.l(F.normalize(x)) * s.scale.exp(), scale=param(), l=nn.Linear(4, 2)),
        lambda: [randn(N, 4)],
    ),
    "lists": (lists, lambda: [randn(N, 5, 4)]),
    "tied-bias": (tied_bias, lambda: [ids(N, 5)]),
    "projected-table": (projected_table, lambda: [randn(N, 6, 4)]),
    "windows": (windows, lambda: [randn(N, 4, 4, 4)]),
    "experts": (experts, lambda: [randn(N, 5, 4)]),
    "sorted-experts": (sorted_experts, lambda: [randn(N, 5, 4)]),
    "expert-modules": (expert_modules, lambda: [randn(N, 4)]),
    "scan": (scan, lambda: [randn(N, 4, 4)]),
    "masked-token": (masked_token, lambda: [randn(N, 5, 4)]),
    "written-in-place": (written_in_place, lambda: [randn(N, 4, 4)]),
    "tables-of-the-batch-size": (tables_of_the_batch_size, lambda: [randn(N, 5, 4)]),
    "learned-state": (learned_state, lambda: [randn(N, 5, 4)]),
    "learned-query": (learned_query, lambda: [randn(N, 5, 4)]),
    "codebook": (
        lambda: Net(lambda s, x: s.b[torch.cdist(x.flatten(0, 1), s.b).argmin(-1)].view_as(x) * x, b=param(6, 4)),
        lambda: [randn(N, 5, 4)],
    ),
    "straight-through": (
        lambda: Net(lambda s, x: F.linear(x, s.w + (s.w.round() - s.w).detach()), w=param(4, 4)),
        lambda: [randn(N, 5, 4)],
    ),
    "parametrised-and-shared": (
        lambda: Net(
            lambda s, x: s.l(x) + s.l(s.t), l=nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), t=param(5, 4)
        ),
        lambda: [randn(N, 5, 4)],
    ),
    "types-of-the-batch": (
        lambda: Net(lambda s, x: F.linear(x, s.w.to(x) * s.v.type_as(x)), w=param(4, 4), v=param(4, 4)),
        lambda: [randn(N, 5, 4)],
    ),
    "slopes": (prelu_scale, lambda: [randn(N, 5, 4)]),
    "time-first": (
        lambda: Net(lambda s, x: s.n(s.l(x.transpose(0, 1))).transpose(0, 1), l=nn.Linear(4, 4), n=nn.LayerNorm(4)),
        lambda: [randn(N, 5, 4)],
    ),
    "time-first-flat": (
        lambda: Net(
            lambda s, x: s.l(x.transpose(0, 1).flatten(0, 1)).view(5, len(x), 4).transpose(0, 1), l=nn.Linear(4, 4)
        ),
        lambda: [randn(N, 5, 4)],
    ),
    "time-first-lstm": (
        lambda: Net(lambda s, x: s.r(x.transpose(0, 1))[0].transpose(0, 1), r=nn.LSTM(4, 3)),
        lambda: [randn(N, 5, 4)],
    ),
    "time-first-attention": (time_first_attention, lambda: [randn(N, 5, 4)]),
    "constant-buffer": (
        lambda: Net(lambda s, x: s.w * s.norms * x + s.norms, w=param(4), norms=torch.rand(4, dtype=torch.float64)),
        lambda: [randn(N, 4)],
    ),
    "convolution": (lambda: nn.Conv1d(2, 3, 3, padding=1, padding_mode="circular"), lambda: [randn(N, 2, 5)]),
    "own-normalisation": (
        lambda: Net(
            lambda s, x: F.layer_norm(x, (4,), s.w, s.b) + F.linear(x, s.m), w=param(4), b=param(4), m=param(4, 4)
        ),
        lambda: [randn(N, 5, 4)],
    ),
}


CASES |= {
    f"{function.__name__.lower()}-function": (
        lambda f=function, arguments=arguments: Net(
            lambda s, x: s.head(torch.tanh(F.linear(x, f.apply(s.a * 2, *arguments(x)) * s.b))),
            a=param(4, 4),
            b=param(4),
            head=nn.Linear(4, 3),
        ),
        lambda: [randn(N, 5, 4)],
    )
    for function, arguments in (
        (Clamped, lambda x: []),
        (Weighed, lambda x: [x]),
        (OutOfSight, lambda x: []),
        (Constant, lambda x: []),
    )
}
CASES |= {
    f"{kind}-function-{where}": (lambda f=f, g=g, make=make: make(f, g), lambda: [randn(N, 5, 4)])
    for kind, (f, g) in {"plain": (Product, Scaled), "two-part": (ProductInTwoParts, ScaledInTwoParts)}.items()
    for where, make in {
        "of-parameters": function_of_parameters,
        "of-results": function_of_results,
        "of-the-batch": function_of_the_batch,
        "of-another-module": function_of_another_module,
    }.items()
}


def build(case):
    torch.manual_seed(1)
    make, inputs = CASES[case]
    model = make().double()
    for p in model.parameters():
        nn.init.normal_(p, std=0.5)
    return model, inputs()


def assert_close(found, expected):
    for name, want in expected.items():
        torch.testing.assert_close(found[name], want, rtol=1e-8, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES)
def test_gradients_match_single_sample_autograd(case, mode):
    """Per-sample gradients, squared norms and weighted sums equal those of single samples, and nothing is left."""
    model, inputs = build(case)
    expected = sample_grads(model, losses_of, *inputs)
    before = Snapshot(model)
    controller = HookController(model, grad_sample_mode=mode)
    losses_of(model, *inputs).mean().backward()
    names = {p: name for name, p in model.named_parameters()}
    found = controller.take()
    assert {names[p] for p in found.params} == set(expected)
    assert_close({names[p]: found.grads(p) for p in found.params}, expected)
    assert_close(
        {names[p]: s for p, s in found.sq_norms(found.params).items()},
        {name: g.reshape(len(g), -1).square().sum(1) for name, g in expected.items()},
    )
    factors = torch.linspace(0.1, 1.0, N, dtype=torch.float64)
    for finite in (torch.ones(N, dtype=torch.bool), torch.tensor([True, False, True])):
        sums = found.weighted_sums(dict.fromkeys(found.params, factors), finite)
        assert_close(
            {names[p]: s for p, s in sums.items()},
            {k: torch.tensordot(factors * finite, g, 1) for k, g in expected.items()},
        )
    assert all(p.grad is None for p in model.parameters())
    controller.cleanup()
    assert before.differences() == []


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES)
def test_other_batch_sizes_after_the_first(case, mode):
    """What was learned about axes on the first batch holds for batches of one, of more, and of none."""
    model, inputs = build(case)
    controller = HookController(model, grad_sample_mode=mode)
    for size in (1, 2, 7):
        batch = [torch.cat([part] * 3)[:size].roll(size, -1) for part in inputs]
        losses_of(model, *batch).mean().backward()
        found = controller.take()
        grads = {controller.name_of(p): found.grads(p) for p in found.params}
        controller.disable_hooks()
        assert_close(grads, sample_grads(model, losses_of, *batch))
        controller.enable_hooks()
    none = [part[:0] for part in inputs]
    losses_of(model, *none).sum().backward()
    empty = controller.take()
    assert empty.samples == 0
    assert all(empty.grads(p).shape == (0, *p.shape) for p in empty.params)
    controller.cleanup()


class Lengths(nn.Module):
    """Reads lengths in a module of its own."""

    def forward(self, n):
        return n.tolist()


def ragged(read):
    """Tokens of all samples in one piece, as many of each as a length says."""

    def forward(s, x, lengths):
        h = s.a(x)
        flat = torch.cat([h[i, :n] for i, n in enumerate(read(lengths))])
        flat = s.b(flat).tanh() * s.g
        parts, start = [], 0
        for n in lengths.tolist():
            parts.append(flat[start : start + n].sum(0))
            start += n
        return torch.stack(parts)

    parts = {"read": read} if isinstance(read, nn.Module) else {}
    return Net(forward, a=nn.Linear(4, 4), b=nn.Linear(4, 4), g=param(4), **parts)


def unpadded(pick):
    """Tokens that a mask picks are worked on in one piece."""

    def forward(s, x, mask):
        h = s.a(x)
        out = torch.zeros_like(h)
        out[mask] = s.b(pick(h, mask)) * s.g
        return out

    return Net(forward, a=nn.Linear(4, 4), b=nn.Linear(4, 4), g=param(4))


def branching():
    def forward(s, x):
        extra = s.b(x) if x[0, 0] > 0 else s.b(torch.ones(4, dtype=x.dtype))
        return s.a(x) + extra * (s.e if x[0, 0] > 0 else 1)

    return Net(forward, a=nn.Linear(4, 4), b=nn.Linear(4, 4), e=param(4))


def with_positions(length):
    def forward(s, x):
        wide = F.pad(x + s.pos, (0, 0, 0, 35 - length % 35))
        return s.l(wide) * s.g + s.e(torch.arange(wide.shape[1]) % length)

    return Net(forward, pos=param(length, 4), l=nn.Linear(4, 4), g=param(4), e=nn.Embedding(length, 4))


def flat_layer():
    return Net(lambda s, x: s.l(x.flatten(0, 1)).view_as(x) * s.g, l=nn.Linear(4, 4), g=param(4))


def lengths(*values):
    return torch.tensor(values)


def masks(*counts):
    return torch.arange(4)[None] < torch.tensor(counts)[:, None]


def signed(sign, *shape):
    return sign * randn(*shape).abs()


# name: (model, batches): what the first batch shows is misleading for the next ones.
SEQUENCES = {
    **{
        f"lengths-{name}": (
            lambda read=read: ragged(read),
            lambda: [(randn(2, 6, 4), lengths(4, 4)), (randn(2, 6, 4), lengths(2, 4)), (randn(2, 6, 4), lengths(6, 2))],
        )
        for name, read in {
            "tolist": lambda n: n.tolist(),
            "iteration": lambda n: n,
            "int": lambda n: map(int, n),
            "numpy": lambda n: n.numpy(),
            "float": lambda n: [int(v) for v in n.double()],
            "differences": lambda n: [c.item() for c in F.pad(n.cumsum(0), (1, 0)).diff()],
            "a-module": Lengths(),
        }.items()
    },
    **{
        f"mask-{name}": (
            lambda pick=pick: unpadded(pick),
            lambda: [(randn(2, 4, 4), masks(4, 4)), (randn(2, 4, 4), masks(1, 3)), (randn(2, 4, 4), masks(4, 2))],
        )
        for name, pick in {
            "index": lambda h, m: h[m],
            "nonzero": lambda h, m: h.flatten(0, 1)[m.flatten().nonzero().squeeze(1)],
            "select": lambda h, m: h.masked_select(m[..., None]).view(-1, 4),
        }.items()
    },
    "branch": (branching, lambda: [(signed(-1, 3, 4),), (signed(1, 3, 4),), (signed(-1, 2, 4),)]),
    "one-expert": (sorted_experts, lambda: [(signed(1, 2, 3, 4),), (randn(3, 3, 4),), (randn(2, 5, 4),)]),
    "number-of-tokens": (
        flat_layer,
        lambda: [(randn(1, 5, 4),), (randn(2, 6, 4),), (randn(6, 2, 4),), (randn(5, 5, 4),)],
    ),
    **{
        f"{size}-positions": (
            lambda size=size: with_positions(size),
            lambda size=size: [(randn(3, size, 4),), (randn(size, size, 4),), (randn(1, size, 4),)],
        )
        for size in (5, 7, 11, 35)
    },
}


@pytest.mark.parametrize("mode", ["ghost", "hooks"])
@pytest.mark.parametrize("case", SEQUENCES)
def test_a_misleading_first_batch(case, mode):
    """Layouts that hold on the first batch only, by coincidence, are never relied on: right, or refused."""
    make, batches = SEQUENCES[case]
    model = make().double()
    controller = HookController(model, grad_sample_mode=mode)
    right = 0
    for batch in batches():
        try:
            losses_of(model, *batch).mean().backward()
        except errors.UnsupportedModelError:
            controller.discard()
            continue
        found = controller.take()
        grads = {controller.name_of(p): found.grads(p) for p in found.params}
        controller.disable_hooks()
        expected = sample_grads(model, losses_of, *batch)
        assert_close({k: grads.get(k, torch.zeros_like(g)) for k, g in expected.items()}, expected)
        controller.enable_hooks()
        right += 1
    assert right > 0
    controller.cleanup()


@pytest.mark.parametrize("case", CASES)
def test_one_private_step_moves_by_the_clipped_sum(case, loader_of):
    """The self-check passes; without noise, SGD with rate 1 moves the parameters by the clipped mean."""
    model, inputs = build(case)
    grads = sample_grads(model, losses_of, *inputs)
    norms = torch.stack([g.reshape(len(g), -1).square().sum(1) for g in grads.values()]).sum(0).sqrt()
    bound = float(norms.median())
    expected = clipped_sum(grads, bound)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    scope = private_training(
        model,
        torch.optim.SGD(model.parameters(), lr=1.0),
        loader_of(inputs),
        noise_multiplier=0.0,
        max_grad_norm=bound,
        poisson_sampling=False,
    )
    with scope as (opt, loader):
        for batch in loader:
            losses_of(model, *batch).mean().backward()
            opt.step()
    for name, want in expected.items():
        moved = (before[name] - model.get_parameter(name).detach()) * N
        torch.testing.assert_close(moved, want, rtol=1e-6, atol=1e-9)


def encoder_layer():
    return nn.TransformerEncoderLayer(4, 2, 8, dropout=0.5, batch_first=True)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("make", [lambda: cls_token(0.5), encoder_layer], ids=["cls-token", "encoder-layer"])
def test_dropout_in_the_owner_of_parameters(make, mode):
    """With dropout inside the owner of parameters, gradients belong to the masks that the forward pass drew."""
    model = make().double()
    x = randn(N, 5, 4)
    torch.manual_seed(3)
    losses = losses_of(model, x)
    expected = [torch.autograd.grad(loss, list(model.parameters()), retain_graph=True) for loss in losses]
    controller = HookController(model, grad_sample_mode=mode)
    torch.manual_seed(3)
    losses_of(model, x).mean().backward()
    found = controller.take()
    for k, p in enumerate(model.parameters()):
        torch.testing.assert_close(found.grads(p), torch.stack([grads[k] for grads in expected]))
    controller.cleanup()


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("mode", ["ghost", "hooks"])
def test_checkpointed_owner(mode, use_reentrant):
    """Parameters of a checkpointed owner give the gradients of single samples."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.shift, self.inner = param(4), param(1, 5, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.inner(x + self.shift.exp()).tanh() * self.scale

    def forward(s, x):
        x = s.first(x)
        for block in s.blocks:
            x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=use_reentrant)
        return x

    model = Net(forward, first=nn.Linear(4, 4), blocks=nn.ModuleList([Block(), Block()])).double()
    x = randn(N, 5, 4)
    expected = {name: [] for name, _ in model.named_parameters()}
    for i in range(N):  # reentrant checkpointing knows no torch.autograd.grad
        losses_of(model, x[i : i + 1]).sum().backward()
        for name, p in model.named_parameters():
            expected[name].append(p.grad)
            p.grad = None
    controller = HookController(model, grad_sample_mode=mode)
    losses_of(model, x).mean().backward()
    found = controller.take()
    assert_close(
        {controller.name_of(p): found.grads(p) for p in found.params}, {k: torch.stack(g) for k, g in expected.items()}
    )
    controller.cleanup()


@pytest.mark.parametrize("mode", ["ghost", "hooks"])
def test_a_list_that_is_as_long_as_the_batch(mode):
    """What a repeated module returns besides, with one entry for each sample, is left out, as long as the loss leaves it out."""
    torch.manual_seed(1)
    model = one_output_for_each_sample().double()
    controller = HookController(model, grad_sample_mode=mode)
    for n in (3, 5):
        x = randn(n, 5, 4)
        controller.disable_hooks()
        expected = sample_grads(model, losses_of, x)
        controller.enable_hooks()
        losses_of(model, x).mean().backward()
        found = controller.take()
        assert_close({controller.name_of(p): found.grads(p) for p in found.params}, expected)
    model.fn = (lambda s, x: torch.stack(s.inner(x)[1]),)
    loss = losses_of(model, x).mean()
    with pytest.raises(errors.UnsupportedModelError, match="inner"):
        loss.backward()
    controller.cleanup()


@pytest.mark.parametrize("flat", [5, 12])
@pytest.mark.parametrize("last", [True, False])
def test_flat_ids_as_inputs_of_the_model_are_refused_with_what_to_do(flat, last):
    """A batch of flat ids and offsets has no rows to take samples from: the error says so, and how to pass them instead."""
    bag = nn.EmbeddingBag(7, 4, include_last_offset=last)
    model = Net(lambda s, i, o: s.head(s.bag(i, o)), bag=bag, head=nn.Linear(4, 3))
    controller = HookController(model)
    with pytest.raises(
        errors.UnsupportedModelError, match=r"bag \(EmbeddingBag\).*offsets.*\[samples, longest\].*padding_idx"
    ):
        model(torch.arange(flat) % 7, torch.tensor([0, 1, 3] + [flat] * last))
    controller.cleanup()


def test_a_custom_function_next_to_random_numbers_is_refused():
    """Where parameters meet the batch in a function and the module around draws numbers, repeating it would draw others."""
    model = Net(lambda s, x: F.dropout(Product.apply(x, s.a), 0.5), a=param(4)).double()
    controller = HookController(model)
    loss = losses_of(model, randn(N, 4)).mean()
    with pytest.raises(errors.UnsupportedModelError, match="it draws random numbers"):
        loss.backward()
    controller.cleanup()


def mixes():
    """Samples attend to each other through a parameter."""
    return Net(lambda s, x: (x @ x.t() * s.scale).softmax(-1) @ x, scale=param())


def batch_mean():
    return Net(lambda s, x: x * s.scale - (x * s.scale).mean(0), scale=param(4))


@pytest.mark.parametrize("make", [mixes, batch_mean])
def test_samples_that_mix_are_refused(make, loader_of):
    """Where samples mix in the owner of a parameter, nothing is released."""
    model = make().double()
    x = randn(N, 4)
    scope = private_training(
        model,
        torch.optim.SGD(model.parameters(), lr=1.0),
        loader_of([x]),
        noise_multiplier=0.0,
        max_grad_norm=1.0,
        poisson_sampling=False,
    )
    value = model.scale.detach().clone()

    def train(opt, loader):
        for (batch,) in loader:
            losses_of(model, batch).mean().backward()
            opt.step()

    with scope as (opt, loader), pytest.raises(errors.UnsupportedModelError):
        train(opt, loader)
    assert torch.equal(value, model.scale)


def test_a_parameter_used_outside_any_forward_is_refused_by_name():
    """A weight that meets the batch in the training loop itself is refused, naming it."""
    model = nn.Sequential(nn.Linear(4, 4)).double()
    controller = HookController(model)
    with pytest.raises(errors.UnsupportedModelError, match=r"0\.weight"):
        F.linear(model(randn(N, 4)), model[0].weight).sum().backward()
    controller.cleanup()


def test_a_shared_tensor_returned_by_the_model_is_refused_when_used():
    """A lifted tensor never leaves the model; a gradient that reaches it from outside is an error that names it."""
    model = Net(lambda s, x: (x * s.scale, s.scale.exp()), scale=param(4)).double()
    controller = HookController(model)
    out, scale = model(randn(N, 4))
    assert type(scale) is torch.Tensor
    with pytest.raises(errors.UnsupportedModelError, match="scale"):
        (out * scale).sum().backward()
    controller.cleanup()


def test_a_lifted_tensor_kept_by_the_model_is_an_ordinary_one_after_the_scope():
    """What the model stored of a shared computation goes on working as a tensor when the controller is closed."""

    def forward(s, x):
        s.kept = s.scale.exp()
        return x * s.kept

    model = Net(forward, scale=param(4)).double()
    controller = HookController(model)
    x = randn(N, 4)
    losses_of(model, x).mean().backward()
    controller.cleanup()
    assert type(model.kept * x) is torch.Tensor
    torch.testing.assert_close(model.kept * x, model.scale.exp() * x)


@pytest.mark.parametrize("in_place", [True, False])
def test_a_buffer_written_in_forward_is_refused_by_name(in_place):
    """A forward pass that stores statistics of the batch in a buffer is an error that names the buffer."""

    def forward(s, x):
        if in_place:
            s.seen += x.detach().mean(0)
        else:
            s.seen = s.seen + x.detach().mean(0)
        return x * s.scale

    model = Net(forward, scale=param(4), seen=torch.zeros(4, dtype=torch.float64)).double()
    controller = HookController(model)
    with pytest.raises(errors.UnsupportedModelError, match="seen"):
        model(randn(N, 4))
    controller.cleanup()


def test_trials_leave_random_state_and_buffers_alone():
    """The first forward pass draws the same numbers and leaves the same buffers as without a controller."""

    def forward(s, x):
        return F.dropout(x, 0.5) * s.scale + torch.rand(4, dtype=x.dtype)

    model = Net(forward, scale=param(4)).double()
    x = randn(N, 4)
    torch.manual_seed(5)
    expected, after = model(x), torch.rand(3)
    controller = HookController(model)
    torch.manual_seed(5)
    torch.testing.assert_close(model(x), expected)
    assert torch.equal(torch.rand(3), after)
    controller.cleanup()
