"""PrivacyEngineHookBased: Opacus's ``PrivacyEngine`` interface over the parts of a private scope."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from opacus import PrivacyEngine
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
from torch import nn
from torch.utils.data import DataLoader
from typing_extensions import Self

from .._validate import bad
from ..capture.validate import check_model, problems
from ..privacy.accounting.opacus import epsilon_of, make_accountant
from ..privacy.clipping import ADAPTIVE_OPTIONS
from ..privacy.sampling.loader import PrivateDataLoader
from ..training.optimizer import PrivateOptimizer
from ..training.scope import PrivateTraining, private_training
from .opacus_checkpoint import OpacusCheckpoints

Private = tuple[nn.Module, PrivateOptimizer, PrivateDataLoader]
PrivateWithCriterion = tuple[nn.Module, PrivateOptimizer, Any, PrivateDataLoader]


class PrivacyEngineHookBased(OpacusCheckpoints):
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
            accountant: "prv", "pld", "rdp" or "gdp".
            secure_mode: noise and sampling that nobody can draw again; see :func:`~dp_hooks.private_training`.
        """
        self.accountant = make_accountant(accountant)
        self.secure_mode = secure_mode
        self.dataset: Any = None
        self._scopes: list[PrivateTraining] = []

    def __enter__(self) -> Self:
        """Return the engine; leaving the block calls :meth:`cleanup`."""
        return self

    def __exit__(self, *raised: object) -> None:
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

        Arguments mean what they mean in :func:`~dp_hooks.private_training` (``module`` is its ``model``, ``data_loader`` its
        ``loader``), which also says what may be in ``kwargs``: ``clipping_options``, ``max_physical_batch_size``,
        ``sample_rate``, ``self_check`` and ``sampling`` (in the place of ``poisson_sampling``, which may then stay as it is). The
        options of adaptive clipping may also be given one by one, as Opacus has them (``target_unclipped_quantile=0.5, ...``),
        and alone, as its ``PrivacyEngineAdaptiveClipping`` has them; they mean ``clipping="adaptive"`` then. ``criterion``, in
        mode "ghost" by default ``CrossEntropyLoss()``, is returned unchanged there, since ordinary losses work; if it is a module
        and the loop calls it, the self-check covers it in every mode. ``wrap_model`` and ``rand_on_empty`` are there for
        compatibility, and refused if True: this engine never wraps, and its empty batches have no row. The optimizer and the
        loader work in Opacus's ``BatchMemoryManager``, without loader workers.

        Returns:
            ``(module, optimizer, loader)``; in mode "ghost" ``(module, optimizer, criterion, loader)``, as in Opacus.

        Raises:
            InvalidArgumentError: an argument that cannot be used.
            UnsupportedModelError: the model cannot be trained privately; names the first three offending modules.
        """
        return self._open(**_given(locals()))

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
        """Like :meth:`make_private`, with sigma calculated for a budget: ``epochs`` passes spend at most ``target_epsilon``.

        ``target_delta`` is the delta that goes with it; all other arguments are those of :meth:`make_private`. The loader
        yields exactly the number of batches the budget was calculated for, over all passes together; a further
        ``optimizer.step()`` raises ``BudgetExhaustedError``.

        Raises:
            InvalidArgumentError: also if this engine has spent budget already.
            UnsupportedModelError: see :meth:`make_private`.
        """
        return self._open(**_given(locals()))

    def _open(
        self,
        *,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        criterion: Any,
        data_loader: DataLoader[Any],
        grad_sample_mode: str,
        wrap_model: bool,
        rand_on_empty: bool = False,
        **kwargs: Any,
    ) -> Private | PrivateWithCriterion:
        if wrap_model is not False:
            raise bad("wrap_model", wrap_model, "this engine never wraps the model; leave the argument out.")
        if rand_on_empty is not False:
            remedy = "an empty batch has zero rows here, and gets noise all the same; a made-up row would count as a person. "
            raise bad("rand_on_empty", rand_on_empty, remedy + "Use @dp_step if the model cannot run on zero rows.")
        options = {name: kwargs.pop(name) for name in ADAPTIVE_OPTIONS if name in kwargs}
        if options:
            if kwargs.get("clipping_options") is not None:
                remedy = f"{', '.join(options)} given outside of it as well; put all options into clipping_options."
                raise bad("clipping_options", kwargs["clipping_options"], remedy)
            kwargs["clipping_options"] = options
            if kwargs["clipping"] == "flat":  # Opacus's PrivacyEngineAdaptiveClipping takes the options alone
                warnings.warn(f"{', '.join(options)}: options of adaptive clipping, so clipping='adaptive' is used", stacklevel=3)
                kwargs["clipping"] = "adaptive"
        if isinstance(criterion, DPLossFastGradientClipping):
            remedy = "it works with Opacus's own modules alone. Pass the loss that it was made of: ghost mode takes any."
            raise bad("criterion", type(criterion).__name__, remedy)
        if kwargs.get("sampling") is not None and kwargs["poisson_sampling"] is True:
            del kwargs["poisson_sampling"]  # which Opacus's signature has, given or not
        own = {"accountant": self.accountant, "secure_mode": self.secure_mode, "grad_sample_mode": grad_sample_mode}
        loss = nn.CrossEntropyLoss() if criterion is None and grad_sample_mode == "ghost" else criterion
        scope = private_training(
            module, optimizer, data_loader, criterion=loss if isinstance(loss, nn.Module) else None, **own, **kwargs
        )
        scope.criterion_is_optional = True  # as in Opacus, where only "ghost" needs the one that is returned
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
            return module, private_optimizer, loss, private_loader
        return module, private_optimizer, private_loader

    def is_compatible(self, *, module: nn.Module, optimizer: Any = None, data_loader: Any = None) -> bool:
        """Whether :meth:`validate` would pass."""
        return not problems(module)

    def validate(self, *, module: nn.Module, optimizer: Any = None, data_loader: Any = None) -> None:
        """Raise ``UnsupportedModelError`` if a module is known to mix samples or to keep statistics of them.

        Unlike in Opacus, ``nn.LSTM``, ``nn.GRU``, ``nn.RNN`` and ``nn.MultiheadAttention`` pass: they are trained as they are.
        """
        check_model(module)

    @classmethod
    def get_compatible_module(cls, module: nn.Module) -> nn.Module:
        """Return a copy of ``module`` in which Opacus's fixers have replaced what cannot be trained privately."""
        fixed: nn.Module = PrivacyEngine.get_compatible_module(module)
        return fixed

    def get_epsilon(self, delta: float) -> float:
        """Return the epsilon spent so far at ``delta``; infinite after a step without noise."""
        return epsilon_of(self.accountant, delta)


def _given(local: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of the method whose ``locals()`` these are at its beginning, without ``self``."""
    given = {name: value for name, value in local.items() if name not in ("self", "kwargs")}
    return {**given, **local["kwargs"]}
