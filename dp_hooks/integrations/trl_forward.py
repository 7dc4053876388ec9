"""What trainers of TRL call in the place of their model: one row for each example in a call, and logits that can be seen."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .token_losses import IGNORED

# Trainers whose batches have two rows for each example: those that were chosen, then those that were rejected.
_PAIRED = ("DPOTrainer", "RewardTrainer", "CPOTrainer", "ORPOTrainer")
_ONE_EACH = ("ref_", "margin")  # what has one row for each example there, by the beginning of its name


def is_paired(trainer: Any) -> bool:
    """Whether a trainer's batches have two rows for each example."""
    return any(kind.__name__ in _PAIRED and kind.__module__.startswith("trl.") for kind in type(trainer).__mro__)


def has_two_rows(batch: Mapping[str, Any]) -> bool:
    """Whether a batch of one example has two rows; trainers of TRL before 1.0 make them where they call the model."""
    found = [len(value) for name, value in batch.items() if _is_doubled(name, value)]
    return bool(found) and all(rows == 2 for rows in found)


class PairedCollate:
    """A collate function that makes ``[n, 2, ...]`` of the ``[2 n, ...]`` that another one makes: one row for each example."""

    def __init__(self, collate_fn: Callable[[list[Any]], Any]) -> None:
        """Around ``collate_fn``."""
        self._collate_fn = collate_fn

    def __call__(self, examples: list[Any]) -> dict[str, Any]:
        """Collate, and put the two rows of each example side by side."""
        batch, n = self._collate_fn(examples), len(examples)
        return {
            name: value.unflatten(0, (2, n)).movedim(0, 1) if _is_doubled(name, value) else value for name, value in batch.items()
        }


def unpaired(batch: Mapping[str, Any]) -> dict[str, Any]:
    """A batch as the trainer's own collate function makes it."""
    return {name: value.movedim(1, 0).flatten(0, 1) if _is_doubled(name, value) else value for name, value in batch.items()}


def _is_doubled(name: str, value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and not name.startswith(_ONE_EACH)


class TRLForward:
    """Calls a model the way a private step needs it; everything else is the model's.

    - ``fused_lm_head=True`` (TRL projects to logits in tiles, in a function of its own in which no example can be told from
      another) becomes an ordinary call, and what the fused head returns is made of its logits.
    - Two rows for each example become two calls with one.
    """

    def __init__(self, model: nn.Module, *, paired: bool) -> None:
        """In the place of ``model``."""
        self._model = model
        self._paired = paired

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model, once or twice."""
        if not self._paired:
            return self._once(*args, **kwargs)
        rows = max(len(value) for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.dim())
        halves = [tuple(_half(value, i, rows) for value in args) for i in (0, 1)]
        named = [{key: _half(value, i, rows) for key, value in kwargs.items()} for i in (0, 1)]
        first, second = (self._once(*half, **more) for half, more in zip(halves, named, strict=True))
        return _joined(first, second)

    def _once(self, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return self._model(*args, **kwargs)
        labels, shifted = kwargs.pop("labels", None), kwargs.pop("shift_labels", None)
        items = kwargs.pop("num_items_in_batch", None)
        outputs = self._model(*args, **kwargs)
        return _per_token(outputs, labels if shifted is None else shifted, items, shifts=shifted is None)


def _per_token(outputs: Any, labels: Tensor, items: Any, *, shifts: bool) -> SimpleNamespace:
    """What TRL's ``FusedCausalLMOutput`` has, of ordinary logits."""
    logits = outputs.logits.float()
    labels = F.pad(labels, (logits.shape[1] - labels.shape[1], 0), value=IGNORED)  # virtual tokens of a prompt come first
    if shifts:
        logits, labels = logits[:, :-1], labels[:, 1:]
    mask = labels != IGNORED
    logs = logits.log_softmax(-1)
    log_probs = logs.gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1).masked_fill(~mask, 0)
    with torch.no_grad():
        seen = logs.detach()
        entropy = -(seen.exp() * seen).sum(-1).masked_fill(~mask, 0)
        is_top1 = (seen.argmax(-1) == labels) & mask
        mean_logits = logits.detach().mean(-1).masked_fill(~mask, 0)
        log_sum_sq_probs = (2 * seen).logsumexp(-1).masked_fill(~mask, 0)
    return SimpleNamespace(
        loss=None if items is None else -log_probs.sum() / items,
        log_probs=log_probs,
        entropy=entropy,
        log_sum_sq_probs=log_sum_sq_probs,
        mean_logits=mean_logits,
        is_top1=is_top1,
        label_mask=mask,
        aux_loss=getattr(outputs, "aux_loss", None),
    )


def _half(value: Any, which: int, rows: int) -> Any:
    return value.chunk(2)[which] if isinstance(value, Tensor) and value.dim() and len(value) == rows else value


def _joined(first: Any, second: Any) -> Any:
    fields = dict(first) if isinstance(first, Mapping) else vars(first)
    others = dict(second) if isinstance(second, Mapping) else vars(second)
    joined = {
        name: torch.cat([value, others[name]]) if isinstance(value, Tensor) and value.dim() else None
        for name, value in fields.items()
    }
    return type(first)(**joined)
