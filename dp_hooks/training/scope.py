"""private_training: a scope in which a model is trained with differential privacy, and after which nothing is left."""

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from types import TracebackType
from typing import Any

import torch
from opacus.accountants import IAccountant
from torch import nn
from torch.utils.data import DataLoader

from .._tree import names_of_parameters
from .._validate import bad, boolean, one_of, positive_int, probability
from ..capture.controller import MODES, REDUCTIONS, HookController
from ..capture.validate import check_is_module, check_model
from ..checks.loss_modules import check_criterion
from ..checks.padding import PaddingCheck
from ..checks.self_check import SelfCheck
from ..checks.spot_check import SpotCheck
from ..distributed.peers import Peers
from ..errors import ScopeError
from ..privacy.accounting.calibrate import Budget, calibrate, check_budget
from ..privacy.accounting.ledger import Ledger, as_ledger
from ..privacy.accounting.meter import PrivacyMeter
from ..privacy.accounting.opacus import make_accountant
from ..privacy.accounting.pld import PLD
from ..privacy.clipping import make_clipping
from ..privacy.noise.make import make_noise
from ..privacy.sampling.collate_probe import CollateFacts, probe_collate
from ..privacy.sampling.loader import PrivateDataLoader, own_generator
from ..privacy.sampling.plan import sampling_of
from ..privacy.sampling.scheme import plan_sampling
from ..privacy.sampling.unit_batches import plan_units
from .claims import Claims
from .clipped_sum import ClippedSum
from .entered_only import EnteredOnly
from .freed_memory import keep_freed_memory
from .lifetime import Lifetime
from .loss_scale import LossScale
from .nonprivate_statistics import NonprivateStatistics
from .optimizer import PrivateOptimizer
from .prepared import Prepared
from .processes import PeersDraws, be_quiet, check_alone, is_replica, replicated, shared_facts
from .saved_state import SavedState
from .scope_results import ScopeResults
from .shared_dataset import some_examples
from .wrapped_optimizer import check_optimizer

open_scopes: Claims["PrivateTraining"] = Claims()
_DATASET = "the dataset (some examples that were compared)"


class PrivateTraining(ScopeResults, EnteredOnly):
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
    :meth:`get_epsilon` returns. Unit: one example of ``loader.dataset``, or all those of a ``privacy_unit``. Relation: one unit
    replaced by a null record that contributes nothing; their number and the sampling rate are public. Not covered: validation on
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
        sampling: how batches are drawn.

            - "poisson", the default: every example is in every batch with probability q = ``batch_size / len(dataset)``.
            - "truncated_poisson": the same, but of more than ``max_batch_size`` examples so many are kept, by chance.
            - "random_allocation": every example is in one batch of each pass, a random one, so that a pass is what is expected of
              an epoch. Charged as a whole before its first batch, even if it is broken off; as a rule it costs less than as many
              Poisson batches.
            - "sequential": the loader's own order; every pass is charged as one release without amplification.

            Only the accountant "pld" can tell what the second and the third spend.
        max_batch_size: the most examples of a batch with "truncated_poisson". Default: the smallest number that is exceeded in at
            most one batch of a million. The less often examples are dropped, the closer epsilon is to that of "poisson".
        poisson_sampling: an older name: True is ``sampling="poisson"``, False ``sampling="sequential"``.
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
        accountant: "pld" (tight, and never below the truth), "prv", "rdp", "gdp", or an Opacus accountant to go on with.
        max_physical_batch_size: split logical batches into parts of at most this many examples. ``opt.step()``
            then does nothing until the logical batch is complete. Drops nothing, whatever the size of a logical batch.
        sample_rate: Poisson rate q, if it is not ``batch_size / len(dataset)``.
        secure_mode: noise and sampling from ChaCha20 with keys of the operating system (``pip install dp_hooks[secure]``;
            from ``os.urandom`` without), never the same twice. Sums are rounded to a fine grid, and rounded normal noise is added
            there, so that their digits tell nothing; for what rounding adds to the sensitivity the noise is up to 0.03 % larger
            (:class:`~dp_hooks.privacy.noise.secure.SecureNoise` says what is proved). No ``noise_generator``, then, and no
            ``generator`` of the loader, unless that keeps its own order.
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
        privacy_unit: protect units of several examples each (users, patients) in the place of examples: the unit of each example,
            as a list, an array or a tensor; the name or the number of a field of the examples; or a function of an example. Units
            are drawn, each with probability q: such that ``batch_size`` examples are expected, the divisor of "mean". The sum of a
            unit's gradients is clipped as one, so a fitting C is up to k times as large. Units are never split over parts. A unit
            with an example whose gradient is not finite is left out. The number of units and q are public.
        max_examples_per_unit: k: of a unit that is drawn at most k examples are in the batch, drawn anew each time. None: all.

    Attributes:
        model: the user's model, never wrapped.
        optimizer: the private optimizer (None before entering).
        loader: the private loader (None before entering).
        controller: the :class:`~dp_hooks.HookController` (None before entering).
        accountant: the Opacus accountant that is charged.
        noise_multiplier: sigma as given, or as calculated from ``target_epsilon``.
        averages: whether the noised sum is divided by the expected batch size, as with ``loss_reduction="mean"``.
        noise: what adds noise to the clipped sums; an audit puts itself in between.
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
        poisson_sampling: bool | None = None,
        sampling: str | None = None,
        max_batch_size: int | None = None,
        clipping: str = "flat",
        clipping_options: Mapping[str, float] | None = None,
        grad_sample_mode: str = "ghost",
        accountant: str | IAccountant = "pld",
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
        privacy_unit: Any = None,
        max_examples_per_unit: int | None = None,
    ) -> None:
        """Check every argument, and work out sigma; nothing is attached or spent yet."""
        self._given_model, self._peers = model, Peers.found()
        self.model = model = check_is_module(replicated(model))
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
        self.noise = make_noise(noise_generator, secure=secure)
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
        self.noise.check_devices({p.device for p in self._params})
        way = sampling_of(sampling, poisson_sampling)
        self.plan = plan_units(
            plan_sampling(loader, sampling=way, sample_rate=sample_rate, max_batch_size=max_batch_size, secure=secure),
            loader,
            privacy_unit,
            max_examples_per_unit,
            sample_rate=sample_rate,
            max_physical_batch_size=self._max_physical_batch_size,
            ledger=ledger,
        )
        alone = {
            "accelerator.prepare()": prepared.is_prepared,
            "nonprivate_statistics=True": nonprivate_statistics,
            "one generator for batches and for noise": noise_generator is not None and noise_generator is own_generator(loader),
        }
        check_alone(self._peers, self.plan, self.noise, self._params, **alone)
        make = partial(
            make_clipping,
            clipping,
            params=self._params,
            names=names_of_parameters(model),
            expected_batch_size=self.plan.expected_protected,
            options=clipping_options,
        )
        if self._ledger is not None:
            self._ledger.spent(self.plan.examples)  # refused now, if it is of something else
        watched = boolean("nonprivate_statistics", nonprivate_statistics)
        self._sum = ClippedSum(make, max_grad_norm, watched=watched)
        self.nonprivate_statistics = NonprivateStatistics(self._params[0].device) if watched else None
        self._clipping_name, self._clipping_options = clipping, dict(clipping_options or {})
        check_model(model)
        self.accountant = make_accountant(accountant)
        if self.plan.needs_pld and not isinstance(self.accountant, PLD):
            remedy = f'it cannot tell what sampling={way!r} spends. Pass accountant="pld", or another sampling.'
            raise bad("accountant", self.accountant.mechanism(), remedy)
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
            per_pass=self.plan.per_pass,
            budget=wanted if isinstance(wanted, Budget) else None,
            releases=releases,
        )
        self._state = SavedState(self._meter, self._sum, clipping, self.plan)
        self.optimizer: PrivateOptimizer | None = None
        self.loader: PrivateDataLoader | None = None
        self.controller: HookController | None = None
        self.self_check: SelfCheck | None = None
        self._lifetime = Lifetime()

    # ---------------------------------------------------------------- lifetime

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
        self._state.check_accountant()
        keep_freed_memory()
        with ExitStack() as stack:
            open_scopes.claim(self.model, self, stack)
            be_quiet(stack, self._given_model)
            draws = self._meet(stack)
            with nullcontext() if self._peers is None else self._peers.step(0):
                optimizer, loader = self._install(stack, draws)
            if self._peers is not None:  # the first one has read the ledger
                self._meter.steps, self.accountant.history = self._peers.first((self._meter.steps, self.accountant.history))
            self._lifetime.begin(stack)
        return optimizer, loader

    def _install(self, stack: ExitStack, draws: PeersDraws | None) -> tuple[PrivateOptimizer, PrivateDataLoader]:
        if self._wants_collate_check:
            self._collate = probe_collate(self._original_loader, in_order=self.plan.units is not None)
        if self._ledger is not None and (self._peers is None or self._peers.is_first):
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
            noise=self.noise,
            meter=self._meter,
            expected_batch_size=self.plan.expected_batch_size,
            averages=self.averages,
            by_units=self.plan.units is not None,
            loss_scale=self._loss_scale,
            self_check=self.self_check,
            lifetime=self._lifetime,
            statistics=self.nonprivate_statistics,
            peers=self._peers,
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
            draws,
        )
        stack.callback(loader.close)
        self.controller, self.optimizer, self.loader = controller, optimizer, loader
        return optimizer, loader

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None) -> None:
        """Remove everything, whatever happened inside; exceptions pass through unchanged."""
        batch = None if self.optimizer is None else self.optimizer.physical_batch
        if exc is not None and batch is not None and batch.size == 0 and hasattr(exc, "add_note"):
            exc.add_note(
                "The batch is empty: Poisson sampling drew no example, and the model or the loss may not work on zero rows. "
                "Train with a @dp_step function, which handles that, or write: if len(y) == 0: opt.step(); continue"
            )
        try:
            if self._peers is not None:
                self._peers.leave(failed=exc is not None)
        finally:
            self._lifetime.end(kind, exc, trace)

    def _meet(self, stack: ExitStack) -> PeersDraws | None:
        """Enter together with the other processes, if there are any, over the same model and with the same arguments."""
        if self._peers is None:
            return None
        settings = {
            "max_grad_norm": self._sum.clipping.max_grad_norm,
            "clipping": (self._clipping_name, sorted(self._clipping_options.items())),
            "loss_reduction": self.loss_reduction,
            "noise_generator (given or not)": self.noise.is_repeatable,
            "ledger (given or not)": self._ledger is not None,
            _DATASET: some_examples(self._original_loader.dataset),
        }
        self._peers.open(stack, shared_facts(self.model, self._params, self.plan, self._meter, **settings))
        if settings[_DATASET] is None:
            warnings.warn(
                "some examples were read twice, and were others or could not be read: whether all processes have the same dataset "
                "in the same order was not compared. If an index is another example in each, examples are clipped twice.",
                stacklevel=4,
            )
        return PeersDraws(self._peers, own_generator(self._original_loader))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Train on public data in between: inside the block the model is an ordinary one, for any optimizer over it.

        Its gradients are ordinary ones, without clipping, noise and charge, and the private optimizer cannot be stepped. No
        private data must be used in the block.

        Raises:
            ScopeError: the scope is not open, or gradients of private samples are waiting for their step.
        """
        if self._peers is not None and is_replica(self._given_model):
            raise ScopeError(
                "scope.paused() with DistributedDataParallel, which adds up no gradients inside the scope: the processes would "
                "part. Leave the scope for steps on public data, and enter another one with accountant=scope.accountant."
            )
        if self.optimizer is None or not self.is_open:
            raise ScopeError("scope.paused() outside of the scope: there is nothing to pause.")
        with self.optimizer.paused():
            yield


private_training = PrivateTraining
