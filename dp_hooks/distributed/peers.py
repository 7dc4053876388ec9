"""Peers: the processes that take the same private steps, and how each learns of it where another one does not."""

import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import ScopeError
from .world import processes

# What a process says when all meet, with a number that has to be the same, too.
_STEP, _LEFT, _FAILED, _CHARGED, _PASS = 1, 2, 3, 4, 5
_WORDS = {
    _STEP: "took step {}",
    _LEFT: "left the scope",
    _FAILED: "failed",
    _CHARGED: "took step {}",
    _PASS: "began a pass over the loader",
}


class Peers:
    """The processes of the default group of ``torch.distributed``, in a scope that all of them have entered.

    They meet at every step, and when they leave: a process that fails, or leaves early, tells the others so, instead of letting
    them wait for it. One that dies is noticed by the connections that close, or after the timeout of the default group.

    Attributes:
        rank: the number of this process.
        size: how many there are.
    """

    def __init__(self) -> None:
        """Of the processes that there are; nothing is sent yet."""
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._group: Any = None
        self._parted = False

    @classmethod
    def found(cls) -> "Peers | None":
        """Those of this process; None if it is alone."""
        return cls() if processes() > 1 else None

    @property
    def is_first(self) -> bool:
        """Whether this process has number 0, which writes the ledger."""
        return self.rank == 0

    # ---------------------------------------------------------------- beginning and end

    def open(self, stack: ExitStack, facts: Mapping[str, Any]) -> None:
        """Meet for the first time; ``facts`` have to be the same for all.

        Raises:
            ScopeError: they are not.
        """
        # On the host, so that no device waits for it, and apart from the group that gradients are added up in.
        self._group = dist.new_group(backend="gloo", timeout=_timeout())
        stack.callback(self._close)
        every: list[Any] = [None] * self.size
        dist.all_gather_object(every, dict(facts), group=self._group)
        different = [name for name in facts if any(_unlike(other.get(name), facts[name]) for other in every)]
        if different:
            name = different[0]
            values = "; ".join(f"process {rank}: {_short(other.get(name))}" for rank, other in enumerate(every))
            raise ScopeError(
                f"{name} is not the same in all processes ({values}). Every process has to open the same scope: over the whole "
                "dataset, with the same arguments, and over copies of one model. DistributedDataParallel makes copies the same, as "
                "does torch.distributed.broadcast of every parameter."
            )

    def leave(self, *, failed: bool) -> None:
        """The scope is left here; the last meeting, unless the processes have parted.

        Raises:
            ScopeError: others are in the middle of it.
        """
        if self._group is None or self._parted:
            return
        try:
            self._meet(_FAILED if failed else _LEFT)
        except ScopeError:
            if not failed:  # else what failed here says more
                raise
        finally:
            self._parted = True

    # ---------------------------------------------------------------- steps

    @contextmanager
    def step(self, number: int, settings: Callable[[], Any] = lambda: None) -> Iterator[None]:
        """In the block a process prepares step ``number``; afterwards all have done so, with the same ``settings``.

        Raises:
            ScopeError: another process did not.
        """
        if self._parted:
            raise ScopeError("the processes of this scope have parted: no further step can be taken. Leave the scope.")
        with self.told_of_failure():
            yield
        self._meet(_STEP, number, zlib.crc32(repr(settings()).encode()))

    def charged(self, number: int) -> None:
        """This step was charged here; afterwards it was in all processes."""
        self._meet(_CHARGED, number)

    def begin_pass(self) -> None:
        """A pass over the loader begins here, and in all processes.

        Raises:
            ScopeError: others do something else.
        """
        self._meet(_PASS)

    def all(self, value: bool) -> bool:
        """Whether ``value`` holds in all processes."""
        return all(self._gathered(int(value)))

    def first(self, value: Any) -> Any:
        """What ``value`` is in process 0."""
        values = [value]
        self._guarded(lambda: dist.broadcast_object_list(values, src=0, group=self._group))
        return values[0]

    def total(self, value: Tensor) -> Tensor:
        """The sum of a tensor over all processes."""
        host = value.detach().to("cpu", torch.float64)
        self._guarded(lambda: dist.all_reduce(host, group=self._group))
        return host.to(value)

    def part(self, indices: list[int]) -> list[int]:
        """What this process has of a batch that all have drawn."""
        return indices[self.rank :: self.size]

    @contextmanager
    def told_of_failure(self) -> Iterator[None]:
        """Where the block raises here, the others are told so, as soon as they meet again."""
        try:
            yield
        except BaseException:
            self._say_failed()
            raise

    # ---------------------------------------------------------------- inside

    def _close(self) -> None:
        """Let go of the group now: found by the garbage collector of a process that was forked from this one, it would hang."""
        if self._group is not None and dist.is_initialized():
            dist.destroy_process_group(self._group)
        self._group, self._parted = None, True

    def _say_failed(self) -> None:
        try:
            self._meet(_FAILED)
        except ScopeError:  # what failed here says more
            self._parted = True

    def _meet(self, event: int, number: int = 0, settings: int = 0) -> None:
        said = self._gathered(event, number, settings)
        if any(each != said[0] for each in said):
            self._parted = True
            words = "; ".join(f"process {rank} {_WORDS[what].format(which)}" for rank, (what, which, _) in enumerate(said))
            if len({each[:2] for each in said}) == 1:
                words += (
                    ", with another noise_multiplier or max_grad_norm, other parameters, another order of them, other values in "
                    "them (learning rates, public steps), others frozen, or another history of charges than other processes"
                )
            raise ScopeError(
                f"the processes do not do the same: {words}. Nothing was released by this call. Look for the error of the process "
                "that failed, or for what makes one of them leave its loop, or a batch, earlier than others."
            )

    def _gathered(self, *numbers: int) -> list[Any]:
        mine = torch.tensor(numbers, dtype=torch.int64, device="cpu")
        every = [torch.empty_like(mine) for _ in range(self.size)]
        self._guarded(lambda: dist.all_gather(every, mine, group=self._group))
        found = [tuple(each.tolist()) for each in every]
        return found if len(numbers) > 1 else [number for (number,) in found]

    def _guarded(self, exchange: Any) -> None:
        try:
            exchange()
        except RuntimeError as error:
            self._parted = True
            raise ScopeError(
                f"another process of this scope is gone, or did not come to the same step in time ({error}). Nothing was "
                "released by this call. Look for the error of that process."
            ) from error


def _timeout() -> timedelta | None:
    """That of the default group; None (PyTorch's own default) where it cannot be told."""
    backend = dist.group.WORLD._get_backend(torch.device(_device())) if dist.group.WORLD is not None else None
    return getattr(getattr(backend, "options", None), "_timeout", None)


def _device() -> str:
    return "cuda" if dist.get_backend() == "nccl" else "cpu"


def _unlike(one: Any, other: Any) -> bool:
    return bool(one != other)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
