"""Products of numbers in float32 are computed in full where a norm, a clipped sum or a comparison comes of them (N2)."""

from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dp_hooks import dp_step
from dp_hooks._precision import _SETTINGS, full_precision

from ..models import Net, loader_of, moved, norm_of, randn, scope_over, values
from ..reference import losses_of

PRODUCTS = ("aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm", "aten::convolution", "aten::convolution_backward")
NEW = hasattr(torch._C, "_get_fp32_precision_getter")


def settings():
    """Every setting as it reads now."""
    found = []
    for read, *_ in _SETTINGS:
        try:
            found.append(read())
        except RuntimeError:
            found.append("contradicted")
    return found


@contextmanager
def settings_kept():
    """Whatever the block sets is as before afterwards."""
    kept = [read() for read, *_ in _SETTINGS]
    try:
        yield
    finally:
        if NEW:
            torch.backends.fp32_precision = "none"
        for (_, write, *_), before in zip(_SETTINGS, kept, strict=True):
            write(before)


class TF32(TorchDispatchMode):
    """A device that rounds the factors of products in float32 to eleven digits, where it may."""

    def __torch_dispatch__(self, fn, types, args=(), kwargs=None):
        if fn.name().partition(".")[0] in PRODUCTS and torch.get_float32_matmul_precision() != "highest":
            args = tuple(self._rounded(value) for value in args)
        return fn(*args, **(kwargs or {}))

    @staticmethod
    def _rounded(value):
        if not isinstance(value, torch.Tensor) or value.dtype != torch.float32:
            return value
        mantissa, exponent = torch.frexp(value)
        return torch.ldexp((mantissa * 2**11).round() / 2**11, exponent)


@contextmanager
def on_a_device_that_rounds():
    with settings_kept(), TF32():
        torch.set_float32_matmul_precision("high")
        yield


SETTINGS = {
    "default": lambda: None,
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "cudnn": lambda: setattr(torch.backends.cudnn, "allow_tf32", not torch.backends.cudnn.allow_tf32),
}
if NEW:
    SETTINGS |= {
        "all": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
        "one": lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
        "contradiction": lambda: setattr(torch.backends.cudnn.conv, "fp32_precision", "ieee"),
    }


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_are_back_after_the_block(case):
    """Inside, nothing may round; afterwards every setting reads as before, also behind an exception."""
    with settings_kept():
        SETTINGS[case]()
        before = settings()
        with pytest.raises(KeyError), full_precision():  # noqa: PT012
            inside = settings()
            raise KeyError
        assert settings() == before
    full = [full for _, _, full, _ in _SETTINGS]
    assert all(value in some or value == "contradicted" for value, some in zip(inside, full, strict=True))


@pytest.mark.skipif(not NEW, reason="PyTorch before 2.9 has one setting for all kinds of products")
def test_a_setting_follows_the_general_one_afterwards():
    """What was not set by itself is not set afterwards either: a later general setting holds for it."""
    with settings_kept():
        torch.backends.fp32_precision = "tf32"
        for _, write, _, general in _SETTINGS:
            if general is not None:
                write("none")
        with full_precision():
            pass
        torch.backends.fp32_precision = "ieee"
        assert set(settings()[2:]) == {"ieee"}


def apart(model, x):
    """The loss of neighbouring tokens' difference: what tokens have in common cancels in the gradient."""
    out = model(x)
    return (out[:, 0] - out[:, 1]).tanh().sum(1)


def alike(n=4):
    """Two tokens for each sample that differ by a thousandth of their size."""
    return (1e3 * torch.ones(n, 1, 16) + randn(n, 2, 16)).float()


def released(data, bound):
    torch.manual_seed(0)
    model = Net(lambda s, x: s.a(x), a=nn.Linear(16, 24, bias=False))
    nn.init.normal_(model.a.weight, std=0.1)
    start = values(model)
    with scope_over(model, loader=loader_of([data]), max_grad_norm=bound, loss_reduction="sum", self_check=False) as (opt, loader):
        for (x,) in loader:
            apart(model, x).sum().backward()
            opt.step()
    return moved(start, model)


def test_a_sample_stays_within_the_bound_where_its_tokens_cancel_and_products_are_rounded():
    """Norms and sums of products of rounded factors would have little to do with one another: they are computed in full."""
    torch.manual_seed(2)
    data, bound = alike(), 1.0
    with on_a_device_that_rounds():
        x, g = alike()[0], torch.tensor([[1.0], [-1.0]]).expand(2, 24) * torch.linspace(0.1, 1, 24)
        rounded = g.mT @ x
        assert float((rounded - (g.double().mT @ x.double())).norm() / (g.double().mT @ x.double()).norm()) > 0.05
        whole, rest = released(data, bound), released(data[1:], bound)
    contribution = float(norm_of([a - b for a, b in zip(whole, rest, strict=True)]))
    assert contribution <= 1.001 * bound
    assert contribution > 0.99 * bound


@pytest.mark.parametrize("by_function", [False, True])
def test_rounded_products_are_no_reason_to_refuse(by_function):
    """The self-check compares what was computed in full, so that kernels which round differently agree."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 32), nn.ReLU(), nn.Linear(32, 3))
    step = dp_step(lambda m, batch: losses_of(m, *batch).mean())
    start = values(model)
    with on_a_device_that_rounds():
        data = loader_of([randn(16, 3, 8, 8).float()])
        with scope_over(model, loader=data, max_grad_norm=1.0, spot_check_rate=1.0) as (opt, loader):
            for _ in range(2):
                for batch in loader:
                    if by_function:
                        step(model, batch)
                    else:
                        opt.zero_grad()
                        losses_of(model, *batch).mean().backward()
                        opt.step()
    assert all(bool(m.any()) for m in moved(start, model))
