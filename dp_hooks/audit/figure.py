"""The picture of an audit."""

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from ..privacy.plots import blank_figure


def draw_audit(
    scores: tuple[Sequence[float], Sequence[float]], threshold: float, facts: Mapping[str, Any], path: str | os.PathLike[str]
) -> None:
    """Draw the scores of canaries that were in and that were not, and epsilon as stated and as found.

    Raises:
        DPHooksError: matplotlib is not installed.
    """
    figure = blank_figure(width=10)
    left, right = figure.subplots(1, 2)
    inside, outside = scores
    if inside and outside:
        every = sorted([*inside, *outside])
        low, high = every[len(every) // 200], every[-1 - len(every) // 200]
        bins = [low + (high - low) * k / 40 for k in range(41)] if high > low else 1
        left.hist([inside, outside], bins=bins, histtype="step", label=["in the run", "not in the run"])
        left.axvline(threshold, color="tab:gray", linestyle=":", label="called in: above")
        left.legend()
    left.set_ylim(0, 1.35 * left.get_ylim()[1])  # room for the legend
    left.set(
        xlabel="score (log likelihood ratio)",
        ylabel="canaries",
        title=f"{facts['canaries']} canaries, {facts['releases']} releases",
    )
    epsilons = {
        "stated": facts["epsilon"],
        f"at least\n(confidence {facts['confidence']:g})": facts["epsilon_lower"],
        "at least,\nassuming nothing": facts["epsilon_guessed"],
    }
    colors = ["tab:blue", "tab:red" if facts["findings"] else "tab:green", "tab:gray"]
    heights = [epsilon if math.isfinite(epsilon) else 0.0 for epsilon in epsilons.values()]
    bars = right.bar(list(epsilons), heights, color=colors)
    right.bar_label(bars, [f"{epsilon:.2f}" for epsilon in epsilons.values()])
    right.set(ylabel=f"epsilon at delta = {facts['delta']:g}", title="nothing was found" if facts["holds"] else "a fault was found")
    figure.savefig(path)
