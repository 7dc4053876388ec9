"""Commands: ``python -m dp_hooks plan ...`` and ``python -m dp_hooks budget ...``."""

import argparse
import json
import sys
from collections.abc import Sequence

from .errors import DPHooksError
from .privacy.accounting.spending import Spending, budget
from .privacy.planner import PrivacyPlan, plan


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return the exit status: 0, or 2 after a word about what cannot be."""
    parser = argparse.ArgumentParser(prog="python -m dp_hooks", description="Differentially private training with dp_hooks.")
    commands = parser.add_subparsers(dest="command", required=True)
    planning = commands.add_parser("plan", help="noise, steps and epsilon by epoch of a private run, before it is begun")
    planning.add_argument("--n", type=int, required=True, help="examples in the dataset")
    planning.add_argument("--batch-size", type=int, required=True, help="expected size of a logical batch")
    planning.add_argument("--epochs", type=float, required=True, help="passes over the data")
    planning.add_argument("--delta", type=float, required=True, help="below 1 / n")
    planning.add_argument("--epsilon", type=float, help="what may be spent; or:")
    planning.add_argument("--noise-multiplier", type=float, help="sigma, from which epsilon is calculated")
    planning.add_argument(
        "--sampling", default="poisson", help="poisson (default), truncated_poisson, random_allocation, sequential"
    )
    planning.add_argument("--max-batch-size", type=int, help="with truncated_poisson: the most examples of a batch")
    planning.add_argument("--plot", metavar="PATH", help="also draw it into this file; needs matplotlib")
    spending = commands.add_parser("budget", help="what all runs in a ledger have spent")
    spending.add_argument("path", help="the ledger: the file that was given to scopes as ledger=")
    spending.add_argument("--delta", type=float, help="default: that of the ledger's total, or one that suits the dataset's size")
    for command in (planning, spending):
        command.add_argument("--accountant", default="pld", help="pld (default), prv or rdp")
        command.add_argument("--json", action="store_true", help="print JSON instead of tables")
    given = vars(parser.parse_args(arguments))
    as_json, command = given.pop("json"), given.pop("command")
    try:
        made = _planned(**given) if command == "plan" else budget(**given)
    except (DPHooksError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(made.as_dict(), indent=2) if as_json else made)
    return 0


def _planned(*, plot: str | None, **given: float) -> PrivacyPlan | Spending:
    made = plan(**given)  # type: ignore[arg-type]
    if plot is not None:
        made.plot(plot)
    return made


if __name__ == "__main__":
    sys.exit(main())
