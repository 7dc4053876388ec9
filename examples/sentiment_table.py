"""Test accuracy of the fine-tuning example: three methods, three budgets, without privacy and with Opacus, over five seeds.

    python examples/sentiment_table.py --choose
    python examples/sentiment_table.py --results results.json

Shows what privacy costs on the reviews, by what is trained, and how the recipes in ``examples/finetune_sentiment.py`` were chosen.
Takes, of processor time on a busy machine, about 20 s for a run of ``keys`` and 50 s for one of ``lora``; ``full`` takes minutes.
Prints Markdown: a line for each run, then the table. A cell is the mean accuracy over the seeds, with the smallest and the largest
in brackets, and the number of seeds where it is not five: what takes long is run less often.

**Choosing** never measures a candidate on a review that the table tests with: candidates are trained on reviews that are in the
test part of some seed, and compared on those that are in none, a third of all (epsilon 3, seed 0). For ``keys`` Opacus has rates of
its own to choose from; for ``lora`` and ``full``, which take longer with it, it takes what was chosen for dp_hooks. What comes out
is in ``PRIVATE``, ``WITH_OPACUS`` and ``NON_PRIVATE`` of that file, by hand.

**The table**: trained on 70 % of the reviews, tested once on 20 %. The seed draws the split, the start, batches and noise. Every
private run's own accountant is asked at its end: one above its budget is an error. The frozen layers are run once for all runs.
``--results`` keeps every finished run in a file; the next call goes on from there.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import finetune_sentiment as job
import torch
from example_data import load_csv, load_reviews, majority
from finetune_sentiment import NON_PRIVATE, PRIVATE, WITH_OPACUS, Generators, Parts, Recipe, Reviews
from sentiment_model import accuracy, model_directory, trainable

DELTA = 1e-5
SEEDS = 5
EPSILONS = (1.0, 3.0, 8.0)
CHOSEN_AT = 3.0


@dataclass(frozen=True)
class Run:
    """One training run; ``engine`` is "none" without privacy."""

    method: str
    engine: str
    epsilon: float
    seed: int

    @property
    def key(self) -> str:
        """What it is called in the file of results."""
        return f"{self.method} {self.engine} {self.epsilon:g} {self.seed}"


# How many seeds there are of each (what is trained, engine), by epsilon: everything, but what takes long is run less often.
PLAN = {
    ("keys", "dp_hooks"): {8.0: SEEDS, 3.0: SEEDS, 1.0: SEEDS},
    ("keys", "none"): {math.inf: SEEDS},
    ("keys", "opacus"): {8.0: SEEDS, 3.0: SEEDS, 1.0: SEEDS},
    ("lora", "dp_hooks"): {8.0: SEEDS, 3.0: SEEDS, 1.0: SEEDS},
    ("lora", "none"): {math.inf: SEEDS},
    ("lora", "opacus"): {8.0: 3},
    ("full", "none"): {math.inf: 3},
    ("full", "dp_hooks"): {8.0: 3},
    ("full", "opacus"): {8.0: 1},
}


def runs(most_seeds: int) -> list[Run]:
    """Return all runs of the table."""
    return [Run(*who, eps, seed) for who, cells in PLAN.items() for eps, n in cells.items() for seed in range(min(n, most_seeds))]


def candidates(method: str, engine: str) -> Iterator[Recipe]:
    """Yield the recipes to choose from: rates a factor of two or three apart and, for ``keys``, fewer passes or smaller batches."""
    if engine == "opacus":
        for times in (0.5, 1.0, 2.0) if method == "keys" else ():
            chosen = PRIVATE[method]
            rates = (times * chosen.learning_rate, times * chosen.classifier_rate)
            yield replace(chosen, learning_rate=rates[0], classifier_rate=rates[1])
        return
    base, rates = START[method, engine]
    for rate in rates:
        times = rate / base.learning_rate if method == "keys" else 1
        moved = replace(base, learning_rate=rate, classifier_rate=base.classifier_rate * times)
        yield moved
        if method == "keys":
            yield replace(moved, epochs=base.epochs // 2)
            yield replace(moved, batch_size=base.batch_size // 2)


# Where the candidates start from, by method and engine, and the learning rates that are tried. Passes are what a few minutes allow.
START = {
    ("keys", "dp_hooks"): (Recipe(20, 2048, 1e-2, classifier_rate=2.5e-2), (5e-3, 1e-2, 2e-2)),
    ("lora", "dp_hooks"): (Recipe(10, 1024, 3e-3, classifier_rate=2.5e-2), (1e-3, 3e-3, 1e-2)),
    ("full", "dp_hooks"): (Recipe(10, 1024, 3e-4, classifier_rate=1e-2), (1e-4, 3e-4, 1e-3)),
    ("keys", "none"): (Recipe(10, 256, 1e-2, classifier_rate=1e-2), (1e-3, 3e-3, 1e-2, 3e-2)),
    ("lora", "none"): (Recipe(5, 256, 1e-3, classifier_rate=3e-3), (3e-4, 1e-3, 3e-3)),
    ("full", "none"): (Recipe(3, 256, 3e-4, classifier_rate=1e-3), (1e-4, 3e-4, 1e-3)),
}


class Bench:
    """All reviews, and what is shared by runs."""

    def __init__(self, args: argparse.Namespace) -> None:
        """Run the frozen layers."""
        self.directory = args.model or model_directory()
        self.reviews, self.tokenizer = job.prepare(load_csv(args.data) if args.data else load_reviews(), self.directory)
        self.epochs = args.epochs
        self._noise: dict[Any, float] = {}

    def train(self, run: Run, recipe: Recipe, parts: Parts) -> torch.nn.Module:
        """Return the top layer, trained; the accountant of a private run is asked what was spent."""
        recipe = replace(recipe, epochs=self.epochs or recipe.epochs)
        _, top = job.start(run.method, self.directory, self.tokenizer, run.seed)
        data, draw = self.reviews.part(parts.train), Generators.of(run.seed)
        if run.engine == "none":
            job.train_without_privacy(top, data, recipe, draw)
            return top
        train = job.train_privately if run.engine == "dp_hooks" else job.train_with_opacus
        same = (run.engine, run.epsilon, recipe.epochs, recipe.batch_size, len(data))  # these need the same noise
        budget = {"target_epsilon": run.epsilon, "target_delta": DELTA, "epochs": recipe.epochs}
        if same in self._noise:
            budget = {"noise_multiplier": self._noise[same]}
        trained = train(job.Private(top, data, recipe, budget, draw, job.PHYSICAL[run.method], DELTA))
        self._noise[same] = trained.noise_multiplier
        if not trained.epsilon <= run.epsilon * 1.001:
            raise SystemExit(f"{run.key} spent {trained.epsilon}, more than its budget.")
        return top


def choosing_parts(reviews: Reviews, seeds: int) -> Parts:
    """Return parts whose validation part holds what no seed tests with; the test part is empty."""
    tested = torch.zeros(len(reviews.labels), dtype=torch.bool)
    for seed in range(seeds):
        tested[job.split(reviews, seed).test] = True
    by_length = reviews.mask.sum(1).argsort()
    return Parts(by_length[tested[by_length]], by_length[~tested[by_length]], by_length[:0])


def choose(bench: Bench, methods: list[str], seeds: int, path: Path | None) -> None:
    """Compare the candidates of each method, engine by engine."""
    parts, results = choosing_parts(bench.reviews, seeds), kept(path)
    held_out = bench.reviews.part(parts.validation)
    print(f"{len(parts.train)} reviews to train on; compared on {len(held_out)} that no seed tests with; epsilon {CHOSEN_AT:g}\n")
    print("| | epochs | batch | learning rate | of the classifier | accuracy |\n| --- | --- | --- | --- | --- | --- |")
    for method in methods:
        for engine in ("dp_hooks", "none", "opacus"):
            found = {}
            for recipe in candidates(method, engine):
                run = Run(method, engine, math.inf if engine == "none" else CHOSEN_AT, seed=0)
                values = " | ".join(f"{value:g}" for value in asdict(recipe).values())
                key = f"choose {run.key}: {values}"
                if key not in results:
                    results[key] = accuracy(bench.train(run, recipe, parts), held_out)
                    keep(results, path)
                print(f"| {method}, {engine} | {values} | {results[key]:.4f} |", flush=True)
                found[recipe] = results[key]
            if found:
                best = max(found, key=found.__getitem__)
                print(f"| **{method}, {engine}: {best}** | | | | | **{found[best]:.4f}** |", flush=True)


def kept(path: Path | None) -> dict[str, float]:
    """Return the results of earlier calls."""
    return json.loads(path.read_text()) if path and path.exists() else {}


def keep(results: dict[str, float], path: Path | None) -> None:
    """Write the results to the file."""
    if path:
        path.write_text(json.dumps(results, indent=1))


def recipe_for(run: Run) -> Recipe:
    """Return what was chosen."""
    return {"none": NON_PRIVATE, "dp_hooks": PRIVATE, "opacus": WITH_OPACUS}[run.engine][run.method]


def measure(bench: Bench, methods: list[str], seeds: int, path: Path | None) -> dict[str, float]:
    """Make all runs that are not in the file yet; return the test accuracies."""
    results = kept(path)
    for seed in range(seeds):
        test = bench.reviews.part(job.split(bench.reviews, seed).test)
        if f"start {seed}" not in results:
            results[f"start {seed}"] = accuracy(job.start("keys", bench.directory, bench.tokenizer, seed)[1], test)
            results[f"majority {seed}"] = majority(test.tensors[2])
    for run in runs(seeds):
        if run.key in results or run.method not in methods:
            continue
        begun, parts = time.process_time(), job.split(bench.reviews, run.seed)
        top = bench.train(run, recipe_for(run), parts)
        results[run.key] = accuracy(top, bench.reviews.part(parts.test))
        print(f"{run.key}: {results[run.key]:.4f}, {time.process_time() - begun:.0f} s of processor time", flush=True)
        keep(results, path)
    return results


def cell(found: list[float], seeds: int) -> str:
    """Return mean, smallest and largest, and the number of seeds if it is another than ``seeds``."""
    if not found:
        return "not run"
    several = f" ({min(found):.3f} to {max(found):.3f})" if len(found) > 1 else ""
    fewer = "" if len(found) == seeds else f", {len(found)} seed{'s' if len(found) > 1 else ''}"
    return f"{statistics.mean(found):.3f}{several}{fewer}"


def table(results: dict[str, float], sizes: dict[str, int], seeds: int) -> str:
    """Return the table in Markdown."""

    def of(start: str) -> str:
        return cell([results[f"{start} {seed}"] for seed in range(seeds) if f"{start} {seed}" in results], seeds)

    heads = ["trained: parameters, with", *(f"epsilon {epsilon:g}" for epsilon in EPSILONS), "without privacy"]
    lines = ["| " + " | ".join(heads) + " |", "| --- " * len(heads) + "|"]
    for method, size in sizes.items():
        for engine, name in (("dp_hooks", "dp_hooks"), ("opacus", "Opacus")):
            cells = [of(f"{method} {engine} {epsilon:g}") for epsilon in EPSILONS]
            without = of(f"{method} none inf") if engine == "dp_hooks" else ""
            lines.append(f"| {method}: {size:,}, {name} | " + " | ".join([*cells, without]) + " |")
    lines.append(f"\nmajority class {of('majority')}; before training {of('start')}")
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--choose", action="store_true", help="compare candidates instead")
    parser.add_argument("--methods", default=",".join(PRIVATE), help="of these only, separated by commas")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="at most so many")
    parser.add_argument("--results", type=Path, help="JSON file that keeps finished runs")
    parser.add_argument("--epochs", type=int, help="instead of those of each recipe: only shows that it runs")
    parser.add_argument("--data", type=Path, help="CSV file with columns text and label (0 or 1) instead of the reviews")
    parser.add_argument("--model", type=Path, help="directory of a BERT encoder instead of MiniLM")
    return parser.parse_args()


def main() -> None:
    """Choose, or measure and print the table."""
    args, begun = arguments(), time.process_time()
    torch.set_num_threads(1)
    methods, bench = args.methods.split(","), Bench(args)
    if args.choose:
        choose(bench, methods, args.seeds, args.results)
    else:
        results = measure(bench, methods, args.seeds, args.results)
        sizes = {m: sum(trainable(job.start(m, bench.directory, bench.tokenizer, 0)[1]).values()) for m in methods}
        print("\n" + table(results, sizes, args.seeds))
    print(f"\n{(time.process_time() - begun) / 60:.0f} minutes of processor time in all")


if __name__ == "__main__":
    main()
