"""Whether what was captured agrees with plain autograd on single samples, up to rounding."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

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
# The same for values: losses and outputs do not jump where a unit switches. Relative, of samples of at least a twentieth of the
# size of all. Models in float64 often have norms in float32.
_VALUES = {torch.float64: 1e-6, torch.float32: 2e-5}
_FLOOR = 0.05
# How many times the change of values that rounding of the parameters makes they may differ: for models that enlarge rounding.
_TIMES_ROUNDING = 30
# The same for gradients, which jump: they may differ by so many times that change, and not by more than a part of themselves:
# between a sample alone and in a batch it was 2 % in float32, and up to 56 % in bfloat16 (ResNets after some steps).
_TIMES_JUMP, _LARGEST_JUMP, _LARGEST_COARSE_JUMP = 3, 0.1, 0.6
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
    batch, apart = (as_real(t.detach()).double().flatten(1) for t in (batch, apart))
    floor = _FLOOR * batch.norm(dim=1).nan_to_num(0.0, 0.0).square().mean().sqrt().clamp(min=1e-12)
    apart = apart.nan_to_num()
    off: Tensor = (batch[rows].nan_to_num() - apart).norm(dim=1) / apart.norm(dim=1).maximum(floor)
    return off


def value_tolerance(dtype: torch.dtype, *, coarse: bool, rounding: float) -> float:
    """The largest relative disagreement of values, where rounding of parameters changes them by ``rounding``."""
    return COARSE if coarse else max(_VALUES.get(dtype, COARSE), _TIMES_ROUNDING * rounding)


class ValuesDiffer(SelfCheckError):
    """Values of samples in a batch are not those in a smaller one, or differ by rounding that the model enlarges."""


@contextmanager
def rounded(params: Iterable[nn.Parameter], *, coarse: bool = False, sign: int = 1) -> Iterator[None]:
    """Change parameters by some units in the last place (``coarse``: of bfloat16), unseen: every second one the other way."""
    kept = [(p, p.detach().clone()) for p in params if p.is_floating_point()]
    try:
        for p, _ in kept:
            signs = torch.arange(p.numel(), device=p.device).remainder(2).mul(2).sub(1).reshape(p.shape)
            size = torch.finfo(torch.bfloat16).eps / 2 if coarse else 4 * torch.finfo(p.dtype).eps
            p.data.mul_(1 + sign * size * signs.to(p.dtype))
        yield
    finally:
        for p, before in kept:
            p.data.copy_(before)


def compare(
    found: SampleGradients,
    picked: list[int],
    expected: list[dict[nn.Parameter, Tensor]],
    params: list[nn.Parameter],
    controller: HookController,
    what: str,
    *,
    coarse: bool,
    jump: float = 0.0,
) -> None:
    """Compare per-sample gradients, norms and a weighted sum with what single samples gave.

    Args:
        found: what was captured of the whole batch.
        picked: numbers of the samples that were run alone.
        expected: the gradients of each of them.
        params: the parameters to compare.
        controller: for names.
        what: for messages.
        coarse: autocast or half precision is in use.
        jump: by how much rounding changes the gradients of single samples, see :func:`jump_of`.

    Raises:
        SelfCheckError: a disagreement beyond rounding, with the parameters that differ most.
    """
    seen = [p for p in params if p in set(found.params)]
    reached = [p for p in params if p in set(seen) or any(p in e for e in expected)]
    if not reached:
        return
    device = reached[0].device
    rows = torch.tensor(picked, device=device)
    own = {
        p: torch.stack([_square(e[p]) if p in e else torch.zeros((), device=p.device, dtype=torch.float64) for e in expected])
        for p in reached
    }
    total = torch.stack([norm.to(device) for norm in own.values()]).sum(0)
    norms = found.sq_norms(seen)
    finite = torch.ones(found.samples, dtype=torch.bool, device=device)
    for norm in norms.values():
        finite &= torch.isfinite(norm).to(device)
    # Samples without a finite gradient are left out of every step; here, too, as long as others remain.
    usable = [k for k, i in enumerate(picked) if bool(finite[i]) and bool(torch.isfinite(total[k]))]
    if not usable:
        raise SelfCheckError(
            f"{what}: no sample that the self-check looked at has a finite gradient (data, loss or weights with NaN or "
            "infinite values); nothing was released."
        )
    picked, expected, total = [picked[k] for k in usable], [expected[k] for k in usable], total[usable]
    own = {p: norm[usable] for p, norm in own.items()}
    rows = rows[usable]
    dtype = wide_dtype(reached[0].dtype)
    factors = torch.zeros(found.samples, device=device, dtype=dtype)
    factors[rows] = torch.linspace(0.5, 1.0, len(picked), device=device, dtype=dtype)
    sums = found.weighted_sums({p: factors.to(p.device) for p in seen}, finite)
    worst: list[tuple[float, str]] = []
    missing: dict[nn.Parameter, Tensor] = {}  # what is missing from the squared norms
    for p in reached:
        scale = torch.maximum(own[p], 1e-4 * total.to(own[p])).sqrt().clamp(min=1e-30)
        have = found.grads(p, rows.to(p.device)) if p in sums else None
        want_sum = torch.zeros_like(p, dtype=wide_dtype(p.dtype))
        squares = []
        for k, gradients in enumerate(expected):  # one after the other: of a large parameter each is large
            want = gradients.get(p, torch.zeros((), dtype=p.dtype, device=p.device))
            want_sum += float(factors[rows[k]]) * want
            squares.append(_square(want if have is None else have[k] - want.to(have.dtype)))
        off = torch.stack(squares).to(scale).sqrt() / scale
        off_sum = _square(sums[p] - want_sum.to(sums[p].dtype) if p in sums else want_sum).to(scale).sqrt() / scale.sum()
        have_norm = norms[p][rows.to(p.device)].to(own[p]) if p in norms else torch.zeros_like(own[p])
        off_norm = (own[p].sqrt() - have_norm.clamp(min=0).sqrt()).abs() / scale
        missing[p] = (own[p] - have_norm).to(device)
        error = float(torch.stack([off.max(), off_sum, off_norm.max()]).nan_to_num(nan=float("inf")).max())
        largest = _LARGEST_COARSE_JUMP if coarse or p.dtype not in TOLERANCE else _LARGEST_JUMP
        if error > max(tolerance(p.dtype, coarse=coarse), min(_TIMES_JUMP * jump, largest)):
            worst.append((error, controller.name_of(p)))
    if not worst and not coarse:
        short = float((torch.stack(list(missing.values())).sum(0) / total.clamp(min=1e-60)).max()) / 2
        if short > max(_NORM_TOLERANCE.get(p.dtype, COARSE) for p in reached):
            worst.append((short, controller.name_of(max(missing, key=lambda p: float(missing[p].sum())))))
    if worst:
        _complain(sorted(worst, reverse=True), len(reached), found.samples, what, controller.loss_reduction)


def jump_of(expected: list[dict[nn.Parameter, Tensor]], again: list[dict[nn.Parameter, Tensor]]) -> float:
    """The largest change, relative, of a parameter's gradient between two runs on the same samples."""
    largest = 0.0
    for before, after in zip(expected, again, strict=True):
        whole = sum(float(_square(g)) for g in before.values())
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
    seen = [p for p in params if p in set(found.params)]
    norms = found.sq_norms(seen)
    everything = torch.ones(found.samples, dtype=torch.bool, device=factors.device)
    joint = [norm.double().cpu() for norm in found.group_sq_norms([seen])] if seen else []  # as in a step, as are the sums
    sums = found.weighted_sums({p: factors.to(p.device, wide_dtype(p.dtype)) for p in seen}, everything)
    reached = [p for p in params if p in sums or p in expected]
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
    for p in reached:
        limit = _SAME_PASS_COARSE if coarse else _SAME_PASS.get(p.dtype, _SAME_PASS_COARSE)
        scale = max(size[p], 1e-4 * total, 1e-60) ** 0.5
        want = expected.get(p, torch.zeros((), dtype=p.dtype, device=p.device)).to(wide_dtype(p.dtype))
        error = float(_square(sums[p] - want if p in sums else want)) ** 0.5 / scale
        for i in picked if p in norms else ():  # a norm is that of the gradient that the sums are made of, or a little more
            row = torch.tensor([i], device=p.device)
            norm, own = float(norms[p][row]) ** 0.5, float(_square(found.grads(p, row)[0])) ** 0.5
            floor = max(own, 1e-2 * (total / found.samples) ** 0.5, 1e-30)
            error = max(error, (own - norm) / floor, (norm - own) / floor * limit / max(limit, 3e-2))
        if not error <= limit:
            worst.append((error, controller.name_of(p)))
    if worst:
        _complain(sorted(worst, reverse=True), len(reached), found.samples, what, controller.loss_reduction)


def _picked(norms: Sums, samples: int) -> list[int]:
    """Samples whose norms are looked at: all of a few, else those of :func:`extreme_samples`."""
    return list(range(samples)) if samples <= _FEW else extreme_samples(norms, samples)


def extreme_samples(norms: Sums, samples: int, *, ends: bool = True) -> list[int]:
    """Samples to look at one by one: those with the largest and the smallest gradient, the ``ends`` of the batch, and some between.

    What others share of a sample's loss is most different for samples unlike the rest: the longest text, the outlier.
    """
    finite = [norm.double().cpu().nan_to_num(0.0, 0.0) for norm in norms.values()]
    total = torch.stack(finite).sum(0) if finite else torch.zeros(samples)
    return sorted({*(some_samples(samples) if ends else ()), int(total.argmax()), int(total.argmin())})


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
