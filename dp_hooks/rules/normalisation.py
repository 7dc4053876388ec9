"""Normalisation with an elementwise affine map: ``y = normalised(x) * w + b``, over features, groups or channels."""

from collections.abc import Hashable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .linear import wide
from .rule import Call, Rule


def _affine(call: Call, normalised: Tensor | None, summed: tuple[int, ...]) -> dict[str, Tensor]:
    """``dw[n] = sum g * normalised(x)`` and ``db[n] = sum g`` over the dimensions that share the parameter."""
    g = wide(call.grad)
    out: dict[str, Tensor] = {}
    if normalised is not None:
        product = normalised.to(g.dtype) * g
        out["weight"] = product.sum(summed) if summed else product
    if "bias" in call.names:
        out["bias"] = g.sum(summed) if summed else g
    return out


def _layer_norm(call: Call) -> dict[str, Tensor]:
    layer = cast(nn.LayerNorm, call.module)
    x = F.layer_norm(call.input, layer.normalized_shape, eps=layer.eps) if "weight" in call.names else None
    return _affine(call, x, tuple(range(1, call.grad.dim() - len(layer.normalized_shape))))


def _rms_norm(call: Call) -> dict[str, Tensor]:
    layer = cast(nn.RMSNorm, call.module)
    x = F.rms_norm(call.input, layer.normalized_shape, eps=layer.eps)
    return _affine(call, x, tuple(range(1, call.grad.dim() - len(layer.normalized_shape))))


def _group_norm(call: Call) -> dict[str, Tensor]:
    layer = cast(nn.GroupNorm, call.module)
    x = None
    if "weight" in call.names:
        x = F.group_norm(call.input, layer.num_groups, eps=layer.eps) if call.samples else call.grad  # it takes no empty batch
    return _affine(call, x, tuple(range(2, call.grad.dim())))


def _instance_norm(call: Call) -> dict[str, Tensor]:
    layer = cast(nn.modules.instancenorm._InstanceNorm, call.module)
    x = None
    if "weight" in call.names:
        x = F.instance_norm(call.input, eps=layer.eps) if call.samples else call.grad
    return _affine(call, x, tuple(range(2, call.grad.dim())))


def _has_no_statistics(module: nn.Module) -> bool:
    return not module.track_running_stats


def _size(module: nn.Module) -> Hashable:
    """What is normalised, and with which epsilon."""
    return (getattr(module, "normalized_shape", None), getattr(module, "num_groups", None), module.eps)


LAYER_NORM = Rule("LayerNorm", _layer_norm, subclasses=True, any_rank=True, alike=_size)
RMS_NORM = Rule("RMSNorm", _rms_norm, subclasses=True, any_rank=True, alike=_size)
GROUP_NORM = Rule("GroupNorm", _group_norm, subclasses=True, batch_dim=0, alike=_size)
INSTANCE_NORM = Rule("InstanceNorm", _instance_norm, subclasses=True, applies=_has_no_statistics, batch_dim=0, alike=_size)


def is_feature_norm(module: nn.Module) -> bool:
    """Whether ``module`` looks like a norm over features of a library's own, as the RMSNorm classes of ``transformers``.

    Whether it is affine in its weight is tested on its first call, see :func:`feature_norm`.
    """
    own = [name for name, p in module.named_parameters() if p is not None]
    return (
        "Norm" in type(module).__name__
        and own == ["weight"]
        and cast(Tensor, module.weight).dim() == 1
        and not any(module.children())
        and not any(True for _ in module.buffers())
    )


def _is_affine(call: Call, base: Tensor, slope: Tensor) -> bool:
    """Whether the module computes ``base + slope * weight`` at its present weight and at one whose entries all differ.

    Weights as they are initialised, all alike, would not tell a module that permutes, averages or rectifies them.
    """
    w = call.parameter("weight").detach()
    for value in (w, torch.linspace(-1.5, 1.25, w.shape[0], dtype=w.dtype, device=w.device)):
        found = call.run({"weight": value}, call.args, call.kwargs)
        tolerance = 50 * torch.finfo(found.dtype).eps
        if not torch.allclose(found, base + slope * value.to(found.dtype), rtol=tolerance, atol=tolerance):
            return False
    return True


def feature_norm(call: Call) -> dict[str, Tensor] | None:
    """``dw[n] = sum_t g * (y(w=1) - y(w=0))`` if the module is affine in ``w`` feature by feature, else None.

    Covers ``w * normalised(x)``, ``(1 + w) * normalised(x)`` and what else a library may have made of it, gates included. The
    property is tested once, on the first call with samples.
    """
    w = call.parameter("weight").detach()
    if call.samples == 0:
        return {"weight": w.new_zeros((0, *w.shape))}
    unfit = call.memo.get("affine") is False or len(call.grads) != 1
    if unfit or call.grad.dim() < 2 or call.grad.shape[-1] != w.shape[0]:
        return None
    slope = call.run({"weight": torch.ones_like(w)}, call.args, call.kwargs)
    if not isinstance(slope, Tensor):
        call.memo["affine"] = False
        return None
    if "affine" not in call.memo or not call.memo["homogeneous"]:
        base = call.run({"weight": torch.zeros_like(w)}, call.args, call.kwargs)
        slope = slope - base
        if "affine" not in call.memo:
            call.memo["homogeneous"] = not bool(base.any())
            call.memo["affine"] = _is_affine(call, base, slope)
    if not call.memo["affine"]:
        return None
    return _affine(call, slope.movedim(call.batch_dim, 0), tuple(range(1, call.grad.dim() - 1)))
