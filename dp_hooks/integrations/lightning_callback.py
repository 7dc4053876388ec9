"""PrivacyCallback: private training as a callback of a Lightning trainer."""

from __future__ import annotations

from contextlib import ExitStack
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from ..errors import ScopeError
from ..training.attributes import put
from ..training.scope import PrivateTraining
from .lightning_checkpoints import KEY
from .lightning_trainer import PrivateLightningTrainer

_Callback: Any = import_module("lightning.pytorch" if find_spec("lightning") else "pytorch_lightning").Callback


class PrivacyCallback(_Callback):  # type: ignore[misc]
    """Makes ``trainer.fit(module, loader)`` private: a scope that is entered when ``fit`` begins, and left when it ends.

    ::

        privacy = PrivacyCallback(target_epsilon=8, target_delta=1e-5, max_grad_norm=1.0)
        trainer = L.Trainer(callbacks=[privacy])
        trainer.fit(module, loader)
        print(privacy.scope.report())

    It is :func:`~dp_hooks.integrations.private_trainer` for one ``fit``, and its arguments are the same; the loader is that of
    ``fit``. The module's ``setup("fit")`` and ``configure_model()`` are called by it, since parameters have to be there when it
    enters. Validation, tests and predictions are ordinary.

    Attributes:
        scope: the scope, which can be asked for ``get_epsilon``, ``report`` and ``steps``, after ``fit`` too; None before.
    """

    def __init__(self, *, max_grad_norm: Any, **options: Any) -> None:
        """Keep the arguments.

        Args:
            max_grad_norm: the clipping bound C.
            options: all other arguments of :func:`dp_hooks.private_training` but model, optimizer and loader; and ``part``, see
                :class:`~dp_hooks.integrations.lightning_trainer.PrivateLightningTrainer`.
        """
        self._options = {"max_grad_norm": max_grad_norm, **options}
        self._stack = ExitStack()
        self.scope: PrivateTraining | None = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Enter the scope, if a fit begins.

        Raises:
            ScopeError: this callback was in a fit before: a new scope would count from zero again.
            InvalidArgumentError: the trainer, the module or an argument cannot be used.
        """
        if stage != "fit":
            return
        if self.scope is not None:
            raise ScopeError(
                "this PrivacyCallback was in a fit already, whose steps a second scope would not count. Make a new one for the "
                "next fit, with accountant=callback.scope.accountant to count both together."
            )
        with ExitStack() as stack:
            pl_module.setup(stage)
            put(stack, pl_module, setup=lambda stage: None)  # once is enough
            pl_module.configure_model()
            loader = trainer.fit_loop._data_source.dataloader()
            over = PrivateLightningTrainer(trainer, pl_module, train_dataloaders=loader, **self._options)
            self.scope = stack.enter_context(over)
            self._stack = stack.pop_all()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leave the scope."""
        self._stack.close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leave the scope."""
        self._stack.close()

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """What was spent is in checkpoints that are saved after the end, too: by other callbacks, of an interrupted fit."""
        if self.scope is not None:
            checkpoint[KEY] = self.scope.state_dict()
