"""Forward passes of which nothing is saved for a backward pass, with gradients enabled all the same."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DPHooksError


class Unsaved:
    """Lets go of the activations that autograd saves, so that a run takes no more memory than one without gradients.

    Attributes:
        bytes: how much the last run would have kept, without parameters.
        failed: whether it has to be run again, with everything saved: it computes gradients itself, or allows no such hooks.
    """

    def __init__(self, params: Iterable[nn.Parameter]) -> None:
        """``params`` are there anyway."""
        self._known = {p.data_ptr() for p in params if p.layout == torch.strided}
        self.bytes, self.failed = 0, False

    @contextmanager
    def run(self) -> Iterator[None]:
        """Run forward in the block; what it raises is raised, if it need not be run again."""
        self.bytes, self.failed = 0, False

        def drop(tensor: Tensor) -> None:
            if type(tensor) is Tensor and tensor.layout == torch.strided and tensor.data_ptr() not in self._known:
                self.bytes += tensor.nbytes

        def needed(nothing: Any) -> Tensor:
            self.failed = True  # a model may catch the error
            raise RuntimeError("a backward pass inside the forward pass: what it needs was not saved in this run.")

        try:
            with torch.autograd.graph.saved_tensors_hooks(drop, needed):
                yield
        except Exception as error:
            if isinstance(error, DPHooksError) and not self.failed:
                raise
            self.failed = True

    def attempt(self, run: Callable[[], Any], begin_again: Callable[[], Any]) -> None:
        """Run forward, with everything saved the second time if there has to be one."""
        with self.run():
            run()
        if self.failed:
            begin_again()
            run()
