"""Compiled code runs eagerly while hooks are on a model: graphs compiled before know nothing of them."""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


class _Users:
    """How many scopes want it; they may end in another order than they began."""

    lock = threading.Lock()
    count = 0
    stance = ExitStack()


@contextmanager
def eager() -> Iterator[None]:
    """Run what ``torch.compile`` made as the Python it was made from, in this process, until the end of the block.

    Hooks of modules never fire in a graph that was compiled and run before they were there, and compiling a model with
    hooks would compile the hooks. After the last such block ``torch.compiler``'s stance is what it was before the first.
    """
    with _Users.lock:
        if _Users.count == 0:
            _Users.stance.enter_context(torch.compiler.set_stance("force_eager"))
        _Users.count += 1
    try:
        yield
    finally:
        with _Users.lock:
            _Users.count -= 1
            if _Users.count == 0:
                _Users.stance.close()
