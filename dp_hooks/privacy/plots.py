"""Drawings of what is spent, and of what will be; matplotlib is imported when one is made."""

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from .._validate import bad
from ..errors import DPHooksError
from .accounting.history import Charge
from .accounting.opacus import ACCOUNTANTS, asked, epsilon_for

_POINTS = {"prv": 12}  # which takes half a second for each
_MORE_POINTS = 40


def plot_spending(
    path: str | os.PathLike[str],
    history: Sequence[Charge],
    delta: float,
    accountant: str,
    *,
    spent: float,
    target_epsilon: float | None = None,
    what: str = "private steps",
) -> None:
    """Draw epsilon against the steps charged, from 0 to what is ``spent``, with the budget as a line.

    Args:
        path: the file to write; its ending says the format (``.png``, ``.pdf``, ``.svg``).
        history: what was charged: (noise multiplier, rate, steps), one after the other.
        delta: the delta of all epsilons.
        accountant: "pld", "prv", "rdp" or "gdp": what adds the charges up.
        spent: epsilon at the end of ``history``, which is drawn as it is.
        target_epsilon: the budget at the same delta; None: there is none.
        what: what the steps of the history are.

    Raises:
        InvalidArgumentError: there is no curve to draw: epsilon is infinite, or the accountant is of another kind.
        DPHooksError: matplotlib is not installed.
    """
    if not math.isfinite(spent):
        raise bad("epsilon", spent, "there is no curve of it: a step was taken without noise.")
    if accountant not in ACCOUNTANTS:
        raise bad("accountant", accountant, f"epsilon on the way is known for {', '.join(ACCOUNTANTS)} only.")
    figure = blank_figure()
    axes = figure.add_subplot()
    steps = [*_steps(sum(count for *_, count in history), _POINTS.get(accountant, _MORE_POINTS)), sum(n for *_, n in history)]
    own = asked(accountant)
    epsilons = [*(epsilon_for(own, _first(history, step), delta) for step in steps[:-1]), spent]
    axes.plot(steps, epsilons, marker=".", label=f"spent: {spent:.4g}")
    if target_epsilon is not None:
        axes.axhline(target_epsilon, color="tab:red", linestyle="--", label=f"budget: {target_epsilon:g}")
    axes.set(xlabel=what, ylabel=f"epsilon at delta = {delta:g}", xlim=(0, None), ylim=(0, None))
    axes.set_title(f"privacy spent ({accountant} accountant)")
    axes.legend()
    figure.savefig(path)


def draw_plan(plan: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Draw the fields of a :class:`~dp_hooks.PrivacyPlan` into a file: epsilon by steps, and noise against signal.

    Raises:
        DPHooksError: matplotlib is not installed.
    """
    figure = blank_figure(width=9)
    left, right = figure.subplots(1, 2)
    left.plot([0, *(row["steps"] for row in plan["by_epoch"])], [0, *(row["epsilon"] for row in plan["by_epoch"])], marker=".")
    left.set(xlabel="steps", ylabel=f"epsilon at delta {plan['delta']:g}", title=f"sigma = {plan['noise_multiplier']:.4g}")
    left.grid(alpha=0.3)
    bars = {"this plan": plan["noise_to_batch_ratio"], **{row["name"]: row["noise_to_batch_ratio"] for row in plan["alternatives"]}}
    right.barh(list(bars), list(bars.values()))
    right.invert_yaxis()
    right.set(xlabel="noise / batch (sigma / B)", title=f"for the same epsilon of {plan['epsilon']:.4g}")
    figure.savefig(path)


def blank_figure(width: float = 6) -> Any:
    """Return an empty figure, so many inches wide.

    Raises:
        DPHooksError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DPHooksError('plot() needs matplotlib, which is not installed: pip install "dp_hooks[plot]".') from error
    return Figure(figsize=(width, 4), dpi=150, layout="constrained")


def _steps(total: int, points: int) -> list[int]:
    """Numbers of steps below ``total``, from 0 on; closer at the start, where epsilon grows fastest."""
    return sorted({int(total * (k / (points - 1)) ** 2) for k in range(points - 1)} - {total})


def _first(history: Sequence[Charge], steps: int) -> list[Charge]:
    """The first ``steps`` steps of a history."""
    found = []
    for sigma, rate, count in history:
        found.append((sigma, rate, min(count, steps)))
        steps -= found[-1][2]
    return [charge for charge in found if charge[2] > 0]
