"""Plans: the numbers are those of the run that they are of."""

import json
import math
import os
import re
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from dp_hooks import PrivacyPlan, errors, plan
from dp_hooks.__main__ import main
from dp_hooks.errors import DPHooksError, InvalidArgumentError
from dp_hooks.privacy.accounting.calibrate import calibrated
from dp_hooks.privacy.accounting.pld import pld_epsilon

from ..training.helpers import train
from .accounting.helpers import DELTA, Charged

USUAL: dict[str, Any] = {"n": 50_000, "batch_size": 512, "epochs": 10, "epsilon": 3, "delta": 1e-5}
COMMAND = "plan --n 600 --batch-size 60 --epochs 3 --epsilon 2 --delta 1e-5".split()


@pytest.mark.parametrize(
    ("n", "batch", "epochs", "target"),
    [(225, 1, 1, 2.0), (100, 7, 3, 8.0), (1000, 300, 2, 0.5), (29, 3, 1.5, 3.0), (10, 3, 2.2, 40.0)],
)
@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_sigma_rate_and_steps_are_those_of_the_run(n: int, batch: int, epochs: float, target: float, accountant: str) -> None:
    """Also where batches do not divide the data, or epochs are not whole: what ``private_training`` works out, to the last bit."""
    made = plan(n=n, batch_size=batch, epochs=epochs, epsilon=target, delta=DELTA, accountant=accountant)
    scope = Charged(n, batch, target_epsilon=target, target_delta=DELTA, epochs=epochs, accountant=accountant).scope
    assert made.noise_multiplier == scope.noise_multiplier
    assert made.steps == scope.plan.releases(epochs)
    assert made.sample_rate == scope.plan.sample_rate
    assert made.noise_to_batch_ratio == scope.noise_multiplier / batch
    assert 0.99 * target < made.epsilon <= target
    assert made.accountant == accountant


@pytest.mark.parametrize("given", ["epsilon", "noise_multiplier"])
def test_epsilon_by_epoch_is_that_of_the_run(given: str) -> None:
    """After every pass of a real run, steps and epsilon of the scope are those of the plan's line."""
    wanted = {"epsilon": {"epsilon": 4.0}, "noise_multiplier": {"noise_multiplier": 1.1}}[given]
    options = {"target_epsilon": 4.0, "target_delta": DELTA, "epochs": 3} if given == "epsilon" else dict(wanted)
    made = plan(n=20, batch_size=6, epochs=3, delta=DELTA, **wanted)
    run = Charged(20, 6, accountant="pld", self_check=False, **options)
    assert [spent.epoch for spent in made.by_epoch] == [1, 2, 3]
    with run as (model, opt, loader):
        for spent in made.by_epoch:
            train(model, opt, loader)
            assert (run.scope.steps, run.epsilon) == (spent.steps, spent.epsilon)
    assert made.epsilon == run.epsilon
    assert made.noise_multiplier == run.scope.noise_multiplier


def test_the_noise_decides_if_it_is_given() -> None:
    """With ``noise_multiplier`` epsilon is the accountant's; less noise spends more."""
    sizes = {"n": 1000, "batch_size": 10, "epochs": 5, "delta": DELTA}
    made = plan(**sizes, noise_multiplier=0.8)
    assert made.epsilon == pld_epsilon(((0.8, 0.01, 500),), DELTA)
    assert plan(**sizes, noise_multiplier=0.76).epsilon > 1.01 * made.epsilon


def test_other_sizes_reach_the_same_epsilon() -> None:
    """Each alternative is the plan of its own sizes; larger batches have a smaller ratio, more epochs a larger one."""
    made = plan(**USUAL)
    assert [(other.batch_size, other.epochs) for other in made.alternatives] == [(1024, 10), (2048, 10), (512, 5), (512, 20)]
    for other in made.alternatives:
        alone = plan(**{**USUAL, "batch_size": other.batch_size, "epochs": other.epochs})
        assert (other.steps, other.noise_multiplier) == (alone.steps, alone.noise_multiplier)
        assert other.noise_to_batch_ratio == other.noise_multiplier / other.batch_size == alone.noise_to_batch_ratio
    twice, four_times, shorter, longer = (other.noise_to_batch_ratio for other in made.alternatives)
    assert four_times < twice < shorter < made.noise_to_batch_ratio < longer


def test_many_epochs_are_told_by_a_few_lines() -> None:
    """At most ten epochs are listed, the last one and its epsilon among them; a part of an epoch ends the list."""
    made = plan(**{**USUAL, "epochs": 37.5, "n": 5000})
    assert len(made.by_epoch) <= 11
    assert (made.by_epoch[-1].epoch, made.by_epoch[-1].epsilon) == (37.5, made.epsilon)
    assert all(a.epsilon < b.epsilon and a.steps < b.steps for a, b in zip(made.by_epoch, made.by_epoch[1:], strict=False))


@pytest.mark.parametrize(
    ("change", "warning"),
    [
        ({"delta": 1e-3, "n": 1000}, r"delta=0\.001 is not below 1 / n"),
        ({"epsilon": 12.0}, r"epsilon=1[12]\.?\d* is above 10"),
        ({"n": 2000, "epochs": 1}, "batch x 4 is left out: a batch above n=2000"),
        ({"epsilon": None, "noise_multiplier": 0.05}, "epochs x 2 is left out: the accountant cannot work out noise"),
    ],
)
def test_what_looks_wrong_is_said(change: dict[str, Any], warning: str) -> None:
    """Large delta or epsilon, and choices that cannot be, are told in ``warnings`` and in the table; a usual plan has none."""
    made = plan(**{**USUAL, **change})
    assert any(re.search(warning, text) for text in made.warnings)
    assert all(text in str(made) for text in made.warnings)
    assert plan(**USUAL).warnings == ()


BAD = [
    ({"n": 0}, "n=0"),
    ({"n": 50_000.5}, "n="),
    ({"batch_size": 0}, "batch_size=0"),
    ({"batch_size": 50_001}, "batch_size=50001 .* larger than the dataset of n=50000"),
    ({"epochs": 0}, "epochs=0"),
    ({"epochs": math.nan}, "epochs=nan"),
    ({"delta": 0}, "delta=0"),
    ({"delta": 1}, "delta=1"),
    ({"epsilon": -1}, "epsilon=-1"),
    ({"epsilon": 101}, "^epsilon=101 .* protects nobody"),
    ({"epsilon": None}, "epsilon=None .* neither"),
    ({"noise_multiplier": 1.0}, "epsilon=3 .* both"),
    ({"epsilon": None, "noise_multiplier": 0}, "noise_multiplier=0"),
    ({"accountant": "gdp"}, "accountant='gdp'"),
    ({"accountant": "none"}, "accountant='none'"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_input_is_named(change: dict[str, Any], message: str) -> None:
    """What a run would refuse is refused with its name, its value and the remedy."""
    with pytest.raises(InvalidArgumentError, match=message):
        plan(**{**USUAL, **change})


def test_a_plan_takes_less_than_two_seconds() -> None:
    """Of processor time, all alternatives included."""
    pld_epsilon.cache_clear()
    calibrated.cache_clear()
    start = time.process_time()
    plan(**USUAL)
    assert time.process_time() - start < 2


# ---------------------------------------------------------------- shown


def test_the_table_has_the_numbers() -> None:
    """Sigma, steps, rate, ratio, each epoch and each alternative are printed."""
    made = plan(n=600, batch_size=60, epochs=3, epsilon=2, delta=DELTA)
    words = str(made).split()
    assert {f"{made.noise_multiplier:.6g}", f"{made.noise_to_batch_ratio:.4g},", "0.1,", f"{made.epsilon:.4f}"} <= set(words)
    assert {f"{spent.epsilon:.4f}" for spent in made.by_epoch} <= set(words)
    assert {f"{other.noise_multiplier:.5g}" for other in made.alternatives} <= set(words)


def test_the_command_prints_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    """As a table, and as JSON that says the same."""
    made = plan(n=600, batch_size=60, epochs=3.0, epsilon=2.0, delta=1e-5)
    assert main(COMMAND) == 0
    assert capsys.readouterr().out.rstrip("\n") == str(made)
    assert main([*COMMAND, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(made.as_dict()))


@pytest.mark.parametrize("command", ["plan", "budget"])
def test_commands_take_less_than_two_seconds(command: str, tmp_path: Path) -> None:
    """``python -m dp_hooks`` plans 39,070 steps, or adds a ledger up, in that much processor time: without PyTorch and Opacus."""
    large = "plan --n 1000000 --batch-size 256 --epochs 10 --noise-multiplier 0.9 --delta 1e-7".split()
    run = Charged(20, 5, noise_multiplier=1.0, ledger=tmp_path / "ledger", self_check=False)
    with run as (model, opt, loader):
        train(model, opt, loader)
    arguments = large if command == "plan" else [command, str(tmp_path / "ledger")]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    called = [sys.executable, "-X", "importtime", "-m", "dp_hooks", *arguments, "--json"]
    alone = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}  # threads that wait for others take processor time, too
    made = subprocess.run(called, capture_output=True, text=True, check=True, env=alone)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    found = json.loads(made.stdout)
    assert (found["steps"] if command == "plan" else found["runs"][0]["releases"]) == {"plan": 39_070, "budget": 4}[command]
    imported = {line.split("|")[-1].strip().split(".")[0] for line in made.stderr.splitlines()}
    assert {"dp_hooks", "numpy"} <= imported
    assert not imported & {"torch", "opacus", "scipy"}
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2


@pytest.mark.parametrize(
    ("arguments", "whole", "command"),
    [
        ("-m plan --n 5", "python -X dev -m dp_hooks plan --n 5", True),
        ("-m", "python -m dp_hooks", True),
        ("-m dp_hooks", "python -m pytest dp_hooks", False),
        ("-m", "python -m dp_hooks.privacy.planner", False),
        ("-m a b", "python", False),
        ("-c dp_hooks", "python -c pass dp_hooks", False),
        ("dp_hooks plan", "python dp_hooks plan", False),
    ],
)
def test_only_commands_go_without_the_rest(arguments: str, whole: str, command: bool) -> None:
    """Whatever else imports the package gets all of it, and an accountant that Opacus knows."""
    assert errors.is_command(arguments.split(), whole.split()) is command
    assert not errors.RUN_AS_COMMAND


def test_the_command_tells_what_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    """A refusal is one line on the error stream and status 2; what argparse refuses, too."""
    assert main([*COMMAND, "--noise-multiplier", "1"]) == 2
    streams = capsys.readouterr()
    assert streams.out == ""
    assert streams.err.startswith("error: epsilon=2.0 cannot be used: both")
    with pytest.raises(SystemExit) as ended:
        main(["plan", "--n", "many"])
    assert ended.value.code == 2


def test_the_plot_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Method and command write a picture."""
    made = plan(n=600, batch_size=60, epochs=3, epsilon=2, delta=DELTA)
    made.plot(tmp_path / "one.png")
    assert main([*COMMAND, "--plot", str(tmp_path / "two.svg")]) == 0
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")
    assert "noise / batch" in capsys.readouterr().out
    assert "<svg" in (tmp_path / "two.svg").read_text()
    assert main([*COMMAND, "--plot", str(tmp_path / "nowhere" / "three.png")]) == 2
    assert "error:" in capsys.readouterr().err


def test_a_plot_without_matplotlib_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without the package the error says what to install; nothing is written."""
    made: PrivacyPlan = plan(n=600, batch_size=60, epochs=3, epsilon=2, delta=DELTA)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(DPHooksError, match=r"dp_hooks\[plot\]"):
        made.plot(tmp_path / "plot.png")
    assert not list(tmp_path.iterdir())
