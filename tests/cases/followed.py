"""Parameters used outside the rules of layers, and calls whose samples are not the rows of axis 0."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from ..models import Net, randn
from . import N, case, ids, net, param, rows

linear = partial(nn.Linear, 4, 4)
head = partial(nn.Linear, 4, 3)
word = partial(nn.Embedding, 7, 4)


def windows_with_a_class_token(s, x):
    """The windows of a sample follow each other, but their class tokens are laid out window by window."""
    tokens = s.token.expand(len(x), -1, -1).repeat(2, 1, 1)
    return torch.cat([tokens, s.proj(x).reshape(2 * len(x), 2, 4)], 1)


def class_tokens_of_the_first_rows(s, x):
    """Each frame gets a class token, and the first rows of all frames are taken for those of the samples."""
    frames = torch.cat([s.token.expand(len(x) * 2, -1, -1), s.proj(x).reshape(2 * len(x), 2, 4)], 1)
    return torch.cat([frames[: len(x), :1], frames[:, 1:].reshape(len(x), 4, 4)], 1)


def with_token(embed):
    return lambda: Net(embed, token=param(1, 1, 4), proj=linear())


def time_first_flat(s, x):
    return s.l(x.transpose(0, 1).flatten(0, 1)).view(5, len(x), 4).transpose(0, 1)


def windows(s, x):
    """Windows flattened into the batch, with a bias table per window position and a module that sees windows only."""
    n = len(x)
    w = x.view(n, 2, 2, 2, 2, 4).transpose(2, 3).reshape(n * 4, 4, 4)
    w = s.norm(s.proj(w)) + s.bias.unsqueeze(0)
    return s.conv(w.transpose(1, 2)).transpose(1, 2).view(n, 4, 4, 4).sum(1)


def tables_of_the_batch_size(s, x):
    n, flat = len(x), x.flatten(0, 1)
    return (flat + s.table.repeat(n, 1) + s.rows(torch.arange(5)).repeat(n, 1)).view_as(x)


def time_first_attention(s, x):
    x = x.transpose(0, 1)
    return s.m(x, x, x)[0].transpose(0, 1)


def attention_bias(s, x):
    """A relative-position table looked up once for all samples, added to attention scores."""
    n, t, _ = x.shape
    at = torch.arange(t)
    bias = s.table(at[None, :] - at[:, None] + t - 1).permute(2, 0, 1)
    q, k, v = s.qkv(x).view(n, t, 3, 2, 2).permute(2, 0, 3, 1, 4)
    scores = q @ k.transpose(-1, -2) + bias.unsqueeze(0)
    return s.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(n, t, 4))


def attention_mask_bias(s, x):
    """The table goes into ``scaled_dot_product_attention`` as its mask, with dropout there that is off."""
    bias = s.table[s.index.view(-1)].view(3, 3, 2).permute(2, 0, 1).unsqueeze(0)
    q = s.q(x).view(len(x), 3, 2, 2).transpose(1, 2)
    return F.scaled_dot_product_attention(q, q, q, attn_mask=bias).transpose(1, 2).flatten(2)


def projected_table(s, x):
    """As in DeBERTa: the position table goes through the norm and projections that serve the tokens as well."""
    h, table = s.norm(s.proj(x)), s.proj(s.norm(s.table.weight))
    return torch.einsum("ntd,pd->ntp", h, table).softmax(-1) @ table


def vector_products(s, x):
    """Attention pooling: matrices of the batch times vectors, from both sides, and products of several axes."""
    scores = x @ s.query + s.key @ x.mT + torch.mv(x.flatten(0, 1), s.query).view(x.shape[:2]) + torch.inner(x, s.key)
    pooled = (scores.softmax(1)[..., None] * x).sum(1)
    return torch.tensordot(pooled[:, None], s.table, dims=([1, 2], [0, 1])) + torch.add(pooled, s.key, out=None)


def written_by_another(s, x):
    """Numbers of parameters are written into what came from others, and into views of it, after it was used as well."""
    e = s.e * 1
    before = x + e
    e[0] = s.q
    e[1].copy_(s.r)
    e[2:].mul_(s.q).addcmul_(s.q, s.r)
    after = F.linear(x, e)
    e.index_add_(0, torch.tensor([0, 3]), torch.stack([s.r, s.q]))
    return torch.cat([before, after, x * e], -1)


def spectral(s, x):
    """Complex parameters: of a spectral layer, of a complex linear one, and a rotation."""
    spectrum = torch.fft.rfft(x, dim=1) * s.filter
    x = torch.fft.irfft(spectrum, n=4, dim=1) + s.turn(x.to(torch.complex128)).abs()
    return torch.view_as_real(x * s.phase.conj() + torch.polar(s.length, s.angle)).flatten(2)


def complex_products(s, x):
    return torch.einsum("nti,tio->nto", torch.fft.rfft(x, dim=1), s.w).abs()


def complex_param(*shape):
    return nn.Parameter(torch.randn(*shape, dtype=torch.complex128))


def spectral_net():
    turn = nn.Linear(4, 4, dtype=torch.complex128)
    return Net(spectral, filter=complex_param(3, 4), turn=turn, phase=complex_param(4), length=param(4), angle=param(4))


def summed_alone(s, x):
    """As in ActNorm: parameters scale the rows, and their sum is added to each."""
    return ((x + s.shift) * s.scale.exp()).tanh() - s.scale.sum() + x.new_zeros(len(x), 1, 1)


def jvp(s, x):
    return torch.func.jvp(lambda z: s.l(z).tanh(), (x,), (torch.ones_like(x),))[1] * s.g


TRANSFORMS = {
    "vmap": lambda s, x: torch.func.vmap(lambda row: s.l(row) * s.g)(x),
    "vmap-of-tokens": lambda s, x: torch.func.vmap(s.l, in_dims=1, out_dims=1)(x) * s.g,
    "energy": lambda s, x: torch.func.grad(lambda z: (s.l(z).tanh() * s.g).sum())(x),
    "jvp": jvp,
    "functional-call": lambda s, x: torch.func.functional_call(s.l, dict(s.l.named_parameters()), (x * s.g,)),
}


def experts(s, x, chosen):
    """Raw expert weights and tokens routed to them by their values."""
    out = torch.zeros_like(x)
    for e in range(3):
        (rows,) = torch.where(chosen == e)
        out.index_add_(0, rows, F.linear(F.linear(x[rows], s.up[e]).tanh(), s.down[e]))
    return out


def routed(s, x):
    flat = s.proj(x).flatten(0, 1)
    return (s.experts(flat, s.router(flat).argmax(-1)) + flat).view(x.shape)


def sorted_experts(s, x, chosen):
    """Tokens of the whole batch sorted by expert, worked on in one piece, and put back."""
    order = torch.argsort(chosen)
    out = torch.bmm(s.weight[chosen[order]], x[order].unsqueeze(-1)).squeeze(-1)
    return out[torch.argsort(order)]


def routed_by_sign(s, x):
    flat = s.proj(x).flatten(0, 1)
    return s.experts(flat, (flat[:, 0] > 0).long() + (flat[:, 1] > 0).long()).view(x.shape)


SORTED_EXPERTS = {"proj": linear, "experts": lambda: Net(sorted_experts, weight=param(3, 4, 4))}


def expert_modules(s, x):
    """Experts that are modules, called with the samples that were routed to them."""
    h = s.proj(x)
    out = torch.zeros_like(h)
    for e, expert in enumerate(s.experts):
        rows = (h[:, 0] > 0).long() == e
        out[rows] = expert(h[rows])
    return out


def tied_bias():
    """A masked-language-model head: a decoder tied to the embedding, with a bias owned by its parent."""
    parts = {"emb": word(), "mid": linear(), "decoder": nn.Linear(4, 7, bias=False), "bias": param(7)}
    model = Net(lambda s, i: s.decoder(s.mid(s.emb(i)).tanh()) + s.bias, **parts)
    model.decoder.weight = model.emb.weight
    return model


def scan(s, x):
    """A state-space layer: parameters pass through exp and softplus before they meet the tokens."""
    decay = -torch.exp(s.log_decay)
    step = F.softplus(s.dt(x) + s.dt_bias)
    state, out = x.new_zeros(len(x), 4, 2), []
    for t in range(x.shape[1]):
        state = state * torch.exp(step[:, t, :, None] * decay) + x[:, t, :, None]
        out.append((state * s.mix).sum(-1) + s.skip * x[:, t])
    return torch.stack(out, 1)


def masked_token(s, x):
    h = s.proj(x)
    h[x[..., 0] > 0] = s.token
    return h


def written_in_place(s, x):
    """A parameter written into results in several ways."""
    out = torch.empty_like(x)
    out[:] = x
    out[:, 0] = s.token
    out[:, 1] += s.token
    out[:, 2].copy_(s.token)
    return out + torch.stack([row * first for row, first in zip(s.table, s.table[0], strict=True)])


def parameter_lists(s, x):
    return sum(torch.einsum("ntd,de->nte", x, w) * s.scales[str(k)] for k, w in enumerate(s.weights))


class Product(torch.autograd.Function):
    """The product of the first two arguments, differentiated by hand."""

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
    """The same of any number of arguments."""

    @staticmethod
    def forward(ctx, *factors):
        return Product.forward(ctx, *factors)


class ScaledInTwoParts(ProductInTwoParts):
    """The same of any number of arguments."""

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
        head=head(),
    )


def function_of_results(product, scaled):
    inner = Net(lambda s, x: x @ scaled.apply(s.a.exp(), s.b + s.a.t()), a=param(4, 4), b=param(4, 4))
    return Net(lambda s, x: s.head(s.inner(s.first(x))), first=linear(), inner=inner, head=head())


def function_of_the_batch(product, scaled):
    inner = Net(lambda s, x: product.apply(x, s.a) + scaled.apply(x, s.b), a=param(5, 4), b=param(4))
    return Net(lambda s, x: s.head(s.inner(s.first(x))), first=linear(), inner=inner, head=head())


def function_of_another_module(product, scaled):
    """A module uses what is owned elsewhere: repeating that module alone would leave it out."""
    last = linear()
    inner = Net(
        lambda s, x: s.last(x @ product.apply(s.other[0].weight, s.a) + product.apply(x, s.other[0].bias)),
        a=param(4, 4),
        last=linear(),
    )
    inner.other = (last,)
    return Net(lambda s, x: s.last(s.inner(s.first(x))), first=linear(), inner=inner, last=last)


PAIRS = {"plain": (Product, Scaled), "two-part": (ProductInTwoParts, ScaledInTwoParts)}
PLACES = {
    "of-parameters": function_of_parameters,
    "of-results": function_of_results,
    "of-the-batch": function_of_the_batch,
    "of-another-module": function_of_another_module,
}


def positions(name, at, size=5):
    return net(name, lambda s, i: s.e(i) + s.p(at()), ids(size), e=word, p=partial(nn.Embedding, size, 4))


FOLLOWED = [
    positions("positions-1xt", lambda: torch.arange(5)[None]),
    positions("positions-t", lambda: torch.arange(5)),
    positions("positions-t-equals-n", lambda: torch.arange(N), N),
    positions("positions-1xt-equals-n", lambda: torch.arange(N)[None], N),
    net(
        "everything-equals-n", lambda s, x: s.l(x + s.pos) * s.scale, rows(N, N), pos=(N, N), l=lambda: nn.Linear(N, N), scale=(N,)
    ),
    *(
        net(name, attention_bias, rows(t, 4), table=partial(nn.Embedding, 2 * t - 1, 2), qkv=partial(nn.Linear, 4, 12), out=linear)
        for name, t in (("relative-positions", 5), ("relative-positions-t-equals-n", N))
    ),
    net("attention-mask-bias", attention_mask_bias, rows(3, 4), table=(9, 2), index=lambda: torch.arange(9).view(3, 3), q=linear),
    net("weight-of-another-module", lambda s, i: F.linear(s.mid(s.emb(i)), s.emb.weight), ids(5), emb=word, mid=linear),
    net(
        "windows-with-a-class-token",
        lambda s, x: s.head(torch.tanh(s.inner(x))).reshape(len(x), 6, 3),
        rows(4, 4),
        inner=with_token(windows_with_a_class_token),
        head=lambda: nn.Linear(4, 3, bias=False),
    ),
    net(
        "class-tokens-of-the-first-rows",
        lambda s, x: s.head(torch.tanh(s.inner(x))),
        rows(4, 4),
        inner=with_token(class_tokens_of_the_first_rows),
        head=head,
    ),
    net(
        "nothing-besides",
        lambda s, x: s.head(s.inner(x)[0]),
        rows(5, 4),
        inner=lambda: Net(lambda s, x: (time_first_flat(s, x), x[:, :0]), l=linear()),
        head=head,
    ),
    net(
        "flat-bags",  # ids of all samples in one row, with offsets, and more than one id for each sample
        lambda s, i: s.head(s.bag(i.flatten(), torch.arange(0, i.numel(), i.shape[1]))),
        ids(5),
        bag=lambda: nn.EmbeddingBag(7, 4),
        head=head,
    ),
    net(
        "repeated-token",
        lambda s, x: s.inner(torch.cat([s.token.repeat(len(x), 2, 1), x], 1)),
        rows(2, 4),
        token=(1, 1, 4),
        inner=linear,
    ),
    net("layer-scale", lambda s, x: x + s.gamma * s.l(x) * s.gate.sigmoid(), rows(5, 4), gamma=(4,), gate=(), l=linear),
    net("in-place-scale", lambda s, x: s.l(x).mul_(s.gamma).add_(s.beta), rows(5, 4), gamma=(4,), beta=(4,), l=linear),
    net("logit-scale", lambda s, x: s.l(F.normalize(x)) * s.scale.exp(), rows(4), scale=(), l=lambda: nn.Linear(4, 2)),
    net(
        "lists",
        parameter_lists,
        rows(5, 4),
        weights=lambda: nn.ParameterList([param(4, 4), param(4, 4)]),
        scales=lambda: nn.ParameterDict({"0": param(4), "1": param(1)}),
    ),
    case("tied-bias", tied_bias, ids(5)),
    net(
        "projected-table", projected_table, rows(6, 4), table=lambda: nn.Embedding(5, 4), norm=lambda: nn.LayerNorm(4), proj=linear
    ),
    net("vector-products", vector_products, rows(4, 4), query=(4,), key=(4,), table=(1, 4, 4)),
    net("written-by-another", written_by_another, rows(4, 4), e=(4, 4), q=(4,), r=(4,)),
    case("spectral", spectral_net, rows(4, 4), empty=False),  # the FFT of MKL takes no empty batch
    case("complex-products", lambda: Net(complex_products, w=complex_param(3, 4, 2)), rows(4, 4), empty=False),
    net("summed-alone", summed_alone, rows(4, 4), shift=(4,), scale=(4,)),
    *(case(f"torch-func-{name}", lambda fn=fn: Net(fn, l=linear(), g=param(4)), rows(3, 4)) for name, fn in TRANSFORMS.items()),
    net("windows", windows, rows(4, 4, 4), proj=linear, norm=lambda: nn.LayerNorm(4), bias=(4, 4), conv=lambda: nn.Conv1d(4, 4, 1)),
    net(
        "experts",
        routed,
        rows(5, 4),
        proj=linear,
        experts=lambda: Net(experts, up=param(3, 5, 4), down=param(3, 4, 5)),
        router=lambda: nn.Linear(4, 3).requires_grad_(False),
    ),
    net("sorted-experts", routed_by_sign, rows(5, 4), **SORTED_EXPERTS),
    net("expert-modules", expert_modules, rows(4), proj=linear, experts=lambda: nn.ModuleList([linear(), linear()])),
    net("scan", scan, rows(4, 4), log_decay=(4, 2), dt=lambda: nn.Linear(4, 4, bias=False), dt_bias=(4,), mix=(2,), skip=(4,)),
    net("masked-token", masked_token, rows(5, 4), proj=linear, token=(4,)),
    net("written-in-place", written_in_place, rows(4, 4), token=(4,), table=(4, 4)),
    net("tables-of-the-batch-size", tables_of_the_batch_size, rows(5, 4), table=(5, 4), rows=lambda: nn.Embedding(5, 4)),
    net(
        "learned-state",
        lambda s, x: s.r(x, s.h.expand(1, len(x), 3).contiguous())[0],
        rows(5, 4),
        r=lambda: nn.GRU(4, 3, batch_first=True),
        h=(1, 1, 3),
    ),
    net(
        "learned-query",
        lambda s, x: s.m(s.q.expand(len(x), 2, 4), x, x)[0],
        rows(5, 4),
        m=lambda: nn.MultiheadAttention(4, 2, batch_first=True),
        q=(2, 4),
    ),
    net("codebook", lambda s, x: s.b[torch.cdist(x.flatten(0, 1), s.b).argmin(-1)].view_as(x) * x, rows(5, 4), b=(6, 4)),
    net("straight-through", lambda s, x: F.linear(x, s.w + (s.w.round() - s.w).detach()), rows(5, 4), w=(4, 4)),
    net("parametrised-and-shared", lambda s, x: s.l(x) + s.l(s.t), rows(5, 4), l=lambda: weight_norm(linear()), t=(5, 4)),
    net("types-of-the-batch", lambda s, x: F.linear(x, s.w.to(x) * s.v.type_as(x)), rows(5, 4), w=(4, 4), v=(4, 4)),
    net("slopes", lambda s, x: torch.where(x > 0, x, s.slope * x) / s.temperature.exp(), rows(5, 4), slope=(4,), temperature=()),
    net("time-first", lambda s, x: s.n(s.l(x.transpose(0, 1))).transpose(0, 1), rows(5, 4), l=linear, n=lambda: nn.LayerNorm(4)),
    net("time-first-flat", time_first_flat, rows(5, 4), l=linear),
    net(
        "time-first-lstm",
        lambda s, x: s.r(x.transpose(0, 1))[0].transpose(0, 1),
        rows(5, 4),
        r=lambda: nn.LSTM(4, 3, 2, bidirectional=True),
    ),
    net(
        "time-first-encoder",
        lambda s, x: s.m(x.transpose(0, 1)).transpose(0, 1),
        rows(5, 4),
        m=lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0), 2, enable_nested_tensor=False),
    ),
    net("time-first-attention", time_first_attention, rows(5, 4), m=lambda: nn.MultiheadAttention(4, 2, add_bias_kv=True)),
    net("constant-buffer", lambda s, x: s.w * s.norms * x + s.norms, rows(4), w=(4,), norms=lambda: torch.rand(4)),
    net("convolution", lambda s, x: s.c(x), rows(2, 5), c=lambda: nn.Conv1d(2, 3, 3, padding=1, padding_mode="circular")),
    net("own-normalisation", lambda s, x: F.layer_norm(x, (4,), s.w, s.b) + F.linear(x, s.m), rows(5, 4), w=(4,), b=(4,), m=(4, 4)),
    *(
        net(
            f"{function.__name__.lower()}-function",
            lambda s, x, f=function, more=more: s.head(torch.tanh(F.linear(x, f.apply(s.a * 2, *more(x)) * s.b))),
            rows(5, 4),
            a=(4, 4),
            b=(4,),
            head=head,
        )
        for function, more in (
            (Clamped, lambda x: []),
            (Weighed, lambda x: [x]),
            (OutOfSight, lambda x: []),
            (Constant, lambda x: []),
        )
    ),
    *(
        case(f"{kind}-function-{place}", lambda pair=pair, make=make: make(*pair), rows(5, 4))
        for kind, pair in PAIRS.items()
        for place, make in PLACES.items()
    ),
]


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
        return torch.stack([part.sum(0) for part in flat.split(lengths.tolist())])

    parts = {"read": read} if isinstance(read, nn.Module) else {}
    return lambda: Net(forward, a=linear(), b=linear(), g=param(4), **parts)


def unpadded(pick):
    """Tokens that a mask picks are worked on in one piece."""

    def forward(s, x, mask):
        h = s.a(x)
        out = torch.zeros_like(h)
        out[mask] = s.b(pick(h, mask)) * s.g
        return out

    return lambda: Net(forward, a=linear(), b=linear(), g=param(4))


def branching(s, x):
    extra = s.b(x) if x[0, 0] > 0 else s.b(torch.ones(4, dtype=x.dtype))
    return s.a(x) + extra * (s.e if x[0, 0] > 0 else 1)


def with_positions(length):
    def forward(s, x):
        wide = F.pad(x + s.pos, (0, 0, 0, 35 - length % 35))
        return s.l(wide) * s.g + s.e(torch.arange(wide.shape[1]) % length)

    return lambda: Net(forward, pos=param(length, 4), l=linear(), g=param(4), e=nn.Embedding(length, 4))


def lengths(*values):
    return [randn(2, 6, 4), torch.tensor(values)]


def masks(*counts):
    return [randn(2, 4, 4), torch.arange(4)[None] < torch.tensor(counts)[:, None]]


def signed(sign, *shape):
    return [sign * randn(*shape).abs()]


READERS = {
    "tolist": lambda n: n.tolist(),
    "iteration": lambda n: n,
    "int": lambda n: map(int, n),
    "numpy": lambda n: n.numpy(),
    "float": lambda n: [int(v) for v in n.double()],
    "differences": lambda n: [c.item() for c in F.pad(n.cumsum(0), (1, 0)).diff()],
    "a-module": Lengths(),
}
PICKERS = {
    "index": lambda h, m: h[m],
    "nonzero": lambda h, m: h.flatten(0, 1)[m.flatten().nonzero().squeeze(1)],
    "select": lambda h, m: h.masked_select(m[..., None]).view(-1, 4),
}

# name: (model, batches): what the first batch shows is misleading for the next ones.
MISLEADING = {
    **{f"lengths-{name}": (ragged(read), lambda: [lengths(4, 4), lengths(2, 4), lengths(6, 2)]) for name, read in READERS.items()},
    **{f"mask-{name}": (unpadded(pick), lambda: [masks(4, 4), masks(1, 3), masks(4, 2)]) for name, pick in PICKERS.items()},
    "branch": (
        lambda: Net(branching, a=linear(), b=linear(), e=param(4)),
        lambda: [signed(-1, 3, 4), signed(1, 3, 4), signed(-1, 2, 4)],
    ),
    "one-expert": (
        lambda: Net(routed_by_sign, **{name: make() for name, make in SORTED_EXPERTS.items()}),
        lambda: [signed(1, 2, 3, 4), [randn(3, 3, 4)], [randn(2, 5, 4)]],
    ),
    "number-of-tokens": (
        lambda: Net(lambda s, x: s.l(x.flatten(0, 1)).view_as(x) * s.g, l=linear(), g=param(4)),
        lambda: [[randn(*shape, 4)] for shape in ((1, 5), (2, 6), (6, 2), (5, 5))],
    ),
    **{
        f"{size}-positions": (with_positions(size), lambda size=size: [[randn(n, size, 4)] for n in (3, size, 1)])
        for size in (5, 7, 11, 35)
    },
}


def swapped(fn):
    """Run ``fn`` on tokens in the order ``[T * n, d]``, time first."""

    def forward(s, x):
        flat = fn(s, x.transpose(0, 1).flatten(0, 1))
        return flat.unflatten(0, (x.shape[1], len(x))).transpose(0, 1)

    return forward


def learned_queries(s, x):
    """Attention of learned queries, time first, over values that are all alike, as in the first layer of DETR's decoder."""
    q = s.queries.unsqueeze(1).expand(-1, len(x), -1)
    hidden = s.m(q, q, torch.full_like(q, 0.0))[0]
    return s.head((hidden.transpose(0, 1) + s.a(x)).tanh())


def zero(layer):
    """The layer with weights of zero."""
    for p in layer.parameters():
        nn.init.zeros_(p)
    return layer


# Models, and a first batch in which the order of the samples cannot be told from the numbers.
ALIKE = {
    "nearly constant": (
        lambda: Net(swapped(lambda s, x: s.b(s.a(x).tanh() * s.g)), a=linear(), b=linear(), g=param(4)),
        1000 + 0.01 * randn(3, 5, 4),
    ),
    "blank": (
        lambda: Net(swapped(lambda s, x: s.b(s.a(x).tanh() * s.g)), a=linear(), b=linear(), g=param(4)),
        torch.zeros(3, 5, 4, dtype=torch.float64),
    ),
    "zero branch": (
        lambda: Net(swapped(lambda s, x: x + s.z(s.a(x) * s.g)), a=linear(), z=zero(linear()), g=param(4)),
        randn(3, 5, 4),
    ),
    "zero gain": (lambda: Net(swapped(lambda s, x: x + s.a(x * s.g)), a=linear(), g=nn.Parameter(torch.zeros(4))), randn(3, 5, 4)),
    "values alike": (
        lambda: Net(learned_queries, m=nn.MultiheadAttention(4, 2), a=linear(), head=linear(), queries=param(5, 4)),
        randn(3, 5, 4),
    ),
}
