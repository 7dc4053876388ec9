"""Every layer, in every mode, against single-sample autograd in float64."""

import importlib
import weakref

import pytest
import torch
import torch.nn.functional as F
from opacus.grad_sample import GradSampleHooks
from torch import nn

from dp_hooks import HookController, errors, private_training, register_rule
from dp_hooks.gradients import terms
from dp_hooks.rules import Rule, RuleTable, registry

from .models import Net, randn
from .reference import clipped_sum, losses_of, sample_grads

# "deferred" is mode "ghost" with nothing written out during the backward pass: norms and sums come from captured tensors.
MODES = ("ghost", "deferred", "hooks", "functorch")
N = 3

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


@pytest.fixture
def mode_of(monkeypatch):
    """Return a function that gives the ``grad_sample_mode`` of one of ``MODES``."""

    def choose(mode):
        if mode == "deferred":
            monkeypatch.setattr(terms, "_GENEROSITY", 0)
            return "ghost"
        return mode

    return choose


class OwnsParameter(nn.Module):
    """A class token owned next to a child layer."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 4))
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        return torch.cat([self.token.expand(x.shape[0], -1, -1), self.inner(x)], dim=1)


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
        return F.normalize(x, dim=-1) * self.weight.exp()


class PermutingNorm(OddNorm):
    """A norm that is affine in its weight, but not feature by feature."""

    def forward(self, x):
        return F.normalize(x, dim=-1) * self.weight.flip(0)


class AbsoluteNorm(OddNorm):
    """A norm that is affine in weights of one sign only."""

    def forward(self, x):
        return F.normalize(x, dim=-1) * self.weight.abs()


class AveragingNorm(OddNorm):
    """A norm that gives every feature the same weight."""

    def forward(self, x):
        return F.normalize(x, dim=-1) * self.weight.mean()


class ResidualNorm(OddNorm):
    """A norm with two outputs."""

    def forward(self, x, residual):
        x = x + residual
        return F.normalize(x, dim=-1) * self.weight, x


class GatedNorm(OddNorm):
    """A norm with a gate that all samples share."""

    def forward(self, x, gate):
        return F.normalize(x, dim=-1) * self.weight * gate


def hf(path, *args, **kwargs):
    """Build the ``transformers`` class ``path``, imported when it is needed."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(f"transformers.{module}"), name)(*args, **kwargs)


def flat(*layers):
    return nn.Sequential(*layers)


def ids(*shape):
    return torch.randint(0, 7, shape)


def tied(**kwargs):
    embedding = nn.Embedding(7, 4, **kwargs)
    model = Net(lambda s, i: s.out(s.mid(s.emb(i))), emb=embedding, mid=nn.Linear(4, 4), out=nn.Linear(4, 7))
    model.out.weight = model.emb.weight
    return model


def tied_to_subclass():
    model = flat(nn.Linear(4, 4), LinearWithForward(4, 4))
    model[1].weight = model[0].weight
    return model


def shared_by_calls(times):
    """One layer called again and again, as the blocks of ALBERT."""

    def forward(s, x):
        for _ in range(times):
            x = x + s.a(x).tanh()
        return x

    return Net(forward, a=nn.Linear(4, 4))


def tied_to_conv1d():
    """A Linear and a Conv1D of GPT-2, which keeps its weight transposed, with one weight."""
    model = flat(nn.Linear(4, 4), nn.Tanh(), hf("pytorch_utils.Conv1D", 4, 4))
    model[2].weight = model[0].weight
    return model


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


LLAMA = "models.llama.modeling_llama.LlamaRMSNorm"
GEMMA = "models.gemma.modeling_gemma.GemmaRMSNorm"
T5 = "models.t5.modeling_t5.T5LayerNorm"
MAMBA = "models.mamba2.modeling_mamba2.MambaRMSNormGated"
QWEN = "models.qwen3_next.modeling_qwen3_next.Qwen3NextRMSNormGated"
# These layers compute in float32 whatever they are given.
IN_FLOAT32 = {"gemma-norm", "llama-norm", "mamba-norm", "mamba-norm-gated", "qwen-norm-gated", "t5-norm"}
LENGTHS = torch.tensor([3, 0, 5])

CASES = {
    "linear-2d": (lambda: flat(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)), lambda: [randn(N, 4)]),
    "linear-no-bias": (lambda: flat(nn.Linear(4, 5, bias=False), nn.Linear(5, 2)), lambda: [randn(N, 4)]),
    "linear-3d": (lambda: flat(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)), lambda: [randn(N, 6, 4)]),
    "linear-gram": (lambda: flat(nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 9)), lambda: [randn(N, 3, 40)]),
    "linear-4d": (lambda: nn.Linear(4, 5), lambda: [randn(N, 2, 3, 4)]),
    "linear-t-equals-n": (lambda: flat(nn.Linear(N, N), nn.Linear(N, N)), lambda: [randn(N, N, N)]),
    "linear-not-contiguous": (lambda: flat(nn.Linear(4, 5)), lambda: [randn(N, 4, 6).transpose(1, 2)]),
    "relu-in-place": (lambda: flat(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 2)), lambda: [randn(N, 4)]),
    "linear-subclass": (lambda: flat(nn.Linear(4, 4), LinearWithForward(4, 3)), lambda: [randn(N, 4)]),
    "tied-to-subclass": (tied_to_subclass, lambda: [randn(N, 4)]),
    "tied-embedding": (tied, lambda: [ids(N, 5)]),
    "called-twice": (lambda: Net(lambda s, x: s.a(s.a(x).tanh()), a=nn.Linear(4, 4)), lambda: [randn(N, 4)]),
    "embedding": (lambda: flat(nn.Embedding(7, 4), nn.Linear(4, 2)), lambda: [ids(N, 5)]),
    "embedding-1d": (lambda: flat(nn.Embedding(7, 4), nn.Linear(4, 2)), lambda: [ids(N)]),
    "embedding-padding": (lambda: flat(nn.Embedding(7, 4, padding_idx=1), nn.Linear(4, 2)), lambda: [ids(N, 9)]),
    "embedding-sparse": (lambda: flat(nn.Embedding(7, 4, sparse=True), nn.Linear(4, 2)), lambda: [ids(N, 5)]),
    "positions-1xt": (
        lambda: Net(lambda s, i: s.e(i) + s.p(torch.arange(5)[None]), e=nn.Embedding(7, 4), p=nn.Embedding(5, 4)),
        lambda: [ids(N, 5)],
    ),
    "embedding-bag": (lambda: flat(nn.EmbeddingBag(7, 4, mode="sum"), nn.Linear(4, 2)), lambda: [ids(N, 5)]),
    "layer-norm": (lambda: flat(nn.Linear(4, 6), nn.LayerNorm(6)), lambda: [randn(N, 5, 4)]),
    "layer-norm-no-bias": (lambda: flat(nn.Linear(4, 6), nn.LayerNorm(6, bias=False)), lambda: [randn(N, 5, 4)]),
    "layer-norm-2d": (lambda: nn.LayerNorm((5, 4)), lambda: [randn(N, 5, 4)]),
    "layer-norm-plain": (
        lambda: flat(nn.Linear(4, 6), nn.LayerNorm(6, elementwise_affine=False)),
        lambda: [randn(N, 4)],
    ),
    "rms-norm": (lambda: flat(nn.Linear(4, 6), nn.RMSNorm(6)), lambda: [randn(N, 5, 4)]),
    "group-norm": (lambda: flat(nn.Conv1d(2, 4, 2), nn.GroupNorm(2, 4)), lambda: [randn(N, 2, 6)]),
    "instance-norm": (lambda: flat(nn.Conv2d(2, 4, 2), nn.InstanceNorm2d(4, affine=True)), lambda: [randn(N, 2, 5, 5)]),
    "conv1d": (lambda: nn.Conv1d(2, 4, 3, padding=1), lambda: [randn(N, 2, 6)]),
    "conv2d-groups": (lambda: nn.Conv2d(4, 4, 3, groups=2, stride=2, dilation=2), lambda: [randn(N, 4, 9, 8)]),
    "conv2d-depthwise-1x1-map": (
        lambda: nn.Conv2d(4, 4, 3, groups=4, padding=1),
        lambda: [randn(N, 1, 4).mT[..., None]],
    ),
    "conv2d-channels-last": (
        lambda: nn.Conv2d(3, 4, 3),
        lambda: [randn(N, 3, 6, 5).to(memory_format=torch.channels_last)],
    ),
    "conv2d-reflect": (lambda: nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect"), lambda: [randn(N, 2, 5, 5)]),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), lambda: [randn(N, 2, 4, 4, 4)]),
    "conv-transpose": (lambda: nn.ConvTranspose2d(2, 3, 3, stride=2), lambda: [randn(N, 2, 4, 4)]),
    "prelu": (lambda: flat(nn.Linear(4, 6), nn.PReLU(6)), lambda: [randn(N, 4)]),
    "bilinear": (lambda: nn.Bilinear(4, 3, 5), lambda: [randn(N, 4), randn(N, 3)]),
    "lstm": (lambda: Net(lambda s, x: s.r(x)[0], r=nn.LSTM(4, 3, batch_first=True)), lambda: [randn(N, 5, 4)]),
    "gru-two-layers": (
        lambda: Net(lambda s, x: s.r(x)[0], r=nn.GRU(4, 3, 2, bidirectional=True, batch_first=True)),
        lambda: [randn(N, 5, 4)],
    ),
    "rnn-cell": (lambda: Net(lambda s, x: s.c(x, s.c(x)), c=nn.RNNCell(4, 4)), lambda: [randn(N, 4)]),
    "attention": (
        lambda: Net(lambda s, x: s.m(x, x, x, need_weights=False)[0], m=nn.MultiheadAttention(4, 2, batch_first=True)),
        lambda: [randn(N, 5, 4)],
    ),
    "encoder-layer": (
        lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True),
        lambda: [randn(N, 5, 4)],
    ),
    "owned-parameter": (OwnsParameter, lambda: [randn(N, 5, 4)]),
    "weight-norm": (
        lambda: flat(nn.utils.parametrizations.weight_norm(nn.Linear(4, 5)), nn.Linear(5, 2)),
        lambda: [randn(N, 4)],
    ),
    # ---------------------------------------------------------------- linear
    "linear-one": (lambda: nn.Linear(4, 5), lambda: [randn(N, 4)]),
    "linear-5d": (lambda: nn.Linear(4, 5), lambda: [randn(N, 2, 1, 3, 4)]),
    "linear-4d-deep": (lambda: flat(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)), lambda: [randn(N, 2, 3, 4)]),
    "linear-wide-gram": (lambda: nn.Linear(40, 30), lambda: [randn(N, 2, 3, 40)]),
    "linear-many-tokens": (lambda: nn.Linear(90, 80), lambda: [randn(N, 65, 90) / 9]),
    "linear-keyword": (lambda: Net(lambda s, x: s.a(input=x), a=nn.Linear(4, 5)), lambda: [randn(N, 6, 4)]),
    "linear-expanded": (lambda: nn.Linear(4, 5), lambda: [randn(N, 1, 4).expand(-1, 6, -1)]),
    "linear-sliced": (lambda: nn.Linear(4, 5), lambda: [randn(N, 12, 9)[:, 1::3, 1::2]]),
    "linear-narrow": (lambda: flat(nn.Linear(1, 1), nn.Tanh(), nn.Linear(1, 3)), lambda: [randn(N, 2, 1)]),
    "gpt2-conv1d": (
        lambda: flat(hf("pytorch_utils.Conv1D", 5, 4), nn.Tanh(), hf("pytorch_utils.Conv1D", 2, 5)),
        lambda: [randn(N, 6, 4)],
    ),
    "gpt2-conv1d-gram": (lambda: hf("pytorch_utils.Conv1D", 30, 40), lambda: [randn(N, 2, 40)]),
    "gpt2-conv1d-2d": (lambda: hf("pytorch_utils.Conv1D", 5, 4), lambda: [randn(N, 4)]),
    # ---------------------------------------------------------------- shared parameters
    "called-12-times": (lambda: shared_by_calls(12), lambda: [randn(N, 4)]),
    "called-12-times-on-tokens": (lambda: shared_by_calls(12), lambda: [randn(N, 2, 4)]),
    "called-twice-gram": (
        lambda: Net(lambda s, x: s.a(s.a(x).tanh()), a=nn.Linear(30, 30)),
        lambda: [randn(N, 2, 30)],
    ),
    "called-twice-embedding": (
        lambda: Net(lambda s, i, j: s.e(i).sum(1) - s.e(j).mean(1), e=nn.Embedding(7, 4)),
        lambda: [ids(N, 5), ids(N, 3)],
    ),
    "tied-embedding-padding": (
        lambda: tied(padding_idx=1),
        lambda: [ids(N, 5)],
    ),
    "tied-to-transposed": (tied_to_conv1d, lambda: [randn(N, 5, 4)]),
    "tied-linear-conv1d": (
        lambda: tied_pair(nn.Linear(4, 4), LinearAsConv(4, 4)),
        lambda: [randn(N, 5, 4)],
    ),
    "tied-conv2d": (
        lambda: tied_pair(nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3, stride=2, padding=1)),
        lambda: [randn(N, 3, 6, 5)],
    ),
    "tied-conv-to-transposed": (
        lambda: tied_pair(nn.Conv1d(4, 4, 3), nn.ConvTranspose1d(4, 4, 3, stride=2)),
        lambda: [randn(N, 4, 6)],
    ),
    "tied-layer-norms": (lambda: tied_pair(nn.LayerNorm(4), nn.RMSNorm(4)), lambda: [randn(N, 5, 4)]),
    "tied-bag-to-embedding": (
        lambda: tied_pair(nn.Embedding(7, 4), nn.EmbeddingBag(7, 4, mode="mean")),
        lambda: [ids(N, 5)],
    ),
    # ---------------------------------------------------------------- embeddings
    "embedding-3d": (lambda: nn.Embedding(7, 4), lambda: [ids(N, 2, 3)]),
    "embedding-int32": (lambda: nn.Embedding(7, 4), lambda: [ids(N, 5).int()]),
    "embedding-repeated-ids": (
        lambda: nn.Embedding(7, 4),
        lambda: [torch.tensor([[1, 1, 1, 1], [2, 0, 2, 0], [6, 6, 5, 6]])],
    ),
    "embedding-padding-negative": (
        lambda: nn.Embedding(7, 4, padding_idx=-1),
        lambda: [torch.tensor([[6, 6], [1, 6], [2, 3]])],
    ),
    "embedding-t-equals-n": (lambda: nn.Embedding(7, 4), lambda: [ids(N, N)]),
    "embedding-large-table": (lambda: nn.Embedding(300, 4), lambda: [torch.randint(0, 300, (N, 5))]),
    "bag-mean": (lambda: nn.EmbeddingBag(7, 4), lambda: [ids(N, 5)]),
    "bag-max": (lambda: nn.EmbeddingBag(7, 4, mode="max"), lambda: [ids(N, 5)]),
    "bag-sum-padding": (lambda: nn.EmbeddingBag(7, 4, mode="sum", padding_idx=1), lambda: [ids(N, 9) % 3]),
    "bag-mean-padding": (lambda: nn.EmbeddingBag(7, 4, padding_idx=-6), lambda: [ids(N, 9) % 3]),
    "bag-max-padding": (lambda: nn.EmbeddingBag(7, 4, mode="max", padding_idx=1), lambda: [ids(N, 9) % 3]),
    "bag-mean-all-padding": (
        lambda: nn.EmbeddingBag(7, 4, padding_idx=1),
        lambda: [torch.tensor([[1, 1, 1], [1, 2, 2], [3, 4, 5]])],
    ),
    "bag-max-all-padding": (
        lambda: nn.EmbeddingBag(7, 4, mode="max", padding_idx=1),
        lambda: [torch.tensor([[1, 1, 1], [1, 2, 2], [3, 4, 5]])],
    ),
    "bag-int32": (lambda: nn.EmbeddingBag(7, 4), lambda: [ids(N, 5).int()]),
    "bag-large-table": (lambda: nn.EmbeddingBag(300, 4), lambda: [torch.randint(0, 300, (N, 5))]),
    "bag-sparse": (lambda: nn.EmbeddingBag(7, 4, sparse=True), lambda: [ids(N, 5)]),
    "bag-weights": (weighted_bag, lambda: [ids(N, 5), randn(N, 5)]),
    "bag-weights-padding": (lambda: weighted_bag(padding_idx=1), lambda: [ids(N, 5) % 3, randn(N, 5)]),
    "bag-weights-that-need-gradients": (
        lambda: Net(
            lambda s, i, x: s.bag(i, per_sample_weights=s.a(x)),
            bag=nn.EmbeddingBag(7, 4, mode="sum"),
            a=nn.Linear(4, 5),
        ),
        lambda: [ids(N, 5), randn(N, 4)],
    ),
    **{
        f"bag-offsets-{mode}{'-last' if last else ''}{'-padding' if padding else ''}": (
            lambda mode=mode, last=last, padding=padding: bag_with_offsets(
                nn.EmbeddingBag(7, 4, mode=mode, include_last_offset=last, padding_idx=1 if padding else None)
            ),
            lambda: [ids(N, 5) % 3, LENGTHS],
        )
        for mode in ("sum", "mean", "max")
        for last, padding in ((False, False), (True, False), (False, True))
    },
    "bag-offsets-weights": (
        lambda: bag_with_offsets(nn.EmbeddingBag(7, 4, mode="sum"), weighted=True),
        lambda: [ids(N, 5), torch.tensor([5, 5, 5])],
    ),
    "bag-offsets-one-id-each": (
        lambda: bag_with_offsets(nn.EmbeddingBag(7, 4)),
        lambda: [ids(N, 5), torch.tensor([1, 1, 1])],
    ),
    # ---------------------------------------------------------------- norms
    "layer-norm-3-dims": (lambda: nn.LayerNorm((2, 3, 4)), lambda: [randn(N, 2, 3, 4)]),
    "layer-norm-2-of-3-dims": (lambda: nn.LayerNorm((3, 4), bias=False), lambda: [randn(N, 2, 3, 4)]),
    "layer-norm-no-tokens": (lambda: nn.LayerNorm(4, eps=0.1), lambda: [randn(N, 4)]),
    "layer-norm-not-contiguous": (lambda: nn.LayerNorm(4), lambda: [randn(N, 4, 5).mT]),
    "rms-norm-2-dims": (lambda: nn.RMSNorm((5, 4)), lambda: [randn(N, 5, 4)]),
    "rms-norm-eps": (lambda: nn.RMSNorm(4, eps=0.1), lambda: [randn(N, 2, 5, 4)]),
    "rms-norm-plain": (lambda: flat(nn.Linear(4, 4), nn.RMSNorm(4, elementwise_affine=False)), lambda: [randn(N, 4)]),
    "llama-norm": (lambda: flat(nn.Linear(4, 6), hf(LLAMA, 6)), lambda: [randn(N, 5, 4)]),
    "gemma-norm": (lambda: flat(nn.Linear(4, 6), hf(GEMMA, 6)), lambda: [randn(N, 5, 4)]),
    "t5-norm": (lambda: flat(nn.Linear(4, 6), hf(T5, 6)), lambda: [randn(N, 5, 4)]),
    "mamba-norm": (lambda: hf(MAMBA, 4, group_size=2), lambda: [randn(N, 5, 4)]),
    "mamba-norm-gated": (
        lambda: Net(lambda s, x: s.n(x, s.a(x)), n=hf(MAMBA, 4, group_size=2), a=nn.Linear(4, 4)),
        lambda: [randn(N, 5, 4)],
    ),
    "qwen-norm-gated": (
        lambda: Net(lambda s, x: s.n(x, gate=s.a(x)), n=hf(QWEN, 4), a=nn.Linear(4, 4)),
        lambda: [randn(N, 5, 4)],
    ),
    "norm-not-affine": (lambda: flat(nn.Linear(4, 6), OddNorm(6)), lambda: [randn(N, 5, 4)]),
    "norm-with-a-gate-of-the-batch-size": (
        lambda: Net(lambda s, x: s.n(s.a(x), x.new_tensor([0.5, 2.0, -1.0])), a=nn.Linear(4, N), n=GatedNorm(N)),
        lambda: [randn(N, 5, 4)],
    ),
    "norm-permuting": (lambda: flat(nn.Linear(4, 6), PermutingNorm(6)), lambda: [randn(N, 5, 4)]),
    "norm-absolute": (lambda: flat(nn.Linear(4, 6), AbsoluteNorm(6)), lambda: [randn(N, 5, 4)]),
    "norm-two-outputs": (
        lambda: Net(lambda s, x: sum(s.n(x, s.a(x))), n=ResidualNorm(4), a=nn.Linear(4, 4)),
        lambda: [randn(N, 5, 4)],
    ),
    "group-norm-2d": (lambda: nn.GroupNorm(2, 4, eps=0.1), lambda: [randn(N, 4, 3, 2)]),
    "group-norm-no-positions": (lambda: nn.GroupNorm(2, 6), lambda: [randn(N, 6)]),
    "group-norm-plain": (
        lambda: flat(nn.Conv1d(2, 4, 2), nn.GroupNorm(2, 4, affine=False)),
        lambda: [randn(N, 2, 6)],
    ),
    "instance-norm-1d": (lambda: nn.InstanceNorm1d(4, affine=True), lambda: [randn(N, 4, 6)]),
    "instance-norm-2d": (lambda: nn.InstanceNorm2d(4, affine=True, eps=0.1), lambda: [randn(N, 4, 3, 2)]),
    "instance-norm-3d": (lambda: nn.InstanceNorm3d(2, affine=True), lambda: [randn(N, 2, 3, 2, 2)]),
    # ---------------------------------------------------------------- convolutions
    **{
        f"conv1d-{mode}-{pad}": (
            lambda mode=mode, pad=pad: nn.Conv1d(2, 3, 4, padding=pad, dilation=2, padding_mode=mode),
            lambda: [randn(N, 2, 9)],
        )
        for mode in ("zeros", "reflect", "replicate", "circular")
        for pad in (2, "same", "valid")
    },
    **{
        f"conv2d-{mode}-same": (
            lambda mode=mode: nn.Conv2d(2, 4, (2, 3), padding="same", groups=2, padding_mode=mode, bias=False),
            lambda: [randn(N, 2, 5, 4)],
        )
        for mode in ("zeros", "reflect", "replicate", "circular")
    },
    "conv1d-no-bias": (lambda: nn.Conv1d(2, 4, 3, bias=False), lambda: [randn(N, 2, 6)]),
    "conv1d-depthwise": (lambda: nn.Conv1d(4, 8, 3, groups=4, stride=2, padding=2), lambda: [randn(N, 4, 7)]),
    "conv1d-1x1": (lambda: nn.Conv1d(4, 3, 1), lambda: [randn(N, 4, 5)]),
    "conv1d-one-position": (lambda: nn.Conv1d(4, 3, 5), lambda: [randn(N, 4, 5)]),
    "conv2d-stride-leaves-a-rest": (lambda: nn.Conv2d(2, 3, 3, stride=3, padding=1), lambda: [randn(N, 2, 9, 10)]),
    "conv2d-anisotropic": (
        lambda: nn.Conv2d(2, 3, (3, 2), stride=(1, 2), padding=(2, 0), dilation=(2, 3)),
        lambda: [randn(N, 2, 6, 9)],
    ),
    "conv2d-few-pixels": (lambda: nn.Conv2d(32, 24, 3, padding=1), lambda: [randn(N, 32, 3, 3)]),
    "conv2d-few-pixels-strided": (
        lambda: nn.Conv2d(32, 24, 3, padding=2, stride=2, dilation=2),
        lambda: [randn(N, 32, 4, 3)],
    ),
    "conv2d-few-pixels-channels-last": (
        lambda: nn.Conv2d(32, 24, 2),
        lambda: [randn(N, 32, 3, 4).to(memory_format=torch.channels_last)],
    ),
    "conv2d-same-few-pixels": (lambda: nn.Conv2d(32, 24, 2, padding="same"), lambda: [randn(N, 32, 3, 3)]),
    "conv2d-weight-channels-last": (
        lambda: nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last),
        lambda: [randn(N, 3, 6, 5)],
    ),
    "conv2d-transposed-input": (lambda: nn.Conv2d(3, 4, 3), lambda: [randn(N, 3, 5, 6).mT]),
    "conv2d-expanded-input": (lambda: nn.Conv2d(3, 4, 3), lambda: [randn(N, 1, 6, 5).expand(-1, 3, -1, -1)]),
    "conv2d-sliced-input": (lambda: nn.Conv2d(3, 4, 3), lambda: [randn(N, 6, 10, 6)[:, ::2, ::2, 1:]]),
    "conv3d-groups-same": (
        lambda: nn.Conv3d(2, 4, (2, 1, 3), padding="same", groups=2, dilation=(1, 1, 2)),
        lambda: [randn(N, 2, 3, 2, 4)],
    ),
    "conv3d-circular": (lambda: nn.Conv3d(2, 3, 2, padding=1, padding_mode="circular"), lambda: [randn(N, 2, 3, 2, 2)]),
    "conv3d-channels-last": (
        lambda: nn.Conv3d(2, 3, 2, stride=2, padding=1),
        lambda: [randn(N, 2, 4, 3, 2).to(memory_format=torch.channels_last_3d)],
    ),
    "conv-transpose-1d": (
        lambda: nn.ConvTranspose1d(2, 3, 3, stride=3, padding=2, output_padding=2, dilation=2),
        lambda: [randn(N, 2, 4)],
    ),
    "conv-transpose-1d-output-padding": (
        lambda: nn.ConvTranspose1d(2, 3, 3, stride=2, output_padding=1),
        lambda: [randn(N, 2, 4)],
    ),
    "conv-transpose-2d-groups": (
        lambda: nn.ConvTranspose2d(4, 6, (2, 3), stride=(2, 1), padding=1, groups=2, bias=False),
        lambda: [randn(N, 4, 3, 4)],
    ),
    "conv-transpose-2d-depthwise": (lambda: nn.ConvTranspose2d(4, 4, 2, groups=4), lambda: [randn(N, 4, 2, 3)]),
    "conv-transpose-2d-few-pixels": (
        lambda: nn.ConvTranspose2d(32, 24, 3, stride=2, padding=1),
        lambda: [randn(N, 32, 2, 2)],
    ),
    "conv-transpose-2d-channels-last": (
        lambda: nn.ConvTranspose2d(3, 4, 3),
        lambda: [randn(N, 3, 4, 3).to(memory_format=torch.channels_last)],
    ),
    "conv-transpose-3d": (
        lambda: nn.ConvTranspose3d(2, 4, 2, stride=2, padding=1, output_padding=1, groups=2),
        lambda: [randn(N, 2, 2, 3, 2)],
    ),
    "conv-transpose-output-size": (
        lambda: Net(lambda s, x: s.c(x, output_size=(8,)), c=nn.ConvTranspose1d(2, 3, 2, stride=2)),
        lambda: [randn(N, 2, 4)],
    ),
    "conv-transpose-output-size-with-rest": (
        lambda: Net(lambda s, x: s.c(x, output_size=(10, 7)), c=nn.ConvTranspose2d(2, 3, 3, stride=2)),
        lambda: [randn(N, 2, 4, 3)],
    ),
    # ---------------------------------------------------------------- small layers
    "prelu-one-slope": (lambda: nn.PReLU(), lambda: [randn(N, 4)]),
    "prelu-one-slope-4d": (lambda: nn.PReLU(), lambda: [randn(N, 3, 2, 2)]),
    "prelu-4d": (lambda: nn.PReLU(3), lambda: [randn(N, 3, 2, 2)]),
    "prelu-2d": (lambda: nn.PReLU(4), lambda: [randn(N, 4)]),
    "bilinear-tokens": (lambda: nn.Bilinear(4, 3, 5), lambda: [randn(N, 2, 2, 4), randn(N, 2, 2, 3)]),
    "bilinear-no-bias": (lambda: nn.Bilinear(4, 3, 5, bias=False), lambda: [randn(N, 2, 4), randn(N, 2, 3)]),
    "bilinear-of-itself": (lambda: Net(lambda s, x: s.b(x, x), b=nn.Bilinear(4, 4, 2)), lambda: [randn(N, 4)]),
}


def build(case):
    torch.manual_seed(1)
    make, inputs = CASES[case]
    model = make().double()
    for p in model.parameters():
        nn.init.normal_(p, std=0.5)
    return model, inputs()


def assert_close(found, expected, case=""):
    rtol, atol = (1e-5, 1e-6) if case in IN_FLOAT32 else (1e-9, 1e-10)
    for name, want in expected.items():
        torch.testing.assert_close(found[name], want, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def assert_captured(expected, model, *inputs, mode="ghost"):
    """A controller of its own captures the ``expected`` gradients."""
    controller = HookController(model, grad_sample_mode=mode)
    losses_of(model, *inputs).mean().backward()
    found = controller.take()
    assert_close({controller.name_of(p): found.grads(p) for p in found.params}, expected)
    controller.cleanup()


def freeze(model, frozen):
    """Freeze every other parameter: of a layer alone its bias, or its weight if it has a bias."""
    params = list(model.parameters())
    chosen = {"none": [], "biases": params[1::2], "weights": params[0::2] if len(params) > 1 else []}
    for p in chosen[frozen]:
        p.requires_grad_(False)


# Of an only parameter nothing would be left, or nothing be frozen.
_SEVERAL = {case for case in CASES if len(list(build(case)[0].parameters())) > 1}
PARTS = [(case, part) for case in CASES for part in ("none", "biases", "weights") if part == "none" or case in _SEVERAL]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("case", "frozen"), PARTS)
def test_gradients_match_single_sample_autograd(case, mode, frozen, mode_of):
    """Per-sample gradients, squared norms and weighted sums, of all samples or of some, equal those of single samples."""
    model, inputs = build(case)
    freeze(model, frozen)
    expected = sample_grads(model, losses_of, *inputs)
    controller = HookController(model, grad_sample_mode=mode_of(mode))
    losses_of(model, *inputs).mean().backward()
    names = {p: name for name, p in model.named_parameters()}
    if controller.grad_sample_mode != "ghost":
        assert_close({names[p]: p.grad_sample for p in controller.params}, expected, case)
    found = controller.take()
    assert {names[p] for p in found.params} == set(expected)
    assert_close({names[p]: found.grads(p) for p in found.params}, expected, case)
    for rows in (slice(1, 3), torch.tensor([2, 0])):
        some = {name: g[rows] for name, g in expected.items()}
        assert_close({names[p]: found.grads(p, rows) for p in found.params}, some, case)
    assert_close(
        {names[p]: s for p, s in found.sq_norms(found.params).items()},
        {name: g.flatten(1).square().sum(1) for name, g in expected.items()},
        case,
    )
    factors = torch.linspace(0.1, 1.0, N, dtype=torch.float64)
    for finite in (torch.ones(N, dtype=torch.bool), torch.tensor([True, False, True])):
        sums = found.weighted_sums(dict.fromkeys(found.params, factors), finite)
        wanted = {name: torch.tensordot(factors[finite], g[finite], 1) for name, g in expected.items()}
        assert_close({names[p]: s for p, s in sums.items()}, wanted, case)
    assert all(p.grad is None for p in model.parameters())
    controller.cleanup()
    assert not any(hasattr(p, "grad_sample") for p in model.parameters())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", ["linear-3d", "tied-embedding", "conv1d", "lstm", "owned-parameter", "layer-norm"])
def test_a_sample_with_a_non_finite_gradient_is_left_out_by_selection(case, mode, mode_of):
    """One sample with a NaN gradient changes nothing but its own contribution."""
    model, inputs = build(case)
    weights = torch.tensor([1.0, float("nan"), 1.0], dtype=torch.float64)
    expected = sample_grads(model, losses_of, *(part[[0, 2]] for part in inputs))
    controller = HookController(model, grad_sample_mode=mode_of(mode))
    (losses_of(model, *inputs) * weights).mean().backward()
    found = controller.take()
    norms = found.sq_norms(found.params)
    finite = torch.stack([torch.isfinite(s) for s in norms.values()]).all(0)
    assert finite.tolist() == [True, False, True]
    ones = torch.ones(N, dtype=torch.float64)
    sums = found.weighted_sums(dict.fromkeys(found.params, ones), finite)
    assert_close({controller.name_of(p): s for p, s in sums.items()}, {k: g.sum(0) for k, g in expected.items()})
    controller.cleanup()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES)
def test_a_batch_of_one_and_an_empty_batch(case, mode, mode_of):
    """A batch of one gives that sample's gradient; a batch of none gives no row, unless the plain module cannot run on it."""
    model, inputs = build(case)
    one = [part[:1] for part in inputs]
    controller = HookController(model, grad_sample_mode=mode_of(mode))
    losses_of(model, *one).mean().backward()
    found = controller.take()
    grads = {controller.name_of(p): found.grads(p) for p in found.params}
    controller.disable_hooks()
    assert_close(grads, sample_grads(model, losses_of, *one), case)
    try:
        losses_of(model, *(part[:0] for part in inputs)).sum().backward()
    except (RuntimeError, IndexError):
        assert case.startswith("instance-norm")  # PyTorch normalises no empty batch
        controller.cleanup()
        return
    controller.enable_hooks()
    losses_of(model, *(part[:0] for part in inputs)).sum().backward()
    empty = controller.take()
    assert empty is not None
    assert empty.samples == 0
    assert all(empty.grads(p).shape == (0, *p.shape) for p in empty.params)
    assert all(s.shape == (0,) for s in empty.sq_norms(empty.params).values())
    controller.cleanup()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES)
def test_one_private_step_moves_by_the_clipped_sum(case, mode, loader_of, mode_of):
    """Without noise, SGD with rate 1 moves the parameters by the clipped mean, and by no more than C per sample."""
    model, inputs = build(case)
    grads = sample_grads(model, losses_of, *inputs)
    norms = torch.stack([g.flatten(1).square().sum(1) for g in grads.values()]).sum(0).sqrt()
    bound = float(norms.median())
    expected = clipped_sum(grads, bound)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scope = private_training(
        model,
        optimizer,
        loader_of(inputs),
        noise_multiplier=0.0,
        max_grad_norm=bound,
        poisson_sampling=False,
        grad_sample_mode=mode_of(mode),
    )
    with scope as (opt, loader):
        for batch in loader:
            losses_of(model, *batch).mean().backward()
            opt.step()
    moved = {name: (before[name] - p.detach()) * N for name, p in model.named_parameters()}
    for name, want in expected.items():
        torch.testing.assert_close(moved[name], want, rtol=1e-6, atol=1e-6 if case in IN_FLOAT32 else 1e-9)
    total = torch.stack([m.square().sum() for m in moved.values()]).sum().sqrt()
    assert total <= N * bound * 1.001


RULES = {
    "Linear": [lambda: nn.Linear(2, 3), lambda: nn.Linear(2, 3, bias=False)],
    "Conv1D": [lambda: hf("pytorch_utils.Conv1D", 3, 2)],
    "Convolution": [
        *(lambda c=c: c(2, 2, 2) for c in (nn.Conv1d, nn.Conv2d, nn.Conv3d)),
        *(lambda c=c: c(2, 2, 2) for c in (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)),
        lambda: nn.Conv2d(2, 2, 2, padding=1, padding_mode="circular", groups=2),
        lambda: nn.Conv1d(2, 2, 2, padding="same", bias=False),
    ],
    "Embedding": [lambda: nn.Embedding(7, 2), lambda: nn.Embedding(7, 2, padding_idx=0, sparse=True)],
    "EmbeddingBag": [lambda m=m: nn.EmbeddingBag(7, 2, mode=m) for m in ("sum", "mean", "max")],
    "LayerNorm": [lambda: nn.LayerNorm(4), lambda: nn.LayerNorm((2, 4), bias=False)],
    "RMSNorm": [lambda: nn.RMSNorm(4), lambda: nn.RMSNorm((2, 4))],
    "GroupNorm": [lambda: nn.GroupNorm(2, 4)],
    "InstanceNorm": [lambda c=c: c(4, affine=True) for c in (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)],
    "PReLU": [nn.PReLU, lambda: nn.PReLU(4)],
    "Bilinear": [lambda: nn.Bilinear(2, 3, 4)],
    "norm over features": [
        lambda: hf(LLAMA, 4),
        lambda: hf(GEMMA, 4),
        lambda: hf(T5, 4),
        lambda: hf(MAMBA, 4, group_size=2),
        lambda: hf(QWEN, 4),
    ],
    "generic": [
        lambda: LinearWithForward(2, 3),
        lambda: LinearAsConv(2, 3),
        lambda: nn.LSTM(2, 3),
        lambda: nn.MultiheadAttention(4, 2),
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(2, 3)),
        lambda: nn.InstanceNorm1d(4, affine=True, track_running_stats=True),
    ],
}


@pytest.mark.parametrize("label", RULES)
def test_each_class_gets_the_rule_that_is_meant_for_it(label):
    """Classes with a formula of their own are not left to the generic rule, and classes that compute something else are."""
    assert {RuleTable().find(make()).label for make in RULES[label]} == {label}
    generic_only = RuleTable(generic_only=True)
    assert {generic_only.find(make()).label for make in RULES[label]} == {"generic"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("path", [LLAMA, GEMMA, T5, MAMBA, QWEN], ids=lambda path: path.rpartition(".")[2])
def test_norms_of_transformers_take_the_fast_formula(path, dtype):
    """The norm classes of ``transformers`` are found to be affine in their weight, in the dtypes they are trained in."""
    norm = hf(path, 6, **({"group_size": 3} if path == MAMBA else {})).to(dtype)
    inputs = [torch.randn(N, 5, 6).to(dtype) for _ in range(2 if path in (MAMBA, QWEN) else 1)]
    controller = HookController(norm, grad_sample_mode="ghost")
    norm(*inputs).float().square().sum(dim=(1, 2)).mean().backward()
    (site,) = controller._sites
    assert site.memo["affine"] is True
    controller.cleanup()


@pytest.mark.parametrize("value", [1.0, 0.1])
@pytest.mark.parametrize("norm", [OddNorm, PermutingNorm, AbsoluteNorm, AveragingNorm])
def test_norms_that_are_not_affine_by_feature_are_found_out_at_any_weight(norm, value):
    """A norm that is not affine in its weight, feature by feature, is differentiated as it is, also at weights all alike."""
    model = norm(4).double()
    nn.init.constant_(model.weight, value)
    x = randn(N, 5, 4)
    for _ in range(2):  # what the first call found is remembered by the second
        expected = sample_grads(model, losses_of, x)
        controller = HookController(model)
        for _ in range(2):
            losses_of(model, x).mean().backward()
            assert_close({"weight": model.weight.grad_sample}, expected)
            controller.discard()
        controller.cleanup()
        nn.init.constant_(model.weight, -value)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bag", ["sum", "mean", "max"])
def test_flat_ids_of_a_bag_are_not_taken_for_rows_of_samples(bag, mode, mode_of):
    """As many flat ids as samples: right for any choice of samples."""
    model = Net(lambda s, i, o: s.bag(i, o), bag=nn.EmbeddingBag(7, 4, mode=bag)).double()
    flat_ids, offsets = torch.tensor([1, 2, 2]), torch.tensor([0, 0, 2])
    weight = model.bag.weight
    rows = [flat_ids[:0], flat_ids[:2], flat_ids[2:]]
    losses = [losses_of(model, row, torch.tensor([0])).sum() for row in rows]
    expected = torch.stack([torch.autograd.grad(loss, weight)[0] for loss in losses])
    controller = HookController(model, grad_sample_mode=mode_of(mode))
    losses_of(model, flat_ids, offsets).mean().backward()
    found = controller.take()
    for some in (slice(None), slice(1, 2), torch.tensor([2, 0])):
        torch.testing.assert_close(found.grads(weight, some), expected[some])
    controller.cleanup()


class Watched(torch.autograd.Function):
    """Identity that keeps weak references to the memory of the activation it makes and of the gradient that comes back."""

    @staticmethod
    def forward(ctx, x, memory):
        ctx.memory = memory
        return Watched.copied(x, memory)

    @staticmethod
    def backward(ctx, grad):
        return Watched.copied(grad, ctx.memory), None

    @staticmethod
    def copied(x, memory):
        array = x.detach().numpy().copy()
        memory.append(weakref.ref(array))
        return torch.from_numpy(array)


def test_nothing_more_than_needed_stays_captured(loader_of):
    """Layers whose gradients are written out at once keep nothing, others their input and output gradient until the step."""
    before, between, after = memories = [], [], []

    def forward(s, x):
        x = Watched.apply(s.narrow(Watched.apply(x, before)), between)
        return Watched.apply(s.wide(x), after)

    model = Net(forward, narrow=nn.Linear(4, 4), wide=nn.Linear(4, 300))
    scope = private_training(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        loader_of([torch.randn(6, 2, 4)], 2),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        poisson_sampling=False,
    )
    with scope as (opt, loader):
        for (x,) in loader:
            for memory in memories:
                memory.clear()
            model(x).square().sum((1, 2)).mean().backward()
            alive = [sum(ref() is not None for ref in memory) for memory in memories]
            assert alive == [0, 1, 1]  # the input of the wide layer, and the gradient of its output
            opt.step()
            assert not any(ref() is not None for memory in memories for ref in memory)
            assert all(memories)


class Mixture(nn.Module):
    """Layers of all kinds: written out at once or later, shared, without a rule, parameters of its own."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(40, 16)
        self.scale = nn.Parameter(torch.ones(16))
        self.norm = nn.LayerNorm(16)
        self.conv = nn.Conv1d(16, 16, 3, padding=1)
        self.rnn = nn.LSTM(16, 16, batch_first=True)
        self.wide = nn.Linear(16, 200)
        self.narrow = nn.Linear(200, 16)
        self.out = nn.Linear(16, 40, bias=False)
        self.out.weight = self.table.weight

    def forward(self, ids):
        x = self.norm(self.table(ids)) * self.scale
        x = x + self.conv(x.mT).mT
        x = x + self.rnn(x)[0]
        return self.out(self.narrow(self.wide(x).relu()))


@pytest.mark.parametrize("mode", MODES)
def test_sums_are_in_float32_inside_autocast_too(mode, mode_of, loader_of):
    """Calling backward and step inside the autocast block gives the very step that calling them outside of it gives."""

    def moved(inside):
        torch.manual_seed(0)
        model = Mixture()
        before = [p.detach().clone() for p in model.parameters()]
        scope = private_training(
            model,
            torch.optim.SGD(model.parameters(), lr=1.0),
            loader_of([torch.randint(0, 40, (6, 16))]),
            noise_multiplier=0.0,
            max_grad_norm=0.1,
            poisson_sampling=False,
            grad_sample_mode=mode_of(mode),
        )
        with scope as (opt, loader):
            for (x,) in loader:
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    loss = model(x).float().square().sum((1, 2)).mean()
                    if inside:
                        loss.backward()
                        opt.step()
                if not inside:
                    loss.backward()
                    opt.step()
        return [b - p.detach() for b, p in zip(before, model.parameters(), strict=True)]

    for a, b in zip(moved(inside=True), moved(inside=False), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)


def convolutions_and_norms():
    layers = nn.LayerNorm(16), nn.Conv1d(16, 16, 3, padding="same"), nn.ConvTranspose1d(16, 8, 2), nn.PReLU(8)
    return Net(
        lambda s, x: s.prelu(s.up(s.conv(s.norm(x).mT))),
        **dict(zip(("norm", "conv", "up", "prelu"), layers, strict=True)),
    )


def tables():
    """A table read by a bag and by a linear layer, next to another layer."""
    model = Net(
        lambda s, x: s.b(s.a(x)) + s.e((x[:, 0, :5].abs() * 4).long().clamp(max=15))[:, None],
        a=nn.Linear(16, 16),
        b=nn.Linear(16, 16, bias=False),
        e=nn.EmbeddingBag(16, 16),
    )
    model.b.weight = model.e.weight
    return model


def followed():
    """Layers without a rule: a subclass of Linear, an attention, and a single number that is used twice."""

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, x):
            return (x * self.scale).tanh() * self.scale

    return Net(
        lambda s, x: s.scaled(s.attend(*[s.linear(x)] * 3, need_weights=False)[0]),
        linear=LinearWithForward(16, 16),
        attend=nn.MultiheadAttention(16, 2, batch_first=True),
        scaled=Scaled(),
    )


def normed():
    """A linear layer under weight norm."""
    return Net(lambda s, x: s.linear(x), linear=nn.utils.parametrizations.weight_norm(nn.Linear(16, 16)))


@pytest.mark.parametrize("mode", ["ghost", "deferred", "hooks"])
@pytest.mark.parametrize("precision", ["bfloat16", "autocast"])
@pytest.mark.parametrize("make", [convolutions_and_norms, tables, followed, normed])
def test_sums_over_many_samples_are_not_rounded_to_half_precision(make, precision, mode, mode_of):
    """In half precision, too, taking away one of many similar samples moves the sum of clipped gradients by C and no more."""
    bound = 1e-3
    x = torch.randn(1, 4, 16) + 0.05 * torch.randn(1024, 4, 16)
    model, dtype = make(), torch.bfloat16 if precision == "bfloat16" else torch.float32
    model, x = model.to(dtype), x.to(dtype)

    def clipped(rows):
        controller = HookController(model, grad_sample_mode=mode_of(mode), loss_reduction="sum")
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "autocast"):
            loss = model(rows).float().square().sum()
        loss.backward()
        found = controller.take()
        factors = (bound / torch.stack(list(found.sq_norms(found.params).values())).sum(0).sqrt()).clamp(max=1)
        sums = found.weighted_sums(dict.fromkeys(found.params, factors), torch.ones(len(rows), dtype=torch.bool))
        controller.cleanup()
        return list(sums.values())

    differences = [(a - b).double() for a, b in zip(clipped(x), clipped(x[1:]), strict=True)]
    assert torch.stack([d.square().sum() for d in differences]).sum().sqrt() <= bound * 1.001


def test_random_numbers_in_a_module_that_is_run_again_are_refused():
    """Dropout inside a module that has to be run again is refused, naming the module."""
    model = Net(lambda s, x: s.r(x)[0], r=nn.LSTM(4, 3, 2, dropout=0.5, batch_first=True)).double()
    controller = HookController(model, grad_sample_mode="hooks")
    with pytest.raises(errors.UnsupportedModelError, match=r"^r \(LSTM\).*random"):
        losses_of(model, randn(N, 5, 4)).sum().backward()
    controller.cleanup()


def test_a_registered_rule_is_used_by_scopes_opened_later_only():
    """register_rule serves new controllers, keeps older ones on their snapshot, and cannot be repeated."""
    calls = []

    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.factor = nn.Parameter(torch.full((4,), 2.0, dtype=torch.float64))

        def forward(self, x):
            return x * self.factor

    older = HookController(older_model := Scale())

    @register_rule(Scale)
    def scale_rule(call):
        calls.append(call.samples)
        return {"factor": call.input * call.grad}

    try:
        x = randn(N, 4)
        losses_of(older_model, x).mean().backward()
        assert calls == []
        newer = HookController(model := Scale())
        losses_of(model, x).mean().backward()
        assert calls == [N]
        torch.testing.assert_close(model.factor.grad_sample, older_model.factor.grad_sample)
        with pytest.raises(errors.InvalidArgumentError, match="has a rule already"):
            register_rule(Scale)(scale_rule)
        older.cleanup()
        newer.cleanup()
    finally:
        registry._RULES.pop(Scale)


@pytest.mark.parametrize("mode", MODES)
def test_a_sampler_registered_with_opacus_is_used(mode, mode_of, monkeypatch):
    """A layer for which the user registered a grad sampler with Opacus gets its gradients from there."""
    calls = []

    class Own(nn.Linear):
        def forward(self, x):
            return F.linear(x, self.weight.exp())

    def sampler(layer, activations, backprops):
        calls.append(len(backprops))
        return {layer.weight: torch.einsum("no,ni->noi", backprops, activations[0]) * layer.weight.exp()}

    monkeypatch.setitem(GradSampleHooks.GRAD_SAMPLERS, Own, sampler)
    model, x = Net(lambda s, x: s.own(x), own=Own(4, 3, bias=False)).double(), randn(N, 4)
    assert_captured(sample_grads(model, losses_of, x), model, x, mode=mode_of(mode))
    assert calls == ([] if mode == "functorch" else [N])


@pytest.mark.parametrize(
    ("cls", "options", "make_input"),
    [
        (nn.Conv1d, {"padding": 1, "padding_mode": "circular"}, lambda: randn(N, 4, 5)),
        (nn.EmbeddingBag, {}, lambda: torch.tensor([[1, 1, 2]] * N)),
    ],
    ids=["convolution", "bag"],
)
def test_a_sampler_of_opacus_is_not_used_for_what_it_gets_wrong(cls, options, make_input, monkeypatch):
    """Registered for a subclass, Opacus's samplers are passed over where padding is not zeros or ids may come twice."""
    subclass = type("Subclass", (cls,), {})
    sizes = (4, 3, 3) if cls is nn.Conv1d else (7, 4)
    monkeypatch.setitem(GradSampleHooks.GRAD_SAMPLERS, subclass, GradSampleHooks.GRAD_SAMPLERS[cls])
    model, x = Net(lambda s, x: s.layer(x), layer=subclass(*sizes, **options)).double(), make_input()
    assert_captured(sample_grads(model, losses_of, x), model, x)


@pytest.mark.parametrize("own_sums", [False, True])
@pytest.mark.parametrize("mode", ["ghost", "deferred"])
def test_a_rule_gets_whole_inputs_that_all_samples_share(mode, own_sums, mode_of, monkeypatch):
    """Of some samples, too, the gradients are right where an input of all samples has as many rows as the batch."""

    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(randn(2, N))

        def forward(self, x, gate):
            return x * gate @ self.weight.T

    def gradients_of(call):
        return {"weight": torch.einsum("no,ni->noi", call.grad, call.input * call.args[1])}

    def sums_of(call, factors):
        return {"weight": torch.einsum("n,noi->oi", factors, gradients_of(call)["weight"])}

    rule = Rule("Gated", gradients_of, weighted_sums=sums_of if own_sums else None)
    monkeypatch.setitem(registry._RULES, Gated, rule)
    model, x = Net(lambda s, x: s.gated(x, x.new_tensor([0.5, 2.0, -1.0])), gated=Gated()), randn(N, N)
    expected = sample_grads(model, losses_of, x)["gated.weight"]
    controller = HookController(model, grad_sample_mode=mode_of(mode))
    losses_of(model, x).mean().backward()
    found, weight = controller.take(), model.gated.weight
    for rows in (slice(None), slice(1, 2), torch.tensor([2, 0])):
        torch.testing.assert_close(found.grads(weight, rows), expected[rows])
    factors, finite = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64), torch.tensor([True, False, True])
    wanted = torch.tensordot(factors[finite], expected[finite], 1)
    torch.testing.assert_close(found.weighted_sums({weight: factors}, finite)[weight], wanted)
    controller.cleanup()


@pytest.mark.parametrize("wrong", [{}, {"factor": "shape"}], ids=["missing", "shape"])
def test_a_rule_that_returns_the_wrong_thing_is_refused(wrong):
    """A rule without a gradient for a parameter, or with one of the wrong shape, is an error that names rule and parameter."""

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.factor = nn.Parameter(torch.ones(4, dtype=torch.float64))

        def forward(self, x):
            return x * self.factor

    register_rule(Odd)(lambda call: {name: call.input.sum(1) for name in wrong})
    try:
        model = Odd()
        controller = HookController(model)
        with pytest.raises(errors.UnsupportedModelError, match=r"'Odd'.*factor"):
            losses_of(model, randn(N, 4)).mean().backward()
        controller.cleanup()
    finally:
        registry._RULES.pop(Odd)
