"""Every layer, in every mode, against single-sample autograd in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dp_hooks import HookController, errors, private_training, register_rule
from dp_hooks.rules import Outer, outer, registry

from .reference import clipped_sum, sample_grads

MODES = ("ghost", "hooks", "functorch")
N = 3


class Wrap(nn.Module):
    """Runs ``fn(self, *inputs)`` over the given submodules."""

    def __init__(self, fn, **modules):
        super().__init__()
        self.fn = (fn,)
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, *inputs):
        return self.fn[0](self, *inputs)


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


def flat(*layers):
    return nn.Sequential(*layers)


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def ids(*shape):
    return torch.randint(0, 7, shape)


def tied():
    model = Wrap(lambda s, i: s.out(s.mid(s.emb(i))), emb=nn.Embedding(7, 4), mid=nn.Linear(4, 4), out=nn.Linear(4, 7))
    model.out.weight = model.emb.weight
    return model


def tied_to_subclass():
    model = flat(nn.Linear(4, 4), LinearWithForward(4, 4))
    model[1].weight = model[0].weight
    return model


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
    "called-twice": (lambda: Wrap(lambda s, x: s.a(s.a(x).tanh()), a=nn.Linear(4, 4)), lambda: [randn(N, 4)]),
    "embedding": (lambda: flat(nn.Embedding(7, 4), nn.Linear(4, 2)), lambda: [ids(N, 5)]),
    "embedding-1d": (lambda: flat(nn.Embedding(7, 4), nn.Linear(4, 2)), lambda: [ids(N)]),
    "embedding-padding": (lambda: flat(nn.Embedding(7, 4, padding_idx=1), nn.Linear(4, 2)), lambda: [ids(N, 9)]),
    "embedding-sparse": (lambda: flat(nn.Embedding(7, 4, sparse=True), nn.Linear(4, 2)), lambda: [ids(N, 5)]),
    "positions-1xt": (
        lambda: Wrap(lambda s, i: s.e(i) + s.p(torch.arange(5)[None]), e=nn.Embedding(7, 4), p=nn.Embedding(5, 4)),
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
    "lstm": (lambda: Wrap(lambda s, x: s.r(x)[0], r=nn.LSTM(4, 3, batch_first=True)), lambda: [randn(N, 5, 4)]),
    "gru-two-layers": (
        lambda: Wrap(lambda s, x: s.r(x)[0], r=nn.GRU(4, 3, 2, bidirectional=True, batch_first=True)),
        lambda: [randn(N, 5, 4)],
    ),
    "rnn-cell": (lambda: Wrap(lambda s, x: s.c(x, s.c(x)), c=nn.RNNCell(4, 4)), lambda: [randn(N, 4)]),
    "attention": (
        lambda: Wrap(lambda s, x: s.m(x, x, x, need_weights=False)[0], m=nn.MultiheadAttention(4, 2, batch_first=True)),
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
}


def build(case):
    torch.manual_seed(1)
    make, inputs = CASES[case]
    model = make().double()
    for p in model.parameters():
        nn.init.normal_(p, std=0.5)
    return model, inputs()


def losses_of(model, *inputs):
    """Per-sample losses that weigh every output differently."""
    out = model(*inputs).flatten(1)
    return (out * torch.linspace(0.5, 1.5, out.shape[1], dtype=out.dtype)).sin().sum(1)


def assert_close(found, expected):
    for name, want in expected.items():
        torch.testing.assert_close(found[name], want, rtol=1e-9, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("half_frozen", [False, True], ids=["all", "half-frozen"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES)
def test_gradients_match_single_sample_autograd(case, mode, half_frozen):
    """Per-sample gradients, squared norms and weighted sums equal those of single samples."""
    model, inputs = build(case)
    if half_frozen:
        for p in list(model.parameters())[1::2]:
            p.requires_grad_(False)
    expected = sample_grads(model, losses_of, *inputs)
    controller = HookController(model, grad_sample_mode=mode)
    losses_of(model, *inputs).mean().backward()
    names = {p: name for name, p in model.named_parameters()}
    if mode != "ghost":
        assert_close({names[p]: p.grad_sample for p in controller.params}, expected)
    found = controller.take()
    assert {names[p] for p in found.params} == set(expected)
    assert_close({names[p]: found.grads(p) for p in found.params}, expected)
    assert_close(
        {names[p]: s for p, s in found.sq_norms(found.params).items()},
        {name: g.flatten(1).square().sum(1) for name, g in expected.items()},
    )
    factors = torch.linspace(0.1, 1.0, N, dtype=torch.float64)
    sums = found.weighted_sums(dict.fromkeys(found.params, factors), torch.ones(N, dtype=torch.bool))
    assert_close(
        {names[p]: s for p, s in sums.items()}, {k: torch.tensordot(factors, g, 1) for k, g in expected.items()}
    )
    assert all(p.grad is None for p in model.parameters())
    controller.cleanup()
    assert not any(hasattr(p, "grad_sample") for p in model.parameters())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", ["linear-3d", "tied-embedding", "conv1d", "lstm", "owned-parameter", "layer-norm"])
def test_a_sample_with_a_non_finite_gradient_is_left_out_by_selection(case, mode):
    """One sample with a NaN gradient changes nothing but its own contribution."""
    model, inputs = build(case)
    weights = torch.tensor([1.0, float("nan"), 1.0], dtype=torch.float64)
    expected = sample_grads(model, losses_of, *(part[[0, 2]] for part in inputs))
    controller = HookController(model, grad_sample_mode=mode)
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
def test_a_batch_of_one_and_an_empty_batch(case, mode):
    """A batch of one gives that sample's gradient; a batch of none gives no row, or is nothing the module can run on."""
    model, inputs = build(case)
    one = [part[:1] for part in inputs]
    controller = HookController(model, grad_sample_mode=mode)
    losses_of(model, *one).mean().backward()
    found = controller.take()
    grads = {controller.name_of(p): found.grads(p) for p in found.params}
    controller.disable_hooks()
    assert_close(grads, sample_grads(model, losses_of, *one))
    try:
        losses_of(model, *(part[:0] for part in inputs)).sum().backward()
    except (RuntimeError, IndexError):  # the plain module cannot run on no sample either
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
def test_one_private_step_moves_by_the_clipped_sum(case, mode, loader_of):
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
        grad_sample_mode=mode,
    )
    with scope as (opt, loader):
        for batch in loader:
            losses_of(model, *batch).mean().backward()
            opt.step()
    moved = {name: (before[name] - p.detach()) * N for name, p in model.named_parameters()}
    for name, want in expected.items():
        torch.testing.assert_close(moved[name], want, rtol=1e-6, atol=1e-9)
    total = torch.stack([m.square().sum() for m in moved.values()]).sum().sqrt()
    assert total <= N * bound * 1.001


def test_gram_norms_never_fall_below_the_truth_in_float32():
    """Where token gradients cancel, Gram norms are replaced or raised: the clipped contribution stays within 1.001 C."""
    torch.manual_seed(0)
    tokens, width = 16, 64
    plain_gram_errors = []
    for spread in (1e3, 1e4, 1e5):
        x = torch.randn(5, tokens, width) + spread
        g = torch.randn(5, tokens, width)
        g = g - g.mean(1, keepdim=True)
        truth = torch.einsum("nto,nti->noi", g.double(), x.double()).flatten(1).square().sum(1)
        norms = outer.sq_norms([Outer(g, x, torch.Size([width, width]))]).double()
        assert (norms >= truth * (1 - 2e-3)).all()
        gram = (torch.bmm(x, x.mT) * torch.bmm(g, g.mT)).sum((1, 2)).double()
        plain_gram_errors.append(float(((gram - truth) / truth).abs().max()))
    assert max(plain_gram_errors) > 0.1, "the inputs are too tame: a plain Gram sum would have passed"


def test_random_numbers_in_a_module_that_is_run_again_are_refused():
    """Dropout inside a module that has to be run again is refused, naming the module."""
    model = Wrap(lambda s, x: s.r(x)[0], r=nn.LSTM(4, 3, 2, dropout=0.5, batch_first=True)).double()
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
