"""OneThread: one thread at a time works with a model in a scope."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ...errors import ScopeError


class OneThread:
    """Refuses a thread that comes while another one runs the model, or takes a step.

    Meanwhile a module may hold other tensors in the place of its parameters, or parameters other values: the other thread would
    compute with these, and one of the two would put back what the other needs. Between steps any thread may go on.
    """

    def __init__(self) -> None:
        """No thread is at work."""
        self._lock = threading.Lock()
        self._stepping: int | None = None
        self._depth = 0  # of steps, one in another
        self._calling: int | None = None
        self._last: int | None = None  # called the model last

    def is_other(self) -> bool:
        """Whether another thread is at work than this one, which is none of autograd's own."""
        free, busy = (None, threading.get_ident()), (self._stepping, self._calling)
        return (busy[0] not in free or busy[1] not in free) and torch._C._current_graph_task_id() == -1

    def check(self) -> None:
        """Raise a ``ScopeError`` if another thread is at work."""
        if self.is_other():
            raise ScopeError(
                "two threads use a model in a private scope at the same time: one runs it, or takes a step, and another one came "
                "in between. What they do would mix. Let one wait for the other (a threading.Lock around each step and each "
                "evaluation), or give each thread a model and a scope of its own. (If a call was broken off in the other thread: "
                "opt.zero_grad() there.)"
            )

    def begin_call(self) -> None:
        """An outermost call of the model begins."""
        with self._lock:
            self.check()
            self._calling = self._last = threading.get_ident()

    def begin_backward(self) -> None:
        """A backward pass begins, in this thread or for the one that waits."""
        self._calling = self._last

    def end(self) -> None:
        """The call, or the backward pass, is over, or was broken off."""
        self._calling = None

    @contextmanager
    def step(self) -> Iterator[None]:
        """The block is a step, or a part of one."""
        with self._lock:
            self.check()
            self._stepping = self._stepping if self._depth else threading.get_ident()
            self._depth += 1
        try:
            yield
        finally:
            with self._lock:
                self._depth -= 1
                self._stepping = self._stepping if self._depth else None
