"""Precision: products of numbers in float32 are computed from all their digits where privacy or a comparison depends on them.

PyTorch may compute them from rounded factors: TF32 on CUDA, which convolutions use unless told otherwise, and TF32 or bfloat16 on
processors that can (``torch.set_float32_matmul_precision``, ``torch.backends.*.fp32_precision``). The settings hold for the whole
process: other threads compute more exactly for as long as a block lasts, never less.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, ClassVar

import torch

# How a setting is read and written, what it is where nothing is rounded, and what a setting of its own differs from.
Setting = tuple[Callable[[], Any], Callable[[Any], None], tuple[Any, ...], Callable[[], Any] | None]
_SETTINGS: list[Setting] = [
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, ("highest",), None),
    (torch._C._get_cudnn_allow_tf32, torch._C._set_cudnn_allow_tf32, (False,), None),
]
if hasattr(torch._C, "_get_fp32_precision_getter"):  # since 2.9, one for each kind of product
    for _kind in [(backend, op) for backend in ("cuda", "mkldnn") for op in ("matmul", "conv", "rnn")]:
        _read, _write = partial(torch._C._get_fp32_precision_getter, *_kind), partial(torch._C._set_fp32_precision_setter, *_kind)
        _general = partial(torch._C._get_fp32_precision_getter, _kind[0], "all")
        _SETTINGS.append((_read, _write, ("ieee", "none"), _general))  # type: ignore[arg-type]


@cache
def wide_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """Return the dtype that holds numbers of all ``dtypes``, and at least float32: sums are rounded after the noise."""
    found = torch.float32
    for dtype in dtypes:
        found = torch.promote_types(found, dtype)
    return found


class _Blocks:
    """Blocks of :func:`full_precision` that are running, in whatever thread: the settings are those of the process."""

    lock = threading.RLock()
    count = 0
    put_back: ClassVar[list[Callable[[], None]]] = []


def rounds() -> bool:
    """Whether factors of some products in float32 are rounded, or would be if no such block were running."""
    with _Blocks.lock:
        return _Blocks.count > 0 or any(_value(read) not in (*full, None) for read, _, full, _ in _SETTINGS)


@contextmanager
def full_precision() -> Iterator[None]:
    """Round no factors of products in float32 inside the block.

    Rounded by TF32, products of tokens that cancel are off by more than what is left of them: a norm would tell nothing of the sum
    that is released. And kernels that round differ by 1e-3 of a gradient from one another, which nothing that is compared should.
    """
    with _Blocks.lock:
        rounding = rounds()
        if rounding:
            _Blocks.put_back = [*_set_full(), *_Blocks.put_back]
            _Blocks.count += 1
    try:
        yield
    finally:
        with _Blocks.lock:
            _Blocks.count -= rounding
            if rounding and _Blocks.count == 0:
                changed, _Blocks.put_back = _Blocks.put_back, []
                for put_back in changed:
                    put_back()


def _set_full() -> list[Callable[[], None]]:
    """Let nothing be rounded; return what puts the settings back."""
    # What is as a more general setting says has to follow that one afterwards, too.
    general = [(read, write, above) for read, write, _, above in _SETTINGS if above is not None]
    follows = [partial(write, "none") for read, write, above in general if "none" != above() == read()]
    changed: list[Callable[[], None]] = []
    for read, write, full, _ in _SETTINGS:
        before = _value(read)
        if before not in (*full, None):
            changed.insert(0, partial(write, before))
            write(full[0])
    return [*changed, *follows]


def _value(read: Callable[[], Any]) -> Any:
    """Return a setting; None for an older one that newer ones have contradicted: these come after it."""
    try:
        return read()
    except RuntimeError:
        return None
