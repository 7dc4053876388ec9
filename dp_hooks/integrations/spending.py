"""What a trainer's run has spent, on disk: in every checkpoint, and beside them as of the last step."""

import json
import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .._validate import bad
from ..privacy.accounting.history import History, as_charge, continues

NAME = "privacy.json"


class Spending:
    """The files of one run: what it has spent is in them before any parameter moves, so that a kill forgets nothing.

    A run that goes on from a checkpoint takes the later of what the checkpoint and the files say, where one continues the other.
    """

    def __init__(self, argument: str) -> None:
        """Nothing is written. ``argument`` is how the trainer is told to go on, for messages."""
        self._argument = argument
        self._own: set[Path] = set()  # folders whose file is of this run
        self._goes_on = False

    def keep(self, folder: Path, state: dict[str, Any]) -> None:
        """Write what is spent now; the file of another run is set aside first."""
        if folder not in self._own:
            known = self.read(folder) if self._goes_on else None
            if known is None or not continues(self._history_in(known, folder), self._history_in(state, folder)):
                self._set_aside(folder)
            self._own.add(folder)
        write(folder, state)

    def latest(self, state: dict[str, Any], beside: Path, folders: Iterable[Path]) -> dict[str, Any]:
        """Return what was spent by the run that a checkpoint is of, which goes on here.

        Args:
            state: what the checkpoint says.
            beside: the folder of that run's checkpoints, where its file is as of its last step.
            folders: those of this run, in which it may have gone on from there before.
        """
        for folder in (beside, *folders):
            later = self.read(folder)
            if later is not None and continues(self._history_in(state, beside), self._history_in(later, folder)):
                state = later
        self._goes_on = True
        return state

    def read(self, folder: Path) -> dict[str, Any] | None:
        """Return what was written there, if anything was.

        Raises:
            InvalidArgumentError: the file is damaged.
        """
        path = folder / NAME
        if not path.exists():
            return None
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise bad(self._argument, str(path), f"the file is damaged ({error}).") from error
        if not isinstance(state, dict):
            raise bad(self._argument, str(path), "the file is damaged.")
        self._history_in(state, folder)
        return state

    def _history_in(self, state: dict[str, Any], folder: Path) -> History:
        """What was charged; a file in which that cannot be read must not be passed over, since it may know more than others."""
        try:
            return [as_charge(entry) for entry in state["history"]]
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            what = "is damaged: its history is not of (noise multiplier, sampling rate, steps)."
            raise bad(self._argument, str(folder), f"what was spent there {what}") from error

    def _set_aside(self, folder: Path) -> None:
        """Keep what an earlier run has spent under another name, and say that this run does not know of it."""
        path = folder / NAME
        if not path.exists():
            return
        number = 1
        while (kept := path.with_suffix(f".{number}.json")).exists():
            number += 1
        os.replace(path, kept)
        warnings.warn(
            f"{folder} holds what an earlier run has spent (now {kept.name}); this run begins anew and does not count it. On the "
            f"same data both add up. To go on with that run, pass one of its checkpoints ({self._argument}=...).",
            stacklevel=3,
        )


def write(folder: Path, state: dict[str, Any]) -> None:
    """Write ``state`` to ``folder``, whole or not at all; it is on the disk when this returns."""
    folder.mkdir(parents=True, exist_ok=True)
    beside = folder / f"{NAME}.new"
    with beside.open("w", encoding="utf-8") as file:
        json.dump(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, folder / NAME)
