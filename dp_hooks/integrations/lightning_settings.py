"""What a Lightning trainer and module are set to: which of it cannot be private, and what of it the scope needs."""

from __future__ import annotations

import inspect
import math
from typing import Any

from torch.utils.data import DataLoader

from .._validate import bad
from ..privacy.accounting.rates import ALLOCATION
from ..privacy.sampling.plan import SEQUENTIAL
from .trainer_scope import refuse

# With automatic optimization, what a private step would go past.
_PAST = ("backward", "optimizer_step", "optimizer_zero_grad", "configure_gradient_clipping", "on_after_backward")


def check(trainer: Any, module: Any) -> None:
    """Refuse what cannot be private.

    Raises:
        InvalidArgumentError, ScopeError: names what it is about.
    """
    base = next((kind for kind in type(module).__mro__ if kind.__name__ == "LightningModule"), None)
    if base is None:
        raise bad("module", type(module).__name__, "pass the LightningModule that trainer.fit() will be called with.")
    automatic = module.automatic_optimization
    own = [name for name in _PAST if automatic and getattr(type(module), name) is not getattr(base, name)]
    past = (
        f"it has a {' and a '.join(own)}() of its own, which a private step would go past: gradients are clipped and get noise, "
        "and the optimizer steps, inside training_step(). Remove it, or train in a plain loop"
    )
    reader = "training_step() fetches its batches from a dataloader_iter itself. Let it take a batch"
    refuse(module, "module", {past: bool(own), reader: "dataloader_iter" in inspect.signature(module.training_step).parameters})
    reasons = {
        'precision="16-true" has no room for small gradients. Use "16-mixed" or "bf16-mixed"': trainer.precision == "16-true",
        "several devices are not supported in this version": trainer.world_size > 1,
        f"gradient_clip_val={trainer.gradient_clip_val} would clip the noised sum. Leave it out: max_grad_norm clips the gradient "
        "of each example": bool(trainer.gradient_clip_val),
        "manual optimization has no accumulate_grad_batches. Give the loader the whole batch_size, and the scope "
        "max_physical_batch_size": not automatic and trainer.accumulate_grad_batches > 1,
    }
    refuse(trainer, "trainer", reasons)


def completed(options: dict[str, Any], trainer: Any, loader: Any, *, manual: bool, alone: bool) -> dict[str, Any]:
    """The options of the scope, with what follows from the trainer and the loader.

    Args:
        options: as given.
        trainer: the trainer.
        loader: of the training data.
        manual: whether ``training_step`` steps the optimizers itself.
        alone: whether the private optimizer is the only one.

    Raises:
        InvalidArgumentError: the loader has no batches to draw, or nothing says how many steps a budget is for.
    """
    if not isinstance(loader, DataLoader):
        raise bad("train_dataloaders", loader, "pass the torch.utils.data.DataLoader with the training data.")
    if loader.batch_size is None:
        raise bad("train_dataloaders", loader, "it has no batch_size.")
    options = dict(options) if manual else {"max_physical_batch_size": loader.batch_size, **options}
    options.setdefault("grad_scaler", getattr(trainer.precision_plugin, "scaler", None))
    accumulated = trainer.accumulate_grad_batches
    units = options.get("privacy_unit") is not None
    if units and accumulated > 1:
        what = f"with privacy_unit= units are drawn, and accumulate_grad_batches={accumulated} is about examples. "
        raise bad("privacy_unit", type(options["privacy_unit"]).__name__, what + "Leave that at 1.")
    if units and options.get("target_epsilon") is not None and options.get("epochs") is None:
        raise bad("epochs", None, "with privacy_unit= a pass is over units: pass epochs= to private_trainer().")
    if accumulated > 1:
        if options.get("sampling") in (ALLOCATION, SEQUENTIAL):
            what = f"with accumulate_grad_batches={accumulated} a logical batch is drawn by Poisson sampling."
            remedy = "Leave it at 1, give the loader the size of a logical batch, and pass max_physical_batch_size."
            raise bad("sampling", options["sampling"], f"{what} {remedy}")
        options.setdefault("sample_rate", loader.batch_size * accumulated / len(loader.dataset))  # type: ignore[arg-type]
    if options.get("target_epsilon") is not None and options.get("epochs") is None:
        rate = options.get("sample_rate")
        options["epochs"] = _epochs(trainer, len(loader) if rate is None else math.ceil(1 / rate - 1e-9), alone=alone)
    return options


def _epochs(trainer: Any, steps: int, *, alone: bool) -> float:
    """For how many passes of so many ``steps`` the trainer will train."""
    found = [float(trainer.max_epochs)] if trainer.max_epochs not in (None, -1) else []
    # Of several optimizers every step counts in max_steps; how many of them are private is not known.
    found += [trainer.max_steps / steps] if alone and trainer.max_steps not in (None, -1) else []
    if not found:
        raise bad("epochs", None, "the trainer does not say for how many passes the budget is (max_epochs); pass epochs=.")
    return min(found)
