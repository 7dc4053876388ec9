"""What has been spent: charges to an accountant, and the budget that bounds them."""

import warnings

from opacus.accountants import IAccountant

from ...errors import BudgetExhaustedError, ScopeError
from .calibrate import Budget
from .history import Charge
from .opacus import charge, epsilon_for
from .open_ledger import OpenLedger
from .rates import Rate


class PrivacyMeter:
    """Charges every release before its result can be seen, and refuses the one that would break the budget.

    With Poisson sampling a release is one logical batch. Without, it is one pass over the loader, in which every example is in
    one batch at most: in the loader's own order, all steps of a pass together are one Gaussian mechanism without
    amplification (parallel composition under the null-record relation); with random allocation they gain from not knowing which
    batch. A batch that did not come from the private loader has no known sampling: its step is charged without amplification.
    """

    def __init__(
        self,
        accountant: IAccountant,
        *,
        noise_multiplier: float,
        charged_rate: Rate,
        per_pass: bool,
        budget: Budget | None = None,
        releases: int = 0,
    ) -> None:
        """Charge to ``accountant``; a ``budget`` was calculated for ``releases`` with these first two numbers.

        ``noise_multiplier`` is what the next release is charged with; without a budget it may be set anew. ``per_pass``: a release
        is a pass, not a batch.
        """
        self.accountant = accountant
        self.noise_multiplier = noise_multiplier
        self.charged_rate = charged_rate
        self.per_pass = per_pass
        self.budget = budget
        self.releases = releases
        self.steps = 0
        self.foreign_steps = 0
        self.ledger: OpenLedger | None = None
        self.run: str | None = None  # the name, in a ledger, of the run that this one goes on with
        self._planned = False  # whether the budget as a whole was seen to fit into what all runs may spend
        self._pass_sigma: float | None = None
        self._others: list[Charge] = []  # charges of another kind, and how many releases fit into the budget beside them
        self._allowed = releases

    def write_to(self, ledger: OpenLedger) -> None:
        """Write every charge to ``ledger`` as well, from now on; see :meth:`adopt`."""
        self.ledger = ledger
        self.adopt()

    def adopt(self) -> None:
        """Take over from the ledger what it knows of this run: steps that were lost with an earlier process, too.

        Raises:
            ScopeError: it knows something else.
        """
        if self.ledger is not None:
            before = sum(steps for _, _, steps in self.accountant.history)
            history = self.ledger.adopt(self.accountant.history, self.run)
            if history != self.accountant.history:
                self.accountant.history = history
                self.steps += sum(steps for _, _, steps in history) - before

    @property
    def remaining(self) -> int | None:
        """Releases left in the budget (batches, or passes if they are charged as such); None: no budget was set.

        Counted from the accountant's history, so that what a checkpoint brought along is included; charges of another kind
        (steps on batches from elsewhere, another noise) leave as many as still fit into the target.
        """
        if self.budget is None:
            return None
        own, others = 0, []
        for sigma, rate, steps in self.accountant.history:
            if (sigma, rate) == (self.noise_multiplier, self.charged_rate):
                own += steps
            else:
                others.append((sigma, rate, steps))
        if others != self._others:
            self._others, self._allowed = others, self._releases_beside(others)
        return max(0, self._allowed - own)

    def _releases_beside(self, others: list[Charge]) -> int:
        """How many releases of the planned kind fit into the budget beside other charges: at most those planned."""
        budget, kind = self.budget, (self.noise_multiplier, self.charged_rate)
        assert budget is not None
        low, high = -1, self.releases
        while low < high:
            middle = (low + high + 1) // 2
            fits = epsilon_for(self.accountant, [*others, (*kind, middle)], budget.delta) <= budget.epsilon
            low, high = (middle, high) if fits else (low, middle - 1)
        return low

    @property
    def batches_left(self) -> int | None:
        """Logical batches that a pass may have if it begins now; None: no bound."""
        left = self.remaining
        return None if left and self.per_pass else left  # a pass that has begun is paid for as a whole

    def start_pass(self) -> None:
        """Account for a new pass over the loader, just before its first batch is handed out."""
        if not self.per_pass:
            return
        if self.remaining == 0:
            raise self._exhausted()
        self._check_total(self.charged_rate)
        self._charge(self.charged_rate)
        self._pass_sigma = self.noise_multiplier

    def check_step(self, *, foreign: bool) -> None:
        """Raise if one more step may not be taken; changes nothing."""
        if foreign or not self.per_pass:
            self._check_total(1.0 if foreign else self.charged_rate)
        if foreign:
            if not self._allows_one_more(1.0):
                raise self._exhausted(
                    " (the batch did not come from the private loader, so the step has no amplification by sampling)"
                )
        elif not self.per_pass:
            if self.remaining == 0:
                raise self._exhausted()
        elif self._pass_sigma is not None and self.noise_multiplier < self._pass_sigma:
            raise ScopeError(
                f"noise_multiplier={self.noise_multiplier} is below the {self._pass_sigma} that this pass over the loader "
                "was charged with. Without Poisson sampling a pass is charged at its start: lower the noise between passes."
            )

    def charge_step(self, *, foreign: bool) -> None:
        """Charge one step, before anything of it is released."""
        if foreign:
            if self.foreign_steps == 0:
                warnings.warn(
                    "a step was taken on a batch that did not come from the private loader: nothing is known about how "
                    "it was sampled, so the step is charged without amplification (as if it held the whole dataset)",
                    stacklevel=2,
                )
            self._charge(1.0)
            self.foreign_steps += 1
        elif not self.per_pass:
            self._charge(self.charged_rate)
        self.steps += 1

    def _charge(self, rate: Rate) -> None:
        charge(self.accountant, self.noise_multiplier, rate)
        if self.ledger is not None:
            self.ledger.charge(self.noise_multiplier, rate)

    def _check_total(self, rate: Rate) -> None:
        """Refuse what would bring all runs in the ledger above what they may spend together: this step, or, once, the budget."""
        if self.ledger is None:
            return
        if not self._planned and self.budget is not None:
            planned = [(self.noise_multiplier, self.charged_rate, self.remaining or 0)]
            self.ledger.check_plan([entry for entry in planned if entry[2]])
        self._planned = True
        self.ledger.check_one_more(self.noise_multiplier, rate)

    def _allows_one_more(self, rate: Rate) -> bool:
        budget = self.budget
        if budget is None:
            return True
        history = [*self.accountant.history, (self.noise_multiplier, rate, 1)]
        return epsilon_for(self.accountant, history, budget.delta) <= budget.epsilon

    def _exhausted(self, why: str = "") -> BudgetExhaustedError:
        assert self.budget is not None
        return BudgetExhaustedError(
            f"the budget of epsilon={self.budget.epsilon} at delta={self.budget.delta} is used up after "
            f"{self.steps} steps{why}; nothing was changed by this call. Train for fewer steps, or open the scope with "
            "more epochs or a larger target_epsilon."
        )
