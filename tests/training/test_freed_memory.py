"""Freed memory is kept for the next step, where the C library would give it back."""

from typing import Any

import pytest
import torch

from dp_hooks.training import freed_memory

from ..models import build, scope_over

PAGE = 1 << 12


def test_entering_frees_a_block_of_the_largest_kind_that_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """With its header, in whole pages, it is at most 32 MiB, the limit of glibc, and nearly that; on the CPU, and not touched."""
    asked: list[tuple[int, Any]] = []

    def empty(size: int, *, dtype: torch.dtype, device: str) -> None:
        asked.append((size * dtype.itemsize, device))

    monkeypatch.setattr(freed_memory.torch, "empty", empty)
    freed_memory.keep_freed_memory()
    monkeypatch.undo()
    ((size, device),) = asked
    assert device == "cpu"
    assert (1 << 25) - 8 * PAGE <= size + 2 * PAGE <= 1 << 25


def test_a_scope_does_so_before_its_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once, on entering."""
    calls: list[int] = []
    monkeypatch.setattr("dp_hooks.training.scope.keep_freed_memory", lambda: calls.append(1))
    scope = scope_over(build("mlp"))
    assert calls == []
    with scope:
        assert calls == [1]
