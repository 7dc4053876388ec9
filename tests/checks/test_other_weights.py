"""Mixing that no value and no gradient of a first batch shows, as what leads there is dead or closed: other parameters open it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dp_hooks.checks.other_weights import _SMALL, exchanged

from ..models import Net, loader_of, randn, scope_over, values
from .steps import STYLES, D, each_style, opened, refused


def centred(h: Tensor) -> Tensor:
    return h - h.mean(0)


def alike(h: Tensor) -> Tensor:
    return h.tanh()


def at_random(mix: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda h: mix(h) if torch.rand(()) < 0.3 else h


# forward(self, x): what is done to the features of a layer cannot be seen in the first batch.
CLOSED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "units that no sample switches on": lambda s, x: s.b(s.a(x)) + s.c(s.mix(s.up(s.small(x).relu()))),
    "a gate behind a threshold": lambda s, x: s.b(s.a(x)) + (s.gate - 0.05).relu().sum() * s.c(s.mix(s.a(x))),
    "a clamped scale": lambda s, x: s.b(s.a(x) + s.gate.clamp(min=0) * s.mix(s.a(x))),
    "behind a saturated unit": lambda s, x: s.b(s.a(x)) * (60 + 1e3 * s.gate.sum() * s.mix(x).sum(1)).sigmoid()[:, None],
    "a product of two zeros": lambda s, x: s.b(s.a(x)) + s.gate.sum() ** 2 * s.c(s.mix(s.a(x))),
}


def closed(case: str, mix: Callable[[Tensor], Tensor]) -> Any:
    layers = {
        "a": nn.Linear(D, D),
        "b": nn.Linear(D, 3),
        "c": nn.Linear(D, 3),
        "small": nn.Linear(D, 2),
        "up": nn.Linear(2, D, False),
    }
    model = Net(CLOSED[case], **layers, gate=nn.Parameter(torch.zeros(D)))
    nn.init.constant_(layers["small"].bias, -50.0)
    model.mix = mix
    return model.double()


@pytest.mark.filterwarnings("ignore:the loss did not reach")
@each_style
@pytest.mark.parametrize("random", [False, True])
@pytest.mark.parametrize("case", CLOSED)
def test_mixing_that_is_closed_in_the_first_batch_is_found(case: str, random: bool, step: Any) -> None:
    """The same with something of the sample alone in its place is accepted; and parameters are what they were."""
    mixing, sound = (closed(case, at_random(mix) if random else mix) for mix in (centred, alike))
    with opened(mixing) as (opt, loader), refused("Samples mix", mixing):
        step(mixing, opt, next(iter(loader)))
    with opened(sound) as (opt, loader):
        step(sound, opt, next(iter(loader)))


def test_values_are_exactly_what_they_were() -> None:
    """Small and large parameters, in all precisions, such that share memory, and empty ones; also when the block fails."""
    large = torch.randn(300, _SMALL // 200)
    tensors = [torch.zeros(3), torch.randn(4, 4).bfloat16(), large.half(), large[:, :1000], torch.zeros(0)]
    tensors += [tensors[0].detach(), tensors[3].T, 1e-40 * torch.randn(_SMALL + 1)]
    params = [nn.Parameter(t) for t in tensors]
    before, versions = [p.detach().clone() for p in params], [p._version for p in params]

    def fail(sign: int) -> None:
        with exchanged(params, sign):
            others = [i for i, (p, value) in enumerate(zip(params, before, strict=True)) if not torch.equal(p, value)]
            assert others == [0, 1, 5, 7]  # large ones only where they are zero, or nearly
            raise ZeroDivisionError

    for sign in (1, -1):
        with pytest.raises(ZeroDivisionError):
            fail(sign)
    assert all(torch.equal(p, value) for p, value in zip(params, before, strict=True))
    assert [p._version for p in params] == versions


def negative(s: Any, x: Tensor) -> Tensor:
    if not bool((s.scale > 0.5).all()):
        raise KeyError("the scale must be above 0.5")
    return s.b(s.a(x) / s.scale)


def asserting(s: Any, x: Tensor) -> Tensor:
    out = s.b(s.a(x) / s.scale.sqrt())
    assert bool(torch.isfinite(out).all())
    return out


def anomalous(s: Any, x: Tensor) -> Tensor:
    s.last = s.a(x).detach()
    with torch.autograd.set_detect_anomaly(True, check_nan=True):
        return s.b(s.a(x).tanh()) * (s.scale - 0.9).sqrt().sum()


def gated(s: Any, x: Tensor) -> Tensor:
    h = s.a(x).tanh()
    return s.b((h * 1.5 if torch.rand(()) < 0.5 else h) / s.scale.sqrt())


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
@each_style
@pytest.mark.parametrize("forward", [negative, asserting, anomalous, gated])
def test_what_cannot_be_computed_with_other_parameters_is_accepted(forward: Callable[[Any, Tensor], Tensor], step: Any) -> None:
    """Models that raise where a parameter is not what it should be, with any error, and such that give NaN."""
    model = Net(forward, a=nn.Linear(D, D), b=nn.Linear(D, 3), scale=nn.Parameter(torch.ones(D))).double()
    model.last = None  # type: ignore[assignment]
    with opened(model) as (opt, loader):
        step(model, opt, next(iter(loader)))


class Clamped(nn.Linear):
    """Keeps its weights positive in the forward pass, in one way or another."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            if self.in_place:
                self.weight.data.clamp_(min=0)
            else:
                self.weight.data = self.weight.data.clamp(min=0)
        return super().forward(x)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("width", [D, 300])
def test_weights_that_a_forward_pass_keeps_in_bounds_are_what_they_were(width: int, in_place: bool) -> None:
    """It clamps the other values, too, in place or not; the weights that are in its bounds come back whole."""
    layer = Clamped(width, width)
    layer.in_place = in_place
    model = Net(lambda s, x: s.b(s.a(s.up(x)).tanh()), up=nn.Linear(D, width), a=layer, b=nn.Linear(width, 3)).double()
    layer.weight.data.abs_()
    before = values(model)
    with opened(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.0)) as (opt, loader):
        STYLES["bare loop"](model, opt, next(iter(loader)))
    assert all(torch.equal(a, b) for a, b in zip(before, values(model), strict=True))


@pytest.mark.parametrize("places", range(6))
@pytest.mark.parametrize("sign", [1, -1])
def test_numbers_of_either_sign_are_tried(places: int, sign: int) -> None:
    """Wherever a gate is among the parameters, and whichever way it opens."""

    def forward(s: Any, x: Tensor) -> Tensor:
        h = s.a(x)
        for norm in s.norms:
            h = norm(h)
        return s.b(h + (sign * s.gate).clamp(min=0) * centred(h))

    norms = nn.ModuleList([nn.LayerNorm(D) for _ in range(places)])
    model = Net(forward, norms=norms, a=nn.Linear(D, D), b=nn.Linear(D, 3), gate=nn.Parameter(torch.zeros(()))).double()
    with opened(model) as (opt, loader), refused("Samples mix", model):
        STYLES["bare loop"](model, opt, next(iter(loader)))


def masked(s: Any, x: Tensor, mask: Tensor) -> Tensor:
    h = s.a(x)
    return s.b((h @ h.mT).masked_fill(mask, -1e9).softmax(-1) @ h)


def weighted(s: Any, x: Tensor, mask: Tensor) -> Tensor:
    return s.b(s.a(x).tanh() * mask[0].double()[:, None])


def heads(s: Any, x: Tensor, mask: Tensor) -> Tensor:
    return torch.stack([s.b(s.a(x) + k) for k in range(8)])


@pytest.mark.parametrize(("forward", "samples"), [(masked, 16), (weighted, 16), (heads, 16), (heads, 8)])
def test_what_all_samples_share_is_not_cut_where_it_is_as_long_as_the_part(
    forward: Callable[..., Tensor], samples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mask over eight tokens, weights of them, eight heads, beside eight of the samples."""
    monkeypatch.setattr("dp_hooks.checks.comparison._LITTLE", 0)
    model = Net(forward, a=nn.Linear(D, D), b=nn.Linear(D, 3)).double()
    scope = scope_over(model, loader=loader_of([randn(samples, 8, D)], samples), max_grad_norm=1.0)
    with scope as (opt, loader):
        for (x,) in loader:
            out = model(x, torch.ones(8, 8).triu(1).bool())
            losses = out.square().mean((0, 2, 3)) if forward is heads else out.square().mean((1, 2))
            losses.mean().backward()
            opt.step()


def test_a_loop_that_does_not_end_with_other_parameters_is_broken_off() -> None:
    """A fixed point that is iterated to convergence, which other weights do not have."""

    def forward(s: Any, x: Tensor) -> Tensor:
        u = s.a(x)
        z = torch.zeros_like(u)
        with torch.no_grad():
            while float((s.w(z) + u).tanh().sub(z).abs().max()) > 1e-8:
                z = (s.w(z) + u).tanh()
        return s.b((s.w(z) + u).tanh())

    model = Net(forward, a=nn.Linear(D, 32), w=nn.Linear(32, 32), b=nn.Linear(32, 3)).double()
    nn.init.zeros_(model.w.weight)
    with opened(model) as (opt, loader):
        STYLES["bare loop"](model, opt, next(iter(loader)))
