"""What a report can be turned into, and the statistics beside it that are not private."""

import dataclasses
import json
import math
import pickle
import statistics
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.axes import Axes
from opacus.accountants import create_accountant
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dp_hooks import PrivacyEngineHookBased, PrivacyReport
from dp_hooks.errors import DPHooksError, InvalidArgumentError
from dp_hooks.privacy.plots import plot_spending

from ..models import BOUND, build, drawn, each_mode, examples, sample_gradients
from .helpers import POISSON, Run, backward, step


def report(**options: Any) -> PrivacyReport:
    """The report of one pass of Poisson batches of the six examples."""
    return Run(**{**POISSON, "noise_multiplier": 2.0} | options).trained().scope.report()


# ---------------------------------------------------------------- JSON and Markdown


def refuse_constant(name: str) -> Any:
    raise AssertionError(f"{name} is not in strict JSON")


@pytest.mark.parametrize(
    ("options", "epsilon"), [({}, None), ({"noise_multiplier": 0.0}, "infinity")], ids=["with noise", "without"]
)
def test_json_is_strict_and_says_what_the_dictionary_says(options: dict[str, Any], epsilon: Any) -> None:
    """All fields are there and read back; infinite epsilon is a string, in one line or several."""
    found = report(**options)
    read = json.loads(found.as_json(), parse_constant=refuse_constant)
    assert read.keys() == found.as_dict().keys()
    assert read["epsilon"] == (epsilon or found.epsilon)
    assert read["history"] == [list(charge) for charge in found.history]
    assert json.loads(found.as_json(indent=2)) == read
    assert "\n" not in found.as_json()


def test_not_a_number_is_null_in_json() -> None:
    """Statistics of a batch without examples are NaN, and null in JSON."""
    scope = Run(**POISSON, sample_rate=1e-9, nonprivate_statistics=True)
    with scope as (_, opt, loader):
        next(iter(loader))
        opt.step_empty()
    last = json.loads(scope.scope.report().as_json(), parse_constant=refuse_constant)["nonprivate_statistics"]["last"]
    assert last == {"mean_norm": None, "median_norm": None, "max_norm": None, "fraction_clipped": None, "drawn_batch_size": 0}


def test_markdown_has_the_lines_of_the_text() -> None:
    """Each line of the printed report is a row of two cells, with bars inside cells escaped."""
    found = dataclasses.replace(report(), max_grad_norm={"0.*|x": 0.5, "*": 0.25})
    rows = found.as_markdown().splitlines()
    assert rows[:2] == ["| privacy report | |", "|---|---|"]
    printed = [line[2:] for line in str(found).splitlines()[1:]]
    assert len(rows) == len(printed) + 2
    for row, line in zip(rows[2:], printed, strict=True):
        name, value = (cell.strip().replace("\0", "|") for cell in row.replace("\\|", "\0").strip("|").split("|"))
        assert line.split() == f"{name} {value}".split()
    assert "0.*\\|x" in found.as_markdown()


# ---------------------------------------------------------------- the curve


class Drawn:
    """What is drawn into axes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.points: list[tuple[Any, Any]] = []
        self.lines: list[float] = []
        self.labels: list[str] = []
        plot, line, named = Axes.plot, Axes.axhline, Axes.set

        def on_plot(axes: Axes, x: Any, y: Any, **more: Any) -> Any:
            self.points = list(zip(x, y, strict=True))
            return plot(axes, x, y, **more)

        def on_line(axes: Axes, y: float, **more: Any) -> Any:
            self.lines.append(y)
            return line(axes, y, **more)

        def on_set(axes: Axes, **more: Any) -> Any:
            self.labels += [more["xlabel"], more["ylabel"]]
            return named(axes, **more)

        monkeypatch.setattr(Axes, "plot", on_plot)
        monkeypatch.setattr(Axes, "axhline", on_line)
        monkeypatch.setattr(Axes, "set", on_set)


@pytest.fixture
def drawing(monkeypatch: pytest.MonkeyPatch) -> Drawn:
    return Drawn(monkeypatch)


HISTORY = [(1.0, 0.01, 100), (0.8, 0.02, 50), (1.0, 1.0, 1)]


@pytest.mark.parametrize(("mechanism", "most"), [("prv", 12), ("rdp", 40)])
def test_the_curve_is_the_accountants_own(mechanism: str, most: int, drawing: Drawn, tmp_path: Path) -> None:
    """From 0 on, each point is what the accountant says for that many steps of the history; the last is the given value."""
    plot_spending(tmp_path / "curve.png", HISTORY, 1e-5, mechanism, spent=123.0)
    steps, epsilons = zip(*drawing.points, strict=True)
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert drawing.points[0] == (0, 0.0)
    assert drawing.points[-1] == (151, 123.0)
    assert len(steps) <= most
    assert list(steps) == sorted(set(steps))
    for number in (1, len(steps) // 2, -2):
        accountant = create_accountant(mechanism)
        for sigma, rate in [(sigma, rate) for sigma, rate, count in HISTORY for _ in range(count)][: steps[number]]:
            accountant.step(noise_multiplier=sigma, sample_rate=rate)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert epsilons[number] == pytest.approx(accountant.get_epsilon(1e-5), rel=1e-9)


def planned(**options: Any) -> PrivacyReport:
    return report(**{"noise_multiplier": None, "target_epsilon": 5.0, "target_delta": 1e-3, "epochs": 1} | options)


def test_the_budget_is_a_line_where_it_is_at_the_same_delta(drawing: Drawn, tmp_path: Path) -> None:
    """A report at the budget's delta shows the budget, one at another delta does not."""
    found = planned()
    found.plot(tmp_path / "a.svg")
    assert drawing.lines == [5.0]
    assert drawing.points[-1] == (found.steps, found.epsilon)
    assert found.epsilon <= 5
    assert drawing.labels == ["private steps", "epsilon at delta = 0.001"]
    run = Run(**POISSON, noise_multiplier=None, target_epsilon=5.0, target_delta=1e-3, epochs=1).trained()
    run.scope.report(1e-4).plot(tmp_path / "b.svg")
    assert drawing.lines == [5.0]


@pytest.mark.parametrize(("kind", "what"), [("in order", "releases charged"), ("none yet", "private steps")])
def test_curves_of_other_runs(kind: str, what: str, drawing: Drawn, tmp_path: Path) -> None:
    """Passes that were charged as a whole are named so, and a run without steps is a point at 0."""
    if kind == "in order":
        run = Run(noise_multiplier=2.0, accountant="rdp", loader=DataLoader(TensorDataset(*examples()), 2)).trained(passes=2)
    else:
        run = Run(**POISSON, noise_multiplier=1.0)
    found = run.scope.report()
    found.plot(tmp_path / "a.png")
    assert drawing.labels[0] == what
    assert drawing.points[-1] == (sum(steps for *_, steps in found.history), found.epsilon)


def test_a_curve_that_cannot_be_drawn_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Infinite epsilon, an accountant of another kind, and a missing matplotlib each have an error; no file is written."""
    path = tmp_path / "a.png"
    with pytest.raises(InvalidArgumentError, match=r"epsilon=inf.*a step was taken without noise"):
        report(noise_multiplier=0.0).plot(path)
    with pytest.raises(InvalidArgumentError, match="accountant='mine'"):
        plot_spending(path, HISTORY, 1e-5, "mine", spent=1.0)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(DPHooksError, match=r"dp_hooks\[plot\]"):
        report().plot(path)
    assert not path.exists()


# ---------------------------------------------------------------- statistics that are not private

NAMES = ["mean_norm", "median_norm", "max_norm", "fraction_clipped", "drawn_batch_size"]


def single_norms(model: nn.Module) -> list[float]:
    x, y = examples()
    rows = sample_gradients(model, x, y)
    return [math.sqrt(sum(float(g.square().sum()) for g in row)) for row in rows]


@each_mode
@pytest.mark.parametrize("physical", [None, 4, 2])
def test_statistics_are_those_of_single_samples(physical: int | None, mode: str) -> None:
    """Mean, median, maximum, fraction above the bound and size are those of the whole logical batch, by plain autograd."""
    run = Run(**POISSON, nonprivate_statistics=True, max_physical_batch_size=physical, grad_sample_mode=mode, max_grad_norm=BOUND)
    run.trained()
    norms = single_norms(run.first)
    found = run.scope.nonprivate_statistics
    assert len(found) == 1
    assert list(found.last) == NAMES
    assert found.last["mean_norm"] == pytest.approx(statistics.mean(norms), rel=1e-5)
    assert found.last["median_norm"] == pytest.approx(statistics.median_low(norms), rel=1e-5)
    assert found.last["max_norm"] == pytest.approx(max(norms), rel=1e-5)
    assert found.last["fraction_clipped"] == pytest.approx(sum(norm > BOUND for norm in norms) / 6)
    assert found.last["drawn_batch_size"] == 6
    run.assert_moved()


@pytest.mark.parametrize("clipping", ["flat", "automatic", "per_layer", "adaptive"])
def test_the_fraction_is_of_samples_that_were_made_shorter(clipping: str) -> None:
    """With a bound above all norms none is clipped, with a tiny one all are, in whatever way samples are clipped."""
    for bound, fraction in ((1e4, 0.0), (1e-4, 1.0)):
        bounds = [bound] * 4 if clipping == "per_layer" else bound
        options = {"clipping_options": {"unclipped_num_std": 9.0}} if clipping == "adaptive" else {}
        run = Run(**POISSON, nonprivate_statistics=True, clipping=clipping, max_grad_norm=bounds, noise_multiplier=1.0, **options)
        assert run.trained().scope.nonprivate_statistics.last["fraction_clipped"] == fraction


def test_samples_that_are_not_finite_are_left_out() -> None:
    """A sample with an infinite input is in none of the numbers but the batch size."""
    x, y = examples()
    x[2] = torch.inf
    run = Run(**POISSON, nonprivate_statistics=True, loader=DataLoader(TensorDataset(x, y), 6), self_check=False).trained()
    others = [norm for i, norm in enumerate(single_norms(run.first)) if i != 2]
    last = run.scope.nonprivate_statistics.last
    assert last["mean_norm"] == pytest.approx(statistics.mean(others), rel=1e-5)
    assert last["max_norm"] == pytest.approx(max(others), rel=1e-5)
    assert last["fraction_clipped"] == pytest.approx(sum(norm > BOUND for norm in others) / 5)
    assert last["drawn_batch_size"] == 6


@pytest.mark.filterwarnings("ignore:a step was taken on a batch that did not come from")
def test_the_whole_run_is_kept_step_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawn sizes are those that were handed out, empty batches and foreign ones included, however many steps there are."""
    monkeypatch.setattr("dp_hooks.training.nonprivate_statistics._TOGETHER", 4)
    run, sizes = Run(**POISSON, nonprivate_statistics=True, sample_rate=0.3), []
    with run as (model, opt, loader):
        for _ in range(5):
            for x, y in loader:
                sizes.append(len(x))
                step(model, opt, x, y) if len(x) else opt.step_empty()
        x, y = examples()
    assert 0 in sizes
    found = run.scope.nonprivate_statistics
    assert found.run["drawn_batch_size"] == sizes
    assert len(found) == len(sizes) == run.scope.steps
    for name in NAMES[:-1]:
        assert [math.isnan(value) for value in found.run[name]] == [size == 0 for size in sizes]
    outside = Run(**POISSON, nonprivate_statistics=True)
    with outside as (model, opt, _):
        step(model, opt, x[:4], y[:4])
    assert outside.scope.nonprivate_statistics.last["drawn_batch_size"] == 4


def test_a_step_that_is_not_taken_leaves_nothing() -> None:
    """What was dropped by ``zero_grad``, or belongs to a logical batch that was left early, is in no number."""
    run = Run(**POISSON, nonprivate_statistics=True, max_physical_batch_size=4)
    with run as (model, opt, loader):
        for x, y in loader:
            step(model, opt, x, y)
            break
        assert len(run.scope.nonprivate_statistics) == 0
        assert run.scope.nonprivate_statistics.last == {}
        assert "no step yet" in str(run.scope.report())
        for x, y in loader:
            backward(model, 7 * x, y)
            step(model, opt, x, y)
    assert run.scope.nonprivate_statistics.last["max_norm"] == pytest.approx(max(single_norms(run.first)), rel=1e-5)


def test_every_output_names_them_not_private_and_no_state_holds_them() -> None:
    """Text, Markdown, dictionary and JSON say so; neither the scope's state nor the optimizer's has any of it."""
    run = Run(**POISSON, nonprivate_statistics=True).trained()
    found = run.scope.report()
    mean = run.scope.nonprivate_statistics.last["mean_norm"]
    line = next(line for line in str(found).splitlines() if "mean norm" in line)
    assert line.split()[:2] == ["not", "private"]
    assert "epsilon does not cover them" in line
    assert "| not private | of the last step: mean norm" in found.as_markdown()
    for told in (found.as_dict(), json.loads(found.as_json())):
        assert told["nonprivate_statistics"]["private"] is False
        assert "without noise" in told["nonprivate_statistics"]["remark"]
        assert told["nonprivate_statistics"]["last"]["mean_norm"] == mean
    state = [json.dumps(run.scope.state_dict()), str(run.scope.optimizer.state_dict()), repr(pickle.dumps(run.scope.optimizer))]
    assert not any(word in text for text in state for word in ("mean_norm", "nonprivate", repr(mean)))


def test_nothing_is_kept_unless_it_is_asked_for() -> None:
    """By default there are no statistics anywhere, and no norms stay behind."""
    run = Run(**POISSON, max_physical_batch_size=4)
    with run as (model, opt, loader):
        for x, y in loader:
            step(model, opt, x, y)
            assert run.scope._sum.watched is None
    assert run.scope.nonprivate_statistics is opt.nonprivate_statistics is None
    found = run.scope.report()
    assert found.nonprivate_statistics is None
    assert found.as_dict()["nonprivate_statistics"] is None
    assert "not private" not in str(found)
    with pytest.raises(InvalidArgumentError, match="nonprivate_statistics=1"):
        Run(nonprivate_statistics=1)


def test_statistics_change_nothing_of_the_run() -> None:
    """With them, noise and parameters are the same as without."""
    one, two = (Run(**POISSON, noise_multiplier=1.0, nonprivate_statistics=kept).trained(passes=2) for kept in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(one.moved, two.moved, strict=True))


def test_the_engine_passes_the_option_on() -> None:
    """Opacus's interface takes it, and the optimizer it returns has the numbers."""
    model, data = build("mlp"), TensorDataset(*examples())
    with PrivacyEngineHookBased(accountant="rdp") as engine:
        _, opt, loader = engine.make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
            data_loader=DataLoader(data, batch_size=6, generator=drawn(1)),
            noise_multiplier=1.0,
            max_grad_norm=BOUND,
            nonprivate_statistics=True,
        )
        for x, y in loader:
            step(model, opt, x, y)
    assert opt.nonprivate_statistics.run["drawn_batch_size"] == [6]


def test_no_step_waits_for_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeping them reads nothing back: as many tensors are turned into Python numbers with them as without."""
    reads: list[str] = []

    def counted(name: str) -> Any:
        own = getattr(Tensor, name)

        def read(self: Tensor, *args: Any) -> Any:
            reads.append(name)
            return own(self, *args)

        return read

    for name in ("item", "tolist", "__bool__", "__float__", "__int__"):
        monkeypatch.setattr(Tensor, name, counted(name))
    counts = []
    for kept in (False, True):
        reads.clear()
        Run(**POISSON, nonprivate_statistics=kept, self_check=False, noise_multiplier=1.0).trained(passes=3)
        counts.append(len(reads))
    assert counts[0] == counts[1] > 0
