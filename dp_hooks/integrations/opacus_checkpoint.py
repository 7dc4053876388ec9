"""Checkpoints in Opacus's format: model, optimizer and what was spent."""

from __future__ import annotations

import copy
import warnings
from typing import Any

from opacus import PrivacyEngine
from opacus.accountants import IAccountant
from torch import nn

from ..privacy.accounting.lineage import lineage_of
from ..privacy.accounting.opacus import make_accountant
from ..privacy.accounting.protected import check_loaded, units_of
from ..privacy.accounting.protected import loaded as history_is_of
from .checkpoint_contents import PathOrFile, read_checkpoint, unusable

_WRAPPER = "_module."
_UNITS = "dp_hooks_units"  # how many units the history is about, if not about single examples


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
        if units_of(self.accountant) is not None:
            checkpoint_dict = {**(checkpoint_dict or {}), _UNITS: units_of(self.accountant)}
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

        If anything in it cannot be loaded, everything is what it was before.

        Raises:
            InvalidArgumentError: it is damaged, no such checkpoint, of another model or accountant, or holds other objects.
            ScopeError: it is of a run that protected other units; or this engine has taken steps, and the checkpoint is neither one
                of its own nor one that it went on from: what both have spent adds up, and equal numbers do not make one run of two.
        """
        checkpoint = read_checkpoint(path, torch_load_kwargs or {}, self.accountant)
        spent = checkpoint["privacy_accountant_state_dict"]
        units = checkpoint.pop(_UNITS, None)
        if units is not None and type(units) is not int:
            raise unusable(path, f"its part {_UNITS!r} is damaged: it is no checkpoint of an engine.")
        check_loaded(self.accountant, units)
        loaded = make_accountant(self.accountant.mechanism())
        loaded.load_state_dict(spent)  # raises before anything has changed
        history, is_older = lineage_of(self.accountant).joined(self.accountant.history, loaded.history)
        if is_older:
            warnings.warn("the checkpoint is older than this engine: its budget spent since then stays spent", stacklevel=2)
        weights = checkpoint["module_state_dict"]
        if weights and all(isinstance(key, str) and key.startswith(_WRAPPER) for key in weights):
            weights = {key.removeprefix(_WRAPPER): value for key, value in weights.items()}
        parts = {"optimizer": optimizer, "noise_scheduler": noise_scheduler, "grad_clip_scheduler": grad_clip_scheduler}
        states = {what: checkpoint.pop(f"{what}_state_dict", {}) for what in parts}
        own = copy.deepcopy(module.state_dict())
        before = {what: copy.deepcopy(part.state_dict()) for what, part in parts.items() if part is not None and states[what]}
        try:
            module.load_state_dict(weights, **(module_load_dict_kwargs or {}))
            for what in before:
                parts[what].load_state_dict(states[what])
            self.accountant.load_state_dict({**spent, "history": history})
        except BaseException as error:
            module.load_state_dict(own)
            for what, state in before.items():
                parts[what].load_state_dict(state)
            if not isinstance(error, Exception):
                raise
            raise unusable(
                path, f"what is in it does not fit to what it is loaded into ({type(error).__name__}: {error})."
            ) from error
        lineage_of(self.accountant).went_on(history)
        history_is_of(self.accountant, units)
        for what, part in parts.items():
            if (part is None) != (not states[what]):
                given = "not given" if part is None else "given"
                has = "a" if states[what] else "no"
                warnings.warn(f"the checkpoint has {has} {what} state, but {what} is {given}", stacklevel=2)
        return checkpoint
