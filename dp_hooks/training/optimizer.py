"""The optimizer that a private scope hands out: clips, adds noise, charges, and only then lets the user's own one step."""

import copy
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from .._rerun import autocast_as
from .._validate import bad, non_negative
from ..capture.controller import HookController
from ..checks.self_check import SelfCheck
from ..errors import ScopeError, UnsupportedModelError
from ..gradients.sample_gradients import SampleGradients
from ..privacy.accounting.meter import PrivacyMeter
from ..privacy.clipping import ClippingFunction
from ..privacy.noise.gaussian import GaussianNoise
from ..privacy.sampling.loader import PhysicalBatch

_HOOKS = tuple(
    f"_optimizer_{method}_{when}_hooks"
    for method in ("step", "state_dict", "load_state_dict")
    for when in ("pre", "post")
)

StepHook = Callable[["PrivateOptimizer"], None]


def check_optimizer(optimizer: object, model: nn.Module) -> list[nn.Parameter]:
    """Return the trainable parameters that ``optimizer`` manages, in its order.

    Raises:
        InvalidArgumentError: not an optimizer, foreign parameters, none that is trainable, or an optimizer that
            evaluates its closure several times (LBFGS) or needs sparse gradients.
    """
    if isinstance(optimizer, PrivateOptimizer):
        raise bad("optimizer", type(optimizer).__name__, "it is private already; pass the optimizer it was made from.")
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise bad("optimizer", optimizer, "pass a torch.optim.Optimizer over the model's parameters.")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise bad(
            "optimizer",
            "LBFGS",
            "it evaluates the loss several times per step, and every evaluation would need a charge of its own. Use SGD "
            "or Adam.",
        )
    if isinstance(optimizer, torch.optim.SparseAdam):
        raise bad("optimizer", "SparseAdam", "noise makes every gradient dense. Use Adam.")
    own = {id(p) for p in model.parameters()}
    params = [p for group in optimizer.param_groups for p in group["params"]]
    foreign = [tuple(p.shape) for p in params if id(p) not in own]
    if foreign:
        raise bad(
            "optimizer",
            type(optimizer).__name__,
            "Module parameters are different than optimizer Parameters: "
            f"{len(foreign)} of its {len(params)} tensors (shapes {foreign[:3]}) are not in the model. Create it "
            "from model.parameters() after the model has its final form.",
        )
    trainable = [p for p in params if p.requires_grad]
    if not trainable:
        raise bad(
            "optimizer",
            type(optimizer).__name__,
            "none of its parameters is trainable. Set requires_grad_(True) on those to train before entering.",
        )
    return trainable


class PrivateOptimizer(torch.optim.Optimizer):
    """A drop-in ``torch.optim.Optimizer`` around the user's own.

    ``step()`` clips the captured per-sample gradients, adds ``N(0, (noise_multiplier * sensitivity)^2)`` to their sum
    (somewhat more with adaptive clipping, which also releases a count), charges the accountant, writes the noised gradient
    to ``p.grad`` and calls the wrapped optimizer. Inside the
    scope ``p.grad`` is None until then. Parameter groups and state are the wrapped optimizer's own, so learning-rate schedulers
    and checkpoints work as usual; a copy or pickle of it is a copy of the wrapped optimizer.

    Guarantee: one example of the dataset changes the clipped sum by at most the clipping function's sensitivity, and no
    function of that sum leaves this class without noise.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        controller: HookController,
        clipping: ClippingFunction,
        make_clipping: Callable[[Any], ClippingFunction],
        noise: GaussianNoise,
        noise_multiplier: float,
        meter: PrivacyMeter,
        expected_batch_size: float,
        loss_reduction: str,
        self_check: SelfCheck | None = None,
    ) -> None:
        """Wrap ``optimizer``; the pieces come checked from the scope."""
        # Not calling super().__init__: it would build parameter groups and state of its own.
        self.original_optimizer = optimizer
        for name in _HOOKS:  # shared, so that hooks registered here run when the wrapped optimizer works
            setattr(self, name, getattr(optimizer, name))
        self.expected_batch_size = expected_batch_size
        self.loss_reduction = loss_reduction
        self.params = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        self._controller = controller
        self._clipping = clipping
        self._make_clipping = make_clipping
        self._noise = noise
        self._noise_multiplier = noise_multiplier
        self._meter = meter
        self._self_check = self_check
        self._step_hooks: list[StepHook] = []
        self._closed = False
        self._stepping = False
        self._part: PhysicalBatch | None = None
        self._part_done = False
        self._sums: dict[nn.Parameter, Tensor] = {}
        self._statistic: Tensor | None = None
        self._said: set[str] = set()

    # ---------------------------------------------------------------- privacy parameters

    @property
    def noise_multiplier(self) -> float:
        """sigma: what is charged, the standard deviation of the noise in units of the sensitivity. Schedulers may set it.

        With adaptive clipping it pays for the count of unclipped samples as well, and the gradients get more noise.
        """
        return self._noise_multiplier

    @noise_multiplier.setter
    def noise_multiplier(self, value: float) -> None:
        value = non_negative("noise_multiplier", value)
        if self._meter.budget is not None and value != self._noise_multiplier:
            raise ScopeError(
                f"noise_multiplier={value}: the noise was calculated for target_epsilon and cannot be changed. Open the "
                "scope with noise_multiplier=... to schedule it."
            )
        self._clipping.check_noise(value)
        self._noise_multiplier = value

    @property
    def max_grad_norm(self) -> Any:
        """The clipping bound C; a list, or a dictionary by name pattern, where there are several. Schedulers may set it.

        With adaptive clipping it is the bound of the next step, and setting it starts afresh from there.
        """
        return self._clipping.max_grad_norm

    @max_grad_norm.setter
    def max_grad_norm(self, value: Any) -> None:
        if self._sums:
            raise ScopeError(
                f"max_grad_norm={value!r}: cannot change in the middle of a logical batch, parts of which were clipped to "
                f"{self.max_grad_norm!r} already. Change it between steps."
            )
        self._clipping = self._make_clipping(value)

    @property
    def clipping_details(self) -> dict[str, float]:
        """Further settings of the clipping function; with adaptive clipping also how the noise is split."""
        return self._clipping.details(self.noise_multiplier)

    @property
    def sensitivity(self) -> float:
        """S: what one example can change in the clipped sum; the noise is in units of it."""
        return self._clipping.sensitivity

    def attach_step_hook(self, fn: StepHook) -> None:
        """Call ``fn(optimizer)`` at every release, after the charge and before the parameters move."""
        self._step_hooks.append(fn)

    def signal_skip_step(self, do_skip: bool = True) -> None:
        """Refused: physical batches belong to the scope, which knows them (Opacus's ``BatchMemoryManager`` calls this)."""
        raise ScopeError(
            "BatchMemoryManager is not needed here: pass max_physical_batch_size to private_training or make_private."
        )

    # ---------------------------------------------------------------- torch.optim.Optimizer

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The wrapped optimizer's parameter groups."""
        return self.original_optimizer.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        self.original_optimizer.param_groups = value

    @property
    def state(self) -> Any:
        """The wrapped optimizer's state."""
        return self.original_optimizer.state

    @state.setter
    def state(self, value: Any) -> None:
        self.original_optimizer.state = value

    @property
    def defaults(self) -> dict[str, Any]:
        """The wrapped optimizer's defaults."""
        return self.original_optimizer.defaults

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        self.original_optimizer.defaults = value

    def state_dict(self) -> dict[str, Any]:
        """Return the wrapped optimizer's state dict."""
        return self.original_optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of the wrapped optimizer's class."""
        self.original_optimizer.load_state_dict(state_dict)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused: the set of private parameters is fixed when the scope begins."""
        raise ScopeError("parameter groups cannot be added inside a private scope: add them before entering it.")

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Asked by ``torch.amp.GradScaler.step``, which would have to unscale gradients that are clipped already."""
        raise ScopeError(
            "GradScaler multiplies the loss by a scale that per-sample clipping would not know of: the clipping bound would be "
            "divided by it. Call loss.backward() and opt.step() without the scaler; autocast alone is fine."
        )

    def __repr__(self) -> str:
        """Show the privacy parameters and the wrapped optimizer."""
        return (
            f"PrivateOptimizer(noise_multiplier={self.noise_multiplier}, max_grad_norm={self.max_grad_norm}, "
            f"{self.original_optimizer!r})"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.optim.Optimizer:
        """A deep copy of the wrapped optimizer: ordinary, over copied parameters, outside the scope."""
        return copy.deepcopy(self.original_optimizer, memo)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as the wrapped optimizer."""
        return (_same, (self.original_optimizer,))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop what was captured since the last step, and every ``p.grad``.

        Finished physical parts of the present logical batch are kept. ``set_to_none=False`` is taken as True.
        """
        if not self._closed:
            self._controller.discard()
        self.original_optimizer.zero_grad(set_to_none=True)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one private step, or, in the middle of a logical batch, just add the finished physical part.

        Args:
            closure: evaluated once, with gradients enabled, before the step.

        Returns:
            What ``closure`` returned, or None.

        Raises:
            ScopeError: after the scope's end, without gradients, or twice for one logical batch.
            BudgetExhaustedError: the step would exceed the budget.
            UnsupportedModelError: a trainable parameter was added or unfrozen inside the scope.
            In each case before anything was released or charged.
        """
        return self._step(closure, empty=False)

    def step_empty(self) -> None:
        """Take the step of a batch without examples: nothing was back-propagated, and noise alone is released and charged.

        Raises:
            ScopeError, BudgetExhaustedError, UnsupportedModelError: as :meth:`step`.
        """
        self._step(None, empty=True)

    # ---------------------------------------------------------------- inside

    def _step(self, closure: Callable[[], Any] | None, *, empty: bool) -> Any:
        self._check_open()
        foreign = self._part is None
        finishes = self._part is None or self._part.last
        if finishes:
            self._meter.check_step(self.noise_multiplier, foreign=foreign)
        self._check_params()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_step(empty=empty)
        self._add_part(self._controller.take())
        self._part_done = True
        if finishes:
            self._release(foreign)
        return loss

    def _check_open(self) -> None:
        if self._closed:
            raise ScopeError(
                "opt.step() after the end of its private scope. Train inside the with block; to go on without privacy, use "
                "the original optimizer."
            )

    def _check_params(self) -> None:
        managed = {id(p) for p in self.params}
        params = [p for group in self.param_groups for p in group["params"]]
        unmanaged = [p for p in params if p.requires_grad and id(p) not in managed]
        for p in unmanaged:
            p.grad = None  # it is of private samples, and without noise
        if unmanaged:
            names = ", ".join(self._controller.name_of(p) for p in unmanaged[:8])
            raise UnsupportedModelError(
                f"{names}: became trainable after the scope began, so gradients were neither clipped nor noised. "
                "Set requires_grad before entering; to unfreeze later, leave the scope and enter a new one with "
                "accountant=scope.accountant."
            )

    def _check_step(self, *, empty: bool) -> None:
        part = self._part
        if part is not None and self._part_done:
            raise ScopeError(
                "a second opt.step() for the same batch of the private loader: its sampling was charged once. Take the "
                "next batch from the loader first. (Batches from elsewhere can be used only in a scope of their own.)"
            )
        empty = empty or (part is not None and part.size == 0)
        if self._controller.is_stale:
            raise ScopeError(
                "opt.step() found gradients of an earlier batch only: the private loader has handed out another one since. "
                "Take the step before the next batch, or call opt.zero_grad() to drop them."
            )
        if not self._controller.has_gradients and not empty and not self._sums:
            raise ScopeError(
                "opt.step() found no gradients: no backward pass through the model's hooked layers since the last step. "
                "Call loss.backward() before it, on a loss of this model, outside torch.no_grad()."
            )

    def start_part(self, part: PhysicalBatch) -> None:
        """The loader is about to hand out ``part``: finish the part before it, or forget a logical batch left early."""
        if part.index > 0:
            if self._part is None or (self._part.logical, self._part.index + 1) != (part.logical, part.index):
                raise ScopeError(
                    "two passes over the private loader are interleaved: physical parts of different logical batches would "
                    "be added up. Finish or leave one pass before beginning the next."
                )
            if not self._part_done:
                self._add_part(self._controller.take())
        else:
            self._sums, self._statistic = {}, None
        self._part = part
        self._part_done = False
        self._controller.next_batch()
        if self._self_check is not None:
            self._self_check.new_step()

    def _add_part(self, gradients: SampleGradients | None) -> None:
        """Clip one physical part and add it to the sums of its logical batch."""
        if gradients is None:
            return
        part = self._part
        if part is not None and gradients.samples > part.size:
            raise ScopeError(
                f"the model saw {gradients.samples} samples, but the private loader handed out {part.size} examples: one "
                "example may then be clipped several times over. Keep one row per example (add up the losses of "
                "augmented copies in separate forward passes)."
            )
        captured = {id(p) for p in gradients.params}
        wanted = [p for p in self.params if id(p) in captured and p.requires_grad]
        if self._self_check is not None:
            if self._self_check.needed(gradients.samples):
                self._self_check.check_calls(gradients.samples)
            self._self_check.new_step()
        if gradients.samples == 0 or not wanted:
            return
        device = wanted[0].device
        # The step, or the loader that finishes a physical part, may be used inside the user's autocast.
        with autocast_as(device.type, None):
            norms = gradients.sq_norms(wanted)
            factors = self._clipping.factors(norms)
            finite = torch.stack([torch.isfinite(s).to(device) for s in norms.values()]).all(0)
            for p, total in gradients.weighted_sums(factors, finite, consume=True).items():
                self._sums[p] = self._sums[p].add_(total) if p in self._sums else total
        statistic = self._clipping.statistic(norms)
        if statistic is not None:
            self._statistic = statistic if self._statistic is None else self._statistic + statistic

    def _release(self, foreign: bool) -> None:
        sums, self._sums = self._sums, {}
        statistic, self._statistic = self._statistic, None
        clipping, sigma = self._clipping, self.noise_multiplier  # a step hook may set others for the next step
        params = [p for p in self.params if p.requires_grad]
        self._mention_unused([p for p in params if p not in sums])
        for p in params:
            if p not in sums:
                sums[p] = torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32))
        std = clipping.gradient_noise_multiplier(sigma) * clipping.sensitivity
        scale = 1 / self.expected_batch_size if self.loss_reduction == "mean" else 1.0
        self._noise.add_([sums[p] for p in params], std, scale)
        noised = {p: sums.pop(p).to(p.dtype) for p in params}  # after the noise, rounding is post-processing
        self._meter.charge_step(sigma, foreign=foreign)
        for hook in self._step_hooks:
            hook(self)
        for group in self.param_groups:  # frozen ones, too: a gradient they got otherwise must not be applied
            for p in group["params"]:
                p.grad = noised.get(p)
        self._stepping = True
        try:
            self.original_optimizer.step()
        finally:
            self._stepping = False
        clipping.update(statistic, self._noise, sigma)

    def _mention_unused(self, unused: list[nn.Parameter]) -> None:
        names = [self._controller.name_of(p) for p in unused]
        new = [name for name in names if name not in self._said]
        if new and (self._part is None or self._part.size > 0):
            self._said.update(new)
            warnings.warn(
                f"the loss did not reach {', '.join(new[:8])}{', ...' if len(new) > 8 else ''}: such parameters get "
                "noise but no signal. Freeze them with requires_grad_(False) before entering the scope.",
                stacklevel=4,
            )

    def _forbid_direct_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if not self._stepping:
            raise ScopeError(
                "the original optimizer was stepped inside a private scope: that step would have neither noise nor "
                "charge. Step the optimizer that the scope returned."
            )

    def open(self, stack: ExitStack) -> None:
        """Guard the original optimizer until ``stack`` unwinds, and close this one then."""
        handle = self.original_optimizer.register_step_pre_hook(self._forbid_direct_step)
        stack.callback(handle.remove)
        stack.callback(self._close)

    def _close(self) -> None:
        self._closed = True
        self._sums, self._statistic = {}, None
        self._part = None


def _same(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    return optimizer
