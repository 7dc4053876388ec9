"""Whether what was captured agrees with plain autograd on single samples, up to rounding."""

import math
from collections.abc import Container, Iterator

import torch
from torch import Tensor, nn

from .._precision import wide_dtype
from .._tree import as_real
from ..capture.controller import HookController
from ..errors import SelfCheckError, bullets
from ..gradients.sample_gradients import SampleGradients
from ..gradients.terms import Sums
from .single_samples import some_samples

# Largest disagreement relative to the gradient of a parameter, or to a hundredth of the sample's whole gradient where
# the parameter's own is smaller. Rounding stays well below; a mixed-up or missing sample is far above.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-2}
COARSE = 1e-1
# The same for gradients taken from the same forward pass, where no unit of a network can have switched by rounding.
_SAME_PASS = {torch.float64: 1e-5, torch.float32: 5e-4}
_SAME_PASS_COARSE = 3e-2
# A parameter with a smaller share of the squared norm is compared as if it had that: in half precision small gradients are often
# what is left of large ones (queries and keys), and so is their rounding. It moves the clipped sum by 0.3 % of the bound at most.
_SMALL_COARSE = 1e-2
# The same for values: losses and outputs do not jump where a unit switches. Relative, of samples of at least a twentieth of the
# size of all. Models in float64 often have norms in float32.
_VALUES = {torch.float64: 1e-6, torch.float32: 2e-5}
_FLOOR = 0.05
# How many times the change of values that rounding of the parameters makes they may differ: for models that enlarge rounding.
_TIMES_ROUNDING = 30
# The same for gradients, which jump: they may differ by so many times that change, and not by more than a part of themselves:
# between a sample alone and in a batch it was 2 % in float32, and up to 56 % in bfloat16 (ResNets after some steps).
_TIMES_JUMP, _LARGEST_JUMP, _LARGEST_COARSE_JUMP = 3, 0.1, 0.6
_AT_ONCE = 1 << 20  # how many numbers are held in float64
_FEW = 16  # of so few samples all norms are looked at
# How much too small the norm of a sample's whole gradient may be: it is what keeps its contribution below the bound.
_NORM_TOLERANCE = {torch.float64: 1e-5, torch.float32: 3e-3}


def tolerance(dtype: torch.dtype, *, coarse: bool) -> float:
    """The largest relative disagreement; ``coarse``: autocast or half precision is in use."""
    return COARSE if coarse else TOLERANCE.get(dtype, COARSE)


def values_off(batch: Tensor, rows: Tensor | slice, apart: Tensor) -> Tensor:
    """How far values of the samples ``rows`` of ``batch`` ``[n, ...]`` are from those ``apart`` ``[k, ...]``, relative: ``[k]``.

    Small values are compared with the size of those of all samples that are finite.
    """
    batch, apart = (as_real(t.detach()).flatten(1) for t in (batch, apart))
    step = max(1, _AT_ONCE // max(1, batch.shape[1]))  # with a large vocabulary a batch is large, too
    sizes = torch.cat([part.double().norm(dim=1) for part in batch.split(step)])
    floor = _FLOOR * sizes.nan_to_num(0.0, 0.0).square().mean().sqrt().clamp(min=1e-12)
    found = []
    chosen = torch.arange(len(batch), device=batch.device)[rows]
    for some, other in zip(chosen.split(step), apart.split(step), strict=True):
        alone = other.double().nan_to_num()
        lengths = alone.norm(dim=1).maximum(floor)
        found.append(alone.sub_(batch[some].double().nan_to_num()).norm(dim=1) / lengths)
    return torch.cat(found)


def value_tolerance(dtype: torch.dtype, *, coarse: bool, rounding: float) -> float:
    """The largest relative disagreement of values, where rounding of parameters changes them by ``rounding``."""
    return COARSE if coarse else max(_VALUES.get(dtype, COARSE), _TIMES_ROUNDING * rounding)


class ValuesDiffer(SelfCheckError):
    """Values of samples in a batch are not those in a smaller one, or differ by rounding that the model enlarges."""


class NotFinite(SelfCheckError):
    """A sample has no finite gradient: such are left out of every step, and nothing can be compared."""


def compare(
    found: SampleGradients,
    norms: Sums,
    i: int,
    expected: dict[nn.Parameter, Tensor],
    params: list[nn.Parameter],
    controller: HookController,
    what: str,
    *,
    coarse: bool,
    jump: float = 0.0,
) -> None:
    """Compare the gradients of one sample, their norms and a sum with what that sample gave alone.

    Args:
        found: what was captured of the whole batch.
        norms: the squared norms of it, ``[samples]`` per parameter.
        i: the number of the sample that was run alone.
        expected: the gradients of it.
        params: the parameters to compare.
        controller: for names.
        what: for messages.
        coarse: autocast or half precision is in use.
        jump: by how much rounding changes the gradients of single samples, see :func:`jump_of`.

    Raises:
        NotFinite: the sample has no finite gradient.
        SelfCheckError: a disagreement beyond rounding, with the parameters that differ most.
    """
    have = {p: float(norms[p][i]) for p in params if p in norms}
    reached = [p for p in params if p in have or p in expected]
    if not reached:
        return
    own = {p: float(_square(expected[p])) if p in expected else 0.0 for p in reached}
    total = sum(own.values())
    if not math.isfinite(total) or not all(map(math.isfinite, have.values())):
        raise NotFinite(
            f"{what}: no sample that the self-check looked at has a finite gradient (data, loss or weights with NaN or "
            "infinite values); nothing was released."
        )
    here = torch.arange(found.samples, device="cpu") == i  # the others are left out, whatever is in them
    worst: list[tuple[float, str]] = []
    for p, its_sum in _sums(found, here, here, reached, have):
        scale = max(own[p], 1e-4 * total, 1e-60) ** 0.5
        row = torch.tensor([i], device=p.device)
        want = expected.get(p, torch.zeros((), dtype=p.dtype, device=p.device))
        pairs = [] if its_sum is None else [(found.grads(p, row)[0], want), (its_sum, want)]
        off = [float(_square(mine - theirs.to(mine.dtype))) ** 0.5 for mine, theirs in pairs] or [own[p] ** 0.5]
        off.append(abs(own[p] ** 0.5 - max(have.get(p, 0.0), 0.0) ** 0.5))
        error = max(off, key=lambda one: one if math.isfinite(one) else math.inf) / scale  # which NaN would hide from max()
        largest = _LARGEST_COARSE_JUMP if coarse or p.dtype not in TOLERANCE else _LARGEST_JUMP
        if not error <= max(tolerance(p.dtype, coarse=coarse), min(_TIMES_JUMP * jump, largest)):
            worst.append((error, controller.name_of(p)))
    if not worst and not coarse:
        missing = {p: own[p] - have.get(p, 0.0) for p in reached}  # from the squared norms
        short = sum(missing.values()) / max(total, 1e-60) / 2
        if short > max(_NORM_TOLERANCE.get(p.dtype, COARSE) for p in reached):
            worst.append((short, controller.name_of(max(missing, key=lambda p: missing[p]))))
    if worst:
        _complain(sorted(worst, reverse=True), len(reached), found.samples, what, controller.loss_reduction)


def jump_of(before: dict[nn.Parameter, Tensor], after: dict[nn.Parameter, Tensor]) -> float:
    """The largest change, relative, of a parameter's gradient between two runs on the same sample."""
    largest, whole = 0.0, sum(float(_square(g)) for g in before.values())
    for p in before.keys() & after.keys():
        scale = max(float(_square(before[p])), 1e-4 * whole, 1e-60)
        largest = max(largest, (float(_square(before[p] - after[p])) / scale) ** 0.5)
    return largest


def compare_sums(
    found: SampleGradients,
    factors: Tensor,
    expected: dict[nn.Parameter, Tensor],
    params: list[nn.Parameter],
    controller: HookController,
    what: str,
    *,
    coarse: bool,
) -> None:
    """Compare a weighted sum of captured gradients with the gradient, by autograd, of the same sum of losses.

    Both come from the same values in the forward pass, so nothing but rounding may lie between them; and as the factors have no
    pattern, no two samples can have been taken for each other, and none can have got a part of another. The norms have to be
    those of the gradients that are summed.

    Args:
        found: what was captured of the whole batch; all of it finite.
        factors: ``[samples]``, one per sample.
        expected: the gradients of the sum of losses, each times its factor.
        params: the parameters to compare.
        controller: for names.
        what: for messages.
        coarse: autocast or half precision is in use.

    Raises:
        SelfCheckError: a disagreement beyond rounding, with the parameters that differ most.
    """
    captured = set(found.params)
    seen = [p for p in params if p in captured]
    norms = found.sq_norms(seen)
    everything = torch.ones(found.samples, dtype=torch.bool, device=factors.device)
    joint = [norm.double().cpu() for norm in found.group_sq_norms([seen])] if seen else []  # as in a step, as are the sums
    reached = [p for p in params if p in norms or p in expected]
    squares = factors.double().square().cpu()
    size = {p: float((norms[p].double().cpu().clamp(min=0) * squares).sum()) if p in norms else 0.0 for p in reached}
    total = sum(size.values())
    picked = _picked(norms, found.samples)
    worst = []
    for norm in joint:
        together = torch.stack([own.double().cpu() for own in norms.values()]).sum(0)
        apart = float(((together - norm).abs() / together.clamp(min=1e-60)).max())
        limit = _SAME_PASS_COARSE if coarse else 2 * max(_SAME_PASS.get(p.dtype, _SAME_PASS_COARSE) for p in seen)
        if not apart <= limit:
            worst.append((apart, "all parameters together"))
    for p, its_sum in _sums(found, factors, everything, reached, norms):
        limit = _SAME_PASS_COARSE if coarse else _SAME_PASS.get(p.dtype, _SAME_PASS_COARSE)
        scale = max(size[p], (_SMALL_COARSE if coarse else 1e-4) * total, 1e-60) ** 0.5
        want = expected.get(p, torch.zeros((), dtype=p.dtype, device=p.device)).to(wide_dtype(p.dtype))
        error = float(_square(want if its_sum is None else its_sum - want)) ** 0.5 / scale
        for i in picked if p in norms else ():  # a norm is that of the gradient that the sums are made of, or a little more
            row = torch.tensor([i], device=p.device)
            norm, own = float(norms[p][row]) ** 0.5, float(_square(found.grads(p, row)[0])) ** 0.5
            floor = max(own, 1e-2 * (total / found.samples) ** 0.5, 1e-30)
            error = max(error, (own - norm) / floor, (norm - own) / floor * limit / max(limit, 3e-2))
        if not error <= limit:
            worst.append((error, controller.name_of(p)))
    if worst:
        _complain(sorted(worst, reverse=True), len(reached), found.samples, what, controller.loss_reduction)


def _sums(
    found: SampleGradients, factors: Tensor, finite: Tensor, reached: list[nn.Parameter], captured: Container[nn.Parameter]
) -> Iterator[tuple[nn.Parameter, Tensor | None]]:
    """For all that was ``reached``, one after the other, the sum of factor times gradient; None for what was not captured."""
    wanted = {p: factors.to(p.device, wide_dtype(p.dtype)) for p in reached if p in captured}
    yield from found.sums_in_turn(wanted, finite.to(reached[0].device))
    yield from ((p, None) for p in reached if p not in captured)


def _picked(norms: Sums, samples: int) -> list[int]:
    """Samples whose norms are looked at: all of a few, else those of :func:`extreme_samples`."""
    return list(range(samples)) if samples <= _FEW else extreme_samples(all_together(norms), samples)


def extreme_samples(norms: Tensor | None, samples: int, *, ends: bool = True) -> list[int]:
    """Samples to look at one by one: those with the largest and the smallest gradient, the ``ends`` of the batch, and some between.

    What others share of a sample's loss is most different for samples unlike the rest: the longest text, the outlier.
    """
    total = torch.zeros(samples, device="cpu") if norms is None else norms
    finite = total.isfinite()  # others cannot be compared
    extremes = {int(total.where(finite, -torch.inf).argmax()), int(total.where(finite, torch.inf).argmin())}
    return sorted({*(some_samples(samples) if ends else ()), *extremes})


def all_together(squares: Sums) -> Tensor | None:
    """``[samples]``: the sum of squared norms over all parameters, if there are any."""
    return torch.stack([square.double().cpu() for square in squares.values()]).sum(0) if squares else None


def _square(gradient: Tensor) -> Tensor:
    """The squared norm of one gradient, as a float64."""
    norm: Tensor = torch.linalg.vector_norm(gradient, dtype=wide_dtype(gradient.dtype))
    return norm.double().square()


def _complain(worst: list[tuple[float, str]], params: int, samples: int, what: str, loss_reduction: str) -> None:
    listing = bullets([f"{name}: off by {error:.1e} of its size" for error, name in worst])
    raise SelfCheckError(
        f"{what}: per-sample gradients of {len(worst)} of {params} parameters differ from plain autograd on single "
        f"samples (batch of {samples}); nothing was released.\n{listing}\nLikely causes: samples mix (batch "
        "statistics, a loss averaged over tokens of the whole batch, contrastive or load-balancing terms); "
        f"loss_reduction={loss_reduction!r} is not how the loss is reduced; an input that all samples "
        "share has as many rows as the batch; random numbers other than dropout. Remedy: return per-sample losses from a "
        "@dp_step function, replace the mixing module, or freeze the parameters named."
    )
