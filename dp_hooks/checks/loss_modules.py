"""Loss modules that cannot be used privately, whatever they are called on."""

import torch
from torch import nn

from .._validate import bad
from ..capture.validate import trainable_beside
from ..errors import some_of

_BY_TARGET = (nn.CrossEntropyLoss, nn.NLLLoss)  # their means leave out targets and divide by the weights of classes


def check_criterion(criterion: nn.Module, model: nn.Module) -> None:
    """Refuse a loss module whose means couple samples, or that is trained itself, or that cannot be watched.

    Raises:
        InvalidArgumentError: a mean over weights of classes, trainable parameters that are not the model's, a scripted module.
    """
    if isinstance(criterion, torch.jit.ScriptModule):
        raise bad(
            "criterion",
            type(criterion).__name__,
            "a scripted module takes no hooks, so it cannot be watched. Pass the module that it was scripted from, and use that in "
            "the loop, or leave criterion out (the report then says that the loss was not checked).",
        )
    if foreign := trainable_beside(criterion, model.parameters()):
        raise bad(
            "criterion",
            type(criterion).__name__,
            f"its own trainable parameters ({some_of(foreign)}) would get gradients of private samples without clipping "
            "and noise. Make it a submodule of the model, whose forward computes what it is about, or freeze it.",
        )
    if isinstance(criterion, _BY_TARGET) and criterion.reduction == "mean" and criterion.weight is not None:
        raise bad(
            "criterion",
            f"{type(criterion).__name__}(weight=...)",
            "its mean is divided by the weights of all samples in the batch, so that what one contributes depends on the others. "
            'Use reduction="none", and take the mean of the losses.',
        )
