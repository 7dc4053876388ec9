"""private_trainer: a scope in which a trainer of another library trains with differential privacy."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from .._validate import bad
from ..training.scope import PrivateTraining
from .lightning_trainer import PrivateLightningTrainer
from .transformers_trainer import PrivateTransformersTrainer

_LIGHTNING = {"lightning.pytorch.trainer.trainer.Trainer", "pytorch_lightning.trainer.trainer.Trainer"}


def private_trainer(
    trainer: Any, module: Any = None, *, max_grad_norm: Any, **options: Any
) -> AbstractContextManager[PrivateTraining]:
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
            Or a ``lightning.Trainer``; see
            :class:`~dp_hooks.integrations.lightning_trainer.PrivateLightningTrainer`.
        module: with Lightning, the module that ``trainer.fit(module)`` will be called with.
        max_grad_norm: the clipping bound C.
        options: all other arguments of :func:`dp_hooks.private_training` but model, optimizer and loader; and those of the
            class named above (``tokens_per_example``; ``train_dataloaders``, ``part``).

    Returns:
        A context manager; its value is the :class:`~dp_hooks.training.scope.PrivateTraining` scope, which can be asked for
        ``get_epsilon``, ``report`` and ``steps``, also after the end.

    Raises:
        InvalidArgumentError: the trainer, or an argument, cannot be used; on entering, before anything is changed or spent.
    """
    bases = set(_bases(trainer))
    if "transformers.trainer.Trainer" in bases:
        if module is not None:
            raise bad("module", type(module).__name__, "a transformers.Trainer has its model; leave it out.")
        return PrivateTransformersTrainer(trainer, max_grad_norm=max_grad_norm, **options)
    if bases & _LIGHTNING:
        if not isinstance(module, nn.Module):
            raise bad("module", module, "pass the LightningModule that trainer.fit() will be called with.")
        return PrivateLightningTrainer(trainer, module, max_grad_norm=max_grad_norm, **options)
    raise bad(
        "trainer", type(trainer).__name__, "pass a transformers.Trainer or a lightning.Trainer, or one of a class derived from it."
    )


def _bases(thing: Any) -> Iterator[str]:
    """The names of its class and of those it is derived from; so that no library has to be imported to find out."""
    return (f"{kind.__module__}.{kind.__qualname__}" for kind in type(thing).__mro__)
