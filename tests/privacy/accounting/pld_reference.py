"""What Google's dp_accounting (0.6) says of 200 settings: the values that the tests of accountant "pld" compare with.

    python -m tests.privacy.accounting.pld_reference                             # compares all 200, a minute
    pip install dp_accounting && python -m tests.privacy.accounting.pld_reference --write   # half an hour of processor time

The second writes ``pld_reference.json`` beside this file. The package is not needed for the tests, and not in the extra "test": it
holds attrs below 24. For every setting its grid is made finer until the pessimistic epsilon changes by less than 0.1 %
(``converged``), or the grid has too many points. Its optimistic one rounds losses down, which for many steps is far below the
truth. At a delta of 1e-11 and less, after many steps, what its transforms round off is as large as delta: its optimistic
epsilon can then be above the pessimistic one, or either on the wrong side of the truth. Where it has not converged, or
contradicts itself, ``exact`` is what :mod:`.exact` finds, where that resolves it.
"""

import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from dp_hooks.privacy.accounting.pld import pld_epsilon
from dp_hooks.privacy.accounting.upper_bound import epsilon_bound, gaussian_epsilon

from .exact import Unresolved, true_epsilon

FILE = Path(__file__).with_suffix(".json")
SIGMAS, RATES, STEPS, DELTAS = (0.3, 20.0), (1e-6, 1.0), (1, 10**6), (1e-12, 1e-3)
CORNERS = [(s, q, k, d) for s in SIGMAS for q in (1e-6, 1e-3, 0.5, 1.0) for k in (1, 1000, 10**6) for d in DELTAS]
Setting = tuple[float, float, int, float]


def settings() -> Iterator[Setting]:
    """48 at the corners, 152 drawn from the logarithmic uniform distribution between them, one in eight of them with q = 1."""
    yield from CORNERS
    generator = torch.Generator().manual_seed(13)
    for i in range(200 - len(CORNERS)):
        s, q, k, d = torch.rand(4, dtype=torch.float64, generator=generator).tolist()
        sigma, rate, steps, delta = (
            a * (b / a) ** x for x, (a, b) in zip((s, q, k, d), (SIGMAS, RATES, STEPS, DELTAS), strict=True)
        )
        yield float(f"{sigma:.3g}"), 1.0 if i % 8 == 0 else float(f"{rate:.3g}"), round(steps), float(f"{delta:.3g}")


def reference(sigma: float, rate: float, steps: int, delta: float) -> dict[str, float | bool]:
    """The optimistic and the pessimistic epsilon of dp_accounting."""
    from dp_accounting.pld import privacy_loss_distribution as pld

    def epsilon(pessimistic: bool, interval: float) -> float:
        try:
            one = pld.from_gaussian_mechanism(
                sigma,
                sampling_prob=rate,
                pessimistic_estimate=pessimistic,
                use_connect_dots=pessimistic,
                value_discretization_interval=interval,
                log_mass_truncation_bound=math.log(1e-4 * delta / steps),
            )
            return float(one.self_compose(steps, 1e-4 * delta).get_epsilon_for_delta(delta))
        except (ValueError, OverflowError):  # a grid that is too coarse for its numbers
            return math.inf if pessimistic else 0.0

    about = epsilon_bound([(sigma, rate, steps)], delta)
    largest = (12 / sigma + 0.5 / sigma**2) if rate > 1e-3 else math.log1p(rate * math.expm1(12 / sigma + 0.5 / sigma**2))
    interval, upper, lower, converged = max(about, 1e-3 * rate / sigma) / 500, math.inf, 0.0, False
    while max(largest, about) / interval < 3e6 and not converged:
        finer = epsilon(True, interval)
        lower = max(lower, epsilon(False, interval))
        converged = finer == 0 or abs(finer / upper - 1) < 1e-3 or finer - lower < 1e-3 * finer
        if math.isinf(finer):
            converged = False
        upper, interval = min(upper, finer), interval / 4
    return {"lower": lower, "upper": upper, "converged": converged}


def within_limits(row: dict[str, Any]) -> bool:
    """Whether dp_accounting's two values can be taken for bounds."""
    return bool(row["converged"] and row["lower"] <= row["upper"])


def bounds(row: dict[str, Any]) -> tuple[float, float]:
    """Between what epsilon has to be: the truth, or what is certainly not above it, and 1 % above a bound from the other side."""
    sigma, rate, steps, delta = row["setting"]
    if rate == 1:
        exact = gaussian_epsilon(math.sqrt(steps) / sigma, delta)
        return exact * (1 - 1e-9), exact * 1.01
    if within_limits(row):
        return row["lower"], row["upper"] * 1.01
    return (row["exact"] * (1 - 1e-9), row["exact"] * 1.01) if row["exact"] is not None else (0.0, math.inf)


def write() -> None:
    """Ask dp_accounting, and keep what it says."""
    rows: list[dict[str, Any]] = []
    for setting in settings():
        start = time.perf_counter()
        row: dict[str, Any] = {"setting": setting, **reference(*setting), "exact": None}
        if not within_limits(row) and setting[1] < 1:
            row["exact"] = exact_of(*setting)
        rows.append(row)
        print(len(rows), row, f"{time.perf_counter() - start:.1f} s", flush=True)
        FILE.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")


def exact_of(sigma: float, rate: float, steps: int, delta: float) -> float | None:
    """The true epsilon; None where the way to it does not resolve it."""
    if steps * rate * math.erf(1 / math.sqrt(8) / sigma) <= delta:
        return 0.0
    try:
        return true_epsilon([(sigma, rate, steps)], delta)
    except Unresolved:
        return None


def compare() -> None:
    """Print every setting whose epsilon is out of its bounds, and how close and how fast the accountant is."""
    above, slowest, unknown = 0.0, 0.0, 0
    for row in json.loads(FILE.read_text()):
        *charge, delta = row["setting"]
        low, high = bounds(row)
        start = time.process_time()
        epsilon = pld_epsilon((tuple(charge),), delta)
        slowest = max(slowest, time.process_time() - start)
        unknown += math.isinf(high)
        if within_limits(row) and row["upper"] > 0:
            above = max(above, epsilon / row["upper"] - 1)
        if not low <= epsilon <= high:
            print("out of bounds:", row, epsilon)
    print(
        f"{above:.2%} above dp_accounting's at most; {slowest:.2f} s of processor time at most; {unknown} settings unknown to both"
    )


if __name__ == "__main__":
    write() if sys.argv[1:] == ["--write"] else compare()
