"""Whether what was captured agrees with plain autograd on single samples, up to rounding."""

import torch
from torch import Tensor, nn

from ..capture.controller import HookController
from ..errors import SelfCheckError
from ..gradients.sample_gradients import SampleGradients

# Largest disagreement relative to the gradient of a parameter, or to a hundredth of the sample's whole gradient where
# the parameter's own is smaller. Rounding stays well below; a mixed-up or missing sample is far above.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-2}
COARSE = 1e-1
# How much too small the norm of a sample's whole gradient may be: it is what keeps its contribution below the bound.
_NORM_TOLERANCE = {torch.float64: 1e-5, torch.float32: 3e-3}


def tolerance(dtype: torch.dtype, *, coarse: bool) -> float:
    """The largest relative disagreement; ``coarse``: autocast or half precision is in use."""
    return COARSE if coarse else TOLERANCE.get(dtype, COARSE)


def compare(
    found: SampleGradients,
    picked: list[int],
    expected: list[dict[nn.Parameter, Tensor]],
    params: list[nn.Parameter],
    controller: HookController,
    what: str,
    *,
    coarse: bool,
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
    dtype = torch.promote_types(reached[0].dtype, torch.float32)
    factors = torch.zeros(found.samples, device=device, dtype=dtype)
    factors[rows] = torch.linspace(0.5, 1.0, len(picked), device=device, dtype=dtype)
    sums = found.weighted_sums({p: factors.to(p.device) for p in seen}, finite)
    worst: list[tuple[float, str]] = []
    missing: dict[nn.Parameter, Tensor] = {}  # what is missing from the squared norms
    for p in reached:
        scale = torch.maximum(own[p], 1e-4 * total.to(own[p])).sqrt().clamp(min=1e-30)
        have = found.grads(p, rows.to(p.device)) if p in sums else None
        want_sum = torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32))
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
        if error > tolerance(p.dtype, coarse=coarse):
            worst.append((error, controller.name_of(p)))
    if not worst and not coarse:
        short = float((torch.stack(list(missing.values())).sum(0) / total.clamp(min=1e-60)).max()) / 2
        if short > max(_NORM_TOLERANCE.get(p.dtype, COARSE) for p in reached):
            worst.append((short, controller.name_of(max(missing, key=lambda p: float(missing[p].sum())))))
    if worst:
        _complain(sorted(worst, reverse=True), len(reached), found.samples, what, controller.loss_reduction)


def _square(gradient: Tensor) -> Tensor:
    """The squared norm of one gradient, as a float64."""
    dtype = torch.promote_types(gradient.dtype, torch.float32)
    norm: Tensor = torch.linalg.vector_norm(gradient, dtype=dtype)
    return norm.double().square()


def _complain(worst: list[tuple[float, str]], params: int, samples: int, what: str, loss_reduction: str) -> None:
    listing = "\n".join(f"  - {name}: off by {error:.1e} of its size" for error, name in worst[:8])
    more = f"\n  ... and {len(worst) - 8} more" if len(worst) > 8 else ""
    raise SelfCheckError(
        f"{what}: per-sample gradients of {len(worst)} of {params} parameters differ from plain autograd on single "
        f"samples (batch of {samples}); nothing was released.\n{listing}{more}\nLikely causes: samples mix (batch "
        "statistics, a loss averaged over tokens of the whole batch, contrastive or load-balancing terms); "
        f"loss_reduction={loss_reduction!r} is not how the loss is reduced; an input that all samples "
        "share has as many rows as the batch; random numbers other than dropout. Remedy: return per-sample losses from a "
        "@dp_step function, replace the mixing module, or freeze the parameters named."
    )
