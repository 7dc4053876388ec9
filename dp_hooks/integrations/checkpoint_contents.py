"""What is in a checkpoint from somewhere: read without running anything of it, and looked at before anything is changed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import IO, Any, BinaryIO

import torch
from opacus.accountants import IAccountant

from .._validate import bad
from ..errors import InvalidArgumentError
from ..privacy.accounting.history import as_charge

PathOrFile = str | os.PathLike[str] | BinaryIO | IO[bytes]
_SPENT, _WEIGHTS = "privacy_accountant_state_dict", "module_state_dict"
_PARTS = ("optimizer_state_dict", "noise_scheduler_state_dict", "grad_clip_scheduler_state_dict")


def unusable(path: PathOrFile, remedy: str) -> InvalidArgumentError:
    """The error of a checkpoint that cannot be used."""
    return bad("path", str(path) if isinstance(path, (str, os.PathLike)) else type(path).__name__, remedy)


def read_checkpoint(path: PathOrFile, options: Mapping[str, Any], accountant: IAccountant) -> dict[str, Any]:
    """Return what ``torch.load`` makes of it, with ``weights_only=True`` unless ``options`` say otherwise.

    Its accountant's history is one: of plain numbers that can have been charged, by an ``accountant`` of the same kind.

    Raises:
        InvalidArgumentError: it is damaged or no such checkpoint, or holds more than numbers, names and tensors.
        OSError: there is no such file.
    """
    try:
        loaded = torch.load(path, **{"weights_only": True, **options})
    except OSError:
        raise
    except Exception as error:  # a damaged pickle ends in exceptions of any kind
        why = " ".join(str(error).split())[:200]
        remedy = (
            "it cannot be read with weights_only=True, so that nothing in it is run: it is damaged, or holds other objects than "
            f"tensors, numbers and names ({type(error).__name__}: {why}). For one of your own that does, pass "
            'torch_load_kwargs={"weights_only": False}.'
        )
        raise unusable(path, remedy) from error
    if not isinstance(loaded, dict):
        raise unusable(path, f"it holds a {type(loaded).__name__}, and no checkpoint of an engine.")
    for name in (_WEIGHTS, _SPENT, *(part for part in _PARTS if part in loaded)):
        if not isinstance(loaded.get(name), Mapping):
            raise unusable(path, f"its part {name!r} is missing or damaged: it is no checkpoint of an engine.")
    spent = loaded[_SPENT]
    if spent.get("mechanism") != accountant.mechanism():
        theirs, own = spent.get("mechanism"), accountant.mechanism()
        remedy = f"its accountant is {theirs!r}, and the engine's {own!r}: build the engine with that."
        raise unusable(path, remedy)
    try:
        if not isinstance(spent.get("history"), (list, tuple)):
            raise ValueError("no history")
        history = [as_charge(entry) for entry in spent["history"]]
    except (ValueError, OverflowError) as error:
        raise unusable(path, "its accountant's history is not of (noise multiplier, sampling rate, steps).") from error
    loaded[_SPENT] = {**spent, "history": history}
    return loaded
