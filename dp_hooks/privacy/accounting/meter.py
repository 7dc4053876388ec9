"""What has been spent: charges to an accountant, and the budget that bounds them."""

import warnings

from opacus.accountants import IAccountant, create_accountant

from ...errors import BudgetExhaustedError, ScopeError
from .calibrate import Budget
from .opacus import epsilon_of


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
        sigma: float,
        charged_rate: float,
        poisson: bool,
        budget: Budget | None = None,
    ) -> None:
        """Charge to ``accountant``; ``sigma`` and ``charged_rate`` are what the budget was calculated for."""
        self.accountant = accountant
        self.sigma = sigma
        self.charged_rate = charged_rate
        self.poisson = poisson
        self.budget = budget
        self.steps = 0
        self.foreign_steps = 0
        self._pass_sigma: float | None = None

    @property
    def remaining(self) -> int | None:
        """Releases left in the budget (batches with Poisson sampling, else passes); None: no budget was set.

        Counted from the accountant's history, so that what a checkpoint brought along is included.
        """
        if self.budget is None:
            return None
        kinds = {(sigma, rate) for sigma, rate, _ in self.accountant.history}
        if kinds <= {(self.sigma, self.charged_rate)}:
            return max(0, self.budget.releases - int(sum(steps for _, _, steps in self.accountant.history)))
        # Something else was charged, too: one more release is allowed as long as epsilon stays within the target.
        return 1 if self._epsilon_with(self.sigma, self.charged_rate) <= self.budget.epsilon else 0

    def get_epsilon(self, delta: float) -> float:
        """Return the epsilon spent so far at ``delta``."""
        return epsilon_of(self.accountant, delta)

    def _charge(self, sigma: float, rate: float) -> None:
        before = list(self.accountant.history)
        try:
            self.accountant.step(noise_multiplier=sigma, sample_rate=rate)
        except ValueError as error:
            self.accountant.history = before  # the GDP accountant forgets what was spent when it refuses more
            raise ScopeError(
                f"the {self.accountant.mechanism()!r} accountant cannot add a step with noise multiplier {sigma} at rate "
                f'{rate} to its history ({error}). Nothing was released. Use accountant="prv" or "rdp".'
            ) from error

    def start_pass(self, sigma: float) -> None:
        """Account for a new pass over the loader, just before its first batch is handed out."""
        if self.poisson:
            return
        if self.remaining == 0:
            raise self._exhausted()
        self._charge(sigma, self.charged_rate)
        self._pass_sigma = sigma

    def check_step(self, sigma: float, *, foreign: bool) -> None:
        """Raise if one more step with ``sigma`` may not be taken; changes nothing."""
        if foreign:
            if self.budget is not None and self._epsilon_with(sigma, 1.0) > self.budget.epsilon:
                raise self._exhausted(
                    " (the batch did not come from the private loader, so the step has no amplification by sampling)"
                )
        elif self.poisson:
            if self.remaining == 0:
                raise self._exhausted()
        elif self._pass_sigma is not None and sigma < self._pass_sigma:
            raise ScopeError(
                f"noise_multiplier={sigma} is below the {self._pass_sigma} that this pass over the loader was charged "
                "with. Without Poisson sampling a pass is charged at its start: lower the noise between passes."
            )

    def charge_step(self, sigma: float, *, foreign: bool) -> None:
        """Charge one step, before anything of it is released."""
        if foreign:
            if self.foreign_steps == 0:
                warnings.warn(
                    "a step was taken on a batch that did not come from the private loader: nothing is known about how "
                    "it was sampled, so the step is charged without amplification (as if it held the whole dataset)",
                    stacklevel=2,
                )
            self._charge(sigma, 1.0)
            self.foreign_steps += 1
        elif self.poisson:
            self._charge(sigma, self.charged_rate)
        self.steps += 1

    def _epsilon_with(self, sigma: float, rate: float) -> float:
        assert self.budget is not None
        trial = create_accountant(mechanism=self.accountant.mechanism())
        trial.history = [*self.accountant.history, (sigma, rate, 1)]
        return epsilon_of(trial, self.budget.delta)

    def _exhausted(self, why: str = "") -> BudgetExhaustedError:
        assert self.budget is not None
        return BudgetExhaustedError(
            f"the budget of epsilon={self.budget.epsilon} at delta={self.budget.delta} is used up after "
            f"{self.steps} steps{why}; nothing was changed by this call. Train for fewer steps, or open the scope with "
            "more epochs or a larger target_epsilon."
        )
