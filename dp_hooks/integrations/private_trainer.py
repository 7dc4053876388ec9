"""private_trainer: a scope in which a trainer of another library trains with differential privacy."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

from .._validate import bad
from ..training.scope import PrivateTraining
from .transformers_trainer import PrivateTransformersTrainer


def private_trainer(trainer: Any, *, max_grad_norm: Any, **options: Any) -> AbstractContextManager[PrivateTraining]:
    """Let a trainer train with differential privacy inside a ``with`` block.

    ::

        trainer = Trainer(model=model, args=arguments, train_dataset=dataset)
        with private_trainer(trainer, target_epsilon=8, target_delta=1e-5, max_grad_norm=1.0) as scope:
            trainer.train()
        print(scope.report())

    Neither the trainer nor the model is rewritten: what is put on this one trainer is taken off again at the end of the block.

    Args:
        trainer: a ``transformers.Trainer``, of a class derived from it as well (such as TRL's ``SFTTrainer``); see
            :class:`~dp_hooks.integrations.transformers_trainer.PrivateTransformersTrainer`.
        max_grad_norm: the clipping bound C.
        options: all other arguments of :func:`dp_hooks.private_training` but model, optimizer and loader.

    Returns:
        A context manager; its value is the :class:`~dp_hooks.training.scope.PrivateTraining` scope, which can be asked for
        ``get_epsilon``, ``report`` and ``steps``, also after the end.

    Raises:
        InvalidArgumentError: the trainer, or an argument, cannot be used; on entering, before anything is changed or spent.
    """
    if "transformers.trainer.Trainer" in _bases(trainer):
        return PrivateTransformersTrainer(trainer, max_grad_norm=max_grad_norm, **options)
    raise bad("trainer", type(trainer).__name__, "pass a transformers.Trainer, or one of a class derived from it.")


def _bases(thing: Any) -> Iterator[str]:
    """The names of its class and of those it is derived from; so that no library has to be imported to find out."""
    return (f"{kind.__module__}.{kind.__qualname__}" for kind in type(thing).__mro__)
