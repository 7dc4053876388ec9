"""Convolutions in one to three dimensions, plain and transposed, as linear maps of patches.

``y[n, o, p] = sum_{c, k} x[n, c, p * stride + k * dilation] W[o, c, k]``: with the patches ``[n, p, (c k)]`` of the padded
input the weight gradient is a sum of outer products over the output positions ``p``. Transposed convolutions swap the
roles: patches of the output gradient meet the input. Weighted sums are the ordinary weight gradient of scaled output
gradients, by PyTorch's own kernels.
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from .linear import wide
from .outer import Outer
from .rule import Call, Dims, Rule


def _layer(call: Call) -> _ConvNd:
    return cast(_ConvNd, call.module)


def _padding(layer: _ConvNd) -> list[int]:
    """Zeros (or their like) before and after each axis, the last axis first, as ``F.pad`` wants them."""
    if layer.padding == "valid":
        return [0] * (2 * len(layer.kernel_size))
    return list(layer._reversed_padding_repeated_twice)


def _padded(layer: _ConvNd, x: Tensor) -> Tensor:
    """Return the input as the convolution without padding sees it."""
    pad = _padding(layer)
    if not any(pad):
        return x
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    return F.pad(x, pad, mode=mode)


def patches(
    x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...], out: torch.Size
) -> Tensor:
    """Return ``[n, (c k), p]``: what each output position sees of ``x [n, c, ...]``; a copy laid out for products over ``p``."""
    strides = x.stride()
    step = [s * d for s, d in zip(strides[2:], dilation, strict=True)]
    jump = [s * d for s, d in zip(strides[2:], stride, strict=True)]
    view = x.as_strided((*x.shape[:2], *kernel, *out), (*strides[:2], *step, *jump))
    return view.reshape(x.shape[0], x.shape[1] * torch.Size(kernel).numel(), out.numel())


def _seen_and_seeing(call: Call) -> tuple[Tensor, Tensor]:
    """Return the tensor that patches are cut from, padded, and the one that meets them, each ``[n, c, ...]``."""
    layer, x, g = _layer(call), call.input, call.grad
    x, g = wide(x, g), wide(g, x)
    if not layer.transposed:
        return _padded(layer, x), g
    # Output position = input position * stride + k * dilation - padding: the gradient is read as an input would be.
    need = [
        (size - 1) * s + (k - 1) * d + 1
        for size, s, k, d in zip(x.shape[2:], layer.stride, layer.kernel_size, layer.dilation, strict=True)
    ]
    pad: list[int] = []
    for p, size, wanted in zip(cast("tuple[int, ...]", layer.padding), g.shape[2:], need, strict=True):
        pad = [p, wanted - size - p, *pad]
    return F.pad(g, pad), x


def _products(call: Call) -> tuple[Tensor, Tensor]:
    """Return ``left [n * groups, p, o]`` and ``right [n * groups, p, (c k)]``, transposed views."""
    layer = _layer(call)
    seen, seeing = _seen_and_seeing(call)
    cut = patches(seen, layer.kernel_size, layer.stride, layer.dilation, seeing.shape[2:])
    split = call.samples * layer.groups
    left = seeing.reshape(split, seeing.shape[1] // layer.groups, seeing.shape[2:].numel())
    return left.mT, cut.reshape(split, cut.shape[1] // layer.groups, cut.shape[2]).mT


def dims(call: Call) -> dict[str, Dims]:
    """The weight's, without groups: as many tokens as there are positions."""
    layer = _layer(call)
    if "weight" not in call.names or layer.groups > 1:
        return {}
    weight = call.parameter("weight")
    places = call.input if layer.transposed else call.grad
    return {"weight": Dims(places.shape[2:].numel(), weight.shape[0], weight[0].numel())}


def factored(call: Call) -> dict[str, Outer]:
    """Positions as tokens."""
    return {"weight": Outer(*_products(call), call.parameter("weight").shape)} if dims(call) else {}


def grad_samples(call: Call) -> dict[str, Tensor]:
    """Output gradients times patches, per sample and group; for the bias the sum over positions."""
    out: dict[str, Tensor] = {}
    if "weight" in call.names:
        left, right = _products(call)
        out["weight"] = torch.bmm(left.mT, right).view(call.samples, *call.parameter("weight").shape)
    if "bias" in call.names:
        out["bias"] = wide(call.grad).flatten(2).sum(2)
    return out


def weighted_sums(call: Call, factors: Tensor) -> dict[str, Tensor]:
    """PyTorch's own weight gradient, of output gradients (or inputs, where they are fewer) scaled per sample."""
    layer, x, g = _layer(call), call.input, call.grad
    x, g = wide(x, g), wide(g, x)
    out: dict[str, Tensor] = {}
    scale = factors.to(g.dtype).view(-1, *[1] * (g.dim() - 1))
    if "weight" in call.names:
        if g[0].numel() <= x[0].numel():
            g = g * scale
        else:
            x = x * scale
        padding = [0] * len(layer.kernel_size)
        if layer.transposed:
            padding = list(cast("tuple[int, ...]", layer.padding))
        elif layer.padding_mode == "zeros" and _is_even(_padding(layer)):
            padding = _padding(layer)[::-2]
        else:
            x = _padded(layer, x)
        _, grad, _ = torch.ops.aten.convolution_backward(
            g,
            x,
            call.parameter("weight").detach().to(g.dtype),
            None,
            list(layer.stride),
            padding,
            list(layer.dilation),
            layer.transposed,
            list(layer.output_padding),
            layer.groups,
            [False, True, False],
        )
        out["weight"] = grad
    if "bias" in call.names:
        out["bias"] = (wide(call.grad) * scale).flatten(2).sum((0, 2))
    return out


def _is_even(pad: list[int]) -> bool:
    return pad[0::2] == pad[1::2]


CONVOLUTION = Rule(
    "Convolution", grad_samples, weighted_sums=weighted_sums, dims=dims, factored=factored, subclasses=True, batch_dim=0
)

CONVOLUTIONS: tuple[type[nn.Module], ...] = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
