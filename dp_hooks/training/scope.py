"""private_training: a scope in which a model is trained with differential privacy, and after which nothing is left."""

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from types import TracebackType
from typing import Any, NoReturn

import torch
from opacus.accountants import IAccountant
from torch import nn
from torch.utils.data import DataLoader

from .._tree import names_of_parameters
from .._validate import bad, boolean, fraction, one_of, positive_int, probability
from ..capture.controller import MODES, REDUCTIONS, HookController
from ..capture.validate import check_is_module, check_model
from ..checks.loss_modules import check_criterion
from ..checks.padding import PaddingCheck
from ..checks.self_check import SelfCheck
from ..checks.spot_check import SpotCheck
from ..distributed.world import processes
from ..errors import ScopeError
from ..privacy.accounting.calibrate import Budget, calibrate, check_budget
from ..privacy.accounting.ledger import Ledger, as_ledger
from ..privacy.accounting.meter import PrivacyMeter
from ..privacy.accounting.opacus import epsilon_of, make_accountant, spent_by
from ..privacy.clipping import make_clipping
from ..privacy.noise.make import make_noise
from ..privacy.report import BY_ORDER, PrivacyReport, not_covered
from ..privacy.sampling.collate_probe import CollateFacts, probe_collate
from ..privacy.sampling.loader import PrivateDataLoader
from ..privacy.sampling.scheme import plan_sampling
from .claims import Claims
from .clipped_sum import ClippedSum
from .freed_memory import keep_freed_memory
from .lifetime import Lifetime
from .loss_scale import LossScale
from .nonprivate_statistics import NonprivateStatistics
from .optimizer import PrivateOptimizer
from .prepared import Prepared
from .saved_state import SavedState
from .wrapped_optimizer import check_optimizer

open_scopes: Claims["PrivateTraining"] = Claims()


class PrivateTraining:
    """Train ``model`` with differential privacy inside a ``with`` block (DP-SGD: Abadi et al., CCS 2016).

    ::

        with private_training(model, optimizer, loader, noise_multiplier=1.0, max_grad_norm=1.0) as (opt, loader):
            for x, y in loader:
                opt.zero_grad()
                criterion(model(x), y).backward()
                opt.step()

    The model is not wrapped. On leaving the block, by whatever way, every hook and attribute is gone again. The scope itself
    (``scope = private_training(...)``, ``with scope as (opt, loader):``) can be asked for :meth:`get_epsilon` and
    :meth:`report`, also after the end.

    Guarantee: the sequence of released parameters is (epsilon, delta)-differentially private for the epsilon that
    :meth:`get_epsilon` returns. Unit: one example of ``loader.dataset``. Relation: one example replaced by a
    null record that contributes nothing; the dataset size and the sampling rate are public. Not covered: validation on
    private data, early stopping and hyper-parameter choice on it.

    Args:
        model: a bare ``nn.Module``. Modules that mix samples (BatchNorm in training mode) are refused.
        optimizer: a torch optimizer over parameters of ``model``; it is stepped with the noised gradients.
        loader: a map-style ``DataLoader`` with a ``batch_size``; that is the expected size of a logical batch.
        noise_multiplier: sigma, what is charged. The noise on the clipped sum has standard deviation
            ``sigma * sensitivity`` (more with ``clipping="adaptive"``, whose count of unclipped samples has to be paid for).
        target_epsilon: instead of ``noise_multiplier``: the budget. sigma is calculated such that exactly ``epochs``
            passes fit, and the loader ends when they are over.
        target_delta: delta of that budget; also the default of :meth:`report`.
        epochs: passes over the data to calculate sigma for; only with ``target_epsilon``.
        max_grad_norm: the clipping bound C. With ``clipping="per_layer"`` a list with one bound per trainable parameter
            tensor, in the optimizer's order, or a mapping from patterns of parameter names to bounds, such as
            ``{"encoder.*": 0.5, "*": 1.0}``: all parameters for which a pattern is the first that matches are clipped
            together (``fnmatch`` patterns on qualified names).
        loss_reduction: "mean" or "sum": how the loss you back-propagate is reduced over the samples of a batch. With "mean"
            the update is divided by the expected batch size, never by the drawn one.
        batch_first: samples are counted by axis 0 of all inputs and outputs; else by axis 1.
        poisson_sampling: draw every batch by Poisson sampling, with rate ``batch_size / len(dataset)``. False keeps the
            loader's own order; every pass is then charged as one release without amplification.
        clipping: what bounds a sample's gradient g, and the sensitivity S that the noise is scaled by.

            - "flat": ``min(1, C / |g|)``; S = C.
            - "per_layer": the same for every tensor or group k on its own; ``S = sqrt(sum_k C_k^2)``. "per_group" is another
              name for it that takes the mapping only.
            - "automatic": ``C / (|g| + gamma)`` (AUTO-S: Bu et al., NeurIPS 2023); S = C.
            - "adaptive": "flat" with a bound that starts at C and follows a quantile of the norms (Andrew et al.,
              NeurIPS 2021); S is the present bound. Needs ``noise_multiplier < 2 * unclipped_num_std``.
        clipping_options: settings of "automatic" (``gamma``, default 0.01) or of "adaptive" (in Opacus's words):
            ``target_unclipped_quantile`` (0.5), ``clipbound_learning_rate`` (0.2), ``unclipped_num_std`` (the noise on
            the count of unclipped samples; default: expected batch size / 20), ``min_clipbound`` (1e-6),
            ``max_clipbound`` (1e6).
        grad_sample_mode: "ghost" (no per-sample gradient is kept where norms can be had without), "hooks" or "functorch"
            (``p.grad_sample`` is ``[n, *p.shape]`` after backward).
        accountant: "prv", "pld" (tight, and never below the truth), "rdp", "gdp", or an Opacus accountant to go on with.
        max_physical_batch_size: split logical batches into parts of at most this many examples. ``opt.step()``
            then does nothing until the logical batch is complete.
        sample_rate: Poisson rate q, if it is not ``batch_size / len(dataset)``.
        secure_mode: noise and Poisson sampling from ChaCha20 with keys of the operating system (``pip install dp_hooks[secure]``;
            from ``os.urandom`` without), never the same twice. Sums are rounded to a fine grid, and rounded normal noise is added
            there, so that their digits tell nothing; for what rounding adds to the sensitivity the noise is up to 0.03 % larger
            (:class:`~dp_hooks.privacy.noise.secure.SecureNoise` says what is proved). No ``noise_generator``, then, and with
            Poisson sampling no ``generator`` of the loader.
        noise_generator: a generator for the noise, for repeatable experiments. Whoever knows its seed can remove the
            noise; the default draws from fresh entropy.
        self_check: compare the first batch's per-sample gradients with plain autograd on single samples before anything
            is released, at the cost of a few passes, once. Under ``@dp_step`` the train function and its loss are
            included. False trusts the engine blindly.
        spot_check_rate: the probability with which a later batch is checked anew, on a few of its samples, since values alone
            may make samples mix at any time. Drawn from fresh entropy; an error says which steps were not looked at. 0: never.
        criterion: the loss module of a bare loop. The self-check then covers it, too: its gradient on the batch must be
            that of single samples, reduced as declared.
        grad_scaler: the ``torch.amp.GradScaler`` of a loop under float16: ``scaler.scale(loss).backward()``, ``scaler.step(opt)``,
            ``scaler.update()`` (under ``@dp_step`` none of these). Its scale is undone for each example before clipping, so that C
            means what it says, and stays as it is at the beginning: following overflows would tell of single examples.
        check_collate: on entering, collate a few examples of the dataset in several ways: each row of a batch has to be made of one
            example. False takes the collate function as it is.
        nonprivate_statistics: keep, of every step, norms of gradients before clipping, the fraction that was clipped, and how many
            examples were drawn: exact numbers, NOT private; see
            :class:`~dp_hooks.training.nonprivate_statistics.NonprivateStatistics`.
        ledger: a file, or a :class:`~dp_hooks.Ledger`, in which every charge of every run on this dataset is on the disk before its
            result is released; see there.

    Attributes:
        model: the user's model, never wrapped.
        optimizer: the private optimizer (None before entering).
        loader: the private loader (None before entering).
        controller: the :class:`~dp_hooks.HookController` (None before entering).
        accountant: the Opacus accountant that is charged.
        noise_multiplier: sigma as given, or as calculated from ``target_epsilon``.
        averages: whether the noised sum is divided by the expected batch size, as with ``loss_reduction="mean"``.
        nonprivate_statistics: what is kept with ``nonprivate_statistics=True``; else None. Not in ``state_dict()``.
        criterion_is_optional: whether ``criterion`` may stay unused; the loss counts as not checked then.

    Raises:
        InvalidArgumentError: an argument that cannot be used, before anything is attached or spent.
        UnsupportedModelError: modules or parameters cannot be trained privately; names the first three.
        SelfCheckError: from the first ``opt.step()``, if the self-check disagrees.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loader: DataLoader[Any],
        *,
        noise_multiplier: float | None = None,
        target_epsilon: float | None = None,
        target_delta: float | None = None,
        epochs: float | None = None,
        max_grad_norm: Any,
        loss_reduction: str = "mean",
        batch_first: bool = True,
        poisson_sampling: bool = True,
        clipping: str = "flat",
        clipping_options: Mapping[str, float] | None = None,
        grad_sample_mode: str = "ghost",
        accountant: str | IAccountant = "prv",
        max_physical_batch_size: int | None = None,
        sample_rate: float | None = None,
        secure_mode: bool = False,
        noise_generator: torch.Generator | None = None,
        self_check: bool = True,
        spot_check_rate: float = 0.005,
        criterion: nn.Module | None = None,
        grad_scaler: torch.amp.GradScaler | None = None,
        check_collate: bool = True,
        nonprivate_statistics: bool = False,
        ledger: str | os.PathLike[str] | Ledger | None = None,
    ) -> None:
        """Check every argument, and work out sigma; nothing is attached or spent yet."""
        self.model = check_is_module(model)
        self._prepared = prepared = Prepared(optimizer, loader)
        optimizer, loader = prepared.optimizer, prepared.loader
        self._params = check_optimizer(optimizer, model)
        self._original_optimizer = optimizer
        self._original_loader = loader
        wanted = check_budget(noise_multiplier, target_epsilon, target_delta, epochs)
        self.target_delta = target_delta
        self.loss_reduction = one_of("loss_reduction", loss_reduction, REDUCTIONS)
        self.averages = loss_reduction == "mean"
        self.batch_first = boolean("batch_first", batch_first)
        self.grad_sample_mode = one_of("grad_sample_mode", grad_sample_mode, MODES)
        secure = boolean("secure_mode", secure_mode)
        if max_physical_batch_size is not None:
            positive_int("max_physical_batch_size", max_physical_batch_size)
        self._max_physical_batch_size = max_physical_batch_size or prepared.max_physical_batch_size
        self._noise = make_noise(noise_generator, secure=secure)
        self._wants_check = boolean("self_check", self_check)
        self._spot_check_rate = probability("spot_check_rate", spot_check_rate)
        self._wants_collate_check = boolean("check_collate", check_collate)
        self._collate = CollateFacts("not checked")
        self._padding: PaddingCheck | None = None
        if criterion is not None and not isinstance(criterion, nn.Module):
            raise bad("criterion", criterion, "pass the loss module of the loop; for a function, train with @dp_step.")
        if criterion is not None:
            check_criterion(criterion, model)
        self._criterion = criterion
        self._loss_scale = LossScale(prepared.scaler if grad_scaler is None else grad_scaler)
        self.criterion_is_optional = False
        self._ledger = as_ledger(ledger)
        self._noise.check_devices({p.device for p in self._params})
        if processes() > 1:
            raise ScopeError(
                "torch.distributed runs with several processes, which this version does not support: noise and "
                "sampling would have to be coordinated. Train in one process."
            )
        poisson = boolean("poisson_sampling", poisson_sampling)
        self.plan = plan_sampling(loader, poisson=poisson, sample_rate=sample_rate, secure=secure)
        make = partial(
            make_clipping,
            clipping,
            params=self._params,
            names=names_of_parameters(model),
            expected_batch_size=self.plan.expected_batch_size,
            options=clipping_options,
        )
        if self._ledger is not None:
            self._ledger.spent(self.plan.examples)  # refused now, if it is of something else
        watched = boolean("nonprivate_statistics", nonprivate_statistics)
        self._sum = ClippedSum(make, max_grad_norm, watched=watched)
        self.nonprivate_statistics = NonprivateStatistics(self._params[0].device) if watched else None
        self._clipping_name = clipping
        check_model(model)
        self.accountant = make_accountant(accountant)
        rate, releases = self.plan.charged_rate, 0
        if isinstance(wanted, Budget):
            releases = self.plan.releases(wanted.epochs)
            self.noise_multiplier = calibrate(self.accountant, wanted, rate, releases)
        else:
            self.noise_multiplier = wanted
        self._sum.clipping.check_noise(self.noise_multiplier)
        self._meter = PrivacyMeter(
            self.accountant,
            noise_multiplier=self.noise_multiplier,
            charged_rate=rate,
            poisson=self.plan.poisson,
            budget=wanted if isinstance(wanted, Budget) else None,
            releases=releases,
        )
        self._state = SavedState(self._meter, self._sum, clipping, self.plan.examples)
        self.optimizer: PrivateOptimizer | None = None
        self.loader: PrivateDataLoader | None = None
        self.controller: HookController | None = None
        self.self_check: SelfCheck | None = None
        self._lifetime = Lifetime()

    # ---------------------------------------------------------------- lifetime

    @property
    def is_open(self) -> bool:
        """Whether the scope has been entered and not left."""
        return self._lifetime.is_open

    def __enter__(self) -> tuple[PrivateOptimizer, PrivateDataLoader]:
        """Install everything and return ``(optimizer, loader)``; if anything fails, everything is taken back.

        Raises:
            ScopeError: entered twice, or the model (or a parameter of it) is in another open scope.
        """
        if self.is_open or self._lifetime.ended:
            state = "open" if self.is_open else "over"
            raise ScopeError(
                f"this private scope is {state} and cannot be entered again. Call private_training(...) anew; pass "
                "accountant=scope.accountant to go on with the same budget."
            )
        keep_freed_memory()
        if self._wants_collate_check:
            self._collate = probe_collate(self._original_loader)
        with ExitStack() as stack:
            open_scopes.claim(self.model, self, stack)
            if self._ledger is not None:
                self._meter.write_to(self._ledger.open(stack, self.accountant, self.plan.examples))
            controller = HookController(
                self.model, batch_first=self.batch_first, loss_reduction=self.loss_reduction, grad_sample_mode=self.grad_sample_mode
            )
            stack.callback(controller.cleanup)
            if self._wants_check:
                fields = [field for field in self._collate.padded if field.value is not None]
                self._padding = PaddingCheck(fields, controller.axis, bool(fields))
                meter = self._meter  # not the scope, which ends when nobody refers to it any more
                spot = SpotCheck(self._spot_check_rate, lambda: meter.steps)
                optional = self.criterion_is_optional
                self.self_check = SelfCheck(
                    controller, self.model, self._params, self._criterion, self._padding, spot, criterion_is_optional=optional
                )
                self.self_check.watch(stack)
            optimizer = PrivateOptimizer(
                self._original_optimizer,
                controller=controller,
                clipped_sum=self._sum,
                noise=self._noise,
                meter=self._meter,
                expected_batch_size=self.plan.expected_batch_size,
                averages=self.averages,
                loss_scale=self._loss_scale,
                self_check=self.self_check,
                lifetime=self._lifetime,
                statistics=self.nonprivate_statistics,
            )
            optimizer.open(stack)
            self._prepared.open(stack)
            loader = PrivateDataLoader(
                self._original_loader,
                self.plan,
                self._meter,
                self._prepared.told(optimizer.start_batch),
                self._max_physical_batch_size,
                optimizer.split,
                self._prepared.place,
            )
            stack.callback(loader.close)
            self.controller, self.optimizer, self.loader = controller, optimizer, loader
            self._lifetime.begin(stack)
        return optimizer, loader

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None) -> None:
        """Remove everything, whatever happened inside; exceptions pass through unchanged."""
        batch = None if self.optimizer is None else self.optimizer.physical_batch
        if exc is not None and batch is not None and batch.size == 0 and hasattr(exc, "add_note"):
            exc.add_note(
                "The batch is empty: Poisson sampling drew no example, and the model or the loss may not work on zero rows. "
                "Train with a @dp_step function, which handles that, or write: if len(y) == 0: opt.step(); continue"
            )
        self._lifetime.end(kind, exc, trace)

    def __iter__(self) -> NoReturn:
        """Refused with a ``ScopeError``: ``opt, loader = private_training(...)`` would be a scope that nothing ends."""
        raise ScopeError(
            "a private scope has to be entered: write `with private_training(...) as (opt, loader):` and train inside that "
            "block, at the end of which everything is taken off the model again."
        )

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused with a ``ScopeError``: a scope decorates nothing."""
        raise ScopeError(
            "a private scope cannot be called or decorate: write `with private_training(...) as (opt, loader):`, and call a "
            "function decorated with @dp_step inside that block."
        )

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Train on public data in between: inside the block the model is an ordinary one, for any optimizer over it.

        Its gradients are ordinary ones, without clipping, noise and charge, and the private optimizer cannot be stepped. No
        private data must be used in the block.

        Raises:
            ScopeError: the scope is not open, or gradients of private samples are waiting for their step.
        """
        if self.optimizer is None or not self.is_open:
            raise ScopeError("scope.paused() outside of the scope: there is nothing to pause.")
        with self.optimizer.paused():
            yield

    # ---------------------------------------------------------------- results

    @property
    def steps(self) -> int:
        """Private steps taken so far."""
        return self._meter.steps

    def get_epsilon(self, delta: float) -> float:
        """Return the epsilon spent so far at ``delta``, by the scope's accountant. Works after the end, too."""
        return epsilon_of(self.accountant, delta)

    def state_dict(self) -> dict[str, Any]:
        """Return what has been spent, and what goes with it, to go on in another scope: plain numbers, strings and lists.

        It can be kept as JSON, and by ``torch.save`` (it loads with ``weights_only=True``). No state of a random generator is
        in it: from that, noise could be drawn again and taken off. Model, optimizer and scheduler are saved beside it.
        """
        return self._state.as_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the run stopped that ``state`` is of: before entering, with the arguments of that run.

        What it spent is spent here; a budget goes on to the number of steps that it was calculated for, and is never refilled.

        Raises:
            ScopeError: the scope was entered; or its accountant has spent what the state knows nothing of.
            InvalidArgumentError: the state is damaged, of something else, or of a run with another dataset, clipping or
                accountant; or it has a budget, and this scope has none.
        """
        if self.is_open or self._lifetime.ended:
            raise ScopeError("load_state_dict() after entering: load into a scope before `with`, so that no step comes first.")
        self.resume(state)

    def resume(self, state: Mapping[str, Any]) -> None:
        """The same for integrations: also in an open scope, before its first step."""
        self._state.resume(state)

    def _padding_remark(self) -> str:
        if not self._collate.padded or (self._padding is not None and self._padding.paddings and not self._padding.waiting):
            return ""
        return "rows are made of one example each, but whether the model leaves padding out has not been seen"

    def report(self, delta: float | None = None) -> PrivacyReport:
        """Return what can be said about privacy at this point.

        Args:
            delta: default: ``target_delta`` if given, else the smaller of 1e-5 and a tenth of 1 / (dataset size).
        """
        if delta is None:
            delta = self.target_delta if self.target_delta is not None else min(1e-5, 0.1 / self.plan.examples)
        delta = fraction("delta", delta, "pass a number between 0 and 1.")
        plan, clipping, sigma = self.plan, self._sum.clipping, self._meter.noise_multiplier
        spent = spent_by(self.accountant, delta)
        return PrivacyReport(
            epsilon=spent.epsilon,
            epsilon_remark=spent.remark,
            delta=delta,
            accountant=self.accountant.mechanism(),
            sampling="Poisson" if plan.poisson else BY_ORDER,
            sample_rate=plan.charged_rate,
            noise_multiplier=sigma,
            max_grad_norm=clipping.max_grad_norm,
            sensitivity=clipping.sensitivity,
            clipping=self._clipping_name,
            clipping_details=clipping.details(sigma),
            steps=self.steps,
            expected_batch_size=plan.expected_batch_size,
            dataset_size=plan.examples,
            foreign_steps=self._meter.foreign_steps,
            written_steps=0 if self.optimizer is None else self.optimizer.writes.steps,
            collate=self._collate.remark or self._padding_remark(),
            model_verified=self.self_check is not None and self.self_check.model_verified,
            loss_verified=self.self_check is not None and self.self_check.loss_verified,
            grad_sample_mode=self.grad_sample_mode,
            history=tuple(self.accountant.history),
            target_epsilon=None if self._meter.budget is None else self._meter.budget.epsilon,
            target_delta=self.target_delta,
            nonprivate_statistics=None if self.nonprivate_statistics is None else self.nonprivate_statistics.as_dict(),
            random_numbers=self._noise.random_numbers,
            not_covered=not_covered(secure=self._noise.is_secure),
        )


private_training = PrivateTraining
