"""The accountant "pld", as Opacus knows accountants."""

from collections.abc import Mapping
from typing import Any

from opacus.accountants import IAccountant, register_accountant

from ..._validate import bad
from .history import as_charge
from .pld import NAME, PLD


class PLDAccountant(PLD, IAccountant):  # type: ignore[misc]
    """:class:`PLD` with the interface of Opacus's accountants; registered with Opacus as "pld" when ``dp_hooks`` is imported."""

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over a state, which may have been kept as JSON.

        Raises:
            InvalidArgumentError: its history is none.
            ValueError: it is of another accountant (from Opacus).
        """
        if state_dict and "history" in state_dict:
            history = state_dict["history"]
            try:
                state_dict = {**state_dict, "history": [as_charge(entry) for entry in history]}
            except (TypeError, ValueError, OverflowError) as error:
                remedy = f"it is not of (noise multiplier, rate, steps): {error}. Pass what state_dict() returned."
                raise bad("state_dict['history']", history, remedy) from error
        super().load_state_dict(state_dict)


register_accountant(NAME, PLDAccountant, force=True)  # anew where the package is loaded again
