"""Gaussian noise on the clipped sum."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from queue import Empty, SimpleQueue
from threading import Event

import torch
from torch import Tensor

from ..._no_randomness import undisturbed_generators
from ..._precision import wide_dtype
from ..._validate import bad
from ...errors import ScopeError
from .entropy import fresh_generator

_SMALL = 1 << 13  # on CPU noise for tensors of at most so many numbers is drawn at once, for all of them together
_TOGETHER = 1 << 24  # at most so many numbers at a time, on any device
_BLOCK = 1 << 15  # numbers drawn at a time: the buffer stays in the cache, and PyTorch uses no threads of its own for so few
_BLOCK_ALONE = 1 << 19  # where PyTorch has one thread: fewer operations, as quick
_WORTH_A_THREAD = 1 << 18  # sums of fewer numbers than this are not worth starting a thread for
_PARALLEL_FROM = 1 << 15  # elementwise operators use several threads from this size on
_MOST_THREADS = 16  # on machines with more cores the noise is drawn so fast that preparing for it does not pay


@contextmanager
def _idle_cores() -> Iterator[None]:
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
        torch.zeros(2 * _PARALLEL_FROM, device="cpu")
        ready.set()
        over.wait()

    with ThreadPoolExecutor(1) as pool:
        pool.submit(occupy)
        ready.wait()
        torch.zeros(2 * _PARALLEL_FROM, device="cpu")
        try:
            yield
        finally:
            over.set()


class GaussianNoise:
    """Adds ``N(0, std^2)`` to tensors in place.

    By default each device gets generators of its own, seeded from the operating system's entropy and never saved:
    ``torch.manual_seed`` does not fix them, and nobody who knows the training script can replay them. A
    ``generator`` makes runs repeatable, and lets everybody who knows its seed subtract the noise.

    On CPU the fresh noise is drawn by as many threads as PyTorch uses, each from an independent generator: PyTorch draws
    normal numbers on one core.
    """

    is_secure = False

    def __init__(self, generator: torch.Generator | None = None) -> None:
        """Draw from ``generator``, or from fresh generators per device."""
        self.generator = generator
        self._process = os.getpid()
        self._fresh: dict[torch.device, list[torch.Generator]] = {}
        self._draws: tuple[object, Tensor, list[Tensor]] | None = None  # for tensors of these shapes: numbers, and views of them

    @property
    def is_repeatable(self) -> bool:
        """Whether numbers come from the user's generator."""
        return self.generator is not None

    @property
    def random_numbers(self) -> str:
        """Where they are from."""
        kind = "repeatable (noise_generator)" if self.generator is not None else "with fresh entropy"
        return f"not secure: PyTorch's generators, {kind}"

    def check_devices(self, devices: set[torch.device]) -> None:
        """Raise ``InvalidArgumentError`` unless the user's generator can serve all ``devices``."""
        if self.generator is not None and any(d.type != self.generator.device.type for d in devices):
            where = f"it lives on {self.generator.device}, the parameters on {sorted(map(str, devices))}"
            raise bad("noise_generator", self.generator, f"{where}; pass torch.Generator(device=...) there.")

    def _generators(self, device: torch.device, count: int) -> list[torch.Generator]:
        if self.generator is not None:
            if os.getpid() != self._process:
                raise ScopeError(
                    "noise_generator= was given before this process was forked: it would draw the noise that the other process "
                    "draws, and their difference would have none. Enter a scope in each process, or leave noise_generator out."
                )
            return [self.generator]
        fresh = self._fresh.setdefault(device, [])
        fresh += [fresh_generator(device) for _ in range(count - len(fresh))]
        return fresh[:count]

    def add_(self, totals: Sequence[Tensor], std: float, scale: float = 1.0, *, sensitivity: float | None = None) -> bool:
        """Replace each of ``totals`` by ``scale * (total + N(0, std^2))``, in place and in one pass over it.

        The draw is made in at least float32, so that half precision does not coarsen its tails. No buffer of the tensors'
        size is needed on CPU; on other devices one as large as the largest tensor, or 64 MB. ``sensitivity`` does not matter.

        Returns:
            Whether the results can be released: none of them is NaN or infinite.
        """
        with nullcontext() if self.generator is None else undisturbed_generators():  # the user's may be one of PyTorch's own
            return self._add_all(totals, std, scale)

    def _add_all(self, totals: Sequence[Tensor], std: float, scale: float) -> bool:
        if std == 0:
            return finite([real_view(total.mul_(scale)).sum(dtype=wide_dtype(total.real.dtype)) for total in totals])
        blocks: list[Tensor] = []
        sums: list[Tensor] = []
        together: dict[object, list[Tensor]] = {}
        block = _BLOCK_ALONE if torch.get_num_threads() == 1 else _BLOCK
        for total in map(real_view, totals):
            on_cpu = total.device.type == "cpu"
            flat = flat_view(total) if on_cpu and total.numel() > _SMALL else None
            if flat is not None:
                blocks.extend(flat.split(block))
            elif total.numel() <= (_SMALL if on_cpu else _TOGETHER) and total.dtype == wide_dtype(total.dtype):
                together.setdefault((total.device, total.dtype), []).append(total)
            else:
                (generator,) = self._generators(total.device, 1)
                draw = torch.empty(total.shape, dtype=wide_dtype(total.dtype), device=total.device)
                sums.append(self._add(total, draw, generator, std, scale))
        for alike in together.values():
            for some in at_most(_TOGETHER, _side_by_side(alike)):
                sums += self._add_together(some, std, scale)
        sums += self._add_blocks(blocks, std, scale)
        return finite(sums)

    def _add_together(self, totals: list[Tensor], std: float, scale: float) -> list[Tensor]:
        """Add noise to tensors alike in dtype and device, by one draw for all; return what tells whether all are finite."""
        (generator,) = self._generators(totals[0].device, 1)
        shapes = (totals[0].device, totals[0].dtype, *(total.shape for total in totals))
        if self._draws is None or self._draws[0] != shapes:
            sizes = [total.numel() for total in totals]
            draw = torch.empty(sum(sizes), dtype=totals[0].dtype, device=totals[0].device)
            views = [part.view(total.shape) for part, total in zip(draw.split(sizes), totals, strict=True)]
            self._draws = (shapes, draw, views)
        _, draw, views = self._draws
        draw.normal_(0.0, std * scale, generator=generator)
        if scale != 1:
            torch._foreach_mul_(totals, scale)
        torch._foreach_add_(totals, views)
        draw.zero_()  # no noise outlives its release
        if draw.device.type != "cpu" or draw.numel() > _BLOCK:
            self._draws = None  # small buffers are kept for the next step
        return list(torch._foreach_norm(totals, 1))

    def _add_blocks(self, blocks: list[Tensor], std: float, scale: float) -> list[Tensor]:
        if not blocks:
            return []
        wanted = min(torch.get_num_threads(), sum(block.numel() for block in blocks) // _WORTH_A_THREAD)
        generators = self._generators(blocks[0].device, max(1, wanted))  # a generator of the user's is one stream
        largest = max(block.numel() for block in blocks)
        queue: SimpleQueue[Tensor] = SimpleQueue()
        for block in blocks:
            queue.put(block)

        def work(generator: torch.Generator) -> list[Tensor]:
            sums: list[Tensor] = []
            buffers: dict[torch.dtype, Tensor] = {}
            with suppress(Empty):
                while True:
                    block = queue.get_nowait()
                    dtype = wide_dtype(block.dtype)
                    if dtype not in buffers:
                        buffers[dtype] = torch.empty(largest, dtype=dtype, device="cpu")
                    buffer, size = buffers[dtype], block.numel()
                    sums.append(self._add(block, buffer if size == largest else buffer[:size], generator, std, scale))
            return sums

        if len(generators) == 1:
            return work(generators[0])
        # All of the work is left to the new threads: the scheduler moves them to idle cores, which it does not do at once
        # for one that shares the core of a busy thread.
        with _idle_cores(), ThreadPoolExecutor(len(generators)) as pool:
            jobs = [pool.submit(work, generator) for generator in generators]
            return [total for job in jobs for total in job.result()]

    @staticmethod
    def _add(total: Tensor, draw: Tensor, generator: torch.Generator, std: float, scale: float) -> Tensor:
        draw.normal_(0.0, std * scale, generator=generator)
        if total.dtype == draw.dtype:
            torch.add(draw, total, alpha=scale, out=total)
        else:
            total.copy_(draw.add_(total, alpha=scale))
        return total.sum(dtype=draw.dtype)  # now: it is in the cache still


def finite(sums: list[Tensor]) -> bool:
    """Return whether what was added up is finite: a NaN or an infinity anywhere is left of a sum."""
    alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for total in sums:
        alike.setdefault((total.device, total.dtype), []).append(total)
    return all(bool(torch.stack(some).isfinite().all()) for some in alike.values())


def _side_by_side(totals: list[Tensor]) -> list[Tensor]:
    """Put together what comes one after the other both in the list and in memory, as flat views of it.

    So their order is that of the list: which number of the noise goes where does not depend on what is where in memory.
    """
    found: list[Tensor] = []
    end = -1  # of the last one in memory, in bytes
    for total in totals:
        if total.is_contiguous() and total.numel():
            begin = total.data_ptr()
            if begin == end and found[-1].untyped_storage().data_ptr() == total.untyped_storage().data_ptr():
                head = found.pop()
                total = head.as_strided((head.numel() + total.numel(),), (1,), head.storage_offset())
            else:
                total = total.view(-1)
            end = total.data_ptr() + total.numel() * total.itemsize
        else:
            end = -1
        found.append(total)
    return found


def at_most(numbers: int, tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Cut a list into parts with at most so many ``numbers`` each."""
    part: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if part and size + tensor.numel() > numbers:
            yield part
            part, size = [], 0
        part.append(tensor)
        size += tensor.numel()
    yield part


def real_view(total: Tensor) -> Tensor:
    """Return a view of real and imaginary parts, each of which gets noise of its own; a real tensor as it is."""
    return torch.view_as_real(total) if total.is_complex() else total


def flat_view(tensor: Tensor) -> Tensor | None:
    """Return a 1-D view of all numbers of ``tensor``, whatever the order of its axes in memory, or None."""
    strides = tensor.stride()
    plain = tensor.permute(sorted(range(tensor.dim()), key=lambda d: -strides[d]))
    return plain.view(-1) if plain.is_contiguous() else None
