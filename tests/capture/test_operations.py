"""Every operation that parameters may meet the batch in: operands of 0 to 4 dimensions, real and complex, in place and not."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dp_hooks import HookController

from ..models import Net
from ..reference import sample_grads

N = 3
SIZES = (2, 3, 4)

ELEMENTWISE = {
    "add": lambda p, x: p + x,
    "radd": lambda p, x: x + p,
    "sub": lambda p, x: p - x,
    "rsub": lambda p, x: x - p,
    "torch.rsub": lambda p, x: torch.rsub(p, x),
    "mul": lambda p, x: p * x,
    "div": lambda p, x: x / (2 + p * p),
    "rdiv": lambda p, x: p / (2 + x.abs()),
    "pow": lambda p, x: (1 + x.abs()) ** p,
    "rpow": lambda p, x: (1 + p * p) ** x,
    "float_power": lambda p, x: torch.float_power(1 + x.abs(), p),
    "maximum": torch.maximum,
    "minimum": lambda p, x: torch.minimum(x, p),
    "fmax": torch.fmax,
    "where": lambda p, x: torch.where(x > 0, x, p * x),
    "where of it alone": lambda p, x: torch.where(x > 0, x, p),
    "addcmul": lambda p, x: torch.addcmul(x, p, x, value=0.5),
    "addcmul to it": lambda p, x: torch.addcmul(p, x, x),
    "addcdiv": lambda p, x: torch.addcdiv(x, p, 2 + x.abs()),
    "lerp": lambda p, x: torch.lerp(x, p, 0.3),
    "lerp by it": lambda p, x: torch.lerp(x, x.sin(), p),
    "hypot": torch.hypot,
    "atan2": lambda p, x: torch.atan2(2 + p * p, x),
    "logaddexp": torch.logaddexp,
    "xlogy": lambda p, x: torch.xlogy(p, 1 + x.abs()),
    "copysign": lambda p, x: torch.copysign(p, x),
    "clamp": lambda p, x: torch.clamp(x, min=p - 1, max=p + 1),
    "isolated by isnan": lambda p, x: torch.where(torch.isnan(x), p, x * p),
    "add with alpha": lambda p, x: torch.add(x, p, alpha=2),
    "sub with out": lambda p, x: torch.sub(x, p, out=None),
    "add in place": lambda p, x: (1 * x).add_(p),
    "iadd": lambda p, x: _iadd(1 * x, p),
    "mul in place": lambda p, x: (1 * x).mul_(p),
    "sub in place": lambda p, x: (1 * x).sub_(p),
    "div in place": lambda p, x: (1 * x).div_(2 + p * p),
    "addcmul in place": lambda p, x: (1 * x).addcmul_(p, x),
    "copied into a row": lambda p, x: _copied(1 * x, p),
    "expanded": lambda p, x: p.expand(x.shape) * x,
    "expanded as": lambda p, x: p.expand_as(x).sin() + x,
    "broadcast": lambda p, x: torch.broadcast_tensors(p, x)[0] * x,
}
COMPLEX = ("add", "sub", "mul", "rdiv", "addcmul", "lerp", "mul in place", "expanded")


def _iadd(x, p):
    x += p
    return x


def _copied(x, p):
    return torch.cat([x, p.expand(x.shape)], -1) * 0.5


# Shapes of the parameter and of one sample.
PRODUCTS = {
    "matmul": (
        lambda p, x: x @ p,
        [
            ((4,), (4,)),
            ((4,), (3, 4)),
            ((4,), (2, 3, 4)),
            ((4, 5), (4,)),
            ((4, 5), (3, 4)),
            ((2, 4, 5), (2, 3, 4)),
            ((4, 5), (2, 3, 4)),
        ],
    ),
    "matmul from the left": (
        lambda p, x: p @ x,
        [((3,), (3, 4)), ((3,), (2, 3, 4)), ((5, 3), (3, 4)), ((5, 3), (2, 3, 4)), ((2, 5, 3), (2, 3, 4))],
    ),
    "linear": (lambda p, x: F.linear(x, p), [((5, 4), (4,)), ((5, 4), (3, 4)), ((5, 4), (2, 3, 4)), ((4,), (3, 4))]),
    "mv": (lambda p, x: torch.mv(x, p), [((4,), (4,))]),
    "mm": (lambda p, x: torch.mm(x, p), [((4, 5), (4,))]),
    "bmm": (lambda p, x: torch.bmm(x, p.expand(len(x), *p.shape)), [((4, 5), (3, 4))]),
    "addmm": (lambda p, x: torch.addmm(p[0], x, p), [((4, 4), (4,))]),
    "baddbmm": (lambda p, x: torch.baddbmm(p[None], x, p.expand(len(x), *p.shape)), [((4, 4), (4, 4))]),
    "inner": (lambda p, x: torch.inner(x, p), [((4,), (4,)), ((4,), (3, 4)), ((5, 4), (3, 4))]),
    "outer": (lambda p, x: torch.outer(x, p), [((4,), ())]),
    "vecdot": (lambda p, x: torch.linalg.vecdot(p, x), [((4,), (4,)), ((4,), (3, 4)), ((3, 4), (3, 4))]),
    "tensordot": (lambda p, x: torch.tensordot(x, p, dims=1), [((4,), (3, 4)), ((4, 5), (3, 4)), ((4, 5, 2), (4,))]),
    "einsum": (lambda p, x: torch.einsum("n...d,de->n...e", x, p), [((4, 5), (4,)), ((4, 5), (3, 4)), ((4, 5), (2, 3, 4))]),
    "kron": (lambda p, x: torch.kron(x, p[None]), [((2,), (3,))]),
    "bilinear": (lambda p, x: F.bilinear(x, x, p), [((2, 4, 4), (4,)), ((2, 4, 4), (3, 4))]),
    "cosine similarity": (lambda p, x: F.cosine_similarity(x, p, dim=-1), [((4,), (3, 4)), ((3, 4), (3, 4))]),
    "cdist": (lambda p, x: torch.cdist(x, p), [((5, 4), (3, 4))]),
    "convolution": (lambda p, x: F.conv1d(x, p, padding=1), [((5, 2, 3), (2, 4))]),
}
COMPLEX_PRODUCTS = ("matmul", "matmul from the left", "linear", "mm", "einsum", "tensordot", "bmm")


def shapes():
    """Shapes of a parameter that broadcast with samples of each number of dimensions, ones among them."""
    for dims in range(4):
        sample = SIZES[3 - dims :]
        for own in range(dims + 1):
            tail = sample[dims - own :]
            for shape in {tail, (1, *tail[1:]) if tail else ()}:
                yield shape, sample
        yield (1, *sample), sample


def check(fn, shape, sample, dtype):
    """Compare per-sample gradients of a parameter of ``shape`` for samples of shape ``sample`` with autograd."""
    torch.manual_seed(len(shape) + 10 * len(sample))
    model = Net(lambda s, x: _real(fn(s.p, x.to(dtype))), p=nn.Parameter(0.5 * torch.randn(shape, dtype=dtype)))
    x = torch.randn(N, *sample, dtype=torch.float64)

    def losses(model, x):
        out = model(x)
        return out.reshape(len(out), out[0:1].numel()).sin().sum(1)

    expected = sample_grads(model, losses, x)["p"]
    controller = HookController(model, loss_reduction="sum")
    losses(model, x).sum().backward()
    torch.testing.assert_close(model.p.grad_sample, expected, msg=lambda m: f"{shape} with {sample}: {m}")
    controller.cleanup()


def _real(out):
    return torch.view_as_real(out.resolve_conj()) if out.is_complex() else out


@pytest.mark.parametrize(
    ("name", "dtype"), [*itertools.product(ELEMENTWISE, [torch.float64]), *itertools.product(COMPLEX, [torch.complex128])]
)
def test_elementwise_operations(name, dtype):
    """Gradients are those of single samples, whatever the parameter broadcasts with."""
    for shape, sample in shapes():
        check(ELEMENTWISE[name], shape, sample, dtype)


@pytest.mark.parametrize(
    ("name", "dtype"), [*itertools.product(PRODUCTS, [torch.float64]), *itertools.product(COMPLEX_PRODUCTS, [torch.complex128])]
)
def test_products(name, dtype):
    """Gradients are those of single samples, of vectors, matrices and stacks of them, from both sides."""
    fn, cases = PRODUCTS[name]
    for shape, sample in cases:
        check(fn, shape, sample, dtype)
