"""What has been spent: charges to an accountant, and the budget that bounds them."""

import warnings

from opacus.accountants import IAccountant

from ...errors import BudgetExhaustedError, ScopeError
from .calibrate import Budget
from .opacus import charge, epsilon_for
from .upper_bound import Charge


class PrivacyMeter:
    """Charges every release before its result can be seen, and refuses the one that would break the budget.

    With Poisson sampling a release is one logical batch at rate ``q``. Without, it is one pass over the loader, in which
    every example is in one batch at most, so that all its steps together are one Gaussian mechanism without
    amplification (parallel composition under the null-record relation). A batch that did not come from the private loader
    has no known sampling: its step is charged without amplification.
    """

    def __init__(
        self,
        accountant: IAccountant,
        *,
        noise_multiplier: float,
        charged_rate: float,
        poisson: bool,
        budget: Budget | None = None,
        releases: int = 0,
    ) -> None:
        """Charge to ``accountant``; a ``budget`` was calculated for ``releases`` with these first two numbers.

        ``noise_multiplier`` is what the next release is charged with; without a budget it may be set anew.
        """
        self.accountant = accountant
        self.noise_multiplier = noise_multiplier
        self.charged_rate = charged_rate
        self.poisson = poisson
        self.budget = budget
        self.releases = releases
        self.steps = 0
        self.foreign_steps = 0
        self._pass_sigma: float | None = None
        self._others: list[Charge] = []  # charges of another kind, and how many releases fit into the budget beside them
        self._allowed = releases

    @property
    def remaining(self) -> int | None:
        """Releases left in the budget (batches with Poisson sampling, else passes); None: no budget was set.

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
        return None if left and not self.poisson else left  # a pass that has begun is paid for as a whole

    def start_pass(self) -> None:
        """Account for a new pass over the loader, just before its first batch is handed out."""
        if self.poisson:
            return
        if self.remaining == 0:
            raise self._exhausted()
        charge(self.accountant, self.noise_multiplier, self.charged_rate)
        self._pass_sigma = self.noise_multiplier

    def check_step(self, *, foreign: bool) -> None:
        """Raise if one more step may not be taken; changes nothing."""
        if foreign:
            if not self._allows_one_more(1.0):
                raise self._exhausted(
                    " (the batch did not come from the private loader, so the step has no amplification by sampling)"
                )
        elif self.poisson:
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
            charge(self.accountant, self.noise_multiplier, 1.0)
            self.foreign_steps += 1
        elif self.poisson:
            charge(self.accountant, self.noise_multiplier, self.charged_rate)
        self.steps += 1

    def _allows_one_more(self, rate: float) -> bool:
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
