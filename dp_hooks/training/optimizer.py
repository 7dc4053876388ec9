"""The optimizer that a private scope hands out: clips, adds noise, charges, and only then lets the user's own one step."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from .._precision import wide_dtype
from .._validate import non_negative
from ..capture.controller import HookController
from ..checks.self_check import SelfCheck
from ..distributed.peers import Peers
from ..errors import ScopeError, some_of
from ..privacy.accounting.meter import PrivacyMeter
from ..privacy.noise.noise import Noise
from ..privacy.noise.standard_deviation import standard_deviation
from ..privacy.sampling.physical import PhysicalBatch
from ..privacy.sampling.split import Split
from .clipped_sum import ClippedSum
from .lifetime import Lifetime
from .loss_scale import LossScale
from .nonprivate_statistics import NonprivateStatistics
from .other_optimizers import OtherOptimizers
from .outside import OutsideGradients
from .prepared import refuse_skipped_steps
from .rows_are_examples import AHEAD, Rows
from .shared_release import SharedRelease
from .unmanaged_parameters import refuse_unmanaged
from .unused_parameters import UnusedParameters
from .wrapped_optimizer import WrappedOptimizer
from .writes import Writes

StepHook = Callable[["PrivateOptimizer"], None]


class PrivateOptimizer(WrappedOptimizer):
    """A drop-in ``torch.optim.Optimizer`` around the user's own.

    ``step()`` clips the captured per-sample gradients, adds ``N(0, (noise_multiplier * sensitivity)^2)`` to their sum
    (somewhat more with adaptive clipping, which also releases a count), charges the accountant, writes the noised gradient
    to ``p.grad`` and calls the wrapped optimizer. Inside the scope ``p.grad`` is None until then.

    Guarantee: one example of the dataset (with ``privacy_unit``: one unit with all of its examples) changes the clipped sum by at
    most the clipping function's sensitivity, and no function of that sum leaves this class without noise.

    Attributes:
        params: the trainable parameters, in the wrapped optimizer's order.
        expected_batch_size: what the noised sum is divided by, if it is.
        averages: whether it is: with ``loss_reduction="mean"``.
        by_units: whether what is clipped are sums over the examples of a unit.
        writes: whether parameters were written to between steps.
        outside: gradients of private samples that a :func:`dp_step` function left outside the model.
        loss_scale: what losses are multiplied with, which is undone before clipping.
        nonprivate_statistics: of the scope's steps, with ``nonprivate_statistics=True``; else None.
        split: which part of a batch comes, where another loader than the private one cuts it.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        controller: HookController,
        clipped_sum: ClippedSum,
        noise: Noise,
        meter: PrivacyMeter,
        expected_batch_size: float,
        averages: bool,
        by_units: bool,
        loss_scale: LossScale,
        self_check: SelfCheck | None = None,
        lifetime: Lifetime | None = None,
        statistics: NonprivateStatistics | None = None,
        peers: Peers | None = None,
    ) -> None:
        """Wrap ``optimizer``; the pieces come checked from the scope."""
        super().__init__(optimizer)
        self.expected_batch_size = expected_batch_size
        self.averages, self.by_units = averages, by_units
        self.params = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        self._controller = controller
        self._shared = SharedRelease(noise, clipped_sum, peers, self.params)
        self._sum = clipped_sum
        self._meter = meter
        self._self_check = self_check
        self.loss_scale = loss_scale
        self.nonprivate_statistics = statistics
        self._handed_out = 0  # logical batches; not their numbers, which workers of a loader may have drawn ahead
        self._drawn = 0  # examples of the logical batch in the parts that were handed out
        self.outside = OutsideGradients(controller)
        self._rows = Rows(controller.axis)
        self.split = Split()
        self._lifetime = lifetime  # who can step can still use the scope
        self._others = OtherOptimizers(optimizer, self.params, controller.model, self.outside)
        self.writes = Writes(self.params)
        self._check_function: Callable[[Tensor | None], None] | None = None
        self._step_hooks: list[StepHook] = []
        self._closed = False
        self._batch_done = False
        self._unused = UnusedParameters(controller.name_of)
        self._managed = {id(p) for p in self.params}

    # ---------------------------------------------------------------- privacy parameters

    @property
    def noise_multiplier(self) -> float:
        """sigma: what is charged, the standard deviation of the noise in units of the sensitivity. Schedulers may set it.

        With adaptive clipping it pays for the count of unclipped samples as well, and the gradients get more noise.
        """
        return self._meter.noise_multiplier

    @noise_multiplier.setter
    def noise_multiplier(self, value: float) -> None:
        value = non_negative("noise_multiplier", value)
        if self._meter.budget is not None and value != self.noise_multiplier:
            raise ScopeError(
                f"noise_multiplier={value}: the noise was calculated for target_epsilon and cannot be changed. Open the "
                "scope with noise_multiplier=... to schedule it."
            )
        self._sum.clipping.check_noise(value)
        self._meter.noise_multiplier = value

    @property
    def max_grad_norm(self) -> Any:
        """The clipping bound C; a list, or a dictionary by name pattern, where there are several. Schedulers may set it.

        With adaptive clipping it is the bound of the next step, and setting it starts afresh from there.
        """
        return self._sum.clipping.max_grad_norm

    @max_grad_norm.setter
    def max_grad_norm(self, value: Any) -> None:
        self._sum.change_bound(value)

    @property
    def clipping_details(self) -> dict[str, float]:
        """Further settings of the clipping function; with adaptive clipping also how the noise is split."""
        return self._sum.clipping.details(self.noise_multiplier)

    @property
    def sensitivity(self) -> float:
        """S: what one example can change in the clipped sum; the noise is in units of it."""
        return self._sum.clipping.sensitivity

    @property
    def physical_batch(self) -> PhysicalBatch | None:
        """What is known of the batch that the private loader handed out last; None before the first."""
        return self._rows.part

    def keep_rows(self, rows: Tensor) -> None:
        """Declare that the model is called on some rows of the batch only, in this step: ``model(x[rows])``.

        Without it a call with fewer rows than the batch has examples is refused, since it may be a micro-batch, or rows may be
        made of several examples. Kept rows are chosen by what is in them alone.

        Args:
            rows: a mask ``[n]`` of bool over the batch, or the numbers of the rows, each once.

        Raises:
            InvalidArgumentError, ScopeError: ``rows`` are not rows of the batch that the private loader handed out last, or some
                were declared for it before.
        """
        self._rows.keep(rows)

    def weigh_rows(self, weights: Tensor) -> None:
        """Multiply the gradient of each example of the batch by a number, before it is clipped.

        So that a sum of losses can be a mean for each example: of its tokens, say, by ``1 / (number of its tokens)``. An example
        adds at most the bound, whatever its weight. Its weight must depend on nothing but that example, and on what is public.
        Is forgotten after the step. ``p.grad_sample`` stays as it is.

        Args:
            weights: ``[n]``, 0 or more and finite: one for each row that the model is called on, in their order.

        Raises:
            InvalidArgumentError: they are not.
        """
        self._rows.weigh(weights)

    def skip_batch(self) -> None:
        """Leave out the batch that the private loader handed out last: nothing is released or charged for it.

        Whether a batch is left out must not depend on what is in it.
        """
        self._controller.discard()
        self._rows.used()

    def attach_step_hook(self, fn: StepHook) -> None:
        """Call ``fn(optimizer)`` at every release, after the charge and before the parameters move: ``p.grad`` is noised then."""
        self._step_hooks.append(fn)

    def signal_skip_step(self, do_skip: bool = True) -> None:
        """Called by Opacus's ``BatchMemoryManager``, as it cuts a batch of the private loader; by hand it is a ``ScopeError``."""
        self.split.announce(do_skip)

    # ---------------------------------------------------------------- torch.optim.Optimizer

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Asked by ``torch.amp.GradScaler.step``, which would have to unscale gradients that are clipped already."""
        if self.loss_scale.is_held:
            return False
        raise ScopeError(
            "GradScaler multiplies the loss by a scale that per-sample clipping would not know of: the clipping bound would be "
            "divided by it. Pass it to the scope (grad_scaler=scaler), or call loss.backward() and opt.step() without it: "
            "bfloat16 needs none."
        )

    def __repr__(self) -> str:
        """Show the privacy parameters and the wrapped optimizer."""
        return (
            f"PrivateOptimizer(noise_multiplier={self.noise_multiplier}, max_grad_norm={self.max_grad_norm}, "
            f"{self.original_optimizer!r})"
        )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop what was captured since the last step, and every ``p.grad``.

        Finished physical parts of the present logical batch are kept. ``set_to_none=False`` is taken as True.
        """
        if not self._closed:
            self._controller.session.threads.check()
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
        with self._controller.session.threads.step():
            return self._step(closure, empty=False)

    def step_empty(self) -> None:
        """Take the step of a batch without examples: nothing was back-propagated, and noise alone is released and charged.

        Raises:
            ScopeError, BudgetExhaustedError, UnsupportedModelError: as :meth:`step`.
        """
        with self._controller.session.threads.step():
            self._step(None, empty=True)

    # ---------------------------------------------------------------- inside

    def _step(self, closure: Callable[[], Any] | None, *, empty: bool) -> Any:
        if self._closed:
            raise ScopeError(
                "opt.step() after the end of its private scope. Train inside the with block; to go on without privacy, use "
                "the original optimizer."
            )
        if self._others.are_allowed:
            raise ScopeError("opt.step() while the scope is paused: step the public optimizer there, and this one after the block.")
        self.split.check_made()
        batch = self.physical_batch
        if batch is None:
            self._shared.check_foreign(by_units=self.by_units)
        empty = empty or self._rows.expected == 0
        finishes = batch is None or batch.last
        loss = None
        with self._shared.prepared(self._handed_out, self._settings) if finishes else nullcontext():
            if finishes:
                self._meter.check_step(foreign=batch is None)
            refuse_unmanaged(self.param_groups, self._controller, self._managed)
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            self._check_step(empty=empty)
            self._add_batch()
        if finishes:
            self._release(foreign=batch is None, empty=empty)
        return loss

    def _settings(self) -> Any:
        """What has to be the same in all processes, step by step."""
        params = [(self._controller.name_of(p), p.requires_grad, p.dtype, p.shape) for p in self.params]
        return self.noise_multiplier, self.max_grad_norm, params, self._meter.steps, self._meter.accountant.history[-1:]

    def _check_step(self, *, empty: bool) -> None:
        batch = self.physical_batch
        if batch is not None and self._batch_done:
            raise ScopeError(
                "a second opt.step() for the same batch of the private loader: its sampling was charged once. Take the "
                "next batch from the loader first. (Batches from elsewhere can be used only in a scope of their own.)"
            )
        if self._controller.is_stale:
            raise ScopeError(
                f"opt.step() found gradients of an earlier batch only: the private loader has handed out another one since. {AHEAD}"
            )
        if not self._controller.has_gradients and not empty:
            raise ScopeError(
                "opt.step() found no gradients: no backward pass through the model's hooked layers since the last step. "
                "Call loss.backward() before it, on a loss of this model, outside torch.no_grad()."
            )

    def start_batch(self, part: PhysicalBatch, batch: Any) -> None:
        """The loader is about to hand out ``batch``: finish the one before it, or forget a logical batch left early."""
        before = self.physical_batch
        if part.index == 0:
            self._sum.clear()
            self._handed_out += 1
        elif before is None or (before.logical, before.index + 1) != (part.logical, part.index):
            raise ScopeError(
                "two passes over the private loader are interleaved: physical parts of different logical batches would "
                "be added up. Finish or leave one pass before beginning the next."
            )
        elif not self._batch_done and self._controller.has_gradients and not self._controller.is_stale:
            self._add_batch()
        if self._rows.was_run and not self._batch_done:
            refuse_skipped_steps()
            warnings.warn(
                "the batch before this one went through the model with gradients, but no step was taken for it. Whether a batch is "
                "left out must not depend on what is in it (a loss that is large or not finite): that would tell something of its "
                "examples without noise. Samples that are not finite are left out by themselves. To leave out a batch, whatever is "
                "in it, call opt.skip_batch().",
                stacklevel=3,
            )
        self._drawn = part.size + (self._drawn if part.index else 0)
        self._rows.hand_out(part, batch)
        self._batch_done = False
        self._controller.next_batch()
        if self._self_check is not None:
            self._self_check.saw_batch(batch)
            self._self_check.new_step()

    def _add_batch(self) -> None:
        """Add what was captured of the present physical batch to the sum of its logical batch."""
        gradients = self._controller.take()
        if gradients is not None:
            self._rows.check_pass(gradients.samples)
            captured = {id(p) for p in gradients.params}
            params = [p for p in self.params if id(p) in captured and p.requires_grad]
            weights = self.loss_scale.undone(self._rows.weights, gradients.samples, self.params[0].device)
            units = self._rows.units
            norms = self._sum.add(gradients, params, weights, units) if gradients.samples > 0 and params else None
            if self._self_check is not None:  # once there is room for it, since what was captured is gone
                try:
                    self._check(self._self_check, gradients.samples, norms)
                except BaseException:
                    self._sum.clear()
                    raise
                self._self_check.new_step()
        self._batch_done = True
        self._rows.stepped()
        self.loss_scale.new_step()

    def _check(self, check: SelfCheck, samples: int, norms: Tensor | None) -> None:
        if self._check_function is not None:
            self._check_function(norms)
        if check.needed(samples):
            check.check_calls(samples, norms)

    @contextmanager
    def checked_by(self, check: Callable[[Tensor | None], None] | None) -> Iterator[None]:
        """Steps in the block are checked by this as well, given the norms ``[n]`` of the samples' gradients, if there are any."""
        self._check_function = check
        try:
            yield
        finally:
            self._check_function = None

    def _release(self, *, foreign: bool, empty: bool) -> None:
        watched = self._sum.watched
        sums, statistic = self._sum.take()
        clipping, sigma = self._sum.clipping, self.noise_multiplier  # a step hook may set others for the next step
        params = [p for p in self.params if p.requires_grad]
        unused = [p for p in params if p not in sums]
        if not empty:
            self._unused.mention(unused)
        sums |= {p: torch.zeros_like(p, dtype=wide_dtype(p.dtype)) for p in unused}
        totals = [sums[p] for p in params]
        sums.clear()
        std = standard_deviation(clipping.gradient_noise_multiplier(sigma), clipping.sensitivity)
        scale = 1 / self.expected_batch_size if self.averages else 1.0
        if not self._shared.add_noise(totals, std, scale, clipping.sensitivity):
            each = zip(params, totals, strict=True)
            names = some_of([self._controller.name_of(p) for p, total in each if not bool(torch.isfinite(total.sum()))])
            raise ScopeError(
                f"the clipped sum of {names} is not finite, although samples with NaN or infinite gradients are left out: "
                "nothing was released. Look for NaN or infinite values in the weights."
            )
        totals.reverse()
        noised = {id(p): totals.pop().to(p.dtype) for p in params}  # after the noise, rounding is post-processing
        self._meter.charge_step(foreign=foreign)
        self._shared.charged()
        self.writes.before_step()
        for group in self.param_groups:  # frozen ones, too: a gradient they got otherwise must not be applied
            for p in group["params"]:
                p.grad = noised.get(id(p))
        with self._shared.applied():
            for hook in self._step_hooks:
                hook(self)
            with self._others.allowed():
                self.original_optimizer.step()
        self.writes.after_step()
        self._shared.learn(clipping, statistic, sigma)
        if self.nonprivate_statistics is not None and watched is not None:
            self.nonprivate_statistics.add(watched, None if foreign else self._drawn)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Let other optimizers step the parameters, by ordinary gradients; see :meth:`PrivateTraining.paused`."""
        if self._controller.has_gradients or self._sum:
            raise ScopeError(
                "scope.paused(): gradients of private samples are waiting. Take opt.step(), or call opt.zero_grad(), before the "
                "block."
            )
        self._controller.disable_hooks()
        try:
            with self._others.allowed():
                yield
        finally:
            self.writes.after_step()
            if not self._closed:
                self._controller.enable_hooks()
            self.original_optimizer.zero_grad(set_to_none=True)

    def open(self, stack: ExitStack) -> None:
        """Guard the original optimizer and the rows of calls until ``stack`` unwinds, and close this one then."""
        session = self._controller.session
        session.before_call, session.check_rows = self._rows.before_call, self._rows.check_pass
        session.check_loss = self.loss_scale.check_pass
        self.loss_scale.open(stack, self)
        session.find_counting = self._rows.find_counting
        if self._self_check is not None and self.by_units:
            rows = self._rows  # not the optimizer, for whose sake the scope would stay open
            self._self_check.watch_units(lambda: rows.units)
        self._others.watch(stack)
        stack.callback(self._close)

    def _close(self) -> None:
        self._closed = True
        self._sum.clear()
        self.outside.clear()
        self._rows = Rows(self._controller.axis)
