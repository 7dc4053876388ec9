"""An optimizer and a loader that accelerate has prepared: what they were made from, and what accelerate asks in between."""

import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler

from ..errors import ScopeError
from ..privacy.sampling.loader import PrivateDataLoader
from ..privacy.sampling.physical import PhysicalBatch
from .attributes import put
from .refused_clipping import refuse_clipping

_KEPT = (
    "num_workers collate_fn pin_memory timeout worker_init_fn multiprocessing_context prefetch_factor persistent_workers"
).split()


class Prepared:
    """What ``accelerator.prepare(...)`` returned before the scope was entered; without accelerate, the things themselves.

    Micro-batches that accelerate would accumulate are physical parts of one logical batch here: its size is the loader's
    ``batch_size`` times ``gradient_accumulation_steps``. While the scope is open, accelerate synchronises at the last part of each,
    so that its schedulers go by private steps, and takes no part of a loss for accumulation.

    Attributes:
        optimizer: the user's optimizer.
        loader: a loader that draws as the user's, with batches as large as logical ones.
        max_physical_batch_size: the ``batch_size`` of the user's loader, if batches would be accumulated.
        scaler: the ``GradScaler`` that accelerate multiplies losses with, if there is one.
    """

    def __init__(self, optimizer: Any, loader: Any) -> None:
        """Look at both; nothing is changed."""
        self.optimizer, self.scaler, states = optimizer, None, []
        while _is_accelerated(self.optimizer):
            self.scaler = self.scaler or self.optimizer.scaler
            states.append(self.optimizer.gradient_state)
            self.optimizer = self.optimizer.optimizer
        self.loader, self.max_physical_batch_size = loader, None
        self.place: Callable[[Any], Any] | None = None  # puts a batch where accelerate would
        prepared = getattr(loader, "_is_accelerate_prepared", False) and not isinstance(loader, PrivateDataLoader)
        if prepared and isinstance(loader, DataLoader) and type(loader.batch_sampler) is BatchSampler:
            states.append(vars(loader)["gradient_state"])
            accumulated = states[-1].num_steps
            if accumulated > 1:
                self.max_physical_batch_size = loader.batch_sampler.batch_size
            self.loader = plain_loader(loader, loader.batch_sampler.batch_size * accumulated)
            self.place = _placing(loader)
        self._state = states[0] if states else None

    @property
    def is_prepared(self) -> bool:
        """Whether accelerate has prepared any of it."""
        return self._state is not None

    def open(self, stack: ExitStack) -> None:
        """Answer accelerate's questions, and let it clip nothing, until ``stack`` unwinds."""
        refuse_clipping([p for group in self.optimizer.param_groups for p in group["params"]], stack)
        if self._state is not None:
            alone = {**self._state.plugin_kwargs, "num_steps": 1}
            put(stack, self._state, plugin_kwargs=alone, sync_gradients=True, _set_sync_gradients=lambda value: None)

    def told(self, start_batch: Callable[[PhysicalBatch, Any], None]) -> Callable[[PhysicalBatch, Any], None]:
        """``start_batch``, so that accelerate knows of each part that is handed out whether it is the last of its batch."""
        state = self._state
        if state is None:
            return start_batch

        def start(part: PhysicalBatch, batch: Any) -> None:
            start_batch(part, batch)
            state.sync_gradients = part.last

        return start


def refuse_skipped_steps() -> None:
    """Called where no step was taken: was it accelerate that let it pass, because it was given the private optimizer to prepare?

    Raises:
        ScopeError: it was.
    """
    module = sys.modules.get("accelerate.state")
    state: dict[str, Any] = {} if module is None else vars(module.GradientState)["_shared_state"]
    if not state.get("sync_gradients", True):
        raise ScopeError(
            "accelerate let the step of a batch pass, to accumulate the gradients of several: an example could be in two. "
            "Remedy: call accelerator.prepare(model, optimizer, loader) before the scope is entered, which makes accumulated "
            "batches parts of one logical batch; or leave gradient_accumulation_steps out, set a larger batch_size, and "
            "max_physical_batch_size in the scope."
        )


def plain_loader(prepared: Any, batch_size: int, *, collate_fn: Any = None) -> DataLoader[Any]:
    """A loader that draws as ``prepared``, which accelerate may have made, with batches of another size.

    They are collated by ``collate_fn``; None: as those of ``prepared``.
    """
    batches = prepared.batch_sampler
    sampler = getattr(batches, "sampler", None)
    options: dict[str, Any] = {name: getattr(prepared, name) for name in _KEPT}
    if type(prepared) is DataLoader:  # not accelerate's, whose generator everybody knows
        options["generator"] = prepared.generator
    if collate_fn is not None:
        options["collate_fn"] = collate_fn
    if isinstance(sampler, RandomSampler) and not sampler.replacement:
        options["shuffle"] = True
    elif not isinstance(sampler, SequentialSampler):
        options["sampler"] = sampler
    return DataLoader(prepared.dataset, batch_size=batch_size, drop_last=getattr(batches, "drop_last", False), **options)


def _is_accelerated(optimizer: Any) -> bool:
    return isinstance(optimizer, torch.optim.Optimizer) and type(optimizer).__name__ == "AcceleratedOptimizer"


def _placing(loader: Any) -> Callable[[Any], Any] | None:
    device = getattr(loader, "device", None)
    if device is None:
        return None
    send: Callable[..., Any] = sys.modules[type(loader).__module__].send_to_device
    return lambda batch: send(batch, device, non_blocking=getattr(loader, "_non_blocking", False))
