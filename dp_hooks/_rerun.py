"""What a call of the model is surrounded by: it is run again in the same, when that is over."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from .capture.parameter_swap import autocast_as, autocast_dtype


@dataclass(frozen=True)
class AmbientContext:
    """The dtype of autocast on ``device`` (None: off), and the innermost hooks on saved tensors (``save_on_cpu``)."""

    device: str
    autocast: torch.dtype | None
    saving: tuple[Callable[..., Any], Callable[..., Any]] | None

    @classmethod
    def current(cls, device: str) -> "AmbientContext":
        """Those of the present moment."""
        return cls(device, autocast_dtype(device), _innermost_hooks())

    @contextmanager
    def restored(self) -> Iterator[None]:
        """The same ones for a block."""
        with autocast_as(self.device, self.autocast):
            if self.saving is None or self.saving == _innermost_hooks():
                yield
            else:
                with torch.autograd.graph.saved_tensors_hooks(*self.saving):
                    yield


def _innermost_hooks() -> tuple[Callable[..., Any], Callable[..., Any]] | None:
    return torch._C._autograd._top_saved_tensors_default_hooks(False)
