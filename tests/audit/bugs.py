"""Privacy bugs, seeded one at a time, and which audit finds each.

``python -m tests.audit.bugs`` tries both audits on every one, and prints what they say.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dp_hooks.gradients.sample_gradients import SampleGradients
from dp_hooks.privacy.accounting import meter
from dp_hooks.privacy.accounting.meter import PrivacyMeter
from dp_hooks.privacy.clipping import fixed
from dp_hooks.privacy.clipping.adaptive import AdaptiveClipping
from dp_hooks.privacy.clipping.fixed import AutomaticClipping, FlatClipping, GroupClipping
from dp_hooks.privacy.clipping.norms import SampleNorms
from dp_hooks.privacy.noise.gaussian import GaussianNoise
from dp_hooks.privacy.noise.secure import SecureNoise
from dp_hooks.privacy.sampling.plan import SamplingPlan
from dp_hooks.privacy.sampling.poisson import PoissonSampler
from dp_hooks.training import optimizer
from dp_hooks.training.clipped_sum import ClippedSum

from .runs import Train, audited, loop, measured

Patch = pytest.MonkeyPatch
PER_LAYER = {"clipping": "per_group", "max_grad_norm": {"head*": 0.6, "*": 0.8}}
ADAPTIVE = {"clipping": "adaptive", "clipping_options": {"unclipped_num_std": 1.0}}


@dataclass(frozen=True)
class Bug:
    """What it is, how it is made, with which options and loop, and the audits that find it: "sensitivity", "one_run", or both."""

    name: str
    make: Callable[[Patch], None]
    finds: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)
    train: Callable[[int], Train] | None = None

    def __str__(self) -> str:
        return self.name

    def found_by(self, audit: str) -> Any:
        """Make it, and let one audit look."""
        with pytest.MonkeyPatch.context() as patch:
            self.make(patch)
            train = self.train or (lambda passes: loop(passes=passes))
            return measured(train(1), **self.options) if audit == "sensitivity" else audited(train(15), **self.options)


def nothing(patch: Patch) -> None:
    """The bug is in the loop."""


def wrapped(owner: Any, name: str, around: Callable[..., Any]) -> Callable[[Patch], None]:
    """Replace a method or function by ``around(original, *args, **kwargs)``."""

    def make(patch: Patch) -> None:
        original = getattr(owner, name)
        patch.setattr(owner, name, lambda *args, **kwargs: around(original, *args, **kwargs))

    return make


def replaced(owner: Any, name: str, value: Any) -> Callable[[Patch], None]:
    return lambda patch: patch.setattr(owner, name, value)


# ---------------------------------------------------------------- noise


def noise(change: Callable[..., Any]) -> Callable[[Patch], None]:
    """``change(original, self, totals, std, scale)`` in the place of the noise on the sums."""

    def around(original: Any, self: Any, totals: Any, std: float, scale: float = 1.0, *, sensitivity: float = 1.0) -> Any:
        return change(lambda t, s, c=scale: original(self, t, s, c, sensitivity=sensitivity), self, totals, std, scale)

    return wrapped(GaussianNoise, "add_", around)


def seeded(seeds: Iterator[int]) -> Callable[..., Any]:
    def change(add: Any, self: Any, totals: Any, std: float, scale: float) -> Any:
        self.generator.manual_seed(next(seeds))
        return add(totals, std)

    return change


def one_seed_a_step(add: Any, self: Any, totals: Any, std: float, scale: float) -> bool:
    """Draw the noise of every tensor from the same seed, which is another one in each step."""
    self.step = getattr(self, "step", 0) + 1
    for total in totals:
        self.generator.manual_seed(self.step)
        add([total], std)
    return True


def all_but_the_smallest(add: Any, self: Any, totals: Any, std: float, scale: float) -> bool:
    for total in totals:
        add([total], std if total.numel() > 20 else 0.0)
    return True


def every_second_number(add: Any, self: Any, totals: Any, std: float, scale: float) -> bool:
    before = [total.clone() for total in totals]
    add(totals, std)
    for total, old in zip(totals, before, strict=True):
        total.view(-1)[1::2] = scale * old.view(-1)[1::2]
    return True


def in_pairs(add: Any, self: Any, totals: Any, std: float, scale: float) -> bool:
    """Give two numbers side by side the same noise."""
    before = [total.clone() for total in totals]
    add(totals, std)
    for total, old in zip(totals, before, strict=True):
        noise = (total - scale * old).view(-1)
        noise[1::2] = noise[: 2 * (noise.numel() // 2) : 2]
        total.copy_(scale * old + noise.view_as(old))
    return True


def rounded(add: Any, self: Any, totals: Any, std: float, scale: float) -> bool:
    """Cut the tails off at half a standard deviation."""
    before = [total.clone() for total in totals]
    add(totals, std)
    for total, old in zip(totals, before, strict=True):
        total.copy_(scale * old + (total - scale * old).clamp(-scale * std, scale * std))
    return True


def of_two_steps(add: Any, self: Any, totals: Any, std: float, scale: float) -> bool:
    """Add noise in every second step only."""
    self.step = getattr(self, "step", 0) + 1
    return add(totals, std if self.step % 2 else 0.0)


# ---------------------------------------------------------------- sampling, accounting


def drawing(present: Callable[[PoissonSampler], Tensor]) -> Any:
    """Draw every batch by a function that tells which examples are present."""

    def batches(self: PoissonSampler) -> Iterator[list[int]]:
        for _ in range(self.batches):
            yield present(self).nonzero().flatten().tolist()

    return replaced(PoissonSampler, "__iter__", batches)


def drawn_at(factor: float) -> Callable[[Patch], None]:
    def present(self: PoissonSampler) -> Tensor:
        uniform = torch.rand(self.examples, dtype=torch.float64, generator=self.generator)
        return uniform < factor * self.sample_rate

    return drawing(present)


def same_batches(self: PoissonSampler) -> Tensor:
    self.generator.manual_seed(5)
    return torch.rand(self.examples, generator=self.generator) < self.sample_rate


def in_blocks(self: PoissonSampler) -> Tensor:
    block = torch.rand(math.ceil(self.examples / 100), generator=self.generator) < self.sample_rate
    return block.repeat_interleave(100)[: self.examples]


def all_or_none(self: PoissonSampler) -> Tensor:
    return (torch.rand(1, generator=self.generator) < self.sample_rate).expand(self.examples)


def doubled(original: Any, self: PoissonSampler) -> Iterator[list[int]]:
    """Yield every example of a batch twice."""
    for batch in original(self):
        yield [i for i in batch for _ in range(2)]


def every_second_charge(original: Any, self: PrivacyMeter, *, foreign: bool) -> None:
    self.turn = getattr(self, "turn", 0) + 1
    if self.turn % 2:
        original(self, foreign=foreign)


def charged(sigma: float = 1.0, rate: float = 1.0) -> Callable[[Patch], None]:
    """Charge so many times the noise, or the rate."""
    return wrapped(meter, "charge", lambda original, accountant, z, q: original(accountant, sigma * z, rate * q))


def forgets(original: Any, accountant: Any, sigma: float, rate: float) -> None:
    """Keep the last ten charges only."""
    original(accountant, sigma, rate)
    accountant.history = [(s, q, min(n, 10)) for s, q, n in accountant.history[-1:]]


# ---------------------------------------------------------------- clipping


def counted_twice(original: Any, self: SampleGradients, factors: Any, finite: Tensor, **kwargs: Any) -> Any:
    """Give the first sample of a batch twice its weight."""
    more = torch.ones(len(finite))
    more[0] = 2
    return original(self, {p: f * more.to(f) for p, f in factors.items()}, finite, **kwargs)


def one_layer_unclipped(original: Any, self: SampleGradients, factors: Any, finite: Tensor, **kwargs: Any) -> Any:
    """Leave the last parameter as it is."""
    last = list(factors)[-1]
    return original(self, {p: torch.ones_like(f) if p is last else f for p, f in factors.items()}, finite, **kwargs)


def shifted(original: Any, self: SampleGradients, factors: Any, finite: Tensor, **kwargs: Any) -> Any:
    """Give each sample the factor of its neighbour."""
    return original(self, {p: f.roll(1) for p, f in factors.items()}, finite, **kwargs)


def mean_norm(original: Any, self: SampleNorms, squares: Any) -> None:
    """Clip all samples by the mean of their norms."""
    original(self, squares)
    self.joint = self.joint.mean().expand_as(self.joint).clone()


def without_first_group(original: Any, self: SampleGradients, groups: Any) -> Any:
    """Leave the embedding out of the norm."""
    return original(self, [group[1:] if len(group) > 1 else group for group in groups])


def weights_after_clipping(
    original: Any, self: ClippedSum, gradients: Any, params: Any, weights: Any = None, units: Any = None
) -> Any:
    """Multiply by the weights of rows what is clipped already."""
    sums = gradients.weighted_sums

    def weighted(factors: Any, finite: Tensor, **kwargs: Any) -> Any:
        return sums({p: f if weights is None else f * weights.to(f) for p, f in factors.items()}, finite, **kwargs)

    gradients.weighted_sums = weighted
    return original(self, gradients, params, None, units)


# ---------------------------------------------------------------- loops


def with_loss(loss: Callable[[nn.Module, Tensor, Tensor], Tensor]) -> Callable[[int], Train]:
    return lambda passes: loop(loss, passes)


def centred(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    out = model(x)
    return F.cross_entropy(out - out.mean(0), y)


def contrastive(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    out = F.normalize(model(x), dim=1)
    return F.cross_entropy(8 * out @ out.T, torch.arange(len(x)))


def neighbours(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Each row has the mean of two examples' outputs: micro-batches."""
    out = model(x)
    return F.cross_entropy((out + out.roll(1, 0)) / 2, y)


def mixed_up(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Tokens of two examples in one row."""
    return F.cross_entropy(model(torch.cat([x[:, :3], x.flip(0)[:, 3:]], 1)), y)


def focal(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Losses are weighed by their share in the batch."""
    losses = F.cross_entropy(model(x), y, reduction="none")
    return (losses * losses.detach() / losses.detach().sum()).sum()


def frequencies(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Classes are balanced by how often they are in the batch."""
    return F.cross_entropy(model(x), y, weight=1 / torch.bincount(y, minlength=3).clamp(min=1))


def hardest_half(passes: int) -> Train:
    """Steps on the half of a batch with the largest losses."""

    def train(model: nn.Module, opt: Any, loader: Any) -> None:
        for x, y in itertools.chain.from_iterable(loader for _ in range(passes)):
            opt.zero_grad()
            with torch.no_grad():
                losses = F.cross_entropy(model(x), y, reduction="none")
            keep = losses >= losses.median() if len(losses) else losses > 0
            opt.keep_rows(keep)
            F.cross_entropy(model(x[keep]), y[keep]).backward()
            opt.step()

    return train


def threefold(passes: int) -> Train:
    """Weighs the rows of a batch."""

    def train(model: nn.Module, opt: Any, loader: Any) -> None:
        for x, y in itertools.chain.from_iterable(loader for _ in range(passes)):
            opt.zero_grad()
            opt.weigh_rows(torch.full((len(x),), 3.0))
            F.cross_entropy(model(x), y).backward()
            opt.step()

    return train


A, B, BOTH = ("sensitivity",), ("one_run",), ("sensitivity", "one_run")

BUGS = [
    Bug("bound times 1.01", replaced(fixed, "clip", lambda norms, bound: (1.01 * bound / norms).clamp(max=1.0)), A),
    Bug("bound times 2", replaced(fixed, "clip", lambda norms, bound: (2 * bound / norms).clamp(max=1.0)), A),
    Bug("nothing is clipped", replaced(fixed, "clip", lambda norms, bound: torch.ones_like(norms)), A),
    Bug("norm divided by the square root of its length", replaced(fixed, "clip", lambda n, c: (c * 20**0.5 / n).clamp(max=1.0)), A),
    Bug("one layer unclipped", wrapped(SampleGradients, "weighted_sums", one_layer_unclipped), A),
    Bug("a sample counted twice", wrapped(SampleGradients, "weighted_sums", counted_twice), A),
    Bug("factors of the neighbour", wrapped(SampleGradients, "weighted_sums", shifted), A),
    Bug("clipped by the mean norm", wrapped(SampleNorms, "__init__", mean_norm), A),
    Bug("a layer left out of the norm", wrapped(SampleGradients, "group_sq_norms", without_first_group), A),
    Bug("weights of rows after clipping", wrapped(ClippedSum, "add", weights_after_clipping), A, train=threefold),
    Bug(
        "sensitivity of the largest group", replaced(GroupClipping, "sensitivity", property(lambda s: max(s.bounds))), A, PER_LAYER
    ),
    Bug(
        "automatic clipping to twice the bound",
        replaced(AutomaticClipping, "_factors", lambda self, norms: 2 * self._bound / (norms + self.gamma)),
        A,
        {"clipping": "automatic"},
    ),
    Bug(
        "count of adaptive clipping for free",
        replaced(AdaptiveClipping, "gradient_noise_multiplier", lambda self, z: z),
        A,
        ADAPTIVE,
    ),
    Bug("half of the sensitivity is said", replaced(FlatClipping, "sensitivity", property(lambda s: s._bound / 2)), A),
    Bug("outputs are centred over the batch", nothing, A, train=with_loss(centred)),
    Bug("contrastive loss", nothing, A, train=with_loss(contrastive)),
    Bug("micro-batches of two outputs", nothing, A, train=with_loss(neighbours)),
    Bug("rows of two examples", nothing, A, train=with_loss(mixed_up)),
    Bug("losses weighed by their share", nothing, A, train=with_loss(focal)),
    Bug("classes balanced over the batch", nothing, A, train=with_loss(frequencies)),
    Bug("the hardest half is kept", nothing, A, train=hardest_half),
    Bug("noise times 0.8", noise(lambda add, self, totals, std, scale: add(totals, 0.8 * std)), B),
    Bug("noise times 0.95", noise(lambda add, self, totals, std, scale: add(totals, 0.95 * std)), B),
    Bug("no noise", noise(lambda add, self, totals, std, scale: add(totals, 0.0)), B),
    Bug("the noise of half a bound", replaced(optimizer, "standard_deviation", lambda z, s: z * s / 2), BOTH),
    Bug("noise not scaled by the bound", replaced(optimizer, "standard_deviation", lambda z, s: z), BOTH, {"max_grad_norm": 3.0}),
    Bug("noise divided twice", noise(lambda add, self, totals, std, scale: add(totals, std * scale)), B),
    Bug("the same noise in every step", noise(seeded(itertools.repeat(3))), B),
    Bug("two draws of noise in turn", noise(seeded(itertools.cycle([3, 4]))), B),
    Bug("the same noise for every tensor", noise(one_seed_a_step), B),
    Bug("small tensors without noise", noise(all_but_the_smallest), B),
    Bug("every second number without noise", noise(every_second_number), B),
    Bug("numbers side by side have the same noise", noise(in_pairs), B),
    Bug("tails of the noise cut off", noise(rounded), B),
    Bug("noise in every second step", noise(of_two_steps), B),
    Bug("no noise on sums of zeros", noise(lambda add, s, t, std, c: add([x for x in t if bool(x.any())][1:], std)), B),
    Bug(
        "secure noise times 0.9",
        wrapped(SecureNoise, "add_", lambda o, s, t, std, c=1.0, *, sensitivity: o(s, t, 0.9 * std, c, sensitivity=sensitivity)),
        B,
        {"secure_mode": True},
    ),
    Bug("drawn at 1.1 times the rate", drawn_at(1.1), B),
    Bug("drawn at twice the rate", drawn_at(2.0), B),
    Bug("the same batch again and again", drawing(same_batches), B),
    Bug("examples in blocks", drawing(in_blocks), B),
    Bug("everybody or nobody", drawing(all_or_none), B),
    Bug("every example twice in a batch", wrapped(PoissonSampler, "__iter__", doubled), B),
    Bug("half of the rate is charged", replaced(SamplingPlan, "charged_rate", property(lambda self: self.sample_rate / 2)), B),
    Bug("the rate is charged squared", wrapped(meter, "charge", lambda o, a, z, q: o(a, z, q * q)), B),
    Bug("no charge", replaced(PrivacyMeter, "charge_step", lambda self, *, foreign: None), B),
    Bug("every second step is charged", wrapped(PrivacyMeter, "charge_step", every_second_charge), B),
    Bug("twice the noise is charged", charged(sigma=2.0), B),
    Bug("1.05 times the noise is charged", charged(sigma=1.05), B),
    Bug("charges are forgotten", wrapped(meter, "charge", forgets), B),
]


def main() -> None:
    """Print which audit finds what."""
    for bug in BUGS:
        for name in BOTH:
            try:
                found = "; ".join(bug.found_by(name).findings) or "nothing"
            except Exception as error:  # noqa: BLE001
                found = f"{type(error).__name__}: {str(error)[:70]}"
            print(f"{bug.name:<45} {name:<12} {'(expected) ' if name in bug.finds else ''}{found}")


if __name__ == "__main__":
    main()
