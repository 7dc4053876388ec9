"""What has been spent: charges to an Opacus accountant, and the budget that bounds them."""

import math
import warnings
from dataclasses import dataclass

from opacus.accountants import IAccountant, create_accountant

from ..._validate import bad, fraction, non_negative, one_of, positive
from ...errors import AccountingError, BudgetExhaustedError, ScopeError

ACCOUNTANTS = ("prv", "rdp", "gdp")
_LARGEST_SIGMA = 1e4
_LARGEST_EPSILON = 100.0

_SIGMA = "pass 0 or more: it is the standard deviation of the noise in units of the clipping bound."
_DELTA = "delta must lie between 0 and 1 and should be well below 1 / (number of examples), such as 1e-5."


def make_accountant(accountant: str | IAccountant) -> IAccountant:
    """Return the Opacus accountant of that name ("prv", "rdp", "gdp"), or the given object itself."""
    if isinstance(accountant, IAccountant):
        return accountant
    return create_accountant(mechanism=one_of("accountant", accountant, ACCOUNTANTS))


def epsilon_of(accountant: IAccountant, delta: float) -> float:
    """Return epsilon at ``delta`` for the accountant's history.

    0 before the first charge; infinite as soon as one step had no noise, whatever the accountant makes of that.

    Raises:
        InvalidArgumentError: ``delta`` outside (0, 1).
        AccountingError: the accountant fails on its history.
    """
    delta = fraction("delta", delta, _DELTA)
    history = [entry for entry in accountant.history if entry[2] > 0]
    if not history:
        return 0.0
    if any(sigma == 0 for sigma, _, _ in history):
        return math.inf
    with warnings.catch_warnings():
        # Opacus's accountants take logarithms of 0 at rate 1, and advise on their grid of orders.
        warnings.simplefilter("ignore", RuntimeWarning)
        try:
            return float(accountant.get_epsilon(delta))
        except ValueError as error:
            raise AccountingError(
                f"the {accountant.mechanism()!r} accountant cannot tell epsilon at delta={delta} for its history ({error}). "
                'What was charged is kept; use accountant="prv" or "rdp" for such steps.'
            ) from error


def check_budget(
    noise_multiplier: object, target_epsilon: object, target_delta: object, epochs: object
) -> tuple[float | None, float | None, float | None, float | None]:
    """Check the four budget arguments together and return them as floats.

    Raises:
        InvalidArgumentError: both or neither of ``noise_multiplier`` and ``target_epsilon``, or a value out of range.
    """
    delta = None if target_delta is None else fraction("target_delta", target_delta, _DELTA)
    if (noise_multiplier is None) == (target_epsilon is None):
        given = "neither" if noise_multiplier is None else "both"
        raise bad(
            "noise_multiplier",
            noise_multiplier,
            f"{given} of noise_multiplier and target_epsilon={target_epsilon!r} given; pass exactly one: a noise "
            "multiplier, or target_epsilon with target_delta and epochs, from which it is calculated.",
        )
    if target_epsilon is None:
        sigma = non_negative("noise_multiplier", noise_multiplier, _SIGMA)
        if epochs is not None:
            raise bad(
                "epochs", epochs, "it only has a meaning with target_epsilon; leave it out with noise_multiplier."
            )
        return sigma, None, delta, None
    epsilon = positive("target_epsilon", target_epsilon, "pass the epsilon to reach, greater than 0.")
    if epsilon > _LARGEST_EPSILON:
        raise bad(
            "target_epsilon",
            target_epsilon,
            f"a budget above {_LARGEST_EPSILON:g} protects nobody, and accountants break down there. Pass a smaller one, or "
            "noise_multiplier.",
        )
    if delta is None:
        raise bad("target_delta", None, f"target_epsilon needs a target_delta: {_DELTA}")
    if epochs is None:
        raise bad("epochs", None, "target_epsilon needs the number of passes over the data to spend it on.")
    return None, epsilon, delta, positive("epochs", epochs, "pass a number of epochs greater than 0.")


def calibrate(accountant: IAccountant, epsilon: float, delta: float, sample_rate: float, releases: int) -> float:
    """Return the noise multiplier with which ``releases`` steps at ``sample_rate`` stay within ``(epsilon, delta)``.

    The result is the larger end of a bisection, so epsilon is never above the target, and at least 99.9 % of it is used
    (less only where the accountant's own resolution is coarser). Opacus's ``get_noise_multiplier`` is not used: it
    starts from 0, where accountants take very long or run out of memory, and need not end for small targets.

    Raises:
        InvalidArgumentError: the accountant holds charges already, which the calculation would leave out, or it cannot
            certify such a small epsilon with any noise.
    """
    if accountant.history:
        raise bad(
            "target_epsilon",
            epsilon,
            "the accountant already holds spent budget, which a noise multiplier calculated for a fresh start would "
            "ignore. Use a new accountant (a new engine), or pass noise_multiplier.",
        )

    def spent(sigma: float) -> float:
        trial = create_accountant(mechanism=accountant.mechanism())
        trial.history = [(sigma, sample_rate, releases)]
        try:
            return epsilon_of(trial, delta)
        except (AccountingError, OverflowError):  # the "gdp" accountant's way to say: beyond all bounds
            return math.inf

    high = 1.0
    while spent(high) > epsilon:
        high *= 2
        if high > _LARGEST_SIGMA:
            raise bad(
                "target_epsilon",
                epsilon,
                f"the {accountant.mechanism()!r} accountant cannot certify it at delta={delta} with any noise. "
                "Pass a larger target_epsilon, or a larger target_delta.",
            )
    low = high / 2
    while spent(low) <= epsilon:
        low, high = low / 2, low
    while epsilon - spent(high) > 1e-3 * epsilon and (high - low) > 1e-4 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if spent(middle) <= epsilon else (middle, high)
    return high


@dataclass
class Budget:
    """A calibrated number of releases within ``(epsilon, delta)``."""

    epsilon: float
    delta: float
    releases: int


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
