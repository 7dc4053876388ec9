"""Trainable tensors in a model that are no parameters of it: nobody clips their gradients."""

from torch import Tensor, nn

from ..capture.controller import HookController
from ..errors import SelfCheckError, some_of
from .single_samples import leaves_of


def hidden_leaves(loss: Tensor, controller: HookController) -> list[Tensor]:
    """Tensors that ``loss`` would give gradients to, and that are no parameters of the model."""
    known = {id(controller.session.anchor), *(id(p) for p in controller.model.parameters())}
    return [leaf for leaf in leaves_of([loss]) if id(leaf) not in known and type(leaf) in (Tensor, nn.Parameter)]


def refuse_hidden(before: list[Tensor], again: list[Tensor], what: str) -> None:
    """Refuse those of one run that are there in the next one; what a run makes anew, as for checkpointing, is not trained.

    Raises:
        SelfCheckError: there are such.
    """
    lasting = [leaf for leaf in before if any(leaf is other for other in again)]
    if lasting:
        shapes = some_of([f"{type(leaf).__name__} {tuple(leaf.shape)}" for leaf in lasting])
        raise SelfCheckError(
            f"{what}: it computes with trainable tensors that are no parameters of the model ({shapes}): they get gradients of "
            "private samples, neither clipped nor noised; nothing was released. Remedy: register them (nn.Parameter, "
            "nn.ParameterList, nn.ModuleList), or detach them."
        )
