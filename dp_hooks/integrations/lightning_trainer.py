"""A Lightning trainer that trains a module privately while a scope over both is open."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from .._rerun import checking
from .._validate import bad
from ..capture.calls.trace import untraced
from ..errors import BudgetExhaustedError, ScopeError
from ..training.attributes import put
from ..training.scope import PrivateTraining
from ..training.wrapped_optimizer import WrappedOptimizer
from .lightning_checkpoints import LightningCheckpoints
from .lightning_optimizers import ONE_PRIVATE, ConfiguredOptimizers, ManualOptimizer
from .lightning_settings import check, completed
from .logical_batches import LogicalBatch, LogicalBatches
from .private_values import PrivateValues
from .stepped_optimizer import SteppedOptimizer
from .trainer_scope import TrainerScope

_OWN_LOADER = "Call trainer.fit(module) without a loader: the scope has it."


class PrivateLightningTrainer(TrainerScope):
    """A scope over a Lightning ``Trainer`` and a module: ``with ... as scope: trainer.fit(module)`` is private training.

    - Logical batches are drawn from the train loader, with ``batch_size * accumulate_grad_batches`` examples expected. With
      automatic optimization parts of at most ``batch_size`` are run at a time, with manual optimization the whole of a batch, or
      parts of ``max_physical_batch_size``.
    - Automatic optimization: ``training_step`` takes the whole private step; what it does and returns is covered by the
      self-check, as under ``@dp_step``. It is called with the model's examples alone, so ``self.log`` of a loss there shows what is
      not private.
    - Manual optimization is a bare loop: ``training_step`` is called as it is with each part of a batch, and
      ``self.optimizers()`` has the private optimizer. Its ``step()`` adds a part up, and releases at the last part of a logical
      batch; only that counts in ``trainer.global_step`` and moves ``self.lr_schedulers()``. For an empty batch, where there is
      nothing to call ``training_step`` with, noise alone is released. The self-check covers the model, and the loss with
      ``criterion=``.
    - Several optimizers (manual optimization): ``part`` names the submodule that is private, with an optimizer of its own. Only
      what that submodule makes of private examples is protected: other optimizers take ordinary steps, in which private examples
      must not be used but by calls of that submodule whose gradients the private optimizer takes. An optimizer that is about to
      apply gradients of private examples is stopped, where they can be seen.
    - ``on_before_optimizer_step``, of the module and of callbacks, is called once for each release, and sees the noised gradient.
    - ``target_epsilon`` needs no ``epochs``: the budget is for ``max_steps`` or ``max_epochs``.
    - Checkpoints hold what was spent, and the file ``privacy.json`` beside them what has been spent since;
      ``fit(module, ckpt_path=...)`` goes on from there.
    """

    def __init__(
        self,
        trainer: Any,
        module: Any,
        *,
        train_dataloaders: DataLoader[Any] | None = None,
        part: str | None = None,
        **options: Any,
    ) -> None:
        """Keep the arguments; see :func:`~dp_hooks.integrations.private_trainer`.

        Args:
            trainer: the trainer.
            module: the ``LightningModule`` that ``trainer.fit`` will be called with.
            train_dataloaders: the loader of the training data; None: what ``module.train_dataloader()`` returns.
            part: the name of the submodule that is private; None: the whole module.
            options: those of :func:`dp_hooks.private_training`.
        """
        super().__init__(trainer, options)
        self._module = module
        self._given = train_dataloaders
        self._part = part
        self._index = self._size = 0  # of the logical batch, and examples in the present part

    def __enter__(self) -> PrivateTraining:
        """Make the module and the trainer private, and return the scope; if anything fails, everything is taken back."""
        trainer, module = self._trainer, self._module
        check(trainer, module)
        manual = not module.automatic_optimization
        loader = module.train_dataloader() if self._given is None else self._given
        model = module if self._part is None else _submodule(module, self._part)
        found = ConfiguredOptimizers(module.configure_optimizers(), model, self._part)
        with ExitStack() as stack:
            options = completed(self._options, trainer, loader, manual=manual, alone=not found.others)
            scope = PrivateTraining(model, found.private, loader, **options)
            private, batches = stack.enter_context(scope)
            self._scope, self._private = scope, private
            self._original = module.training_step
            self._takes_index = len(inspect.signature(self._original).parameters) > 1
            self._values = PrivateValues()
            self._stepped = SteppedOptimizer(private)
            self._handle: WrappedOptimizer = ManualOptimizer(private, self._values) if manual else self._stepped
            self._schedulers = found.schedulers
            for scheduler in found.schedulers:
                put(stack, scheduler, optimizer=self._handle)
            answer = found.with_private(self._handle)
            view = LogicalBatches(batches, private, scope.plan.batches_per_pass, self._stop)
            put(
                stack,
                module,
                training_step=self._manual_step if manual else self._training_step,
                configure_optimizers=lambda: answer,
                train_dataloader=lambda: view,
                _on_before_batch_transfer=partial(_transferred, module._on_before_batch_transfer),
                _apply_batch_transfer_handler=partial(_transferred, module._apply_batch_transfer_handler),
            )
            if manual:
                put(stack, module, clip_gradients=partial(self._clip_gradients, module.clip_gradients))
            put(stack, trainer.fit_loop._data_source, instance=view)
            LightningCheckpoints(trainer, module, scope).attach(module, private, stack)
            self._others = found.others
            for other in found.others:
                stack.callback(other.register_step_pre_hook(self._values.guard).remove)
            self._show_noised_gradients(found.private, stack)
            stack.callback(self._forget, found.private)
            put(stack, trainer, accumulate_grad_batches=1)
            self._stack = stack.pop_all()
        return scope

    def _show_noised_gradients(self, optimizer: torch.optim.Optimizer, stack: ExitStack) -> None:
        """Let ``on_before_optimizer_step`` be called where the noised gradient is there: just before ``optimizer`` steps."""
        precision = self._trainer.precision_plugin
        original = precision._after_closure

        def after_closure(module: Any, stepped: Any) -> None:
            if stepped is not self._handle:
                original(module, stepped)

        put(stack, precision, _after_closure=after_closure)
        stack.callback(optimizer.register_step_pre_hook(lambda *_: original(self._module, self._handle)).remove)

    def _clip_gradients(self, original: Callable[..., None], optimizer: Any, *args: Any, **kwargs: Any) -> None:
        if getattr(optimizer, "optimizer", optimizer) is self._handle:
            raise ScopeError(
                "clip_gradients() in a private scope: gradients are clipped one by one, by max_grad_norm, and there is none to "
                "clip before the step. Leave it out for this optimizer."
            )
        original(optimizer, *args, **kwargs)

    def _stop(self) -> None:
        """The budget is used up: without an end of its own (``max_epochs=-1``) the trainer would go on without batches."""
        trainer = self._trainer
        if trainer.min_steps is not None and trainer.global_step < trainer.min_steps:
            raise BudgetExhaustedError(
                f"the privacy budget is used up after {trainer.global_step} steps, and the trainer's min_steps={trainer.min_steps} "
                "would have it go on for ever without batches. Leave min_steps out, or give the budget more epochs."
            )
        trainer.should_stop = True

    def _forget(self, optimizer: torch.optim.Optimizer) -> None:
        """Take the private optimizer and loader out of what the trainer keeps."""
        trainer = self._trainer
        if any(known is self._handle for known in trainer.strategy.optimizers):
            trainer.strategy.optimizers = [optimizer if o is self._handle else o for o in trainer.strategy.optimizers]
        trainer.fit_loop._combined_loader = None

    # ---------------------------------------------------------------- automatic optimization

    def _training_step(self, batch: Any, batch_idx: int = 0, *args: Any) -> Tensor:
        """Take one private step, on all parts of a logical batch; return the mean loss."""
        self._index = batch_idx
        mean = self._step_on(self._scope.model, batch, _OWN_LOADER)
        return mean.detach().requires_grad_()  # Lightning goes back from it; nothing is behind it any more

    def _before(self, part: Any, size: int) -> tuple[int, int]:
        self._size = size
        return super()._before(part, size)

    def _loss(self, model: nn.Module, part: Any) -> Tensor:
        found = self._call(part)
        loss = found["loss"] if isinstance(found, dict) else found
        if not isinstance(loss, Tensor):
            raise ScopeError(f"training_step() returned {type(found).__name__}; a private step needs a loss.")
        return loss

    def _call(self, part: Any) -> Any:
        """The module's own ``training_step`` of a part."""
        with ExitStack() as stack:
            # What is logged is no part of the loss; and not logged again by the runs of a check.
            logs = {
                name: _nothing if checking() else untraced(partial(_logged, getattr(self._module, name), self._size))
                for name in ("log", "log_dict")
            }
            put(stack, self._module, **logs)
            part = self._trainer.precision_plugin.convert_input(part)
            part = self._module._on_before_batch_transfer(part, dataloader_idx=0)
            part = self._trainer.strategy.batch_to_device(part, dataloader_idx=0)
            return self._original(part, self._index) if self._takes_index else self._original(part)

    # ---------------------------------------------------------------- manual optimization

    def _manual_step(self, batch: Any, batch_idx: int = 0, *args: Any) -> Any:
        """Let the module train on each part of a logical batch; return what it returned last."""
        self._index, result = batch_idx, None
        counted = next(o for o in self._trainer.strategy._lightning_optimizers if o.optimizer is self._handle)
        for part, size in self._parts(batch, _OWN_LOADER):
            self._size = size
            known = self._private.physical_batch
            assert known is not None  # the loader has handed it out
            with ExitStack() as stack:
                if not known.last:  # nothing is released yet
                    put(stack, counted, _on_before_step=_nothing, _on_after_step=_nothing)
                    for scheduler in self._schedulers:
                        put(stack, scheduler, step=_nothing)
                if size:
                    stack.enter_context(self._values.of(part) if self._others else nullcontext())
                    result = self._call(part)
                else:
                    counted._on_before_step()
                    self._private.zero_grad()  # what another optimizer's step left, in the batch before
                    self._private.step_empty()
                    counted._on_after_step()
        return result


def _submodule(module: nn.Module, name: str) -> nn.Module:
    found: nn.Module | None = dict(module.named_modules()).get(name) if name and isinstance(name, str) else None
    if found is None:
        raise bad("part", name, f"pass the name of one submodule of the module, as in named_modules(). {ONE_PRIVATE}")
    return found


def _transferred(original: Callable[..., Any], batch: Any, *args: Any, **kwargs: Any) -> Any:
    """A batch where the model is; the parts of a logical batch are transferred one by one."""
    return batch if isinstance(batch, LogicalBatch) else original(batch, *args, **kwargs)


def _logged(original: Callable[..., None], size: int, *args: Any, **kwargs: Any) -> None:
    original(*args, **{"batch_size": size, **kwargs})


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Log, count or step nothing."""
