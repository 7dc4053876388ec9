"""ScopeResults: what a private scope can be asked for: what was spent, a report, and a state to go on from."""

from collections.abc import Mapping
from typing import Any

from opacus.accountants import IAccountant

from .._validate import fraction
from ..checks.padding import PaddingCheck
from ..checks.self_check import SelfCheck
from ..errors import ScopeError
from ..privacy.accounting.meter import PrivacyMeter
from ..privacy.accounting.opacus import epsilon_of
from ..privacy.accounting.unit_loss import epsilon_of_units
from ..privacy.noise.noise import Noise
from ..privacy.report import PrivacyReport
from ..privacy.sampling.collate_probe import CollateFacts
from ..privacy.sampling.plan import SamplingPlan
from .clipped_sum import ClippedSum
from .lifetime import Lifetime
from .nonprivate_statistics import NonprivateStatistics
from .optimizer import PrivateOptimizer
from .saved_state import SavedState
from .scope_report import report_of


class ScopeResults:
    """Answers before, during and after the training, from what the scope below it has put here."""

    accountant: IAccountant
    plan: SamplingPlan
    noise: Noise
    grad_sample_mode: str
    target_delta: float | None
    optimizer: PrivateOptimizer | None
    self_check: SelfCheck | None
    nonprivate_statistics: NonprivateStatistics | None
    _meter: PrivacyMeter
    _state: SavedState
    _sum: ClippedSum
    _clipping_name: str
    _collate: CollateFacts
    _padding: PaddingCheck | None
    _lifetime: Lifetime

    @property
    def is_open(self) -> bool:
        """Whether the scope has been entered and not left."""
        return self._lifetime.is_open

    @property
    def steps(self) -> int:
        """Private steps taken so far."""
        return self._meter.steps

    def get_epsilon(self, delta: float, *, examples_per_unit: int | None = None) -> float:
        """Return the epsilon spent so far at ``delta``, by the scope's accountant. Works after the end, too.

        With ``examples_per_unit=k``, where single examples are drawn and clipped: of a user, say, with at most k in the dataset.
        """
        if examples_per_unit is None:
            return epsilon_of(self.accountant, delta)
        return epsilon_of_units(self.accountant, delta, examples_per_unit, by_units=self.plan.units is not None)

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

    def report(self, delta: float | None = None) -> PrivacyReport:
        """Return what can be said about privacy at this point.

        Args:
            delta: default: ``target_delta`` if given, else the smaller of 1e-5 and a tenth of 1 / (number of examples, or units).
        """
        if delta is None:
            delta = self.target_delta if self.target_delta is not None else min(1e-5, 0.1 / self.plan.protected)
        return report_of(
            fraction("delta", delta, "pass a number between 0 and 1."),
            plan=self.plan,
            meter=self._meter,
            clipping=(self._clipping_name, self._sum.clipping),
            noise=self.noise,
            collate=self._collate,
            padding=self._padding,
            check=self.self_check,
            optimizer=self.optimizer,
            mode=self.grad_sample_mode,
            target_delta=self.target_delta,
            statistics=self.nonprivate_statistics,
        )
