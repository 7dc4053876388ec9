"""PrivacyEngineHookBased: Opacus's ``PrivacyEngine`` interface over the parts of a private scope."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from types import TracebackType
from typing import IO, Any, BinaryIO

import torch
from opacus import PrivacyEngine
from torch import nn
from torch.utils.data import DataLoader
from typing_extensions import Self

from .._validate import bad
from ..capture.validate import check_model, problems
from ..errors import ScopeError
from ..privacy.accounting.meter import epsilon_of, make_accountant
from ..privacy.clipping import ADAPTIVE_OPTIONS
from ..privacy.sampling.loader import PrivateDataLoader
from ..training.optimizer import PrivateOptimizer
from ..training.scope import PrivateTraining, private_training

_WRAPPER = "_module."

PathOrFile = str | os.PathLike[str] | BinaryIO | IO[bytes]
Private = tuple[nn.Module, PrivateOptimizer, PrivateDataLoader]
PrivateWithCriterion = tuple[nn.Module, PrivateOptimizer, Any, PrivateDataLoader]


class PrivacyEngineHookBased:
    """Opacus's ``PrivacyEngine``, but the model comes back as it is.

    ::

        from dp_hooks import PrivacyEngineHookBased as PrivacyEngine

        engine = PrivacyEngine()
        model, optimizer, loader = engine.make_private(
            module=model, optimizer=optimizer, data_loader=loader, noise_multiplier=1.0, max_grad_norm=1.0
        )

    Hooks stay until :meth:`cleanup`, or until the end of ``with engine:``. Differences from Opacus that concern
    privacy: the sampling rate is ``batch_size / len(dataset)``, not ``1 / len(data_loader)``; without Poisson sampling
    every pass over the loader is charged without amplification; noise comes from fresh entropy unless
    ``noise_generator`` is given, so ``torch.manual_seed`` does not fix it.
    """

    def __init__(self, *, accountant: str = "prv", secure_mode: bool = False) -> None:
        """Create an engine with its own accountant.

        Args:
            accountant: "prv", "rdp" or "gdp".
            secure_mode: not available yet; True raises ``InvalidArgumentError`` in :meth:`make_private`.
        """
        self.accountant = make_accountant(accountant)
        self.secure_mode = secure_mode
        self.dataset: Any = None
        self._scopes: list[PrivateTraining] = []

    # ---------------------------------------------------------------- lifetime

    def __enter__(self) -> Self:
        """Return the engine; leaving the block calls :meth:`cleanup`."""
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Call :meth:`cleanup`."""
        self.cleanup()

    def cleanup(self) -> None:
        """End every scope this engine opened: hooks, attributes and guards are gone. May be called again.

        The accountant keeps its history, so the engine can go on with another ``make_private``.
        """
        try:
            while self._scopes:
                self._scopes.pop().__exit__(None, None, None)
        finally:
            if self._scopes:  # one of them failed: the others must go all the same
                self.cleanup()

    # ---------------------------------------------------------------- making private

    def make_private(
        self,
        *,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        criterion: Any = None,
        data_loader: DataLoader[Any],
        noise_multiplier: float,
        max_grad_norm: float | list[float] | Mapping[str, float],
        batch_first: bool = True,
        loss_reduction: str = "mean",
        poisson_sampling: bool = True,
        clipping: str = "flat",
        noise_generator: torch.Generator | None = None,
        grad_sample_mode: str = "hooks",
        wrap_model: bool = False,
        rand_on_empty: bool = False,
        **kwargs: Any,
    ) -> Private | PrivateWithCriterion:
        """Attach to ``module`` and return it with the private optimizer and loader.

        Parameters mean what they mean in :func:`~dp_hooks.private_training` (``module`` is ``model``,
        ``data_loader`` is ``loader``).

        Args:
            module: the model, returned as the same object.
            optimizer: its optimizer.
            criterion: the loss function; returned unchanged in mode "ghost" (default there: ``CrossEntropyLoss()``), since
                ordinary losses work. Unused in other modes.
            data_loader: the loader of the training data.
            noise_multiplier: sigma.
            max_grad_norm: C, or a list or a mapping from name patterns with ``clipping="per_layer"``.
            batch_first: the sample axis is 0, else 1.
            loss_reduction: "mean" or "sum".
            poisson_sampling: draw batches by Poisson sampling.
            clipping: "flat", "per_layer", "per_group", "automatic" or "adaptive".
            noise_generator: generator of the noise, for repeatable experiments.
            grad_sample_mode: "hooks", "functorch" or "ghost".
            wrap_model: accepted for compatibility; True raises, since this engine never wraps.
            rand_on_empty: accepted for compatibility; True raises, since empty batches have no row here.
            **kwargs: ``clipping_options``, ``max_physical_batch_size``, ``sample_rate``, ``self_check`` as in
                ``private_training``. The options of adaptive clipping may also be given one by one, as Opacus has them
                (``target_unclipped_quantile=0.5, ...``).

        Returns:
            ``(module, optimizer, loader)``; in mode "ghost" ``(module, optimizer, criterion, loader)``, as in Opacus.

        Raises:
            InvalidArgumentError: an argument that cannot be used.
            UnsupportedModelError: the model cannot be trained privately; lists every offending module.
        """
        return self._open(
            module,
            optimizer,
            criterion,
            data_loader,
            wrap_model,
            rand_on_empty=rand_on_empty,
            noise_multiplier=noise_multiplier,
            max_grad_norm=max_grad_norm,
            batch_first=batch_first,
            loss_reduction=loss_reduction,
            poisson_sampling=poisson_sampling,
            clipping=clipping,
            noise_generator=noise_generator,
            grad_sample_mode=grad_sample_mode,
            **kwargs,
        )

    def make_private_with_epsilon(
        self,
        *,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        criterion: Any = None,
        data_loader: DataLoader[Any],
        target_epsilon: float,
        target_delta: float,
        epochs: float,
        max_grad_norm: float | list[float] | Mapping[str, float],
        batch_first: bool = True,
        loss_reduction: str = "mean",
        poisson_sampling: bool = True,
        clipping: str = "flat",
        noise_generator: torch.Generator | None = None,
        grad_sample_mode: str = "hooks",
        wrap_model: bool = False,
        **kwargs: Any,
    ) -> Private | PrivateWithCriterion:
        """Like :meth:`make_private`, with sigma calculated for a budget.

        The loader yields exactly the number of batches the budget was calculated for, over all passes together; a further
        ``optimizer.step()`` raises ``BudgetExhaustedError``.

        Args:
            module: see :meth:`make_private`.
            optimizer: see :meth:`make_private`.
            criterion: see :meth:`make_private`.
            data_loader: see :meth:`make_private`.
            target_epsilon: epsilon after ``epochs`` passes.
            target_delta: the delta that goes with it.
            epochs: number of passes.
            max_grad_norm: see :meth:`make_private`.
            batch_first: see :meth:`make_private`.
            loss_reduction: see :meth:`make_private`.
            poisson_sampling: see :meth:`make_private`.
            clipping: see :meth:`make_private`.
            noise_generator: see :meth:`make_private`.
            grad_sample_mode: see :meth:`make_private`.
            wrap_model: see :meth:`make_private`.
            **kwargs: see :meth:`make_private`.

        Returns:
            As :meth:`make_private`.

        Raises:
            InvalidArgumentError: also if this engine has spent budget already.
        """
        return self._open(
            module,
            optimizer,
            criterion,
            data_loader,
            wrap_model,
            target_epsilon=target_epsilon,
            target_delta=target_delta,
            epochs=epochs,
            max_grad_norm=max_grad_norm,
            batch_first=batch_first,
            loss_reduction=loss_reduction,
            poisson_sampling=poisson_sampling,
            clipping=clipping,
            noise_generator=noise_generator,
            grad_sample_mode=grad_sample_mode,
            **kwargs,
        )

    def _open(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        criterion: Any,
        data_loader: DataLoader[Any],
        wrap_model: bool,
        *,
        grad_sample_mode: str,
        rand_on_empty: bool = False,
        **kwargs: Any,
    ) -> Private | PrivateWithCriterion:
        if wrap_model is not False:
            raise bad("wrap_model", wrap_model, "this engine never wraps the model; leave the argument out.")
        if rand_on_empty is not False:
            raise bad(
                "rand_on_empty",
                rand_on_empty,
                "an empty batch has zero rows here, and gets noise all the same; a made-up row would count as a person. "
                "Use @dp_step if the model cannot run on zero rows.",
            )
        options = {name: kwargs.pop(name) for name in ADAPTIVE_OPTIONS if name in kwargs}
        if options:
            if kwargs.get("clipping_options") is not None:
                raise bad(
                    "clipping_options",
                    kwargs["clipping_options"],
                    f"{', '.join(options)} given outside of it as well; put all options into clipping_options.",
                )
            kwargs["clipping_options"] = options
        scope = private_training(
            module,
            optimizer,
            data_loader,
            accountant=self.accountant,
            secure_mode=self.secure_mode,
            grad_sample_mode=grad_sample_mode,
            **kwargs,
        )
        if self.dataset is not None and self.dataset is not data_loader.dataset:
            warnings.warn(
                "this engine was used with another dataset object before. Its accountant adds all steps up as if they "
                "were on the same data; use a new engine for other data",
                stacklevel=3,
            )
        private_optimizer, private_loader = scope.__enter__()
        self._scopes.append(scope)
        self.dataset = data_loader.dataset
        if grad_sample_mode == "ghost":
            loss = nn.CrossEntropyLoss() if criterion is None else criterion
            return module, private_optimizer, loss, private_loader
        return module, private_optimizer, private_loader

    # ---------------------------------------------------------------- checking

    def is_compatible(
        self,
        *,
        module: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        data_loader: DataLoader[Any] | None = None,
    ) -> bool:
        """Whether :meth:`validate` would pass."""
        return not problems(module)

    def validate(
        self,
        *,
        module: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        data_loader: DataLoader[Any] | None = None,
    ) -> None:
        """Raise ``UnsupportedModelError`` if a module is known to mix samples or to keep statistics of them.

        Unlike in Opacus, ``nn.LSTM``, ``nn.GRU``, ``nn.RNN`` and ``nn.MultiheadAttention`` pass: they are trained as
        they are.
        """
        check_model(module)

    @classmethod
    def get_compatible_module(cls, module: nn.Module) -> nn.Module:
        """Return a copy of ``module`` in which Opacus's fixers have replaced what cannot be trained privately."""
        fixed: nn.Module = PrivacyEngine.get_compatible_module(module)
        return fixed

    # ---------------------------------------------------------------- accounting and checkpoints

    def get_epsilon(self, delta: float) -> float:
        """Return the epsilon spent so far at ``delta``; infinite after a step without noise."""
        return epsilon_of(self.accountant, delta)

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

        State-dict keys have no ``_module.`` prefix. Random states are never saved: past noise could be replayed from
        them.
        """
        # Opacus's own method only calls state_dict() on what it is given and self.accountant; no engine state is used.
        PrivacyEngine.save_checkpoint(
            self,
            path=path,
            module=module,
            optimizer=optimizer,
            noise_scheduler=noise_scheduler,
            grad_clip_scheduler=grad_clip_scheduler,
            checkpoint_dict=checkpoint_dict,
            module_state_dict_kwargs=module_state_dict_kwargs,
            torch_save_kwargs=torch_save_kwargs,
        )

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
            ScopeError: this engine has spent budget that is neither part of the checkpoint nor its continuation.
        """
        checkpoint: dict[str, Any] = torch.load(path, **{"weights_only": True, **(torch_load_kwargs or {})})
        spent = checkpoint["privacy_accountant_state_dict"]
        make_accountant(self.accountant.mechanism()).load_state_dict(spent)  # raises before anything has changed
        history = _joined(self.accountant.history, spent["history"])
        weights = checkpoint["module_state_dict"]
        if weights and all(key.startswith(_WRAPPER) for key in weights):
            weights = {key.removeprefix(_WRAPPER): value for key, value in weights.items()}
        module.load_state_dict(weights, **(module_load_dict_kwargs or {}))
        self.accountant.load_state_dict({**spent, "history": history})
        parts = (
            ("optimizer_state_dict", optimizer),
            ("noise_scheduler_state_dict", noise_scheduler),
            ("grad_clip_scheduler_state_dict", grad_clip_scheduler),
        )
        for key, part in parts:
            state = checkpoint.pop(key, {})
            if part is not None and state:
                part.load_state_dict(state)
            elif (part is None) != (not state):
                what = key.removesuffix("_state_dict")
                warnings.warn(
                    f"the checkpoint has {'a' if state else 'no'} {what} state, but {what} is "
                    f"{'given' if part is not None else 'not given'}",
                    stacklevel=2,
                )
        return checkpoint


def _joined(spent: list[tuple[float, float, int]], loaded: list[tuple[float, float, int]]) -> list[Any]:
    """Return the history to go on with: the longer of two where one continues the other."""
    for shorter, longer in ((spent, loaded), (loaded, spent)):
        if _continues(shorter, longer):
            if longer is spent and len(spent) and shorter != longer:
                warnings.warn(
                    "the checkpoint is older than this engine: its budget spent since then stays spent", stacklevel=3
                )
            return [tuple(entry) for entry in longer]
    raise ScopeError(
        f"this engine has already spent budget ({spent}) that the checkpoint ({loaded}) knows nothing of; loading would "
        "forget it. Load into a new engine."
    )


def _continues(shorter: list[tuple[float, float, int]], longer: list[tuple[float, float, int]]) -> bool:
    if not shorter:
        return True
    *head, (sigma, rate, steps) = [tuple(entry) for entry in shorter]
    rest = [tuple(entry) for entry in longer]
    if len(rest) < len(shorter) or rest[: len(head)] != head:
        return False
    at = rest[len(head)]
    return at[:2] == (sigma, rate) and (at[2] >= steps)
