"""Losses over the tokens of a batch, taken apart by examples."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Self

from .._validate import bad
from ..training.attributes import put

IGNORED = -100  # the label of a token that there is no loss on


class TokenLosses:
    """How a trainer's loss over tokens becomes a sum over examples, each weighted by what is its own.

    A mean over all tokens of a batch couples examples: how long one is decides how much the others count. So the trainer is asked
    for the sum over all tokens (``num_items_in_batch=1``), and the gradient of each example is divided by its own number of
    tokens, before it is clipped; or by ``denominator``, the same for all.
    """

    def __init__(self, trainer: Any, denominator: float | None) -> None:
        """Of ``trainer``."""
        self._trainer = trainer
        self._denominator = denominator
        self._takes_number = False  # whether the trainer's loss is divided by the number it is given, and not by one of its own

    @classmethod
    def of(cls, trainer: Any, batch: Any, options: Mapping[str, Any], denominator: float | None) -> Self | None:
        """Look at a ``batch``. Return None where labels are not one for each token, or the user says how the loss is reduced."""
        if options.get("loss_reduction") is not None:
            return None
        labels = batch.get("labels") if isinstance(batch, Mapping) else None
        if not isinstance(labels, Tensor) or labels.dim() < 2 or labels.is_floating_point():
            if denominator is not None:
                raise bad("tokens_per_example", denominator, "a batch has no labels for single tokens ([n, t]); leave it out.")
            return None
        losses = cls(trainer, denominator)
        losses._takes_number = losses._is_divided(batch)
        return losses

    def count(self, part: Any) -> Tensor:
        """``[n]``: on how many tokens of each example there is a loss; 1 or more."""
        labels: Tensor = part.get("shift_labels", part["labels"])
        if "shift_labels" not in part and self._shifts() and not self._has_virtual_tokens():
            labels = labels[..., 1:]  # nothing comes before the first token that it could be foretold by
        counted = labels != IGNORED
        return counted.flatten(1).sum(1).clamp(min=1)

    def weights(self, tokens: Tensor) -> Tensor:
        """``[n]``: what the gradient of each example is multiplied by."""
        return (
            1 / tokens.float() if self._denominator is None else torch.full_like(tokens, 1 / self._denominator, dtype=torch.float32)
        )

    def prepare(self, stack: ExitStack, part: Any) -> tuple[Any, int]:
        """Return what the training step is called with, so that its loss is the sum over all tokens, until ``stack`` unwinds."""
        trainer = self._trainer
        if self._takes_number:
            return part, 1
        # The model reduces its own loss to a mean, so it is not asked for it.
        put(stack, trainer, compute_loss_func=self._sum)
        make = getattr(trainer.model, "prepare_decoder_input_ids_from_labels", None)
        if trainer.model.config.is_encoder_decoder and "decoder_input_ids" not in part and make is not None:
            part = {**part, "decoder_input_ids": make(labels=part["labels"])}
        return part, 1

    def _is_divided(self, batch: Any) -> bool:
        """Whether the loss of a batch is half as large if it is to be divided by two: many models take the number and leave it."""
        trainer = self._trainer
        if trainer.compute_loss_func is not None or trainer.label_smoother is not None or not _is_plain(trainer):
            return True  # it is the trainer's, and gets the number; how it is reduced will be checked
        if not trainer.model_accepts_loss_kwargs:
            return False
        inputs, found = trainer._prepare_inputs(batch), []
        for number in (1, 2):
            with torch.no_grad(), torch.random.fork_rng():
                outputs = trainer.model(**inputs, num_items_in_batch=number)
            found.append(outputs["loss"] if isinstance(outputs, Mapping) else outputs[0])
        return bool((found[0] - 2 * found[1]).abs() <= 1e-2 * found[0].abs())

    def _sum(self, outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        if not isinstance(outputs, Mapping) or "logits" not in outputs:
            raise bad(
                "trainer",
                type(self._trainer).__name__,
                f"the loss of {type(self._trainer.model).__name__} over tokens cannot be taken apart by examples. Override "
                'compute_loss to return the mean of one loss for each example, and pass loss_reduction="mean".',
            )
        logits = outputs["logits"]
        if self._shifts():
            logits, labels = logits[..., :-1, :], labels[..., 1:]
        return F.cross_entropy(logits.flatten(0, -2).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum")

    def _has_virtual_tokens(self) -> bool:
        """Whether PEFT puts a trained prompt before the first token."""
        config = getattr(self._trainer.model, "active_peft_config", None)
        return config is not None and config.is_prompt_learning and config.peft_type != "PREFIX_TUNING"

    def _shifts(self) -> bool:
        """Whether labels are those of the next token, and the model shifts them itself."""
        known = getattr(self._trainer, "_loss_shifts_labels", None)
        if known is not None:
            return bool(known)
        # As transformers (before 5.24) chooses a loss: by the model's class, and that of causal models where it knows none.
        model = self._trainer.model
        model = model.get_base_model() if hasattr(model, "get_base_model") else model
        loss = getattr(model, "loss_type", None)
        return loss in (None, "ForCausalLM", "ForConditionalGeneration") and not model.config.is_encoder_decoder


def _is_plain(trainer: Any) -> bool:
    """Whether ``compute_loss`` is that of ``transformers.Trainer``."""
    return str(type(trainer).compute_loss.__module__) == "transformers.trainer"
