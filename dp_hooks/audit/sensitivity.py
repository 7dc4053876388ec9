"""sensitivity: how far one example moves the clipped sum, seen from outside."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.utils.data import DataLoader

from .._no_randomness import NoRandomness
from .._validate import bad, positive_int
from ..privacy.sampling.physical import PhysicalSampler
from ..privacy.sampling.plan import POISSON, SamplingPlan
from ..privacy.sampling.poisson import PoissonSampler
from ..training.optimizer import PrivateOptimizer
from .clipped_sums import ClippedSums, Release
from .still_optimizer import StillOptimizer
from .trials import BOUNDS, FixedItems, Over, Trial, TrialSampler, trials_of
from .user_loop import UserLoop, no_steps, number_of_batch
from .user_state import kept

NOT_PRIVATE = "computed from private data without noise: not to be published"
_ALLOWED = 1e-3  # what the engine may add to a bound by rounding: see the README
_COUPLED = 0.02  # how far the sums of halves may be from that of the whole, beside rounding, in units of the bound
_ORDER = 0.02  # how far the sum may move by the order of its examples, in units of the bound

# What is another one in the scope in which is measured: nothing is drawn, checked, charged or kept there.
_MEASURED: dict[str, Any] = {
    "target_epsilon": None,
    "target_delta": None,
    "epochs": None,
    "accountant": "rdp",
    "secure_mode": False,
    "noise_generator": None,
    "poisson_sampling": None,
    "sampling": "poisson",
    "self_check": False,
    "spot_check_rate": 0.0,
    "check_collate": False,
}


@dataclass(frozen=True)
class Sensitivity:
    """What :func:`sensitivity` measured; ``print`` shows it in words, ``as_dict()`` is plain numbers. None of it is private.

    Attributes:
        value: the largest distance ``|S(D) - S(D without i)|`` that was seen, in units of C: of the standard deviation of the
            noise on the sum over the noise multiplier that is charged. Of several released sums (adaptive clipping has a second
            one) they are taken together. At most 1 for a private step, and close to 1 where gradients are clipped.
        example: i, the index in the dataset of the example that moved the sum so far.
        tried: examples that were left out.
        batches: in how many batches.
        coupling: how far the sums of the halves of a batch, together, are from that of the whole, in the same units, or of what an
            example does where that is less. A clipped sum is a
            sum over examples, each of which depends on nothing but itself: 0 but for rounding.
        rounding: how far a mere change of order moved a sum, in the same units: what values can be off by.
        findings: what must not be, in words; empty: nothing was found.
    """

    value: float
    example: int
    tried: int
    batches: int
    coupling: float
    rounding: float
    findings: tuple[str, ...] = ()
    remark: str = NOT_PRIVATE

    @property
    def holds(self) -> bool:
        """Whether nothing was found."""
        return not self.findings

    def as_dict(self) -> dict[str, Any]:
        """Return all fields, and ``holds``."""
        return {**asdict(self), "holds": self.holds}

    def __str__(self) -> str:
        """Say it in words."""
        lines = [
            f"Sensitivity: {self.value:.4f} C, by example {self.example} (the most of {self.tried} in {self.batches} batches)",
            *(f"FOUND: {finding}" for finding in self.findings),
            *(["nothing was found: at most 1 is allowed"] if self.holds else []),
            f"what examples do to each other: {self.coupling:.1e} C (rounding: {self.rounding:.1e} C)",
            f"({self.remark})",
        ]
        return "\n  ".join(lines)


def sensitivity(
    train: Callable[..., Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loader: DataLoader[Any],
    *,
    batches: int = 4,
    examples: int = 64,
    seed: int | None = None,
    **options: Any,
) -> Sensitivity:
    """Measure ``max |S(D) - S(D without i)| / C`` over real batches D, through the user's own loop.

    ::

        def train(model, opt, loader):  # the body of the with block
            for x, y in loader:
                opt.zero_grad()
                criterion(model(x), y).backward()
                opt.step()

        print(dp_hooks.audit.sensitivity(train, model, optimizer, loader, noise_multiplier=1.0, max_grad_norm=1.0))

    S is what the noise would be added to: nothing that the engine says of norms is used. Some batches are drawn as the scope would
    draw them, and are run whole, in halves, and without one example; also at a thousandth of the bound, at which every gradient is
    clipped. The self-check is off: what it would refuse is measured. So is dropout, and random numbers are the same for each batch.

    Nothing is released, charged or written to a ledger: ``optimizer`` is never stepped, and ``model``, ``optimizer`` and generators
    are put back as they were. The loop takes more steps than in a real run, and what it does elsewhere (counters, logs) it does.
    What is measured is exact and not private.

    It shows a fault for certain, and none that it did not meet: a small number of examples at the present weights.

    Args:
        train: ``train(model, opt, loader)``, which runs what is in the ``with`` block, or a ``@dp_step`` function of model and
            batch. It is left by an exception of its own once everything is measured.
        model: as in :func:`~dp_hooks.private_training`, and so are ``optimizer`` and ``loader``.
        optimizer: see there.
        loader: see there; its workers are not used.
        batches: how many batches D.
        examples: how many examples are left out, in all batches together.
        seed: for batches that can be drawn again; None: other ones each time.
        options: the other arguments of ``private_training``.

    Raises:
        InvalidArgumentError: an argument that cannot be used, or ``train`` takes no step.
        ScopeError, UnsupportedModelError: as from ``private_training`` and in the loop.
    """
    batches, examples = positive_int("batches", batches), positive_int("examples", examples)
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise bad("seed", seed, "pass a whole number, or None.")
    loop = UserLoop(train, options)
    stated = loop.scope(model, optimizer, loader)  # checks the arguments, and works sigma out
    drawn = _drawn(stated.plan, batches, seed)
    trials = trials_of(drawn, _chosen(drawn, examples, seed))
    sigma = stated.noise_multiplier or 1.0
    plain = DataLoader(
        FixedItems(loader.dataset), batch_size=max(1, round(stated.plan.expected_batch_size)), collate_fn=loader.collate_fn
    )
    scope = loop.scope(
        model, StillOptimizer(optimizer), plain, **{**_MEASURED, "noise_multiplier": sigma, "sample_rate": stated.plan.sample_rate}
    )
    found = _Found(sigma)
    with kept(model, optimizer, loader, None), NoRandomness() as without:
        sums = ClippedSums(
            lambda: number_of_batch(scope.optimizer), lambda release: found.compare(sampler.trial(release.number), release)
        )
        scope.noise = sums
        with scope as (opt, private_loader):
            bound = opt.max_grad_norm

            def begin(trial: Trial) -> None:
                without.begin_again()
                opt.max_grad_norm = _times(bound, trial.times) if trial.times != 1 else bound

            sampler = TrialSampler(trials, begin)
            cast(PhysicalSampler, private_loader.batch_sampler).logical = cast(PoissonSampler, sampler)
            _run_all(loop, model, opt, private_loader, sampler)
            sums.finish()
    return found.result(train)


def _run_all(loop: UserLoop, model: nn.Module, opt: PrivateOptimizer, loader: Any, sampler: TrialSampler) -> None:
    """Run the loop until all trials were made, or it asks for no more."""
    while len(sampler):
        before = sampler.handed_out
        try:
            loop.run(model, opt, loader)
        except Over:
            return
        if sampler.handed_out == before:
            return


@dataclass
class _Seen:
    """What was seen at one bound, in units of it."""

    value: float = 0.0
    example: int = -1
    coupling: float = 0.0
    rounding: float = 0.0
    changed: float = 0.0

    def relative(self, distance: float) -> float:
        """A distance in units of what an example does, where that is less than the bound."""
        return distance / min(1.0, self.value) if self.value > 0 else 0.0


class _Found:
    """Compares releases as they come."""

    def __init__(self, sigma: float) -> None:
        self._sigma = sigma
        self._base: tuple[Trial, Release] | None = None
        self._halves: list[Release] = []
        self._seen = {times: _Seen() for times in BOUNDS}
        self._left_out: set[tuple[int, int]] = set()
        self._batches: set[int] = set()
        self._not_finite = 0

    def compare(self, trial: Trial, release: Release) -> None:
        """Take down one more release."""
        if trial.kind == "whole":
            self._base, self._halves = (trial, release), []
            return
        if self._base is None or (self._base[0].batch, self._base[0].times) != (trial.batch, trial.times):
            return  # the loop left the whole batch out
        base, seen = self._base[1], self._seen[trial.times]
        if trial.kind == "half":
            self._halves.append(release)
            if len(self._halves) < 2:
                return
            release = self._halves[0].plus(self._halves[1])
        apart = self._sigma * base.apart(release)
        if math.isnan(apart):
            self._not_finite += 1
        elif trial.kind == "half":
            seen.coupling = max(seen.coupling, apart)
        elif trial.kind == "reversed":
            seen.rounding = max(seen.rounding, apart)
        elif trial.kind == "again":
            seen.changed = max(seen.changed, apart)
        else:
            self._left_out.add((trial.batch, trial.left_out))
            self._batches.add(trial.batch)
            if apart > seen.value:
                seen.value, seen.example = apart, trial.left_out

    def result(self, train: object) -> Sensitivity:
        """Return what was found of all."""
        if not self._left_out and not self._not_finite:
            raise no_steps(train)
        times, most = max(self._seen.items(), key=lambda item: item[1].value)
        rounding, changed, coupling = (
            max(seen.relative(getattr(seen, name)) for seen in self._seen.values()) for name in ("rounding", "changed", "coupling")
        )
        findings = []
        if self._not_finite:
            findings.append(f"{self._not_finite} sums were not finite")
        if changed > _ORDER:
            what = "by what changes from step to step, or random numbers, so that it cannot be told what one example does"
            findings.append(f"the same batch gave another sum later, {changed:.3g} C away: {what}")
        elif rounding > _ORDER:
            findings.append(f"the order of the examples in a batch moves the sum by {rounding:.3g} C: examples mix")
        elif coupling > _COUPLED + 10 * rounding:
            what = "examples change each other's part"
            findings.append(f"the sums of two halves of a batch are {coupling:.3g} C away from that of the whole: {what}")
        if most.value > 1 + _ALLOWED + 2 * rounding:
            where = "at the bound as given" if times == 1 else f"at {times:g} of the bound"
            findings.append(f"example {most.example} moves the sum by {most.value:.4g} C, {where}: the noise is made for 1 C")
        tried, batches = len(self._left_out), len(self._batches)
        return Sensitivity(most.value, most.example, tried, batches, coupling, rounding, tuple(findings))


def _drawn(plan: SamplingPlan, count: int, seed: int | None) -> list[list[int]]:
    """Draw batches of at least two examples, as the scope would; where they are rare, such of two."""
    generator = torch.Generator()
    generator.seed() if seed is None else generator.manual_seed(seed)
    if plan.sampling == POISSON:
        drawn = list(PoissonSampler(plan.examples, plan.sample_rate, 10 * count, generator))
    else:
        order = torch.randperm(plan.examples, generator=generator, device="cpu").tolist()
        size = max(1, round(plan.expected_batch_size))
        drawn = [order[k : k + size] for k in range(0, len(order), size)]
    pairs = [torch.randperm(plan.examples, generator=generator, device="cpu")[:2].tolist() for _ in range(count)]
    return [batch for batch in [*drawn, *pairs] if len(batch) > 1 or plan.examples == 1][:count]


def _chosen(drawn: Sequence[Sequence[int]], examples: int, seed: int | None) -> list[list[int]]:
    """Choose about as many examples of each batch to be left out."""
    generator = torch.Generator()
    generator.seed() if seed is None else generator.manual_seed(seed)
    found = []
    for number, batch in enumerate(drawn):
        count = examples // len(drawn) + (number < examples % len(drawn))
        found.append([batch[k] for k in torch.randperm(len(batch), generator=generator, device="cpu").tolist()[:count]])
    return found


def _times(bound: Any, factor: float) -> Any:
    """Multiply a bound, or each of several."""
    if isinstance(bound, Mapping):
        return {name: factor * value for name, value in bound.items()}
    return [factor * value for value in bound] if isinstance(bound, Sequence) else factor * bound
