"""Every layer, alone and shared, on all shapes of inputs."""

import importlib

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import rnn
from torch.nn.utils.parametrizations import weight_norm

from ..models import Net, randn
from . import N, case, ids, rows

chain = nn.Sequential


def step_by_step(model, x):
    """A recurrent network written out, over tokens on axis 1."""
    state = None
    for token in x.unbind(1):
        state = model.c(token, state)
    return model.out(state[0] if isinstance(state, tuple) else state)


def two_cells(model, x):
    first = second = None
    for token in x.unbind(1):
        first = model.c(token, first)
        second = model.d(first[0], hx=second)
    return model.out(second[0])


def with_one_weight(cell):
    cell.weight_hh = cell.weight_ih
    return cell


def from_start(model, x):
    h = model.h.expand(len(x), -1)
    for token in x.unbind(1):
        h = model.c(input=token, hx=h)
    return h


class LinearWithForward(nn.Linear):
    """A subclass of Linear that computes something else."""

    def forward(self, x):
        return F.linear(x, 2 * self.weight, self.bias).tanh()


class LinearAsConv(nn.Conv1d):
    """A convolution of width 1 over tokens that keeps its weight as a matrix, to share it with a linear layer."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs, 1)

    def forward(self, x):
        return F.conv1d(x.mT, self.weight[..., None], self.bias)


class OddNorm(nn.Module):
    """A norm whose output is not affine in its weight."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return unit(x) * self.weight.exp()


def norm(name, forward):
    """Return a class of norms with another ``forward``."""
    return type(name, (OddNorm,), {"forward": forward})


def unit(x):
    return F.normalize(x, dim=-1)


# Affine in its weight, but not feature by feature; affine in weights of one sign only; one weight for every feature.
PermutingNorm = norm("PermutingNorm", lambda s, x: unit(x) * s.weight.flip(0))
AbsoluteNorm = norm("AbsoluteNorm", lambda s, x: unit(x) * s.weight.abs())
AveragingNorm = norm("AveragingNorm", lambda s, x: unit(x) * s.weight.mean())
ODD_NORMS = [OddNorm, PermutingNorm, AbsoluteNorm, AveragingNorm]
# With two outputs; with a gate that all samples share.
ResidualNorm = norm("ResidualNorm", lambda s, x, residual: (unit(x + residual) * s.weight, x + residual))
GatedNorm = norm("GatedNorm", lambda s, x, gate: unit(x) * s.weight * gate)


def hf(path, *args, **kwargs):
    """Build the ``transformers`` class ``path``, imported when it is needed."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(f"transformers.{module}"), name)(*args, **kwargs)


def tied(**kwargs):
    embedding = nn.Embedding(7, 4, **kwargs)
    model = Net(lambda s, i: s.out(s.mid(s.emb(i))), emb=embedding, mid=nn.Linear(4, 4), out=nn.Linear(4, 7))
    model.out.weight = model.emb.weight
    return model


class SubLinear(nn.Linear):
    """A subclass with the same forward."""


def tied_layers(first, second):
    """Two layers with one weight, one after the other."""
    second.weight = first.weight
    return chain(first, nn.Tanh(), second)


def shared_by_calls(times):
    """One layer called again and again, as the blocks of ALBERT."""

    def forward(s, x):
        for _ in range(times):
            x = x + s.a(x).tanh()
        return x

    return Net(forward, a=nn.Linear(4, 4))


def tied_pair(first, second):
    """Two layers of any kind with one weight, one after the other on tokens and on channels."""
    second.weight = first.weight
    return Net(lambda s, x: torch.cat([s.a(x).flatten(1), s.b(x).flatten(1)], 1), a=first, b=second)


def bag_with_offsets(bag, weighted=False):
    """Hand flat ids and offsets to ``bag``; sample ``i`` has ``lengths[i]`` ids, which may be none."""

    def forward(s, i, lengths):
        kept = i[torch.arange(i.shape[1]) < lengths[:, None]]
        ends = lengths.cumsum(0)
        offsets = torch.cat([ends.new_zeros(1), ends])
        if not bag.include_last_offset:
            offsets = offsets[:-1]
        weights = (kept + 1) / torch.tensor(3.0, dtype=torch.float64) if weighted else None
        return s.bag(kept, offsets, per_sample_weights=weights)

    return Net(forward, bag=bag)


def weighted_bag(**kwargs):
    return Net(lambda s, i, w: s.bag(i, per_sample_weights=w), bag=nn.EmbeddingBag(7, 4, mode="sum", **kwargs))


def channels_last(*shape):
    layout = torch.channels_last if len(shape) == 3 else torch.channels_last_3d
    return lambda: randn(N, *shape).to(memory_format=layout)


def tokens_of(layer):
    """Run ``layer``, and return the first of its outputs."""
    return Net(lambda s, x: s.r(x)[0], r=layer)


def packed(s, x, lengths):
    """The last hidden state of each of some sequences of different lengths."""
    return s.r(rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False))[1][0][-1]


LLAMA = "models.llama.modeling_llama.LlamaRMSNorm"
GEMMA = "models.gemma.modeling_gemma.GemmaRMSNorm"
T5 = "models.t5.modeling_t5.T5LayerNorm"
MAMBA = "models.mamba2.modeling_mamba2.MambaRMSNormGated"
QWEN = "models.qwen3_next.modeling_qwen3_next.Qwen3NextRMSNormGated"
HF_NORMS = {LLAMA: {}, GEMMA: {}, T5: {}, MAMBA: {"group_size": 2}, QWEN: {}}
IN_FLOAT32 = {"tolerance": 1e-5}  # these layers compute in float32 whatever they are given
PADDED = lambda: torch.tensor([[1, 1, 1], [1, 2, 2], [3, 4, 5]])  # noqa: E731

LAYERS = [
    case("linear-2d", lambda: chain(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)), rows(4)),
    case("linear-no-bias", lambda: chain(nn.Linear(4, 5, bias=False), nn.Linear(5, 2)), rows(4)),
    case("linear-3d", lambda: chain(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)), rows(6, 4)),
    case("linear-gram", lambda: chain(nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 9)), rows(3, 40)),
    case("linear-4d", lambda: nn.Linear(4, 5), rows(2, 3, 4)),
    case("linear-t-equals-n", lambda: chain(nn.Linear(N, N), nn.Linear(N, N)), rows(N, N)),
    case("linear-not-contiguous", lambda: chain(nn.Linear(4, 5)), lambda: randn(N, 4, 6).transpose(1, 2)),
    case("relu-in-place", lambda: chain(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 2)), rows(4)),
    case("linear-subclass", lambda: chain(nn.Linear(4, 4), LinearWithForward(4, 3)), rows(4)),
    case("tied-to-subclass", lambda: tied_layers(nn.Linear(4, 4), LinearWithForward(4, 4)), rows(4)),
    case("tied-embedding", tied, ids(5)),
    case("called-twice", lambda: Net(lambda s, x: s.a(s.a(x).tanh()), a=nn.Linear(4, 4)), rows(4)),
    case("embedding", lambda: chain(nn.Embedding(7, 4), nn.Linear(4, 2)), ids(5)),
    case("embedding-1d", lambda: chain(nn.Embedding(7, 4), nn.Linear(4, 2)), ids()),
    case("embedding-padding", lambda: chain(nn.Embedding(7, 4, padding_idx=1), nn.Linear(4, 2)), ids(9)),
    case("embedding-sparse", lambda: chain(nn.Embedding(7, 4, sparse=True), nn.Linear(4, 2)), ids(5)),
    case("embedding-bag", lambda: chain(nn.EmbeddingBag(7, 4, mode="sum"), nn.Linear(4, 2)), ids(5)),
    case("layer-norm", lambda: chain(nn.Linear(4, 6), nn.LayerNorm(6)), rows(5, 4)),
    case("layer-norm-no-bias", lambda: chain(nn.Linear(4, 6), nn.LayerNorm(6, bias=False)), rows(5, 4)),
    case("layer-norm-2d", lambda: nn.LayerNorm((5, 4)), rows(5, 4)),
    case("layer-norm-plain", lambda: chain(nn.Linear(4, 6), nn.LayerNorm(6, elementwise_affine=False)), rows(4)),
    case("rms-norm", lambda: chain(nn.Linear(4, 6), nn.RMSNorm(6)), rows(5, 4)),
    case("group-norm", lambda: chain(nn.Conv1d(2, 4, 2), nn.GroupNorm(2, 4)), rows(2, 6)),
    case("instance-norm", lambda: chain(nn.Conv2d(2, 4, 2), nn.InstanceNorm2d(4, affine=True)), rows(2, 5, 5), empty=False),
    case("conv1d", lambda: nn.Conv1d(2, 4, 3, padding=1), rows(2, 6)),
    case("conv2d-groups", lambda: nn.Conv2d(4, 4, 3, groups=2, stride=2, dilation=2), rows(4, 9, 8)),
    case("conv2d-depthwise-1x1-map", lambda: nn.Conv2d(4, 4, 3, groups=4, padding=1), lambda: randn(N, 1, 4).mT[..., None]),
    case("conv2d-channels-last", lambda: nn.Conv2d(3, 4, 3), channels_last(3, 6, 5)),
    case("conv2d-reflect", lambda: nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect"), rows(2, 5, 5)),
    case("conv3d", lambda: nn.Conv3d(2, 3, 2), rows(2, 4, 4, 4)),
    case("conv-transpose", lambda: nn.ConvTranspose2d(2, 3, 3, stride=2), rows(2, 4, 4)),
    case("prelu", lambda: chain(nn.Linear(4, 6), nn.PReLU(6)), rows(4)),
    case("bilinear", lambda: nn.Bilinear(4, 3, 5), rows(4), rows(3)),
    case("lstm", lambda: tokens_of(nn.LSTM(4, 3, batch_first=True)), rows(5, 4)),
    case("gru-two-layers", lambda: tokens_of(nn.GRU(4, 3, 2, bidirectional=True, batch_first=True)), rows(5, 4)),
    case("lstm-two-layers", lambda: tokens_of(nn.LSTM(4, 3, 2, batch_first=True)), rows(4, 4)),
    case("rnn-two-layers", lambda: tokens_of(nn.RNN(4, 3, 2, batch_first=True)), rows(4, 4)),
    case(
        "lstm-packed",
        lambda: Net(packed, r=nn.LSTM(4, 3, batch_first=True)),
        rows(5, 4),
        lambda: torch.tensor([5, 3, 2]),
        empty=False,
    ),
    case("rnn-cell", lambda: Net(lambda s, x: s.c(x, s.c(x)), c=nn.RNNCell(4, 4)), rows(4)),
    case("rnn-cell-relu", lambda: Net(lambda s, x: s.c(x, s.c(x)), c=nn.RNNCell(4, 4, nonlinearity="relu")), rows(4)),
    case("lstm-cell", lambda: Net(step_by_step, c=nn.LSTMCell(4, 3), out=nn.Linear(3, 2)), rows(5, 4)),
    case("gru-cell", lambda: Net(step_by_step, c=nn.GRUCell(4, 3), out=nn.Linear(3, 2)), rows(5, 4)),
    case("gru-cell-without-bias", lambda: Net(step_by_step, c=nn.GRUCell(4, 3, bias=False), out=nn.Linear(3, 2)), rows(5, 4)),
    case("lstm-cell-once", lambda: Net(lambda s, x: torch.cat(s.c(x), 1), c=nn.LSTMCell(4, 3)), rows(4)),
    case("lstm-cell-state-only", lambda: Net(lambda s, x: s.c(x, (x, x))[1], c=nn.LSTMCell(4, 4)), rows(4)),
    case("gru-cell-tokens", lambda: Net(lambda s, x: s.c(x.flatten(0, 1)).view(len(x), 15), c=nn.GRUCell(4, 3)), rows(5, 4)),
    case(
        "lstm-cells-two-layers", lambda: Net(two_cells, c=nn.LSTMCell(4, 3), d=nn.LSTMCell(3, 3), out=nn.Linear(3, 2)), rows(5, 4)
    ),
    case("gru-cell-one-weight", lambda: Net(lambda s, x: s.c(x, s.c(x)), c=with_one_weight(nn.GRUCell(4, 4))), rows(4)),
    case("gru-cell-learnt-start", lambda: Net(from_start, c=nn.GRUCell(4, 3), h=nn.Parameter(randn(3))), rows(5, 4)),
    case(
        "attention",
        lambda: Net(lambda s, x: s.m(x, x, x, need_weights=False)[0], m=nn.MultiheadAttention(4, 2, batch_first=True)),
        rows(5, 4),
    ),
    case("encoder-layer", lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True), rows(5, 4)),
    case("transformer", lambda: nn.Transformer(4, 2, 1, 1, 8, dropout=0.0, batch_first=True), rows(5, 4), rows(3, 4)),
    case("weight-norm", lambda: chain(weight_norm(nn.Linear(4, 5)), nn.Linear(5, 2)), rows(4)),
    # ---------------------------------------------------------------- linear
    case("linear-one", lambda: nn.Linear(4, 5), rows(4)),
    case("linear-5d", lambda: nn.Linear(4, 5), rows(2, 1, 3, 4)),
    case("linear-4d-deep", lambda: chain(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)), rows(2, 3, 4)),
    case("linear-wide-gram", lambda: nn.Linear(40, 30), rows(2, 3, 40)),
    case("linear-many-tokens", lambda: nn.Linear(90, 80), lambda: randn(N, 65, 90) / 9),
    case("linear-keyword", lambda: Net(lambda s, x: s.a(input=x), a=nn.Linear(4, 5)), rows(6, 4)),
    case("linear-expanded", lambda: nn.Linear(4, 5), lambda: randn(N, 1, 4).expand(-1, 6, -1)),
    case("linear-sliced", lambda: nn.Linear(4, 5), lambda: randn(N, 12, 9)[:, 1::3, 1::2]),
    case("linear-narrow", lambda: chain(nn.Linear(1, 1), nn.Tanh(), nn.Linear(1, 3)), rows(2, 1)),
    case("gpt2-conv1d", lambda: chain(hf("pytorch_utils.Conv1D", 5, 4), nn.Tanh(), hf("pytorch_utils.Conv1D", 2, 5)), rows(6, 4)),
    case("gpt2-conv1d-gram", lambda: hf("pytorch_utils.Conv1D", 30, 40), rows(2, 40)),
    case("gpt2-conv1d-2d", lambda: hf("pytorch_utils.Conv1D", 5, 4), rows(4)),
    # ---------------------------------------------------------------- shared parameters
    case("called-12-times", lambda: shared_by_calls(12), rows(4)),
    case("called-12-times-on-tokens", lambda: shared_by_calls(12), rows(2, 4)),
    case("called-twice-gram", lambda: Net(lambda s, x: s.a(s.a(x).tanh()), a=nn.Linear(30, 30)), rows(2, 30)),
    case(
        "called-twice-embedding", lambda: Net(lambda s, i, j: s.e(i).sum(1) - s.e(j).mean(1), e=nn.Embedding(7, 4)), ids(5), ids(3)
    ),
    case("tied-linears", lambda: tied_layers(nn.Linear(4, 4), nn.Linear(4, 4)), rows(4, 4)),
    case("tied-to-a-subclass-of-one-forward", lambda: tied_layers(nn.Linear(4, 4), SubLinear(4, 4)), rows(4, 4)),
    case("tied-embedding-padding", lambda: tied(padding_idx=1), ids(5)),
    case("tied-to-transposed", lambda: tied_layers(nn.Linear(4, 4), hf("pytorch_utils.Conv1D", 4, 4)), rows(5, 4)),
    case("tied-linear-conv1d", lambda: tied_pair(nn.Linear(4, 4), LinearAsConv(4, 4)), rows(5, 4)),
    case("tied-conv2d", lambda: tied_pair(nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3, stride=2, padding=1)), rows(3, 6, 5)),
    case("tied-conv-to-transposed", lambda: tied_pair(nn.Conv1d(4, 4, 3), nn.ConvTranspose1d(4, 4, 3, stride=2)), rows(4, 6)),
    case("tied-layer-norms", lambda: tied_pair(nn.LayerNorm(4), nn.RMSNorm(4)), rows(5, 4)),
    case("tied-bag-to-embedding", lambda: tied_pair(nn.Embedding(7, 4), nn.EmbeddingBag(7, 4, mode="mean")), ids(5)),
    # ---------------------------------------------------------------- embeddings
    case("embedding-3d", lambda: nn.Embedding(7, 4), ids(2, 3)),
    case("embedding-int32", lambda: nn.Embedding(7, 4), lambda: ids(5)().int()),
    case("embedding-repeated-ids", lambda: nn.Embedding(7, 4), lambda: torch.tensor([[1, 1, 1, 1], [2, 0, 2, 0], [6, 6, 5, 6]])),
    case("embedding-padding-negative", lambda: nn.Embedding(7, 4, padding_idx=-1), lambda: torch.tensor([[6, 6], [1, 6], [2, 3]])),
    case("embedding-t-equals-n", lambda: nn.Embedding(7, 4), ids(N)),
    case("embedding-large-table", lambda: nn.Embedding(300, 4), ids(5, top=300)),
    case("bag-mean", lambda: nn.EmbeddingBag(7, 4), ids(5)),
    case("bag-max", lambda: nn.EmbeddingBag(7, 4, mode="max"), ids(5)),
    case("bag-sum-padding", lambda: nn.EmbeddingBag(7, 4, mode="sum", padding_idx=1), ids(9, top=3)),
    case("bag-mean-padding", lambda: nn.EmbeddingBag(7, 4, padding_idx=-6), ids(9, top=3)),
    case("bag-max-padding", lambda: nn.EmbeddingBag(7, 4, mode="max", padding_idx=1), ids(9, top=3)),
    case("bag-mean-all-padding", lambda: nn.EmbeddingBag(7, 4, padding_idx=1), PADDED),
    case("bag-max-all-padding", lambda: nn.EmbeddingBag(7, 4, mode="max", padding_idx=1), PADDED),
    case("bag-int32", lambda: nn.EmbeddingBag(7, 4), lambda: ids(5)().int()),
    case("bag-large-table", lambda: nn.EmbeddingBag(300, 4), ids(5, top=300)),
    case("bag-sparse", lambda: nn.EmbeddingBag(7, 4, sparse=True), ids(5)),
    case("bag-weights", weighted_bag, ids(5), rows(5)),
    case("bag-weights-padding", lambda: weighted_bag(padding_idx=1), ids(5, top=3), rows(5)),
    case(
        "bag-weights-that-need-gradients",
        lambda: Net(lambda s, i, x: s.bag(i, per_sample_weights=s.a(x)), bag=nn.EmbeddingBag(7, 4, mode="sum"), a=nn.Linear(4, 5)),
        ids(5),
        rows(4),
    ),
    *(
        case(
            f"bag-offsets-{mode}{'-last' * last}{'-padding' * padding}",
            lambda mode=mode, last=last, padding=padding: bag_with_offsets(
                nn.EmbeddingBag(7, 4, mode=mode, include_last_offset=last, padding_idx=1 if padding else None)
            ),
            ids(5, top=3),
            lambda: torch.tensor([3, 0, 5]),
        )
        for mode in ("sum", "mean", "max")
        for (last, padding) in ((False, False), (True, False), (False, True))
    ),
    case(
        "bag-offsets-weights",
        lambda: bag_with_offsets(nn.EmbeddingBag(7, 4, mode="sum"), weighted=True),
        ids(5),
        lambda: torch.tensor([5, 5, 5]),
    ),
    case("bag-offsets-one-id-each", lambda: bag_with_offsets(nn.EmbeddingBag(7, 4)), ids(5), lambda: torch.tensor([1, 1, 1])),
    # ---------------------------------------------------------------- norms
    case("layer-norm-3-dims", lambda: nn.LayerNorm((2, 3, 4)), rows(2, 3, 4)),
    case("layer-norm-2-of-3-dims", lambda: nn.LayerNorm((3, 4), bias=False), rows(2, 3, 4)),
    case("layer-norm-no-tokens", lambda: nn.LayerNorm(4, eps=0.1), rows(4)),
    case("layer-norm-not-contiguous", lambda: nn.LayerNorm(4), lambda: randn(N, 4, 5).mT),
    case("rms-norm-2-dims", lambda: nn.RMSNorm((5, 4)), rows(5, 4)),
    case("rms-norm-eps", lambda: nn.RMSNorm(4, eps=0.1), rows(2, 5, 4)),
    case("rms-norm-plain", lambda: chain(nn.Linear(4, 4), nn.RMSNorm(4, elementwise_affine=False)), rows(4)),
    case("llama-norm", lambda: chain(nn.Linear(4, 6), hf(LLAMA, 6)), rows(5, 4), **IN_FLOAT32),
    case("gemma-norm", lambda: chain(nn.Linear(4, 6), hf(GEMMA, 6)), rows(5, 4), **IN_FLOAT32),
    case("t5-norm", lambda: chain(nn.Linear(4, 6), hf(T5, 6)), rows(5, 4), **IN_FLOAT32),
    case("mamba-norm", lambda: hf(MAMBA, 4, group_size=2), rows(5, 4), **IN_FLOAT32),
    case(
        "mamba-norm-gated",
        lambda: Net(lambda s, x: s.n(x, s.a(x)), n=hf(MAMBA, 4, group_size=2), a=nn.Linear(4, 4)),
        rows(5, 4),
        **IN_FLOAT32,
    ),
    case(
        "qwen-norm-gated", lambda: Net(lambda s, x: s.n(x, gate=s.a(x)), n=hf(QWEN, 4), a=nn.Linear(4, 4)), rows(5, 4), **IN_FLOAT32
    ),
    case("norm-not-affine", lambda: chain(nn.Linear(4, 6), OddNorm(6)), rows(5, 4)),
    case(
        "norm-with-a-gate-of-the-batch-size",
        lambda: Net(lambda s, x: s.n(s.a(x), x.new_tensor([0.5, 2.0, -1.0])), a=nn.Linear(4, N), n=GatedNorm(N)),
        rows(5, 4),
    ),
    case("norm-permuting", lambda: chain(nn.Linear(4, 6), PermutingNorm(6)), rows(5, 4)),
    case("norm-absolute", lambda: chain(nn.Linear(4, 6), AbsoluteNorm(6)), rows(5, 4)),
    case("norm-two-outputs", lambda: Net(lambda s, x: sum(s.n(x, s.a(x))), n=ResidualNorm(4), a=nn.Linear(4, 4)), rows(5, 4)),
    case("group-norm-2d", lambda: nn.GroupNorm(2, 4, eps=0.1), rows(4, 3, 2)),
    case("group-norm-no-positions", lambda: nn.GroupNorm(2, 6), rows(6)),
    case("group-norm-plain", lambda: chain(nn.Conv1d(2, 4, 2), nn.GroupNorm(2, 4, affine=False)), rows(2, 6)),
    case("instance-norm-1d", lambda: nn.InstanceNorm1d(4, affine=True), rows(4, 6), empty=False),
    case("instance-norm-2d", lambda: nn.InstanceNorm2d(4, affine=True, eps=0.1), rows(4, 3, 2), empty=False),
    case("instance-norm-3d", lambda: nn.InstanceNorm3d(2, affine=True), rows(2, 3, 2, 2), empty=False),
    # ---------------------------------------------------------------- convolutions
    *(
        case(
            f"conv1d-{mode}-{pad}",
            lambda mode=mode, pad=pad: nn.Conv1d(2, 3, 4, padding=pad, dilation=2, padding_mode=mode),
            rows(2, 9),
        )
        for mode in ("zeros", "reflect", "replicate", "circular")
        for pad in (2, "same", "valid")
    ),
    *(
        case(
            f"conv2d-{mode}-same",
            lambda mode=mode: nn.Conv2d(2, 4, (2, 3), padding="same", groups=2, padding_mode=mode, bias=False),
            rows(2, 5, 4),
        )
        for mode in ("zeros", "reflect", "replicate", "circular")
    ),
    case("conv1d-no-bias", lambda: nn.Conv1d(2, 4, 3, bias=False), rows(2, 6)),
    case("conv1d-depthwise", lambda: nn.Conv1d(4, 8, 3, groups=4, stride=2, padding=2), rows(4, 7)),
    case("conv1d-1x1", lambda: nn.Conv1d(4, 3, 1), rows(4, 5)),
    case("conv1d-one-position", lambda: nn.Conv1d(4, 3, 5), rows(4, 5)),
    case("conv2d-stride-leaves-a-rest", lambda: nn.Conv2d(2, 3, 3, stride=3, padding=1), rows(2, 9, 10)),
    case("conv2d-anisotropic", lambda: nn.Conv2d(2, 3, (3, 2), stride=(1, 2), padding=(2, 0), dilation=(2, 3)), rows(2, 6, 9)),
    case("conv2d-few-pixels", lambda: nn.Conv2d(32, 24, 3, padding=1), rows(32, 3, 3)),
    case("conv2d-few-pixels-strided", lambda: nn.Conv2d(32, 24, 3, padding=2, stride=2, dilation=2), rows(32, 4, 3)),
    case("conv2d-few-pixels-channels-last", lambda: nn.Conv2d(32, 24, 2), channels_last(32, 3, 4)),
    case("conv2d-same-few-pixels", lambda: nn.Conv2d(32, 24, 2, padding="same"), rows(32, 3, 3)),
    case("conv2d-weight-channels-last", lambda: nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last), rows(3, 6, 5)),
    case("conv2d-transposed-input", lambda: nn.Conv2d(3, 4, 3), lambda: randn(N, 3, 5, 6).mT),
    case("conv2d-expanded-input", lambda: nn.Conv2d(3, 4, 3), lambda: randn(N, 1, 6, 5).expand(-1, 3, -1, -1)),
    case("conv2d-sliced-input", lambda: nn.Conv2d(3, 4, 3), lambda: randn(N, 6, 10, 6)[:, ::2, ::2, 1:]),
    case("conv3d-groups-same", lambda: nn.Conv3d(2, 4, (2, 1, 3), padding="same", groups=2, dilation=(1, 1, 2)), rows(2, 3, 2, 4)),
    case("conv3d-circular", lambda: nn.Conv3d(2, 3, 2, padding=1, padding_mode="circular"), rows(2, 3, 2, 2)),
    case("conv3d-channels-last", lambda: nn.Conv3d(2, 3, 2, stride=2, padding=1), channels_last(2, 4, 3, 2)),
    case("conv-transpose-1d", lambda: nn.ConvTranspose1d(2, 3, 3, stride=3, padding=2, output_padding=2, dilation=2), rows(2, 4)),
    case("conv-transpose-1d-output-padding", lambda: nn.ConvTranspose1d(2, 3, 3, stride=2, output_padding=1), rows(2, 4)),
    case(
        "conv-transpose-2d-groups",
        lambda: nn.ConvTranspose2d(4, 6, (2, 3), stride=(2, 1), padding=1, groups=2, bias=False),
        rows(4, 3, 4),
    ),
    case("conv-transpose-2d-depthwise", lambda: nn.ConvTranspose2d(4, 4, 2, groups=4), rows(4, 2, 3)),
    case("conv-transpose-2d-few-pixels", lambda: nn.ConvTranspose2d(32, 24, 3, stride=2, padding=1), rows(32, 2, 2)),
    case("conv-transpose-2d-channels-last", lambda: nn.ConvTranspose2d(3, 4, 3), channels_last(3, 4, 3)),
    case(
        "conv-transpose-3d", lambda: nn.ConvTranspose3d(2, 4, 2, stride=2, padding=1, output_padding=1, groups=2), rows(2, 2, 3, 2)
    ),
    case(
        "conv-transpose-output-size",
        lambda: Net(lambda s, x: s.c(x, output_size=(8,)), c=nn.ConvTranspose1d(2, 3, 2, stride=2)),
        rows(2, 4),
    ),
    case(
        "conv-transpose-output-size-with-rest",
        lambda: Net(lambda s, x: s.c(x, output_size=(10, 7)), c=nn.ConvTranspose2d(2, 3, 3, stride=2)),
        rows(2, 4, 3),
    ),
    case(
        "convolutions",
        lambda: chain(nn.Conv1d(4, 4, 3, padding=2, dilation=2, groups=2), nn.ConvTranspose1d(4, 2, 3, stride=2, padding=1)),
        rows(4, 4),
    ),
    # ---------------------------------------------------------------- small layers
    case("prelu-one-slope", nn.PReLU, rows(4)),
    case("prelu-one-slope-4d", nn.PReLU, rows(3, 2, 2)),
    case("prelu-4d", lambda: nn.PReLU(3), rows(3, 2, 2)),
    case("prelu-2d", lambda: nn.PReLU(4), rows(4)),
    case("bilinear-tokens", lambda: nn.Bilinear(4, 3, 5), rows(2, 2, 4), rows(2, 2, 3)),
    case("bilinear-no-bias", lambda: nn.Bilinear(4, 3, 5, bias=False), rows(2, 4), rows(2, 3)),
    case("bilinear-of-itself", lambda: Net(lambda s, x: s.b(x, x), b=nn.Bilinear(4, 4, 2)), rows(4)),
]
