"""Sample gradients: what is kept of a batch, and in which precision sums are made of it."""

import weakref
from itertools import product

import pytest
import torch
from torch import nn

from .. import laws
from ..cases.layers import LinearWithForward
from ..models import Net, loader_of, moved, scope_over, values


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


def test_nothing_more_than_needed_stays_captured(nothing_is_small):
    """Layers whose gradients are written out at once keep nothing, others their input and output gradient until the step."""
    before, between, after = memories = [], [], []

    def forward(s, x):
        x = Watched.apply(s.narrow(Watched.apply(x, before)), between)
        return Watched.apply(s.wide(x), after)

    model = Net(forward, narrow=nn.Linear(4, 4), wide=nn.Linear(4, 10_000))
    with scope_over(model, loader=loader_of([torch.randn(6, 2, 4)], 2), noise_multiplier=1.0) as (opt, loader):
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
        self.attend = nn.MultiheadAttention(16, 2, batch_first=True)
        self.wide = nn.Linear(16, 200)
        self.narrow = nn.Linear(200, 16)
        self.out = nn.Linear(16, 40, bias=False)
        self.out.weight = self.table.weight

    def forward(self, ids):
        x = self.norm(self.table(ids)) * self.scale
        h = self.conv(x.mT).mT  # in half precision under autocast: what is run again below needs it, too
        x = x + h + self.rnn(h)[0] + self.attend(h, h, h)[0]
        return self.out(self.narrow(self.wide(x).relu()))


@pytest.mark.parametrize("mode", [mode for mode in laws.MODES if not mode.two_pass], ids=str)
def test_sums_are_in_float32_inside_autocast_too(mode):
    """Calling backward and step inside the autocast block gives the very step that calling them outside of it gives."""

    def step(inside):
        torch.manual_seed(0)
        model = Mixture()
        before = values(model)
        data = loader_of([torch.randint(0, 40, (6, 16))])
        with mode.on() as name, scope_over(model, loader=data, max_grad_norm=0.1, grad_sample_mode=name) as (opt, loader):
            for (x,) in loader:
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    loss = model(x).float().square().sum((1, 2)).mean()
                    if inside:
                        loss.backward()
                        opt.step()
                if not inside:
                    loss.backward()
                    opt.step()
        return moved(before, model)

    for a, b in zip(step(inside=True), step(inside=False), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)


def convolutions_and_norms():
    layers = nn.LayerNorm(16), nn.Conv1d(16, 16, 3, padding="same"), nn.ConvTranspose1d(16, 8, 2), nn.PReLU(8)
    return Net(lambda s, x: s.prelu(s.up(s.conv(s.norm(x).mT))), **dict(zip(("norm", "conv", "up", "prelu"), layers, strict=True)))


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


def flat():
    """Linear layers that see a sample as one row."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 4))


# These models take long by the hundred of samples: what is summed is the same in "functorch" as in "hooks", and in two
# passes as in "deferred".
@pytest.mark.parametrize("mode", [laws.MODE[name] for name in ("ghost", "deferred", "hooks")], ids=str)
@pytest.mark.parametrize(
    ("make", "precision"),
    [*product((convolutions_and_norms, tables, followed, normed, flat), ("bfloat16", "autocast")), (flat, "float32")],
)
def test_sums_over_many_samples_are_not_rounded_to_half_precision(make, precision, mode):
    """In half precision, too, taking away one of many similar samples moves the sum of clipped gradients by C and no more."""
    bound = 1e-3
    x = torch.randn(1, 4, 16) + 0.05 * torch.randn(256, 4, 16)
    model, dtype = make(), torch.bfloat16 if precision == "bfloat16" else torch.float32
    model, x = model.to(dtype), x.to(dtype)

    def losses(rows):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "autocast"):
            return model(rows).float().square().flatten(1).sum(1)

    def clipped(rows):
        with (
            laws.attached(model, mode, loss_reduction="sum") as controller,
            laws.captured(controller, mode, lambda: losses(rows)) as found,
        ):
            factors = (bound / torch.stack(list(found.sq_norms(found.params).values())).sum(0).sqrt()).clamp(max=1)
            sums = found.weighted_sums(dict.fromkeys(found.params, factors), torch.ones(len(rows), dtype=torch.bool))
        assert all(total.dtype == torch.float32 for total in sums.values())
        return list(sums.values())

    differences = [(a - b).double() for a, b in zip(clipped(x), clipped(x[1:]), strict=True)]
    assert torch.stack([d.square().sum() for d in differences]).sum().sqrt() <= bound * 1.001
