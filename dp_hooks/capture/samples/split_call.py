"""Calls of modules in which samples are not simply the rows of one axis, laid out so that a rule can read them."""

import dataclasses

from torch import Tensor

from ..._tree import join, split
from ...errors import UnsupportedModelError
from ...rules import Call, Rule
from ...rules.embedding import has_flat_ids
from .axis import SampleAxis
from .uses import UseLayout


def split_call(rule: Rule, call: Call, use: UseLayout) -> tuple[Rule, Call]:
    """Return the rule and the call with one slice per sample, given where probes found the samples; else refuse the call."""
    skeleton, inputs = split((call.args, call.kwargs))
    n = call.samples
    if use.reason is not None:
        raise _refusal(call, use.reason)
    ins, outs = use.inputs, use.outputs or ()
    if has_flat_ids(call) and outs == (SampleAxis(0),):
        return rule, call  # one bag for each sample, wherever its ids are
    if rule.whole_subtree:  # of outputs at the end that have no sample axis there may be any number
        outs = (*outs, *(None for _ in call.grads[len(outs) :]))
    if len(ins) != len(inputs) or len(outs) != len(call.grads):
        raise _refusal(call, "it was called with other inputs or gave other outputs than in the runs that showed its layout")
    for sample_axis, tensor in [*zip(ins, inputs, strict=True), *zip(outs, call.grads, strict=True)]:
        if sample_axis is not None and tensor is not None and not sample_axis.fits(tensor, n):
            raise _refusal(call, f"{n} samples do not fit into a tensor of shape {tuple(tensor.shape)} as they should")
    for sample_axis, grad in zip(outs, call.grads, strict=True):
        if sample_axis is None and grad is not None:
            raise _refusal(call, "an output that the loss depends on has no axis that counts samples")
    here = SampleAxis(call.batch_dim)
    used = {at for at, g in zip(outs, call.grads, strict=True) if g is not None}
    if not rule.whole_subtree and used <= {here} and {*ins} <= {here, None}:
        return rule, call
    if rule.whole_subtree or rule.any_rank:
        return rule, _cut(call, skeleton, inputs, ins, outs)
    moving = used | {*ins}
    sample_axis = next(iter(moving)) if len(moving) == 1 else None
    if sample_axis is not None:
        one_row = sample_axis == SampleAxis(sample_axis.axis)
        if sample_axis.axis == 0 and not one_row:
            return _row_by_row(rule), _cut(call, skeleton, inputs, ins, outs)
        if one_row and rule.batch_dim is None:
            return rule, dataclasses.replace(call, batch_dim=sample_axis.axis)
    raise _refusal(call, "its samples are laid out in a way that its rule cannot read")


def _cut(
    call: Call, skeleton: object, inputs: list[Tensor], ins: tuple[SampleAxis | None, ...], outs: tuple[SampleAxis | None, ...]
) -> Call:
    n = call.samples
    tensors = [t if at is None else at.samples(t, n) for t, at in zip(inputs, ins, strict=True)]
    args, kwargs = join(skeleton, tensors)
    grads = [None if g is None or at is None else at.samples(g, n) for g, at in zip(call.grads, outs, strict=True)]
    cut = frozenset(i for i, at in enumerate(ins) if at is not None)
    return dataclasses.replace(call, args=args, kwargs=kwargs, grads=grads, batch_dim=0, cut=cut)


def _row_by_row(rule: Rule) -> Rule:
    """A rule for calls that got several rows per sample as if each were a sample of its own: their gradients add up."""

    def grad_samples(call: Call) -> dict[str, Tensor]:
        skeleton, inputs = split((call.args, call.kwargs))
        rows = inputs[0].shape[0] * inputs[0].shape[1]
        args, kwargs = join(skeleton, [t.flatten(0, 1) for t in inputs])
        grads = [None if g is None else g.flatten(0, 1) for g in call.grads]
        flat = dataclasses.replace(call, args=args, kwargs=kwargs, grads=grads, samples=rows, cut=None)
        found = rule.grad_samples(flat)
        return {name: g.unflatten(0, (call.samples, -1)).sum(1) for name, g in found.items()}

    return dataclasses.replace(rule, grad_samples=grad_samples, sq_norms=None, weighted_sums=None, outer_products=None)


def _refusal(call: Call, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{call.name or 'the model'} ({type(call.module).__name__}): {reason}, so its per-sample gradients cannot be told "
        f"apart ({', '.join(call.names)}). Remedy: give the module one row per sample, write a rule for it with "
        "dp_hooks.register_rule, or freeze its parameters with requires_grad_(False)."
    )
