"""What a trainer's run has spent, on disk: in every checkpoint, and beside them as of the last step."""

import json
import os
import warnings
from pathlib import Path
from typing import Any

from .._validate import bad
from ..privacy.accounting.history import History

NAME = "privacy.json"


def write(folder: Path, state: dict[str, Any]) -> None:
    """Write ``state`` to ``folder``, whole or not at all; it is on the disk when this returns."""
    folder.mkdir(parents=True, exist_ok=True)
    beside = folder / f"{NAME}.new"
    with beside.open("w", encoding="utf-8") as file:
        json.dump(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, folder / NAME)


def read(folder: Path) -> dict[str, Any] | None:
    """Return what was written there, if anything was.

    Raises:
        InvalidArgumentError: the file is damaged.
    """
    path = folder / NAME
    if not path.exists():
        return None
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise bad("resume_from_checkpoint", str(path), f"the file is damaged ({error}).") from error
    if not isinstance(state, dict):
        raise bad("resume_from_checkpoint", str(path), "the file is damaged.")
    return state


def history_in(state: dict[str, Any]) -> History:
    """What was charged, as far as it can be read: whether the state is whole is checked where it is loaded."""
    history = state.get("history", [])
    return [tuple(entry) for entry in history] if isinstance(history, list) else []


def set_aside(folder: Path) -> None:
    """Keep what an earlier run has spent under another name, and say that a new run does not know of it."""
    path = folder / NAME
    if not path.exists():
        return
    number = 1
    while (kept := path.with_suffix(f".{number}.json")).exists():
        number += 1
    os.replace(path, kept)
    warnings.warn(
        f"{folder} holds what an earlier run has spent (now {kept.name}); this run begins anew and does not count it. On the same "
        "data both add up. To go on with that run: trainer.train(resume_from_checkpoint=True).",
        stacklevel=3,
    )
