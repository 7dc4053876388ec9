"""Faults planted in models, losses and layer rules: the self-check finds each of them before anything is released."""

# mypy: disable-error-code="no-any-return"

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dp_hooks import PrivateTraining, dp_step
from dp_hooks.errors import SelfCheckError, UnsupportedModelError
from dp_hooks.rules import registry
from dp_hooks.rules.linear import LINEAR
from dp_hooks.rules.rule import Call, Rule

from . import models
from .models import Net, assert_same, loader_of, randn, values
from .reference import per_sample

N, T, D = 6, 4, 5

Step = Callable[[Any, Any, Any], Any]


def linear(bias: bool = True) -> nn.Linear:
    return nn.Linear(D, D, bias=bias)


def net(middle: Callable[[Tensor], Tensor] = torch.tanh) -> nn.Module:
    """Two layers with ``middle`` between them, on ``[n, t, d]``."""
    return Net(lambda s, x: s.b(middle(s.a(x))), a=linear(), b=linear()).double()


def bare(model: nn.Module, opt: Any, batch: Any) -> None:
    """Take a step as bare loops do."""
    per_sample(model(*batch)).mean().backward()
    opt.step()


def scope_over(model: nn.Module, data: list[Tensor], **options: Any) -> PrivateTraining:
    """Return a scope without noise whose batches hold every example."""
    options = {"max_grad_norm": 1.0, "poisson_sampling": True, "accountant": "rdp", **options}
    return models.scope_over(model, loader=loader_of(data), **options)


def released(model: nn.Module, data: list[Tensor], step: Step, **options: Any) -> Exception | None:
    """Take one step; return what it was refused with, after seeing that it moved and charged all or nothing."""
    start, error = values(model), None
    scope = scope_over(model, data, **options)
    with scope as (opt, loader):
        for batch in loader:
            try:
                step(model, opt, batch)
            except (SelfCheckError, UnsupportedModelError) as caught:
                error = caught
    if error is not None:
        assert_same(values(model), start)
        assert not scope.accountant.history
        assert not scope.report().loss_verified
    else:
        assert any(not torch.equal(a, b) for a, b in zip(start, values(model), strict=True))
        assert scope.steps == 1
    return error


# ---------------------------------------------------------------- models


def shuffled(h: Tensor) -> Tensor:
    """Permute the samples and put them back: harmless unless something in between depends on the place."""
    order = torch.arange(len(h)).flip(0)
    scale = torch.linspace(1, 2, len(h), dtype=h.dtype)[:, None, None]
    return (h[order] * scale)[order]


def picked(h: Tensor) -> Tensor:
    """Keep the largest tokens of the whole batch."""
    limit = h.norm(dim=-1).flatten().topk(len(h)).values[-1]
    return h * (h.norm(dim=-1, keepdim=True) >= limit)


def batch_attention(h: Tensor) -> Tensor:
    """Let the samples attend to each other, token by token."""
    q = h.transpose(0, 1)
    return F.scaled_dot_product_attention(q, q, q).transpose(0, 1)


def capacity(h: Tensor) -> Tensor:
    """Let only the first half of all positive tokens of the batch through, as routers with a capacity do."""
    positive = (h[..., 0] > 0).flatten()
    place = positive.long().cumsum(0)
    return h * (place <= len(place) // 4).view(*h.shape[:2], 1)


class Averaging(nn.Module):
    """Keeps a running mean of its inputs in an ordinary attribute, and subtracts it."""

    def __init__(self) -> None:
        super().__init__()
        self.mean: Any = 0.0

    def forward(self, x: Tensor) -> Tensor:
        self.mean = 0.5 * self.mean + 0.5 * x.detach().mean(0)
        return x - self.mean


MIXING: dict[str, Callable[[Tensor], Tensor]] = {
    "batch mean subtracted": lambda h: h - h.mean(0),
    "detached batch mean subtracted": lambda h: h - h.detach().mean(0),
    "batch norm as a function": lambda h: F.batch_norm(h.mT, None, None, training=True).mT,
    "instance norm over all samples": lambda h: F.layer_norm(h.flatten(0, 1).T, (h.shape[0] * h.shape[1],)).T.view(
        h.shape
    ),
    "attention over the batch": batch_attention,
    "in-batch negatives": lambda h: h - 0.1 * (h.mean(1) @ h.mean(1).T).softmax(1).mean(0)[:, None, None],
    "rolled": lambda h: h + 0.1 * h.roll(1, 0),
    "cumulative sum": lambda h: h.cumsum(0) / 3,
    "sorted": lambda h: h.sort(0).values,
    "flipped": lambda h: h.flip(0),
    "scaled by place": shuffled,
    "tokens picked over the batch": picked,
    "capacity of a router": capacity,
    "divided by the number of samples": lambda h: h / len(h),
    "divided by the largest value": lambda h: h / h.abs().max(),
    "clamped to a quantile of the batch": lambda h: h.clamp(max=float(h.detach().flatten().quantile(0.7))),
    "mixed with another sample": lambda h: 0.9 * h + 0.1 * h[torch.arange(len(h)) - 1],
    "one sample replaced by another": lambda h: torch.cat([h[:-1], h[:1]]),
    "last sample zeroed": lambda h: torch.cat([h[:-1], 0 * h[-1:]]),
    "reshaped across samples": lambda h: h.reshape(h.shape[1], h.shape[0], -1).transpose(0, 1),
    "normed over the batch": lambda h: F.normalize(h, dim=0),
    "softmax over the batch": lambda h: h.softmax(0),
    "quantised by a scale of the batch": lambda h: h + ((h / h.detach().std()).round() * h.detach().std() - h).detach(),
}

MODELS: dict[str, Callable[[], nn.Module]] = {
    **{name: lambda mix=mix: net(mix) for name, mix in MIXING.items()},  # type: ignore[misc]
    "running mean in an attribute": lambda: nn.Sequential(linear(), Averaging(), linear()).double(),
    "conv over the batch": lambda: Net(
        lambda s, x: s.b(s.c(x.permute(1, 2, 0)).permute(2, 0, 1)), c=nn.Conv1d(D, D, 3, padding=1), b=linear()
    ).double(),
    "recurrence over the batch": lambda: Net(lambda s, x: s.b(s.r(x)[0]), r=nn.LSTM(D, D), b=linear()).double(),
    "owner that centres": lambda: Net(
        lambda s, x: s.b((x - x.mean(0)) * s.w), w=nn.Parameter(torch.rand(D)), b=linear()
    ).double(),
    "shared weight scaled by the batch": lambda: Net(
        lambda s, x: s.b(x * (s.w * x.detach().mean())), w=nn.Parameter(torch.rand(D)), b=linear()
    ).double(),
}


@pytest.mark.filterwarnings("ignore:the loss did not reach")
@pytest.mark.parametrize("mode", ["ghost", "hooks"])
@pytest.mark.parametrize("name", MODELS)
def test_broken_models_are_found(name: str, mode: str) -> None:
    """A model in which a sample's output depends on the other samples, or on what it saw before, is refused."""
    assert released(MODELS[name](), [randn(N, T, D)], bare, grad_sample_mode=mode) is not None


# ---------------------------------------------------------------- losses


def _padding() -> list[Tensor]:
    keep = torch.arange(T)[None] < torch.tensor([1, 2, 3, 4, 2, 1])[:, None]
    return [randn(N, T, D), keep.double()]


def _balance(out: Tensor) -> Tensor:
    share = out.flatten(0, 1).softmax(-1).mean(0)
    return per_sample(out).mean() + 0.01 * (share * share).sum()


def _weighted(out: Tensor) -> Tensor:
    weights = per_sample(out).detach().abs()
    return (per_sample(out) * weights / weights.sum()).sum()


# From the output and the mask: a scalar, or one loss per sample.
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean over tokens that count": lambda out, keep: (out.square().sum(-1) * keep).sum() / keep.sum(),
    "divided by the norm of all losses": lambda out, keep: per_sample(out) / per_sample(out).norm(),
    "divided by the detached mean": lambda out, keep: per_sample(out) / per_sample(out).detach().mean().abs(),
    "contrastive": lambda out, keep: F.cross_entropy(out.mean(1) @ out.mean(1).T, torch.arange(len(out))),
    "triplets": lambda out, keep: (per_sample(out) - per_sample(out).roll(1)).relu(),
    "largest in the batch": lambda out, keep: per_sample(out).max(),
    "hard examples": lambda out, keep: per_sample(out).topk(2).values.mean(),
    "sum for mean": lambda out, keep: per_sample(out).sum(),
    "mean over tokens of a sum": lambda out, keep: out.square().sum() / T,
    "balanced load": lambda out, keep: _balance(out),
    "one sample left out": lambda out, keep: per_sample(out)[1:].mean(),
    "one sample left out, rest in place": lambda out, keep: per_sample(out) * (torch.arange(len(out)) > 0),
    "one sample twice": lambda out, keep: per_sample(out)[[*range(len(out) - 1), 0]],
    "weights normalised over the batch": lambda out, keep: _weighted(out),
    "softmax weights": lambda out, keep: per_sample(out) * per_sample(out).softmax(0),
    "variance": lambda out, keep: per_sample(out).var(0),
    "labels of the neighbour": lambda out, keep: per_sample(out * keep.roll(1, 0)[..., None]),
    "ranking": lambda out, keep: (per_sample(out)[:, None] - per_sample(out)[None]).sigmoid().mean(1),
    "mean of a power": lambda out, keep: per_sample(out).square().mean().sqrt(),
    "log of a sum": lambda out, keep: per_sample(out).logsumexp(0),
    "averaged over a fixed size": lambda out, keep: per_sample(out).sum() / 32,
    "correlation": lambda out, keep: torch.corrcoef(out.flatten(1)).square().mean(),
}


@pytest.mark.parametrize("name", LOSSES)
def test_broken_losses_in_a_train_function_are_found(name: str) -> None:
    """A train function whose loss is not the mean of losses that depend on one sample each is refused."""
    train = dp_step(lambda model, batch: LOSSES[name](model(batch[0]), batch[1]))
    assert released(net(), _padding(), lambda model, opt, batch: train(model, batch)) is not None


def test_mean_for_sum_is_found() -> None:
    """A mean where a sum is declared is refused, in a train function and as the model's own loss."""
    train = dp_step(lambda model, batch: per_sample(model(*batch)).mean())
    for step, model in (
        (lambda model, opt, batch: train(model, batch), net()),
        (_own_loss, Net(lambda s, x: {"loss": per_sample(s.inner(x)).mean()}, inner=net())),
    ):
        assert released(model, [randn(N, T, D)], step, loss_reduction="sum") is not None


def _own_loss(model: nn.Module, opt: Any, batch: Any) -> None:
    model(*batch)["loss"].backward()
    opt.step()


class Criterion(nn.Module):
    """A loss module around a function."""

    def __init__(self, fn: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, out: Tensor, keep: Tensor) -> Tensor:
        loss = self.fn(out, keep)
        return loss.mean() if loss.dim() else loss


@pytest.mark.parametrize("name", LOSSES)
def test_broken_criteria_are_found(name: str) -> None:
    """The same losses are found when they are given as ``criterion``."""
    criterion = Criterion(LOSSES[name])

    def step(model: nn.Module, opt: Any, batch: Any) -> None:
        criterion(model(batch[0]), batch[1]).backward()
        opt.step()

    assert released(net(), _padding(), step, criterion=criterion) is not None


@pytest.mark.parametrize("name", LOSSES)
def test_broken_losses_of_the_model_are_found(name: str) -> None:
    """The same losses are found when the model computes them and returns a scalar."""
    criterion = Criterion(LOSSES[name])
    model = Net(lambda s, x, keep: {"loss": criterion(s.inner(x), keep)}, inner=net())
    assert released(model, _padding(), _own_loss) is not None


# ---------------------------------------------------------------- rules


def gradients(call: Call) -> dict[str, Tensor]:
    found = LINEAR.grad_samples(call)
    return {name: g.clone() for name, g in found.items()}


def changed(fn: Callable[[Tensor], Tensor], only: str | None = None) -> Rule:
    """A rule whose gradients are ``fn`` of the right ones."""

    def grad_samples(call: Call) -> dict[str, Tensor]:
        return {name: fn(g) if only in (None, name) else g for name, g in gradients(call).items()}

    return Rule("broken", grad_samples)


def norms_times(factor: float) -> Rule:
    def sq_norms(call: Call) -> dict[str, Tensor]:
        return {name: factor**2 * g.flatten(1).square().sum(1) for name, g in gradients(call).items()}

    return Rule("broken", gradients, sq_norms=sq_norms)


def sums(fn: Callable[[Tensor, Tensor], Tensor]) -> Rule:
    """A rule whose weighted sum is ``fn(factors, gradients)``."""
    return Rule(
        "broken", gradients, weighted_sums=lambda call, w: {name: fn(w, g) for name, g in gradients(call).items()}
    )


def plain_sum(w: Tensor, g: Tensor) -> Tensor:
    return torch.tensordot(w, g, 1)


def factors_of(change: Callable[[Any], None]) -> Rule:
    """The library's own rule with its outer products changed."""
    assert LINEAR.outer_products is not None
    own = LINEAR.outer_products

    def outer_products(call: Call) -> Any:
        found = own(call)
        for use in found.values():
            change(use)
        return found

    return dataclasses.replace(LINEAR, outer_products=outer_products)


def _scale(use: Any) -> None:
    use.left = 1.1 * use.left


def _swap(use: Any) -> None:
    use.left = use.left.roll(1, 0)


def _forget_token(use: Any) -> None:
    use.right = torch.cat([use.right[:, :1], 0 * use.right[:, 1:]], 1)


def _mix_axes(use: Any) -> None:
    use.right = use.right.transpose(0, 1).reshape(use.right.shape)


RULES: dict[str, Rule] = {
    "twice as large": changed(lambda g: 2 * g),
    "one percent too small": changed(lambda g: 0.99 * g),
    "a thousandth too small": changed(lambda g: 0.999 * g),
    "sign": changed(lambda g: -g),
    "samples swapped": changed(lambda g: g.roll(1, 0)),
    "two samples swapped": changed(lambda g: g[[1, 0, *range(2, len(g))]]),
    "samples in reverse": changed(lambda g: g.flip(0)),
    "last sample forgotten": changed(lambda g: torch.cat([g[:-1], 0 * g[-1:]])),
    "average over samples": changed(lambda g: g.mean(0, keepdim=True).expand_as(g)),
    "bias forgotten": changed(lambda g: 0 * g, "bias"),
    "bias doubled": changed(lambda g: 2 * g, "bias"),
    "weight transposed": changed(lambda g: g.mT, "weight"),
    "one row forgotten": changed(lambda g: torch.cat([g[:, :-1], 0 * g[:, -1:]], 1)),
    "mean over tokens": changed(lambda g: g / T),
    "only the first token": Rule("broken", lambda call: _first_token(call)),
    "norms one percent too small": norms_times(0.99),
    "norms a thousandth too small": norms_times(0.999),
    "norms doubled": norms_times(2.0),
    "norms zero": norms_times(0.0),
    "norms without the last sample": Rule(
        "broken",
        gradients,
        sq_norms=lambda call: {
            name: g.flatten(1).square().sum(1) * (torch.arange(len(g)) < len(g) - 1)
            for name, g in gradients(call).items()
        },
    ),
    "sums without the first sample": sums(lambda w, g: plain_sum(w[1:], g[1:])),
    "sums doubled": sums(lambda w, g: 2 * plain_sum(w, g)),
    "sums one percent too large": sums(lambda w, g: 1.01 * plain_sum(w, g)),
    "sums that ignore the factors": sums(lambda w, g: g.sum(0)),
    "sums with the factors of the neighbours": sums(lambda w, g: plain_sum(w.roll(1), g)),
    "sums that average": sums(lambda w, g: plain_sum(w, g) / len(g)),
    "outer products scaled": factors_of(_scale),
    "outer products swapped": factors_of(_swap),
    "outer products without later tokens": factors_of(_forget_token),
    "outer products with axes mixed": factors_of(_mix_axes),
}


def _first_token(call: Call) -> dict[str, Tensor]:
    x, g = call.input[:, 0], call.grad[:, 0]
    return {"weight": torch.einsum("no,ni->noi", g, x), "bias": g}


@pytest.mark.filterwarnings("ignore:the loss did not reach")
@pytest.mark.parametrize("name", RULES)
def test_broken_rules_are_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer rule that is wrong in gradients, norms, sums or factors is refused."""
    monkeypatch.setitem(registry._RULES, nn.Linear, RULES[name])
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16)).double()  # large enough for factors
    assert released(model, [randn(N, 2, 16)], bare) is not None


@pytest.mark.parametrize(("factor", "found"), [(0.98, True), (0.99, True), (0.996, True), (0.9999, False)])
def test_the_size_of_what_is_found_in_single_precision(
    factor: float, found: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32 norms that are too small by half a percent are found; a ten-thousandth is within rounding."""
    monkeypatch.setitem(registry._RULES, nn.Linear, norms_times(factor))
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))
    assert (released(model, [torch.randn(N, 2, 16)], bare) is not None) == found


# ---------------------------------------------------------------- no false alarms


@dataclasses.dataclass
class Output:
    """What a model returns."""

    logits: Tensor
    extra: Any = None


def _wrap(fn: Callable[..., Any], **parts: Any) -> Callable[[], nn.Module]:
    return lambda: Net(fn, inner=net(), **{k: make() for k, make in parts.items()}).double()


def _depth(s: Any, x: Tensor) -> Tensor:
    keep = (0.8 + torch.rand((len(x), 1, 1), dtype=x.dtype)).floor()
    return x + s.inner(x) / 0.8 * keep


def _kept_on_cpu(s: Any, x: Tensor) -> Tensor:
    with torch.autograd.graph.save_on_cpu():
        return s.inner(x)


class Checkpointed(nn.Module):
    """Runs its block under checkpointing, with dropout inside."""

    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.use_reentrant = use_reentrant
        self.block = nn.Sequential(linear(), nn.Dropout(0.3), nn.GELU(), linear())

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.block, x, use_reentrant=self.use_reentrant)


class Parts(nn.Module):
    """Has methods that call its submodules."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = net(), linear()

    def encode(self, x: Tensor) -> Tensor:
        return self.encoder(x).tanh()


def loop(fn: Callable[[Any, Tensor], Tensor]) -> Step:
    """Return a step whose per-sample losses are ``fn(model, x)``."""

    def step(model: nn.Module, opt: Any, batch: Any) -> None:
        fn(model, batch[0]).mean().backward()
        opt.step()

    return step


SOUND: dict[str, tuple[Callable[[], nn.Module], Step]] = {
    "dropout": (lambda: nn.Sequential(linear(), nn.Dropout(0.4), linear()).double(), bare),
    "alpha and feature dropout": (
        lambda: nn.Sequential(linear(), nn.AlphaDropout(0.4), nn.Dropout1d(0.3), linear()).double(),
        bare,
    ),
    "stochastic depth": (_wrap(_depth), bare),
    "checkpointing": (lambda: nn.Sequential(linear(), Checkpointed(False), linear()).double(), bare),
    "reentrant checkpointing": (lambda: nn.Sequential(linear(), Checkpointed(True), linear()).double(), bare),
    "saved tensors on the CPU": (_wrap(_kept_on_cpu), bare),
    "dataclass": (_wrap(lambda s, x: Output(s.inner(x))), loop(lambda m, x: per_sample(m(x).logits))),
    "nested": (
        _wrap(lambda s, x: {"a": [s.inner(x), None], "b": (3, "c", x.long())}),
        loop(lambda m, x: per_sample(m(x)["a"][0])),
    ),
    "keywords and constants": (
        _wrap(lambda s, *, x, power, name, nothing=None: s.inner(x) ** power),
        loop(lambda m, x: per_sample(m(x=x, power=2, name="a"))),
    ),
    "calls of parts": (Parts, loop(lambda m, x: per_sample(m.head(m.encoder(x))))),
    "calls of methods": (Parts, loop(lambda m, x: per_sample(m.head(m.encode(x))))),
    "a layer called many times": (
        Parts,
        loop(lambda m, x: per_sample(m.head(m.head(m.encoder(x) * 0.1) * 0.1))),
    ),
    "a summary of the batch beside the output": (
        _wrap(lambda s, x: (s.inner(x), s.inner(x).detach().mean())),
        loop(lambda m, x: per_sample(m(x)[0])),
    ),
    "centred in itself": (lambda: net(lambda h: h - h.mean(1, keepdim=True)), bare),
    "layer norm": (lambda: nn.Sequential(linear(), nn.LayerNorm(D), linear()).double(), bare),
    "samples permuted and put back": (lambda: net(lambda h: h.flip(0).tanh().flip(0)), bare),
}


@pytest.mark.filterwarnings("ignore:.*None of the inputs have requires_grad")
@pytest.mark.parametrize("mode", ["ghost", "hooks"])
@pytest.mark.parametrize("name", SOUND)
def test_sound_models_pass(name: str, mode: str) -> None:
    """Models without a fault take their step, whatever they draw, return or are called by."""
    make, step = SOUND[name]
    error = released(make().double(), [randn(N, T, D)], step, grad_sample_mode=mode)
    assert error is None, error


@pytest.mark.parametrize("sizes", [(1, 3, 6), (0, 4, 1), (1, 1, 6), (6, 1, 0, 2)])
@pytest.mark.parametrize("by_function", [True, False])
def test_sizes_of_the_first_batches_do_not_matter(by_function: bool, sizes: tuple[int, ...]) -> None:
    """Batches of one and of none before and after larger ones take their steps as well."""
    model = Net(
        lambda s, x: s.inner(x + s.place) * s.gain,
        inner=net(),
        place=nn.Parameter(randn(T, D)),
        gain=nn.Parameter(randn(D)),
    )
    train = dp_step(lambda model, batch: per_sample(model(*batch)))
    if by_function:  # batches of none come from the loader only
        sizes = tuple(n for n in sizes if n)
    for n in sizes:
        with contextlib.ExitStack() as stack:
            scope = scope_over(model, [randn(8, T, D)], self_check=True)
            opt, _ = stack.enter_context(scope)
            for size in (n, *sizes):
                if by_function:
                    train(model, [randn(size, T, D)])
                else:
                    per_sample(model(randn(size, T, D))).sum().div(max(1, size)).backward()
                    opt.step()
            assert scope.steps == 1 + len(sizes)
