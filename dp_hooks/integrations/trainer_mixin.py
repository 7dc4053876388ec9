"""PrivateTrainerMixin: a class of transformers trainers that train privately."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .._validate import bad
from ..errors import ScopeError
from ..training.scope import PrivateTraining
from .private_trainer import private_trainer


class PrivateTrainerMixin:
    """Makes ``train()`` of a ``transformers.Trainer`` private, put before its class.

    ::

        class PrivateSFT(PrivateTrainerMixin, SFTTrainer):
            privacy = {"target_epsilon": 8, "target_delta": 1e-5, "max_grad_norm": 1.0}


        trainer = PrivateSFT(model, args=arguments, train_dataset=data)  # or, in the place of the attribute, privacy={...}
        trainer.train()
        print(trainer.privacy_scope.report())

    It is :func:`~dp_hooks.integrations.private_trainer` for one ``train()``. A callback cannot do this: the events of
    ``transformers.TrainerCallback`` are not told the trainer, and ``on_train_begin`` comes after loader and optimizer were made.

    Attributes:
        privacy: the arguments of ``private_trainer``; a class may have them as an attribute.
        privacy_scope: the scope of the last ``train()``, which can be asked for ``get_epsilon``, ``report`` and ``steps``.
    """

    privacy: Mapping[str, Any] | None = None
    privacy_scope: PrivateTraining | None = None

    def __init__(self, *args: Any, privacy: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        """Make the trainer.

        Args:
            args: those of the trainer.
            privacy: arguments of :func:`~dp_hooks.integrations.private_trainer`, such as ``{"target_epsilon": 8, ...}``; None:
                those of the class.
            kwargs: those of the trainer.
        """
        if privacy is not None:
            self.privacy = privacy
        super().__init__(*args, **kwargs)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train privately, and return what the trainer returns.

        Raises:
            InvalidArgumentError: ``privacy`` is missing, or the trainer or an argument cannot be used.
            ScopeError: it has trained before, and the accountant of that time is not passed on.
        """
        if not isinstance(self.privacy, Mapping) or "max_grad_norm" not in self.privacy:
            raise bad("privacy", self.privacy, 'pass the arguments of private_trainer, such as {"max_grad_norm": 1.0, ...}.')
        before = self.privacy_scope
        if before is not None and before.steps and self.privacy.get("accountant") is not before.accountant:
            raise ScopeError(
                "this trainer has trained already, and a second train() would not count those steps. To count both together: "
                'trainer.privacy = {**trainer.privacy, "accountant": trainer.privacy_scope.accountant}.'
            )
        with private_trainer(self, **self.privacy) as scope:
            self.privacy_scope = scope
            return super().train(*args, **kwargs)  # type: ignore[misc]
