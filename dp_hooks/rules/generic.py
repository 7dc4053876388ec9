"""Modules without a rule: run the module again on each sample and differentiate, with ``torch.func`` or in a loop.

``vmap`` over samples is tried first; what it cannot do (ATen recurrent layers, control flow that depends on data) is done one
sample at a time through ordinary autograd, which is exact. A module that draws random numbers is refused: the repetition would
not see the numbers that the forward pass drew.
"""

import threading
import warnings
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .._tree import as_real, differentiable, join, split
from ..errors import UnsupportedModelError
from .embedding import bag_grad_samples, has_flat_ids
from .normalisation import feature_norm
from .rule import Call, Rule

Key = TypeVar("Key")
_RANDOM = "it draws random numbers (dropout?), and the repeated call draws others"


def needs_loop(module: nn.Module) -> bool:
    """Whether ``vmap`` has no rule for ``module``, so that the attempt is not worth it."""
    return isinstance(module, (nn.RNNBase, nn.EmbeddingBag)) or bool(getattr(module, "sparse", False))


def _batch_axes(call: Call, tensors: list[Tensor]) -> list[int | None]:
    """Return the sample axis of every input, or None for inputs that all samples share.

    An input that once had another size than the batch is shared for good, also when a later batch has just its size.
    """
    axis, n = call.batch_dim, call.samples
    if call.cut is not None:
        return [0 if i in call.cut else None for i in range(len(tensors))]
    shared: set[int] = call.memo.setdefault("shared", set())
    shared |= {i for i, t in enumerate(tensors) if t.dim() <= axis or t.shape[axis] != n}
    return [None if i in shared else axis for i in range(len(tensors))]


def contraction(outputs: Any, grads: list[Tensor | None]) -> Tensor:
    """Return ``sum(output * grad)`` over all outputs: its gradient is the vector-Jacobian product.

    Complex numbers count as pairs of real ones, as in PyTorch: the gradient of ``Re(sum(output * conj(grad)))`` is ``grad``.
    Behind the last output that got a gradient there may be any number of others: a list with one for each sample.
    """
    found = differentiable(outputs)
    last = max((i for i, grad in enumerate(grads) if grad is not None), default=-1)
    if len(found) <= last:
        raise RuntimeError(f"the repeated call returned {len(found)} tensors, the first one {len(grads)}")
    found, grads = found[: last + 1], grads[: last + 1]
    if any(grad is not None and grad.shape != out.shape for out, grad in zip(found, grads, strict=True)):
        raise RuntimeError("the repeated call returned tensors of other shapes than the first one")
    pairs = [(out, grad.to(out.dtype)) for out, grad in zip(found, grads, strict=True) if grad is not None]
    terms = [(as_real(out) * as_real(grad)).sum() for out, grad in pairs]
    return torch.stack(terms).sum()


def gradients_of(total: Tensor, leaves: Mapping[Key, Tensor]) -> dict[Key, Tensor]:
    """Return the gradients of ``total``; zeros for leaves that it does not depend on."""
    found = zip(leaves.items(), torch.autograd.grad(total, list(leaves.values()), allow_unused=True), strict=True)
    return {key: torch.zeros_like(p) if g is None else g.to_dense() if g.is_sparse else g for (key, p), g in found}


def _alone(call: Call, row: Tensor) -> Tensor:
    """Return what the module got for one sample, from a row without sample axis."""
    return row if call.cut is not None else row.unsqueeze(call.batch_dim)


def _row(call: Call, tensor: Tensor, i: int) -> Tensor:
    return tensor[i] if call.cut is not None else tensor.narrow(call.batch_dim, i, 1)


def _by_vmap(call: Call, params: dict[str, Tensor]) -> dict[str, Tensor]:
    axis = call.batch_dim
    skeleton, inputs = split((call.args, call.kwargs))
    axes = _batch_axes(call, inputs)
    grads = [g for g in call.grads if g is not None]

    def loss(params: Mapping[str, Tensor], inputs: list[Tensor], grads: list[Tensor]) -> Tensor:
        alone = [t if a is None else _alone(call, t) for t, a in zip(inputs, axes, strict=True)]
        args, kwargs = join(skeleton, alone)
        queue = iter(grads)
        placed = [None if g is None else _alone(call, next(queue)) for g in call.grads]
        return contraction(call.run(params, args, kwargs), placed)

    in_dims = (None, axes, [axis] * len(grads))
    mapped = torch.func.vmap(torch.func.grad(loss), in_dims=in_dims, randomness="error")
    return dict(mapped(params, inputs, grads))


def _random_state() -> list[Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])]


class _Draws(TorchDispatchMode):
    """Tells whether operations of this thread draw random numbers: the generators are those of all threads."""

    drew = False

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        self.drew = self.drew or torch.Tag.nondeterministic_seeded in func.tags
        return func(*args, **(kwargs or {}))


def _by_loop(call: Call, params: dict[str, Tensor]) -> dict[str, Tensor]:
    before = _random_state()
    found = _looped(call, params)
    if all(torch.equal(a, b) for a, b in zip(before, _random_state(), strict=True)):
        return found
    if threading.active_count() == 1:
        raise _refusal(call, _RANDOM)
    with _Draws() as draws:  # type: ignore[no-untyped-call]  # another thread may have drawn, or seeded
        found = _looped(call, params)
    if draws.drew:
        raise _refusal(call, _RANDOM)
    return found


def _looped(call: Call, params: dict[str, Tensor]) -> dict[str, Tensor]:
    skeleton, inputs = split((call.args, call.kwargs))
    axes = _batch_axes(call, inputs)
    rows: dict[str, list[Tensor]] = {name: [] for name in params}
    for i in range(call.samples):
        alone = [t if a is None else _row(call, t, i) for t, a in zip(inputs, axes, strict=True)]
        args, kwargs = join(skeleton, alone)
        with torch.enable_grad():
            leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
            placed = [None if g is None else _row(call, g, i) for g in call.grads]
            found = gradients_of(contraction(call.run(leaves, args, kwargs), placed), leaves)
        for name, grad in found.items():
            rows[name].append(grad)
    return {name: torch.stack(grads) if grads else params[name].new_zeros((0, *params[name].shape)) for name, grads in rows.items()}


def _refusal(call: Call, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{call.name or 'the model'} ({type(call.module).__name__}): there is no rule for this class, and its "
        f"per-sample gradients cannot be computed by repeating the call, since {reason}. Remedy: write a rule with "
        "dp_hooks.register_rule, set the dropout inside to 0, or freeze its parameters with requires_grad_(False)."
    )


def grad_samples(call: Call) -> dict[str, Tensor]:
    """Per-sample gradients of every trainable parameter in the module and below it."""
    if has_flat_ids(call):
        if call.cut is not None:
            raise _refusal(call, "its ids are flat, with offsets: a row of them is not a sample")
        return bag_grad_samples(call)
    params = {name: call.parameter(name).detach() for name in call.names}
    if call.samples and not needs_loop(call.module) and "loop" not in call.memo:
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="There is a performance drop")
                return _by_vmap(call, params)
        except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
            if "randomness" in str(error) or "random operation" in str(error):
                raise _refusal(call, _RANDOM) from error
            call.memo["loop"] = error
    try:
        return _by_loop(call, params)
    except UnsupportedModelError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError) as error:
        raise _refusal(call, f"that failed with {type(error).__name__}: {error}") from error


def _feature_norm(call: Call) -> dict[str, Tensor]:
    return feature_norm(call) or grad_samples(call)


FEATURE_NORM = Rule("norm over features", _feature_norm, parameters=frozenset({"weight"}), any_rank=True)
GENERIC = Rule("generic", grad_samples, parameters=None, keep=True, whole_subtree=True)
