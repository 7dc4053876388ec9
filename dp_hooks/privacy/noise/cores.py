"""Cores for threads that draw noise."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Event

import torch

# Elementwise operators use several threads from this size on.
_PARALLEL_FROM = 1 << 15
# On machines with more cores the noise is drawn so fast that preparing for it does not pay.
_MOST_THREADS = 16


@contextmanager
def idle_cores() -> Iterator[None]:
    """Let PyTorch's own threads sleep in this context.

    After a parallel operator the OpenMP runtime of PyTorch's Linux builds (libgomp) keeps the other cores spinning for some
    milliseconds, in expectation of the next; threads that draw noise would have to share the cores with that. It spins only
    briefly while there are more threads than cores, which another thread with a team of its own sees to, and a
    parallel operator makes the spinning ones notice. With other runtimes this is without effect.
    """
    if torch.get_num_threads() > _MOST_THREADS:
        yield
        return
    ready, over = Event(), Event()

    def occupy() -> None:
        torch.zeros(2 * _PARALLEL_FROM)
        ready.set()
        over.wait()

    with ThreadPoolExecutor(1) as pool:
        pool.submit(occupy)
        ready.wait()
        torch.zeros(2 * _PARALLEL_FROM)
        try:
            yield
        finally:
            over.set()
