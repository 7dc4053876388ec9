"""Checkpoints of a Lightning trainer in a private scope: what they have cost is in them, and beside them as of the last step."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from .._validate import bad
from ..training.attributes import put
from ..training.optimizer import PrivateOptimizer
from ..training.scope import PrivateTraining
from .spending import Spending

KEY = "dp_hooks"  # of the scope's state in a checkpoint


class LightningCheckpoints:
    """Keeps what was spent, where checkpoints are.

    ``privacy.json`` is in the folder of each ``ModelCheckpoint`` from the first step on, and wherever ``trainer.save_checkpoint``
    wrote to: who goes on from a checkpoint names it, and so its folder, but need not have the same ``default_root_dir``, which
    several runs may share.
    """

    def __init__(self, trainer: Any, module: Any, scope: PrivateTraining) -> None:
        """For a ``scope`` over both."""
        self._trainer = trainer
        self._scope = scope
        self._spending = Spending("ckpt_path")
        self._saved_to: set[Path] = set()
        self._original = {name: getattr(module, name) for name in ("on_save_checkpoint", "on_load_checkpoint")}

    def attach(self, module: Any, private: PrivateOptimizer, stack: ExitStack) -> None:
        """Be told of every checkpoint and step until ``stack`` unwinds."""
        put(stack, module, on_save_checkpoint=self._save, on_load_checkpoint=self._load)
        put(stack, self._trainer, save_checkpoint=partial(self._save_to, self._trainer.save_checkpoint))
        private.attach_step_hook(self._keep)

    def _folders(self) -> set[Path]:
        dirpaths = [getattr(callback, "dirpath", None) for callback in self._trainer.checkpoint_callbacks]
        return {Path(path) for path in dirpaths if path and _is_local(path)} | self._saved_to

    def _keep(self, optimizer: PrivateOptimizer | None = None) -> None:
        """Before the parameters move, and before weights are saved: what has been spent now."""
        state = self._scope.state_dict()
        for folder in self._folders():
            self._spending.keep(folder, state)

    def _save_to(self, original: Callable[..., None], filepath: Any, *args: Any, **kwargs: Any) -> None:
        if _is_local(filepath):
            self._saved_to.add(Path(filepath).parent)
        if self._scope.steps:
            self._keep()
        original(filepath, *args, **kwargs)

    def _save(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[KEY] = self._scope.state_dict()
        self._original["on_save_checkpoint"](checkpoint)

    def _load(self, checkpoint: dict[str, Any]) -> None:
        """The trainer goes on from a checkpoint: so does the scope, with all that was spent up to the last step of that run."""
        path = self._trainer.ckpt_path
        if KEY not in checkpoint:
            raise bad(
                "ckpt_path",
                path,
                "the checkpoint does not say what its run has spent. Go on from one that was saved in a private scope; to begin "
                "with these weights, load them into the module, and start a new run.",
            )
        state = checkpoint[KEY]
        if isinstance(state, dict) and _is_local(path):
            state = self._spending.latest(state, Path(path).parent, self._folders())
        self._scope.resume(state)
        self._original["on_load_checkpoint"](checkpoint)


def _is_local(path: Any) -> bool:
    return path is not None and "://" not in str(path)
