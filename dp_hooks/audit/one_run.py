"""one_run: a lower bound of epsilon from one private run in which canaries are put."""

import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from .._tree import names_of_parameters
from .._validate import bad, fraction, positive, positive_int
from ..privacy.accounting.history import History
from ..privacy.accounting.rates import number
from ..privacy.sampling.physical import PhysicalSampler
from ..privacy.sampling.plan import POISSON
from ..privacy.sampling.poisson import PoissonSampler
from ..training.scope import PrivateTraining
from .canaries import Canaries
from .canary_noise import CanaryNoise
from .canary_slots import CanarySlots
from .canary_test import CanaryTest
from .figure import draw_audit
from .guesses import epsilon_from_guesses
from .sensitivity import NOT_PRIVATE
from .trade_off import Rates, noise_at_most, scaled_epsilon
from .user_loop import UserLoop, no_steps
from .user_state import kept

_CANARIES = 5000


@dataclass(frozen=True)
class OneRun:
    """What :func:`one_run` found; ``print`` shows it in words, ``as_dict()`` is plain numbers, ``plot(path)`` draws it.

    None of it is private.

    Attributes:
        epsilon: what the run says it has spent at ``delta``.
        delta: the delta of all epsilons here.
        epsilon_lower: what it has spent at least, with ``confidence``, if what it adds to different numbers is independent and its
            privacy is that of the charged releases with some other noise: from how often a test of single canaries is right.
        epsilon_guessed: the same without any such assumption, and much less: from right guesses (Steinke, Nasr and Jagielski 2023).
        confidence: the probability with which each of both bounds holds.
        canaries: how many canaries there were; half of them, by fair coins, were in.
        reach: their norm, in units of the sensitivity.
        true_positives: the share of those in that the test found, and ``false_positives`` that of the others that it took for in.
        guesses: how many coins were guessed, and ``right`` of them rightly.
        releases: steps of the run.
        noise_scale: the standard deviation of the noise that was seen, in units of what is charged.
        rate: the probability of an example to be in a batch, as it was seen.
        findings: what must not be, in words; empty: nothing was found.
    """

    epsilon: float
    delta: float
    epsilon_lower: float
    epsilon_guessed: float
    confidence: float
    canaries: int
    reach: float
    true_positives: float
    false_positives: float
    guesses: int
    right: int
    releases: int
    noise_scale: float
    rate: float
    findings: tuple[str, ...] = ()
    remark: str = NOT_PRIVATE
    scores: tuple[tuple[float, ...], tuple[float, ...]] = field(default=((), ()), repr=False, compare=False)
    threshold: float = field(default=0.0, repr=False, compare=False)

    @property
    def holds(self) -> bool:
        """Whether nothing was found."""
        return not self.findings

    def as_dict(self) -> dict[str, Any]:
        """Return all fields but the scores, and ``holds``."""
        fields = asdict(self)
        del fields["scores"], fields["threshold"]
        return {**fields, "holds": self.holds}

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw the scores of canaries, and epsilon as stated and as found, into a file (``.png``, ``.pdf``, ``.svg``).

        Raises:
            DPHooksError: matplotlib is not installed.
        """
        draw_audit(self.scores, self.threshold, self.as_dict(), path)

    def __str__(self) -> str:
        """Say it in words."""
        sure = f"confidence {self.confidence:g}"
        errors = f"of canaries {self.true_positives:.3f} are found, {self.false_positives:.3f} falsely"
        lines = [
            f"Audit of one run: {self.canaries} canaries of norm {self.reach:g} C, {self.releases} releases",
            f"epsilon as stated     {self.epsilon:.3f} at delta = {self.delta:g}",
            f"epsilon at least      {self.epsilon_lower:.3f} ({sure}; {errors})",
            f"  assuming nothing    {self.epsilon_guessed:.3f} ({sure}; {self.right} of {self.guesses} guesses are right)",
            f"noise                 {self.noise_scale:.4f} of what is charged",
            f"sampling rate         {self.rate:.4g} as seen",
            *(f"FOUND: {finding}" for finding in self.findings),
            *(["nothing was found"] if self.holds else []),
            f"({self.remark})",
        ]
        return "\n  ".join(lines)


def one_run(
    train: Callable[..., Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loader: DataLoader[Any],
    *,
    canaries: int | None = None,
    reach: float = 1.0,
    confidence: float = 0.99,
    delta: float | None = None,
    seed: int | None = None,
    **options: Any,
) -> OneRun:
    """Run the user's own loop once with canaries in it, and say what epsilon the run has at least.

    ::

        budget = {"target_epsilon": 8, "target_delta": 1e-5, "epochs": 5}
        print(dp_hooks.audit.one_run(train, model, optimizer, loader, max_grad_norm=1.0, **budget))

    Some examples of the dataset give their places to canaries. A fair coin says for each whether the canary is in, or nothing (a
    null record): the relation that the library's epsilon is about. Canaries are gradients of norm C at right angles to each other;
    whenever the scope's own sampler draws the example, its canary is added to the clipped sum. Scores are read from the noised
    gradients that are released in all steps, by the best test there is. So sampling, noise, steps and accounting are audited
    together. What is done before the clipped sum (rules, clipping, the loop) :func:`sensitivity` measures; canaries that send what
    it has found (``reach=found.value``) bring both together.

    Two bounds: :attr:`OneRun.epsilon_guessed` by Steinke, Nasr and Jagielski (arXiv:2305.08846) assumes nothing, and cannot reach a
    Gaussian's epsilon at a small delta. :attr:`OneRun.epsilon_lower` takes the canaries for independent trials, which they are if
    the noise is, and bounds the test's errors by exact binomial intervals (Clopper and Pearson); with more than some factor times
    the noise no test of these releases could be that good, by the trade-off of the accountant "pld" (Nasr et al., USENIX Security
    2023, do this for Gaussians over many runs); the bound is the epsilon at that factor. (arXiv:2606.12733 goes further for one
    run, by a central limit; here nothing is asymptotic.) Beside them noise and draws are looked at directly; each of these tests
    is wrong with a chance below 1e-6.

    The run is as long as the real one, and is thrown away: ``model``, ``optimizer`` and generators are put back as they were, no
    ledger is written, and no accountant of the user's is charged. The numbers are exact and not private.

    Args:
        train: as in :func:`sensitivity`.
        model: as in :func:`~dp_hooks.private_training`, and so are ``optimizer`` and ``loader``.
        optimizer: see there.
        loader: see there.
        canaries: how many; the more, the closer the bound. Default: 5,000, but at most half as many as there are examples, and as
            there are trained numbers.
        reach: the norm of a canary, in units of the sensitivity.
        confidence: of each bound.
        delta: default: ``target_delta`` if given, else the smaller of 1e-5 and a tenth of 1 / (dataset size).
        seed: for coins and places that can be drawn again; None: other ones each time.
        options: the other arguments of ``private_training``. A ``noise_generator`` has to be another one than that of the real run.

    Raises:
        InvalidArgumentError: an argument that cannot be used, or ``train`` takes no step.
        ScopeError, UnsupportedModelError: as from ``private_training`` and in the loop.
    """
    confidence = fraction("confidence", confidence, "pass a number between 0 and 1, such as 0.99.")
    reach = positive("reach", reach)
    if delta is not None:
        delta = fraction("delta", delta, "pass a number between 0 and 1, such as 1e-5.")
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise bad("seed", seed, "pass a whole number, or None.")
    generator = torch.Generator()
    generator.seed() if seed is None else generator.manual_seed(seed)
    loop = UserLoop(train, options)
    scope = loop.scope(model, optimizer, loader)
    params = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    most = min(scope.plan.examples // 2, sum(p.numel() for p in params))
    count = min(_CANARIES, most) if canaries is None else positive_int("canaries", canaries)
    if not 2 <= count <= most:
        remedy = "at least 2, and at most half as many as there are examples, and as there are numbers that are trained: "
        raise bad("canaries", count, f"{remedy}here {most}.")
    noise = _with_canaries(scope, params, count, reach, generator)
    with kept(model, optimizer, loader, options.get("noise_generator")), scope as (opt, private_loader):
        noise.watch(opt)
        sampler = cast(PhysicalSampler, private_loader.batch_sampler)
        noise.slots.stand_before(sampler.logical)
        sampler.logical = cast(PoissonSampler, noise.slots)
        loop.run(model, opt, private_loader)
    if not noise.releases:
        raise no_steps(train)
    if delta is None:
        delta = scope.report().delta
    return _judged(scope, noise, delta, confidence, generator)


def _with_canaries(
    scope: PrivateTraining, params: list[nn.Parameter], count: int, reach: float, generator: torch.Generator
) -> CanaryNoise:
    """Put canaries in front of the noise of ``scope``."""
    examples = scope.plan.examples
    names = names_of_parameters(scope.model)
    slots = CanarySlots(torch.randperm(examples, generator=generator, device="cpu")[:count], examples)
    made = Canaries(params, count, generator)
    scope.noise = CanaryNoise(scope.noise, made, slots, [names[p][0] for p in params], scope.plan.sample_rate, reach)
    return scope.noise


def _judged(scope: PrivateTraining, noise: CanaryNoise, delta: float, confidence: float, generator: torch.Generator) -> OneRun:
    """Guess the coins, and work out what follows."""
    coins, scores, stated = noise.canaries.coins, noise.scores, scope.get_epsilon(delta)
    findings = [*noise.noise_seen.findings()]
    if noise.missing:
        findings.insert(0, f"{noise.missing} parameters got no noise")
    history = noise.history
    if scope.plan.sampling == POISSON:
        findings += noise.draws_seen.findings(_charged_rate(scope))
        charged = sum(steps for _, _, steps in scope.accountant.history)
        if charged < noise.releases:
            findings.append(f"{noise.releases} releases, of which {charged} are charged")
        elif _information(scope.accountant.history) < (1 - 1e-9) * _information(noise.history):
            findings.append("more noise is charged than the optimizer says that it adds")
    else:  # each example is in one batch of a pass, and a pass is one release
        history = [(min(sigma for sigma, _, _ in history), 1.0, max(1, round(noise.draws_seen.most)))]
    if any(sigma == 0 for sigma, _, _ in history):
        return _infinite(noise, delta, confidence, stated, findings)
    test = CanaryTest.for_run(noise.history, len(coins), 1 - confidence, generator)
    said = scores > test.threshold
    inside, outside = int(coins.sum()), int((~coins).sum())
    found, wrong = int((said & coins).sum()), int((said & ~coins).sum())
    factor = noise_at_most(Rates.of(found, inside, wrong, outside, 1 - confidence), history, test.deltas)
    lower = 0.0 if math.isinf(factor) else scaled_epsilon(factor, history, delta)
    right = _right(scores, coins, test.guesses)
    guessed = epsilon_from_guesses(len(coins), test.guesses, right, delta, 1 - confidence)
    if max(lower, guessed) > stated:
        findings.insert(0, f"epsilon is at least {max(lower, guessed):.3f}, and {stated:.3f} is stated")
    return OneRun(
        epsilon=stated,
        delta=delta,
        epsilon_lower=lower,
        epsilon_guessed=guessed,
        confidence=confidence,
        canaries=len(coins),
        reach=noise.reach,
        true_positives=found / max(1, inside),
        false_positives=wrong / max(1, outside),
        guesses=test.guesses,
        right=right,
        releases=noise.releases,
        noise_scale=noise.noise_seen.scale,
        rate=noise.draws_seen.rate,
        findings=tuple(findings),
        scores=(tuple(scores[coins].tolist()), tuple(scores[~coins].tolist())),
        threshold=test.threshold,
    )


def _right(scores: Tensor, coins: Tensor, guesses: int) -> int:
    """Guess "in" where scores are highest, "out" where they are lowest, and count the right guesses."""
    order = scores.argsort(stable=True)
    lowest, highest = order[: guesses // 2], order[len(order) - (guesses - guesses // 2) :]
    return int((~coins[lowest]).sum() + coins[highest].sum())


def _charged_rate(scope: PrivateTraining) -> float:
    """The rate of a release, on average, as it is charged."""
    history: History = scope.accountant.history
    steps = sum(count for _, _, count in history)
    return sum(number(rate) * count for _, rate, count in history) / steps if steps else scope.plan.sample_rate


def _information(history: History) -> float:
    """What releases tell without sampling: the sum of ``1 / sigma^2``."""
    return math.inf if any(sigma == 0 for sigma, _, _ in history) else sum(steps / sigma**2 for sigma, _, steps in history)


def _infinite(noise: CanaryNoise, delta: float, confidence: float, stated: float, findings: list[str]) -> OneRun:
    """What is said of a run of which a step had no noise."""
    if stated < math.inf:
        findings.insert(0, f"a step was released without noise, and an epsilon of {stated:.3f} is stated")
    return OneRun(
        epsilon=stated,
        delta=delta,
        epsilon_lower=math.inf,
        epsilon_guessed=0.0,
        confidence=confidence,
        canaries=len(noise.canaries),
        reach=noise.reach,
        true_positives=1.0,
        false_positives=0.0,
        guesses=0,
        right=0,
        releases=noise.releases,
        noise_scale=0.0,
        rate=noise.draws_seen.rate,
        findings=tuple(findings),
    )
