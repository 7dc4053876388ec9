"""What has to be kept of a scope, so that another one goes on where it stopped."""

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

from .._validate import bad
from ..errors import ScopeError
from ..privacy.accounting.history import as_charge, as_json, as_number
from ..privacy.accounting.lineage import lineage_of
from ..privacy.accounting.meter import PrivacyMeter
from ..privacy.accounting.protected import check_protected
from ..privacy.accounting.rates import as_rate
from ..privacy.sampling.plan import SamplingPlan
from .clipped_sum import ClippedSum

FORMAT = "dp_hooks scope 1"
_FIELDS: dict[str, Any] = {
    "format": str,
    "accountant": str,
    "history": (list, tuple),
    "steps": int,
    "foreign_steps": int,
    "dataset_size": int,
    "sample_rate": (Real, list, tuple),
    "budget": (list, tuple, type(None)),
    "clipping": str,
    "clipping_bound": (Real, type(None)),
}


class SavedState:
    """Takes the state of a scope down, and goes on from one."""

    def __init__(self, meter: PrivacyMeter, clipped_sum: ClippedSum, clipping: str, plan: SamplingPlan) -> None:
        """Of the scope that has these parts.

        Raises:
            ScopeError: the accountant has counted what was spent on something else than the plan is about.
        """
        self._meter = meter
        self._sum = clipped_sum
        self._loaded = 0  # how many of the steps were taken elsewhere
        self._units = None if plan.units is None else plan.units.count
        self.check_accountant()
        self._mine = {
            "accountant": meter.accountant.mechanism(),
            "dataset_size": plan.examples,
            "clipping": clipping,
            "units": self._units,
        }

    def check_accountant(self) -> None:
        """Raise a ``ScopeError`` if the accountant has counted what was spent on something else than the scope protects."""
        check_protected(self._meter.accountant, self._units)

    def as_dict(self) -> dict[str, Any]:
        """The state now; see :meth:`~dp_hooks.PrivateTraining.state_dict`."""
        meter = self._meter
        lineage_of(meter.accountant).save(meter.accountant.history)
        rate = meter.charged_rate
        return {
            "format": FORMAT,
            **self._mine,
            "history": as_json(meter.accountant.history),
            "steps": meter.steps,
            "foreign_steps": meter.foreign_steps,
            "sample_rate": list(rate) if isinstance(rate, tuple) else rate,
            "budget": None if meter.budget is None else [meter.budget.epsilon, meter.budget.delta, meter.releases],
            "ledger_run": meter.run if meter.ledger is None else meter.ledger.run,
            "clipping_bound": self._sum.clipping.max_grad_norm if self._mine["clipping"] == "adaptive" else None,
        }

    def resume(self, state: object) -> None:
        """Go on from ``state``; see :meth:`~dp_hooks.PrivateTraining.load_state_dict`."""
        known, meter = _checked(state), self._meter
        if meter.steps > self._loaded:
            raise ScopeError(f"{meter.steps - self._loaded} steps were taken in this scope already: load into a new one.")
        for name, value in self._mine.items():
            if known.get(name) != value:  # states of older versions have no units
                remedy = f"its {name} is another one than this scope's ({value!r}): build it as that run's was"
                remedy += f" (accountant={known.get(name)!r})." if name == "accountant" else "."
                raise bad("state", known.get(name), remedy)
        if known["budget"] is not None and meter.budget is None:
            epsilon, delta, _ = known["budget"]
            remedy = f"it goes on with a budget: pass target_epsilon={epsilon}, target_delta={delta}, epochs=..."
            raise bad("state", known["budget"], remedy)
        history, _ = lineage_of(meter.accountant).joined(meter.accountant.history, known["history"])
        if known["clipping_bound"] is not None:
            self._sum.change_bound(known["clipping_bound"])
        meter.accountant.history = history
        lineage_of(meter.accountant).went_on(history)
        meter.steps, meter.foreign_steps = max(meter.steps, known["steps"]), max(meter.foreign_steps, known["foreign_steps"])
        meter.run = known.get("ledger_run")
        meter.adopt()
        self._loaded = meter.steps


def _checked(state: object) -> dict[str, Any]:
    """Return ``state`` if it is what :meth:`~dp_hooks.PrivateTraining.state_dict` makes.

    Raises:
        InvalidArgumentError: it is something else, of another version, or damaged.
    """
    if not isinstance(state, Mapping):
        raise bad("state", type(state).__name__, "pass what scope.state_dict() returned.")
    if state.get("format") != FORMAT:
        known = state.get("format")
        raise bad("state", known, f"it is no state of a scope in the format {FORMAT!r}. Pass what scope.state_dict() returned.")
    for name, kinds in _FIELDS.items():
        if name not in state or not isinstance(state[name], kinds) or isinstance(state[name], bool):
            raise bad("state", dict(state), f"its field {name!r} is missing or damaged.")
    if not isinstance(state.get("ledger_run"), (str, type(None))):  # states of older versions have none
        raise bad("state", dict(state), "its field 'ledger_run' is damaged.")
    if (state["clipping"] == "adaptive") != (state["clipping_bound"] is not None):
        raise bad("state", dict(state), "its field 'clipping_bound' is of another kind of clipping.")
    if state["budget"] is not None and not _is_budget(state["budget"]):
        raise bad("state", dict(state), "its field 'budget' is not of (epsilon, delta, releases).")
    try:
        history = [as_charge(entry) for entry in state["history"]]
    except (ValueError, OverflowError) as error:
        raise bad("state", state["history"], "its history is not of (noise multiplier, rate, steps).") from error
    try:
        as_rate(state["sample_rate"])
    except ValueError as error:
        raise bad("state", dict(state), "it has numbers that cannot be.") from error
    counts = [state[name] for name in ("steps", "foreign_steps", "dataset_size")]
    if min(counts) < 0:
        raise bad("state", dict(state), "it has numbers that cannot be.")
    return {**state, "history": history}


def _is_budget(value: Sequence[object]) -> bool:
    try:
        epsilon, delta, releases = map(as_number, value)
    except (ValueError, OverflowError):
        return False
    return epsilon > 0 and 0 < delta < 1 and releases >= 0 and releases == int(releases)
