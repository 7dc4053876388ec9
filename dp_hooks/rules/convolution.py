"""Convolutions in one to three dimensions, plain and transposed, as linear maps of patches.

``y[n, o, p] = sum_{c, k} x[n, c, p * stride + k * dilation] W[o, c, k]``: with the patches ``[n, p, (c k)]`` of the padded
input the weight gradient is a sum of outer products over the output positions ``p``. Transposed convolutions swap the
roles: patches of the output gradient meet the input. Weighted sums are the ordinary weight gradient of scaled output
gradients, by PyTorch's own kernels.
"""

from collections.abc import Hashable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from .linear import wide
from .outer import OuterProducts
from .rule import Call, Rule

_COPY = 32  # multiplications that take as long as copying a number of a patch from a scattered place


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
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    return F.pad(x, pad, mode=mode) if any(pad) else x


def _needed(layer: _ConvNd, x: Tensor) -> list[int]:
    """Return the size of what a transposed convolution of ``x`` gives, without any padding."""
    sizes = zip(x.shape[2:], layer.stride, layer.kernel_size, layer.dilation, strict=True)
    return [(size - 1) * s + (k - 1) * d + 1 for size, s, k, d in sizes]


def _output_padding(layer: _ConvNd, x: Tensor, g: Tensor) -> list[int]:
    """Return the output padding of a transposed convolution, which a call may override by its ``output_size``."""
    sizes = zip(g.shape[2:], _needed(layer, x), cast("tuple[int, ...]", layer.padding), strict=True)
    return [size - (need - 2 * p) for size, need, p in sizes]


def _seen_and_seeing(call: Call) -> tuple[Tensor, Tensor]:
    """Return the tensor that patches are cut from, padded, and the one that meets them, each ``[n, c, ...]``."""
    layer, x, g = _layer(call), call.input, call.grad
    x, g = wide(x, g), wide(g, x)
    if not layer.transposed:
        return _padded(layer, x), g
    # Output position = input position * stride + k * dilation - padding: the gradient is read as an input would be.
    pad: list[int] = []
    for p, size, wanted in zip(cast("tuple[int, ...]", layer.padding), g.shape[2:], _needed(layer, x), strict=True):
        pad = [p, wanted - size - p, *pad]
    return F.pad(g, pad), x


class Patches(OuterProducts):
    """A use whose ``right`` factors are patches, which are only written out where they have to be.

    Inner products of patches are sums of inner products of pixels: ``patch_p . patch_q = sum_k pixel_{p+k} . pixel_{q+k}``. With
    fewer pixels than entries of a patch that is less work, and it copies nothing.
    """

    def __init__(self, seen: Tensor, seeing: Tensor, layer: _ConvNd, shape: torch.Size, scale: float = 1.0) -> None:
        """Patches of ``seen`` ``[n, c, ...]``, padded already, meet the positions of ``seeing`` ``[n, o, ...]``."""
        self._seen, self._seeing, self._layer = seen, seeing, layer
        self.left = seeing.flatten(2).mT
        self.shape, self.scale = shape, scale
        self.is_kept, self._norms = False, None

    @property
    def right(self) -> Tensor:  # type: ignore[override]
        """The patches ``[n, p, (c k)]``, a transposed view."""
        return _cut(self._seen, self._layer, self._seeing.shape[2:]).mT

    @property
    def columns(self) -> int:
        """Numbers in a patch."""
        return self._seen.shape[1] * torch.Size(self._layer.kernel_size).numel()

    @property
    def storages(self) -> set[int]:
        """Where the memory of the input and the output gradients is; patches are made when they are needed."""
        return {self._seen.untyped_storage().data_ptr(), self._seeing.untyped_storage().data_ptr()}

    @property
    def numbers(self) -> int:
        """How many numbers the input and the output gradients hold."""
        return self._seen.numel() + self._seeing.numel()

    def right_products(self, other: OuterProducts) -> Tensor:
        """Of patches with themselves from pixels where that is cheaper, else of the patches written out."""
        if other is self and self._cost_of_pixels() <= self._cost_of_patches():
            return self._products_of_pixels()
        right = self.right
        return torch.bmm(right, (right if other is self else other.right).mT)

    def blocks(self) -> list[tuple[OuterProducts, OuterProducts, float]]:
        """One block: the work is in the pixels."""
        return [(self, self, self.scale**2)]

    def pick(self, samples: slice | Tensor) -> "Patches":
        """Return the factors of some samples."""
        return Patches(self._seen[samples], self._seeing[samples], self._layer, self.shape, self.scale)

    def norms(self) -> tuple[Tensor, Tensor]:
        """As for other uses; of patches from the norms of their pixels."""
        if self._norms is None:
            pixels = self._seen.square().sum(1, keepdim=True)
            patches = _cut(pixels, self._layer, self._seeing.shape[2:]).sum(1).sqrt()
            self._norms = torch.linalg.vector_norm(self.left, dim=2), patches
        return self._norms

    def weighed(self, weights: Tensor) -> "Patches":
        """Return the factors of gradients that are multiplied by ``weights`` ``[n]``."""
        seeing = self._seeing * weights.to(self._seeing).view(-1, *[1] * (self._seeing.dim() - 1))
        return Patches(self._seen, seeing, self._layer, self.shape, self.scale)

    def together(self, count: int) -> OuterProducts:
        """Return the factors of sums over ``count`` samples that follow each other, with the patches written out."""
        seen, seeing = (t.unflatten(0, (-1, count)) for t in (self._seen, self._seeing))
        left = seeing.flatten(3).movedim(1, 2).flatten(2)
        return OuterProducts(left.mT, _cut(seen.movedim(1, 2), self._layer, self._seeing.shape[2:]).mT, self.shape, self.scale)

    def absolute(self) -> "Patches":
        """Return the factors without their signs."""
        return Patches(self._seen.abs(), self._seeing.abs(), self._layer, self.shape, abs(self.scale))

    def _cost_of_pixels(self) -> float:
        kernel = torch.Size(self._layer.kernel_size).numel()
        return self._seen.shape[2:].numel() ** 2 * self._seen.shape[1] + self.tokens**2 * kernel

    def _cost_of_patches(self) -> float:
        return self.tokens * self.columns * (self.tokens + _COPY)

    def gram_cost(self, others: int) -> float:
        """As for other uses, with the cheaper way to the products of patches."""
        products = min(self._cost_of_pixels(), self._cost_of_patches()) * others / self.tokens
        return self.tokens * others * (self.rows + 1.0) + products

    def instantiation_cost(self) -> float:
        """As for other uses, and the patches have to be written out."""
        return super().instantiation_cost() + _COPY * self.tokens * self.columns

    def _products_of_pixels(self) -> Tensor:
        n, c, *size = self._seen.shape
        pixels = self._seen.reshape(n, c, -1)
        grams = torch.bmm(pixels.mT, pixels)
        total, layer = grams.view(n, *size, *size), self._layer
        of_axes = zip(layer.kernel_size, layer.stride, layer.dilation, self._seeing.shape[2:], strict=True)
        # Sums over a kernel are sums over one axis after the other.
        for axis, (kernel, stride, dilation, out) in enumerate(of_axes, 1):
            total = _along_diagonal(total, axis, axis + len(size), kernel, stride, dilation, out)
        return total.reshape(n, self.tokens, self.tokens)


def _along_diagonal(pairs: Tensor, one: int, other: int, kernel: int, stride: int, dilation: int, out: int) -> Tensor:
    """Sum over ``k`` of what is at ``(p stride + k dilation, q stride + k dilation)`` on two axes, for ``out`` each of p and q."""
    shape, strides, at = list(pairs.shape), list(pairs.stride()), pairs.storage_offset()
    step = dilation * (strides[one] + strides[other])
    for axis in (one, other):
        shape[axis], strides[axis] = out, strides[axis] * stride
    first, *more = [pairs.as_strided(shape, strides, at + k * step) for k in range(kernel)]
    if not more:
        return first
    total = first + more[0]
    for part in more[1:]:
        total += part
    return total


def _cut(seen: Tensor, layer: _ConvNd, out: torch.Size) -> Tensor:
    """Return the patches ``[n, (c k), p]`` of ``seen`` for ``out`` positions; a copy laid out for products over ``p``.

    Of ``seen`` ``[n, c, m, ...]``, m inputs in one sample, those of all m: ``[n, (c k), (m p)]``.
    """
    axes = len(layer.kernel_size)
    several, strides = seen.shape[2:-axes], seen.stride()
    step = [s * d for s, d in zip(strides[-axes:], layer.dilation, strict=True)]
    jump = [s * d for s, d in zip(strides[-axes:], layer.stride, strict=True)]
    shape = (*seen.shape[:2], *layer.kernel_size, *several, *out)
    view = seen.as_strided(shape, (*strides[:2], *step, *strides[2:-axes], *jump))
    rows = seen.shape[1] * torch.Size(layer.kernel_size).numel()
    return view.reshape(seen.shape[0], rows, several.numel() * out.numel())


def outer_products(call: Call) -> dict[str, OuterProducts]:
    """The weight's, without groups: positions as tokens."""
    layer = _layer(call)
    if "weight" not in call.names or layer.groups > 1:
        return {}
    return {"weight": Patches(*_seen_and_seeing(call), layer, call.parameter("weight").shape)}


def grad_samples(call: Call) -> dict[str, Tensor]:
    """Output gradients times patches, per sample and group; for the bias the sum over positions."""
    out: dict[str, Tensor] = {}
    if "weight" in call.names:
        layer, (seen, seeing) = _layer(call), _seen_and_seeing(call)
        cut = _cut(seen, layer, seeing.shape[2:])
        split = call.samples * layer.groups
        left = seeing.reshape(split, seeing.shape[1] // layer.groups, cut.shape[2])
        right = cut.reshape(split, cut.shape[1] // layer.groups, cut.shape[2])
        out["weight"] = torch.bmm(left, right.mT).view(call.samples, *call.parameter("weight").shape)
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
        pad, padding, beyond = _padding(layer), [0] * len(layer.kernel_size), list(layer.output_padding)
        if layer.transposed:
            padding, beyond = list(cast("tuple[int, ...]", layer.padding)), _output_padding(layer, x, g)
        elif layer.padding_mode == "zeros" and pad[::2] == pad[1::2]:
            padding = pad[::-2]
        else:
            x = _padded(layer, x)
        weight, stride, dilation = call.parameter("weight").detach().to(g.dtype), list(layer.stride), list(layer.dilation)
        settings = (stride, padding, dilation, layer.transposed, beyond, layer.groups)
        _, out["weight"], _ = torch.ops.aten.convolution_backward(g, x, weight, None, *settings, [False, True, False])
    if "bias" in call.names:
        out["bias"] = (wide(call.grad) * scale).flatten(2).sum((0, 2))
    return out


def _settings(module: nn.Module) -> Hashable:
    layer = cast(_ConvNd, module)
    shape = (layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.output_padding)
    return (*shape, layer.groups, layer.padding_mode, layer.transposed)


CONVOLUTION = Rule(
    "Convolution",
    grad_samples,
    weighted_sums=weighted_sums,
    outer_products=outer_products,
    subclasses=True,
    batch_dim=0,
    alike=_settings,
)

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONVOLUTIONS: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)
