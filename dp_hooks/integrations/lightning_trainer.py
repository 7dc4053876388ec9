"""A Lightning trainer that trains a module privately while a scope over both is open."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from .._rerun import checking
from .._validate import bad
from ..capture.calls.trace import untraced
from ..errors import ScopeError
from ..training.scope import PrivateTraining
from .attributes import put
from .logical_batches import LogicalBatch, LogicalBatches
from .stepped_optimizer import SteppedOptimizer
from .trainer_scope import TrainerScope, refuse

_KEY = "dp_hooks"  # of the scope's state in a checkpoint


class PrivateLightningTrainer(TrainerScope):
    """A scope over a Lightning ``Trainer`` and a module: ``with ... as scope: trainer.fit(module)`` is private training.

    - Logical batches are drawn from the train loader, with ``batch_size * accumulate_grad_batches`` examples expected; parts of at
      most ``batch_size`` are run at a time.
    - ``training_step`` of the module (automatic optimization) takes the whole private step; what it does and returns is covered
      by the self-check, as under ``@dp_step``. It is called with the model's examples alone, so ``self.log`` of a loss there shows
      what is not private.
    - ``target_epsilon`` needs no ``epochs``: the budget is for ``max_steps`` or ``max_epochs``.
    - Checkpoints hold what was spent, and ``fit(module, ckpt_path=...)`` goes on from there. Steps that were taken after the
      checkpoint are not in it.
    """

    def __init__(self, trainer: Any, module: Any, *, train_dataloaders: DataLoader[Any] | None = None, **options: Any) -> None:
        """Keep the arguments; see :func:`~dp_hooks.integrations.private_trainer`.

        Args:
            trainer: the trainer.
            module: the ``LightningModule`` that ``trainer.fit`` will be called with.
            train_dataloaders: the loader of the training data; None: what ``module.train_dataloader()`` returns.
            options: those of :func:`dp_hooks.private_training`.
        """
        super().__init__(trainer, options)
        self._module = module
        self._given = train_dataloaders
        self._index = self._size = 0  # of the logical batch, and examples in the present part

    def __enter__(self) -> PrivateTraining:
        """Make the module and the trainer private, and return the scope; if anything fails, everything is taken back."""
        trainer, module = self._trainer, self._module
        _check(trainer, module)
        loader = module.train_dataloader() if self._given is None else self._given
        if not isinstance(loader, DataLoader):
            raise bad("train_dataloaders", loader, "pass the torch.utils.data.DataLoader with the training data.")
        if loader.batch_size is None:
            raise bad("train_dataloaders", loader, "it has no batch_size.")
        options = {"max_physical_batch_size": loader.batch_size, **self._options}
        accumulated = trainer.accumulate_grad_batches
        if accumulated > 1:
            rate = loader.batch_size * accumulated / len(loader.dataset)  # type: ignore[arg-type]
            options.setdefault("sample_rate", rate)
        configured = module.configure_optimizers()
        optimizer, schedulers = _one_optimizer(configured)
        with ExitStack() as stack:
            if options.get("target_epsilon") is not None and options.get("epochs") is None:
                rate = options.get("sample_rate") or loader.batch_size / len(loader.dataset)  # type: ignore[arg-type]
                options["epochs"] = _epochs(trainer, len(loader) if accumulated == 1 else math.ceil(1 / rate - 1e-9))
            scope = PrivateTraining(module, optimizer, loader, **options)
            private, batches = stack.enter_context(scope)
            self._scope, self._private = scope, private
            self._original = module.training_step
            self._takes_index = len(inspect.signature(self._original).parameters) > 1
            self._stepped = SteppedOptimizer(private)
            for scheduler in schedulers:
                put(stack, scheduler, optimizer=self._stepped)
            answer = _with_optimizer(configured, self._stepped)
            view = LogicalBatches(batches, private, scope.plan.batches_per_pass)
            put(
                stack,
                module,
                training_step=self._training_step,
                configure_optimizers=lambda: answer,
                train_dataloader=lambda: view,
                on_save_checkpoint=partial(self._save, module.on_save_checkpoint),
                on_load_checkpoint=partial(self._load, module.on_load_checkpoint),
                _apply_batch_transfer_handler=partial(_transferred, module._apply_batch_transfer_handler),
            )
            stack.callback(self._forget, optimizer)
            put(stack, trainer, accumulate_grad_batches=1)
            self._stack = stack.pop_all()
        return scope

    def _forget(self, optimizer: torch.optim.Optimizer) -> None:
        """Take the private optimizer and loader out of what the trainer keeps."""
        trainer = self._trainer
        if self._stepped in trainer.strategy.optimizers:
            trainer.strategy.optimizers = [optimizer]
        trainer.fit_loop._combined_loader = None

    def _save(self, original: Callable[[dict[str, Any]], None], checkpoint: dict[str, Any]) -> None:
        checkpoint[_KEY] = self._scope.state_dict()
        original(checkpoint)

    def _load(self, original: Callable[[dict[str, Any]], None], checkpoint: dict[str, Any]) -> None:
        if _KEY not in checkpoint:
            raise bad(
                "ckpt_path",
                self._trainer.ckpt_path,
                "the checkpoint does not say what its run has spent. Go on from one that was saved in a private scope; to begin "
                "with these weights, load them into the module, and start a new run.",
            )
        self._scope.resume(checkpoint[_KEY])
        original(checkpoint)

    def _training_step(self, batch: Any, batch_idx: int = 0, *args: Any) -> Tensor:
        """Take one private step, on all parts of a logical batch; return the mean loss."""
        self._index = batch_idx
        mean = self._step_on(self._module, batch, "Call trainer.fit(module) without a loader: the scope has it.")
        return mean.detach().requires_grad_()  # Lightning goes back from it; nothing is behind it any more

    def _before(self, part: Any, size: int) -> tuple[int, int]:
        self._size = size
        return super()._before(part, size)

    def _loss(self, model: nn.Module, part: Any) -> Tensor:
        with ExitStack() as stack:
            # What is logged is no part of the loss; and not logged again by the runs of a check.
            logs = {
                name: _nothing if checking() else untraced(partial(_logged, getattr(self._module, name), self._size))
                for name in ("log", "log_dict")
            }
            put(stack, self._module, **logs)
            part = self._trainer.strategy.batch_to_device(part, dataloader_idx=0)
            found = self._original(part, self._index) if self._takes_index else self._original(part)
        loss = found["loss"] if isinstance(found, dict) else found
        if not isinstance(loss, Tensor):
            raise ScopeError(f"training_step() returned {type(found).__name__}; a private step needs a loss.")
        return loss


def _transferred(original: Callable[..., Any], batch: Any, *args: Any, **kwargs: Any) -> Any:
    """A batch where the model is; the parts of a logical batch are transferred one by one."""
    return batch if isinstance(batch, LogicalBatch) else original(batch, *args, **kwargs)


def _logged(original: Callable[..., None], size: int, *args: Any, **kwargs: Any) -> None:
    original(*args, **{"batch_size": size, **kwargs})


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Log nothing."""


_PAST = ("backward", "optimizer_step", "optimizer_zero_grad", "configure_gradient_clipping", "on_after_backward")


def _check(trainer: Any, module: Any) -> None:
    base = next(kind for kind in type(module).__mro__ if kind.__name__ == "LightningModule")
    own = [name for name in _PAST if getattr(type(module), name) is not getattr(base, name)]
    past = (
        f"it has a {' and a '.join(own)}() of its own, which a private step would go past: gradients are clipped and get noise, "
        "and the optimizer steps, inside training_step(). Remove it, or train in a plain loop"
    )
    refuse(module, "module", {past: bool(own)})
    reasons = {
        "manual optimization is not supported in this version. Train in a plain loop": not module.automatic_optimization,
        'precision="16-mixed" scales losses by a GradScaler. Use "bf16-mixed"': str(trainer.precision).startswith("16"),
        "several devices are not supported in this version": trainer.world_size > 1,
    }
    refuse(trainer, "trainer", reasons)


def _epochs(trainer: Any, steps: int) -> float:
    found = [float(trainer.max_epochs)] if trainer.max_epochs not in (None, -1) else []
    found += [trainer.max_steps / steps] if trainer.max_steps not in (None, -1) else []
    if not found:
        raise bad("epochs", None, "the trainer has neither max_epochs nor max_steps, so say for how many passes the budget is.")
    return min(found)


def _one_optimizer(configured: Any) -> tuple[torch.optim.Optimizer, list[Any]]:
    """The optimizer, and schedulers over it, of what ``configure_optimizers()`` returned."""
    optimizers, schedulers = configured, []
    if isinstance(configured, dict):
        optimizers, schedulers = configured["optimizer"], configured.get("lr_scheduler", [])
    elif isinstance(configured, (tuple, list)) and len(configured) == 2 and isinstance(configured[0], (tuple, list)):
        optimizers, schedulers = configured
    if isinstance(optimizers, (tuple, list)) and len(optimizers) == 1:
        optimizers = optimizers[0]
    if not isinstance(optimizers, torch.optim.Optimizer):
        raise bad(
            "module", type(optimizers).__name__, "configure_optimizers() has to return one optimizer, with or without schedulers."
        )
    listed = schedulers if isinstance(schedulers, (tuple, list)) else [schedulers]
    return optimizers, [s["scheduler"] if isinstance(s, dict) else s for s in listed]


def _with_optimizer(configured: Any, optimizer: torch.optim.Optimizer) -> Any:
    """What ``configure_optimizers()`` returned, with another optimizer."""
    if isinstance(configured, dict):
        return {**configured, "optimizer": optimizer}
    if isinstance(configured, (tuple, list)) and len(configured) == 2 and isinstance(configured[0], (tuple, list)):
        return [optimizer], configured[1]
    return optimizer
