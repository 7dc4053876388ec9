"""Checkpoints in Opacus's format: model, optimizer and what was spent."""

from __future__ import annotations

import os
import warnings
from typing import IO, Any, BinaryIO

import torch
from opacus import PrivacyEngine
from opacus.accountants import IAccountant
from torch import nn

from ..privacy.accounting.lineage import lineage_of
from ..privacy.accounting.opacus import make_accountant

_WRAPPER = "_module."

PathOrFile = str | os.PathLike[str] | BinaryIO | IO[bytes]


class OpacusCheckpoints:
    """Saves and loads checkpoints, and never forgets what its accountant has spent."""

    accountant: IAccountant

    def save_checkpoint(
        self,
        *,
        path: PathOrFile,
        module: nn.Module,
        optimizer: Any = None,
        noise_scheduler: Any = None,
        grad_clip_scheduler: Any = None,
        checkpoint_dict: dict[str, Any] | None = None,
        module_state_dict_kwargs: dict[str, Any] | None = None,
        torch_save_kwargs: dict[str, Any] | None = None,
    ) -> None:
        """Save model, optimizer, accountant and schedulers in Opacus's checkpoint format.

        State-dict keys have no ``_module.`` prefix. Random states are never saved: past noise could be replayed from them.
        """
        lineage_of(self.accountant).save(self.accountant.history)
        # Opacus's own method only calls state_dict() on what it is given and self.accountant; no engine state is used.
        PrivacyEngine.save_checkpoint(**locals())

    def load_checkpoint(
        self,
        *,
        path: PathOrFile,
        module: nn.Module,
        optimizer: Any = None,
        noise_scheduler: Any = None,
        grad_clip_scheduler: Any = None,
        module_load_dict_kwargs: dict[str, Any] | None = None,
        torch_load_kwargs: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Load a checkpoint written by this engine or by Opacus's, and return what else was in it.

        The ``_module.`` prefix of checkpoints written through Opacus's wrapper is taken off.
        What this engine has spent stays spent: going back to an earlier checkpoint of the same run restores the model, not
        the budget, since both releases have been seen.

        Loads with ``weights_only=True``: a checkpoint cannot run code. Pass
        ``torch_load_kwargs={"weights_only": False}`` for one of your own that holds other objects.

        Raises:
            ScopeError: this engine has taken steps, and the checkpoint is neither one of its own nor one that it went on from:
                what both have spent adds up, and equal numbers do not make one run of two.
        """
        checkpoint: dict[str, Any] = torch.load(path, **{"weights_only": True, **(torch_load_kwargs or {})})
        spent = checkpoint["privacy_accountant_state_dict"]
        make_accountant(self.accountant.mechanism()).load_state_dict(spent)  # raises before anything has changed
        history, is_older = lineage_of(self.accountant).joined(self.accountant.history, spent["history"])
        if is_older:
            warnings.warn("the checkpoint is older than this engine: its budget spent since then stays spent", stacklevel=2)
        weights = checkpoint["module_state_dict"]
        if weights and all(key.startswith(_WRAPPER) for key in weights):
            weights = {key.removeprefix(_WRAPPER): value for key, value in weights.items()}
        module.load_state_dict(weights, **(module_load_dict_kwargs or {}))
        self.accountant.load_state_dict({**spent, "history": history})
        lineage_of(self.accountant).went_on(history)
        parts = {"optimizer": optimizer, "noise_scheduler": noise_scheduler, "grad_clip_scheduler": grad_clip_scheduler}
        for what, part in parts.items():
            state = checkpoint.pop(f"{what}_state_dict", {})
            if part is not None and state:
                part.load_state_dict(state)
            elif (part is None) != (not state):
                given = "not given" if part is None else "given"
                warnings.warn(f"the checkpoint has {'a' if state else 'no'} {what} state, but {what} is {given}", stacklevel=2)
        return checkpoint
