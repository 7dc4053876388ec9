"""The ledger: what was spent is on the disk before it is released, for all runs on a dataset, and cannot be forgotten by halves."""

import json
import os
import random
import signal
import time
from typing import Any

import pytest
import torch
from torch import Tensor

from dp_hooks import Ledger, PrivacyEngineHookBased, budget
from dp_hooks.__main__ import main
from dp_hooks.errors import AccountingError, BudgetExhaustedError, DPHooksError, InvalidArgumentError, ScopeError
from dp_hooks.privacy.accounting.ledger_contents import Spent
from dp_hooks.privacy.accounting.ledger_file import LedgerFile, read_records
from dp_hooks.privacy.accounting.opacus import epsilon_for, make_accountant

from ...models import build, in_order, scope_over, values
from ...mutations import MUTATIONS, mutated_bytes

DELTA, SIGMA = 1e-5, 1.0
PRIVATE: dict[str, Any] = {"noise_multiplier": SIGMA, "poisson_sampling": True, "accountant": "rdp", "self_check": False}
KILLS = int(os.environ.get("DP_HOOKS_KILLS", "12"))


def scope_of(path: Any, **options: Any) -> Any:
    """Return a scope over six examples, in batches of three."""
    return scope_over(build("mlp"), loader=in_order(6, 3), ledger=path, **{**PRIVATE, **options})


def spend(scope: Any, passes: int = 1) -> Any:
    """Take two steps in each pass."""
    with scope as (opt, loader):
        for _ in range(passes):
            for _ in loader:
                opt.step_empty()
    return scope


def one_pass(opt: Any, loader: Any) -> None:
    for _ in loader:
        opt.step_empty()


def charges(path: Any) -> int:
    """How many releases are in the file."""
    return sum(steps for _, _, steps in Spent(path, read_records(path)[0], examples=6).history)


class Counting(torch.optim.SGD):
    """Counts, in memory that other processes see, before it moves anything."""

    def __init__(self, model: Any) -> None:
        super().__init__(model.parameters(), lr=1.0)
        self.released = torch.zeros(1, dtype=torch.int64).share_memory_()
        self.seen: list[int] = []
        self.path: Any = None

    def step(self, closure: Any = None) -> Any:
        self.released += 1
        if self.path is not None:
            self.seen.append(charges(self.path))
        return super().step(closure)


def test_a_charge_is_on_the_disk_before_its_release(tmp_path):
    """When the parameters are about to move, the file has the charge of this step, and none of a later one."""
    path, model = tmp_path / "spent.jsonl", build("mlp")
    optimizer = Counting(model)
    optimizer.path = path
    scope = scope_over(model, optimizer=optimizer, loader=in_order(6, 3), ledger=path, **PRIVATE)
    spend(scope, passes=2)
    assert optimizer.seen == [1, 2, 3, 4]


def test_a_charge_is_synced_before_its_release(tmp_path, monkeypatch):
    """Written is not enough where the machine may lose its power: each line is forced to the disk before the parameters move."""
    path, model, events = tmp_path / "spent.jsonl", build("mlp"), []
    optimizer, sync = Counting(model), os.fsync
    scope = scope_over(model, optimizer=optimizer, loader=in_order(6, 3), ledger=path, **PRIVATE)
    monkeypatch.setattr(os, "fsync", lambda descriptor: (sync(descriptor), events.append((charges(path), int(optimizer.released)))))
    spend(scope)
    assert events[-2:] == [(1, 0), (2, 1)]


@pytest.mark.parametrize(
    ("options", "entries"),
    [({}, [[SIGMA, 0.5, 4]]), ({"poisson_sampling": False}, [[SIGMA, 1.0, 2]]), ({"sample_rate": 0.25}, [[SIGMA, 0.25, 8]])],
)
def test_all_kinds_of_charges_are_in_it(options, entries, tmp_path):
    """With Poisson sampling one for each batch, else one for each pass: as in the accountant."""
    path = tmp_path / "spent.jsonl"
    scope = spend(scope_of(path, **options), passes=2)
    assert [list(entry) for entry in scope.accountant.history] == entries
    assert charges(path) == sum(steps for _, _, steps in entries)


@pytest.mark.filterwarnings("ignore:a step was taken on a batch that did not come")
def test_steps_from_elsewhere_are_in_it(tmp_path):
    """They are charged without amplification, in the file as well."""
    path = tmp_path / "spent.jsonl"
    with scope_of(path) as (opt, _):
        opt.step_empty()
    assert '"rate": 1.0' in path.read_text()


def test_runs_add_up(tmp_path):
    """Several scopes, of several rates and noises: their epsilon is that of all charges together, and each has a line."""
    path = tmp_path / "spent.jsonl"
    spend(scope_of(path))
    spend(scope_of(path, noise_multiplier=2.0, sample_rate=0.25))
    found = budget(path, accountant="rdp", delta=DELTA)
    histories = [[(SIGMA, 0.5, 2)], [(2.0, 0.25, 4)]]
    rdp = make_accountant("rdp")
    assert [run.epsilon for run in found.runs] == [epsilon_for(rdp, history, DELTA) for history in histories]
    assert found.epsilon == epsilon_for(rdp, [*histories[0], *histories[1]], DELTA)
    assert max(run.epsilon for run in found.runs) < found.epsilon < sum(run.epsilon for run in found.runs)
    assert found.examples == 6
    assert str(found).splitlines()[-1].split()[:2] == ["together", "6"]
    assert found.as_dict()["runs"][0]["releases"] == 2


def test_the_engine_takes_one_too(tmp_path):
    """``make_private(..., ledger=path)``."""
    path, model = tmp_path / "spent.jsonl", build("mlp")
    with PrivacyEngineHookBased(accountant="rdp") as engine:
        _, opt, loader = engine.make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
            data_loader=in_order(6, 3),
            noise_multiplier=SIGMA,
            max_grad_norm=1.0,
            ledger=path,
        )
        for _ in loader:
            opt.step_empty()
    assert charges(path) == 2


# ---------------------------------------------------------------- a total over runs


def until_refused(opt: Any, loader: Any, look: Any) -> None:
    for _ in range(100):
        for _ in loader:
            look()
            opt.step_empty()


def test_no_run_spends_more_than_the_total(tmp_path):
    """The step that would, of whichever run, is refused before anything moves or is charged; nearly all can be spent."""
    path = tmp_path / "spent.jsonl"
    ledger = Ledger(path, total_epsilon=8.0, total_delta=DELTA)
    spend(scope_of(ledger))
    scope, seen = scope_of(path), []  # the total is in the file
    with scope as (opt, loader), pytest.raises(BudgetExhaustedError, match="together"):
        until_refused(opt, loader, lambda: seen.append((values(scope.model), charges(path))))
    before, had = seen[-1]
    assert all(map(torch.equal, values(scope.model), before))
    assert charges(path) == had
    spent = budget(path, accountant="rdp")
    one_more = epsilon_for(make_accountant("rdp"), [(SIGMA, 0.5, had + 1)], DELTA)
    assert spent.epsilon <= 8.0 < one_more
    assert (spent.total_epsilon, spent.total_delta, spent.delta) == (8.0, DELTA, DELTA)


def test_a_budget_that_does_not_fit_is_refused_before_its_first_step(tmp_path):
    """Nothing is spent on a run that could not be finished; a smaller one may begin."""
    path = tmp_path / "spent.jsonl"
    spend(scope_of(Ledger(path, total_epsilon=8.0, total_delta=DELTA)))
    options = {"noise_multiplier": None, "target_delta": DELTA, "epochs": 2}
    too_large = scope_of(path, target_epsilon=7.5, **options)
    with too_large as (opt, loader), pytest.raises(BudgetExhaustedError, match="this run plans"):
        one_pass(opt, loader)
    assert charges(path) == 2
    spend(scope_of(path, target_epsilon=2.0, **options), passes=2)
    assert charges(path) == 6


def test_the_total_and_the_dataset_of_a_ledger_stay_what_they_are(tmp_path):
    """Another total, or another number of examples, is refused when the scope is made."""
    path = tmp_path / "spent.jsonl"
    spend(scope_of(Ledger(path, total_epsilon=8.0, total_delta=DELTA)))
    with pytest.raises(InvalidArgumentError, match="cannot be changed later"):
        scope_of(Ledger(path, total_epsilon=9.0, total_delta=DELTA))
    with pytest.raises(AccountingError, match="dataset of 6 examples, and this one has 8"):
        scope_over(build("mlp"), loader=in_order(8, 4), ledger=path)


# ---------------------------------------------------------------- going on


def test_a_run_that_goes_on_counts_what_was_lost_with_its_process(tmp_path):
    """Steps after the state was saved are in the file: the accountant has them, and the file has none of them twice."""
    path = tmp_path / "spent.jsonl"
    with (scope := scope_of(path)) as (opt, loader):
        for _ in loader:
            opt.step_empty()
        state = json.loads(json.dumps(scope.state_dict()))
        for _ in loader:
            opt.step_empty()
    other = scope_of(path)
    other.load_state_dict(state)
    spend(other)
    assert other.accountant.history == [(SIGMA, 0.5, 6)]
    assert other.steps == 6
    assert charges(path) == 6
    assert len(budget(path).runs) == 1


def test_a_state_without_a_ledger_brings_what_it_has_spent(tmp_path):
    """It is written down before the first charge; so is what an accountant of another scope holds, unless it is in the file."""
    path, other = tmp_path / "spent.jsonl", tmp_path / "other.jsonl"
    state = spend(scope_of(None)).state_dict()
    scope = scope_of(path)
    scope.load_state_dict(state)
    assert not path.exists()
    spend(scope)
    assert charges(path) == 4
    spend(scope_of(path, accountant=scope.accountant))  # goes on with the same run
    assert charges(path) == 6
    assert len(budget(path).runs) == 1
    spend(scope_of(other, accountant=scope.accountant))
    assert charges(other) == 8


def test_an_older_copy_of_the_file_is_brought_up_to_date(tmp_path):
    """What the run has spent since the copy was made is written down before the next charge."""
    path = tmp_path / "spent.jsonl"
    scope = spend(scope_of(path))
    copy = path.read_bytes()
    spend(second := scope_of(path, accountant=scope.accountant))
    path.write_bytes(copy)
    third = scope_of(path)
    third.load_state_dict(second.state_dict())
    spend(third)
    assert charges(path) == 6
    assert len(budget(path).runs) == 1


def test_a_step_without_noise_is_infinite_for_all_runs(tmp_path):
    """It is written down as it is, and no total has room for it."""
    path = tmp_path / "spent.jsonl"
    spend(scope_of(path, noise_multiplier=0.0))
    assert budget(path).epsilon == float("inf")
    bounded = scope_of(Ledger(tmp_path / "bounded.jsonl", total_epsilon=100.0, total_delta=DELTA), noise_multiplier=0.0)
    with bounded as (opt, loader), pytest.raises(BudgetExhaustedError, match="together"):
        one_pass(opt, loader)


def test_an_equal_history_of_a_run_elsewhere_is_not_taken_for_one_in_the_file(tmp_path):
    """Two runs that spent as much are two runs: what the one without a ledger has spent is counted."""
    path = tmp_path / "spent.jsonl"
    spend(scope_of(path))
    elsewhere = spend(scope_of(None))
    spend(scope_of(path, accountant=elsewhere.accountant))
    assert charges(path) == 6


# ---------------------------------------------------------------- damage


@pytest.fixture
def written(tmp_path):
    """A ledger of two runs, of two releases each."""
    path = tmp_path / "spent.jsonl"
    for _ in range(2):
        spend(scope_of(path))
    return path


def test_a_write_that_was_cut_off_anywhere_is_recovered(written):
    """Every beginning of the file is what some process left: whole charges count, and the next run goes on after them."""
    whole = written.read_bytes()
    ends = [k + 1 for k, byte in enumerate(whole) if byte == ord("\n")]
    is_charge = [b'"charge"' in line for line in whole.splitlines()]
    for size in range(ends[0], len(whole) + 1, 7):
        written.write_bytes(whole[:size])
        expected = sum(charge for charge, end in zip(is_charge, ends, strict=True) if end - 1 <= size)
        assert charges(written) == expected
    for size in (ends[-2] + 5, ends[-1] - 1, ends[-1]):
        written.write_bytes(whole[:size])
        spend(scope_of(written))
        assert charges(written) == (3 if size < ends[-1] - 1 else 4) + 2
        written.write_bytes(whole)


def changed(lines: list[bytes], how: str) -> list[bytes]:
    if how == "a number":
        lines[3] = lines[3].replace(b'"sigma": 1.0', b'"sigma": 9.0')
    elif how == "left out":
        del lines[3]
    elif how == "twice":
        lines.insert(3, lines[3])
    elif how == "swapped":
        lines[2], lines[4] = lines[4], lines[2]
    elif how == "zeros":
        lines[3] = b"\0" * len(lines[3])
    elif how == "the first":
        del lines[0]
    return lines


@pytest.mark.parametrize("how", ["a number", "left out", "twice", "swapped", "zeros", "the first"])
def test_a_line_that_was_changed_is_noticed(how, written):
    """What was spent is not known then: no scope is made, and nothing is written."""
    damaged = b"\n".join(changed(written.read_bytes().splitlines(), how)) + b"\n"
    written.write_bytes(damaged)
    for use in (budget, scope_of):
        with pytest.raises(AccountingError, match="damaged"):
            use(written)
    assert written.read_bytes() == damaged


def test_anything_else_in_a_file_is_refused(written, tmp_path):
    """Random changes of a ledger give an error of this library or what is a beginning of it; other files are none."""
    whole, draw = written.read_bytes(), random.Random(0)
    for _ in range(MUTATIONS):
        written.write_bytes(mutated_bytes(whole, draw, [b"[" * 50_000, b'{"kind": "charge"}\n']))
        try:
            assert charges(written) <= 4
        except DPHooksError:
            continue
    for text in ("{}\n", "[]\n", "3\n", '{"kind": "ledger"}\n', "not a ledger\n"):
        (tmp_path / "other").write_text(text)
        with pytest.raises(AccountingError):
            budget(tmp_path / "other")


def test_a_ledger_of_another_format_is_refused(tmp_path):
    """One whose lines are bound to each other, but say something else."""
    head = {"kind": "ledger", "format": "dp_hooks ledger 1", "examples": 6, "total": None}
    run, charge = {"kind": "run", "run": "a", "accountant": "rdp"}, {"kind": "charge", "run": "a", "sigma": 1.0, "rate": 0.5}
    other_format, begun_twice = (({**head, "format": "dp_hooks ledger 9"},), (head, run, charge, run))
    for number, records in enumerate((other_format, (charge,), begun_twice)):
        path = tmp_path / f"{number}.jsonl"
        file = LedgerFile(path)
        file.append(*records)
        file.close()
        with pytest.raises(AccountingError, match="none of a ledger"):
            scope_of(path)


@pytest.mark.parametrize("written_bytes", [0, 30])
def test_a_disk_that_is_full_releases_nothing(written_bytes, written, monkeypatch):
    """The step fails, the parameters stay, and what was half written is taken off the file."""
    before, real = written.read_bytes(), os.write
    scope = scope_of(written)
    with scope as (opt, loader):
        next(iter(loader))
        start, parts = values(scope.model), [written_bytes]

        def failing(descriptor: int, data: Any) -> int:
            if parts and parts[0]:
                return real(descriptor, data[: parts.pop()])
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "write", failing)
        with pytest.raises(AccountingError, match="nothing was released"):
            opt.step_empty()
        monkeypatch.undo()
        assert all(map(torch.equal, values(scope.model), start))
        assert written.read_bytes() == before


# ---------------------------------------------------------------- processes


def test_two_scopes_cannot_write_to_one_ledger(written):
    """The second one is refused on entering, and the first goes on; when it has ended, the next may begin."""
    with scope_of(written) as (opt, loader):
        second = scope_of(written)
        with pytest.raises(ScopeError, match="in use by another open scope"), second:
            pass
        assert not second.is_open
        next(iter(loader))
        opt.step_empty()
    assert charges(spend_and_path(written)) == 7


def spend_and_path(path: Any) -> Any:
    spend(scope_of(path))
    return path


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")


@needs_fork
@pytest.mark.filterwarnings("ignore:This process")
def test_a_forked_process_cannot_write_to_it(written):
    """Both would write to one file: the child's step is refused."""
    with scope_of(written) as (opt, loader):
        next(iter(loader))
        child = os.fork()
        if child == 0:
            try:
                opt.step_empty()
            except ScopeError as error:
                os._exit(7 if "forked" in str(error) else 8)
            os._exit(9)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert charges(written) == 4


@needs_fork
@pytest.mark.filterwarnings("ignore:This process")
def test_a_process_that_is_killed_has_written_what_it_released(tmp_path):
    """Killed at any point, the file has all releases, and at most one that did not come any more; then a run goes on."""
    path, draw = tmp_path / "spent.jsonl", random.Random(0)
    released = torch.zeros(1, dtype=torch.int64).share_memory_()
    model = build("mlp")
    for _ in range(KILLS):
        before = charges(path) if path.exists() else 0
        released.zero_()
        child = os.fork()
        if child == 0:
            train_for_ever(path, model, released)
        while not int(released):  # until it is at work
            time.sleep(0.001)
        time.sleep(draw.random() * 0.02)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert int(released) <= charges(path) - before <= int(released) + 1


def train_for_ever(path: Any, model: Any, released: Tensor) -> None:
    try:
        optimizer = Counting(model)
        optimizer.released = released
        with scope_over(model, optimizer=optimizer, loader=in_order(6, 3), ledger=path, **PRIVATE) as (opt, loader):
            while True:
                for _ in loader:
                    opt.step_empty()
    finally:
        os._exit(1)


# ---------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: Ledger(3), "ledger=3"),
        (lambda path: Ledger(""), "ledger=''"),
        (lambda path: Ledger(path, total_epsilon=8.0), "total_delta=None"),
        (lambda path: Ledger(path, total_epsilon=-1.0, total_delta=DELTA), "total_epsilon=-1"),
        (lambda path: Ledger(path, total_epsilon=1.0, total_delta=2.0), "total_delta=2"),
        (lambda path: scope_of(7), "ledger=7"),
        (lambda path: budget(path / "none"), "path="),
        (budget, "path="),
    ],
)
def test_what_cannot_be_used_is_refused(make, said, tmp_path):
    """By the name of the argument, and nothing is made."""
    with pytest.raises(InvalidArgumentError, match=said):
        make(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_command_prints_what_was_spent(written, capsys):
    """``python -m dp_hooks budget PATH`` prints the table, or JSON; what cannot be read is an error in words."""
    assert main(["budget", str(written), "--accountant", "rdp"]) == 0
    assert capsys.readouterr().out == f"{budget(written, accountant='rdp')}\n"
    assert main(["budget", str(written), "--json", "--delta", "1e-6"]) == 0
    assert json.loads(capsys.readouterr().out)["epsilon"] == budget(written, delta=1e-6).epsilon
    assert main(["budget", "nothing"]) == 2
    assert "nothing" in capsys.readouterr().err
