"""sampling=: what a scope charges, reports, saves and refuses for each way to draw batches."""

import io
import json
import re
from typing import Any

import datasets
import pytest
import torch
from opacus.accountants import RDPAccountant, create_accountant
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from dp_hooks import Ledger, PrivacyEngineHookBased, budget, plan, private_training
from dp_hooks.__main__ import main
from dp_hooks.errors import AccountingError, BudgetExhaustedError, DPHooksError, InvalidArgumentError, ScopeError
from dp_hooks.privacy.accounting.history import as_charge
from dp_hooks.privacy.accounting.pld import pld_epsilon
from dp_hooks.privacy.accounting.pld_accountant import PLDAccountant

from ..models import build, drawn, examples, in_order, scope_over
from .helpers import sgd, train

DELTA = 1e-5
RATES: dict[str, Any] = {
    # sampling: what is charged for, over six examples in batches of three, and how often in a pass of two batches
    "poisson": (0.5, 2),
    "truncated_poisson": (("truncated_poisson", 0.5, 6, 4), 2),
    "random_allocation": (("random_allocation", 2), 1),
    "sequential": (1.0, 1),
}
NEW = ["truncated_poisson", "random_allocation"]
each_sampling = pytest.mark.parametrize("sampling", list(RATES))
each_new = pytest.mark.parametrize("sampling", NEW)


def options_of(sampling: str) -> dict[str, Any]:
    return {"sampling": sampling, **({"max_batch_size": 4} if sampling == "truncated_poisson" else {})}


def scope_of(sampling: str, **options: Any) -> Any:
    """Return a scope over six examples in batches of three."""
    model = build("mlp")
    loader = options.pop("loader") if "loader" in options else in_order(6, 3)
    noise = {} if "target_epsilon" in options else {"noise_multiplier": 1.0}
    return private_training(model, sgd(model), loader, **{"max_grad_norm": 1.0, **options_of(sampling), **noise, **options})


def spend(scope: Any, passes: int = 1) -> Any:
    with scope as (opt, loader):
        for _ in range(passes):
            train(scope.model, opt, loader, by=lambda model, opt, x, y: opt.step_empty())
    return scope


# ---------------------------------------------------------------- charges, budgets, reports


@each_sampling
def test_charges_and_epsilon(sampling: str) -> None:
    """Three passes are charged as what they are, and epsilon is that of these charges."""
    scope = spend(scope_of(sampling), 3)
    rate, often = RATES[sampling]
    assert scope.accountant.history == [(1.0, rate, 3 * often)]
    assert scope.steps == 6
    assert scope.get_epsilon(DELTA) == pld_epsilon(((1.0, rate, 3 * often),), DELTA)


@each_new
def test_a_pass_is_charged_before_its_first_batch_and_a_batch_before_its_step(sampling: str) -> None:
    """Handing out a batch charges random allocation's whole pass, and nothing of Poisson sampling's."""
    with (scope := scope_of(sampling)) as (opt, loader):
        batches = iter(loader)
        assert scope.accountant.history == []
        next(batches)
        assert len(scope.accountant.history) == (sampling == "random_allocation")
        opt.zero_grad()
        opt.step_empty()
        assert scope.accountant.history == [(1.0, RATES[sampling][0], 1)]


@each_sampling
def test_a_budget_lasts_for_its_epochs(sampling: str) -> None:
    """At least 99.8 % of it is used in four passes, and not more; a further step or pass is refused."""
    scope = scope_of(sampling, target_epsilon=3.0, target_delta=DELTA, epochs=4)
    with scope as (opt, loader):
        for _ in range(4):
            train(scope.model, opt, loader, by=lambda model, opt, x, y: opt.step_empty())
        assert scope.steps == 8
        with pytest.warns(UserWarning, match="used up"):
            assert list(loader) == []
        if sampling not in ("random_allocation", "sequential"):
            with pytest.raises(BudgetExhaustedError):
                opt.step_empty()
    assert 0.998 * 3 <= scope.get_epsilon(DELTA) <= 3


def test_samplings_in_the_order_of_their_cost() -> None:
    """For one budget the noise is least with random allocation, then Poisson sampling, truncated, and the loader's order."""
    loader = DataLoader(TensorDataset(torch.randn(1000, 5), torch.randint(3, (1000,))), batch_size=20)
    budgets = {"target_epsilon": 2.0, "target_delta": DELTA, "epochs": 3, "loader": loader}
    scopes = {name: scope_of(name, **budgets, **({"max_batch_size": 35} if name == NEW[0] else {})) for name in RATES}
    sigma = {name: scope.noise_multiplier for name, scope in scopes.items()}
    assert sigma["random_allocation"] < sigma["poisson"] < sigma["truncated_poisson"] < sigma["sequential"]


def test_the_report_names_the_sampling() -> None:
    """With what matters of it; as JSON the history has lists."""
    reports = {name: spend(scope_of(name)).report(DELTA) for name in RATES}
    assert reports["poisson"].sampling == "Poisson"
    assert reports["truncated_poisson"].sampling == "Poisson, truncated: at most 4 examples in a batch"
    assert reports["random_allocation"].sampling.startswith("random allocation: every example in one of 2 batches of a pass")
    assert reports["sequential"].sampling.startswith("order of the loader")
    assert [report.sample_rate for report in reports.values()] == [0.5, 0.5, 0.5, 1.0]
    for name, report in reports.items():
        entry = json.loads(report.as_json())["history"][0]
        assert as_charge(entry) == (1.0, *RATES[name])
        assert report.sampling in str(report)


# ---------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, "poisson"),
        ({"poisson_sampling": True}, "poisson"),
        ({"poisson_sampling": False}, "sequential"),
        ({"poisson_sampling": True, "sampling": "poisson"}, "poisson"),
        ({"poisson_sampling": False, "sampling": "sequential"}, "sequential"),
    ],
)
def test_the_older_name_says_the_same(given: dict[str, Any], wanted: str) -> None:
    """``poisson_sampling`` is another name for two of the four."""
    model = build("mlp")
    scope = private_training(model, sgd(model), in_order(6, 3), noise_multiplier=1.0, max_grad_norm=1.0, **given)
    assert scope.plan.sampling == wanted
    assert type(scope.accountant) is PLDAccountant


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"sampling": "uniform"}, "sampling='uniform'.*'random_allocation'"),
    ({"sampling": True}, "sampling=True"),
    ({"sampling": "sequential", "poisson_sampling": True}, "sampling='sequential'.*poisson_sampling=True means 'poisson'"),
    ({"sampling": "truncated_poisson", "poisson_sampling": True}, "Leave poisson_sampling out"),
    ({"sampling": "random_allocation", "poisson_sampling": False}, "means 'sequential'"),
    ({"max_batch_size": 4}, "max_batch_size=4.*truncated_poisson"),
    ({"sampling": "random_allocation", "max_batch_size": 4}, "max_batch_size=4"),
    ({"sampling": "truncated_poisson", "max_batch_size": 0}, "max_batch_size=0"),
    ({"sampling": "truncated_poisson", "max_batch_size": 4.0}, "max_batch_size=4.0"),
    ({"sampling": "random_allocation", "sample_rate": 0.1}, "sample_rate=0.1.*sampling='random_allocation'"),
    ({"sampling": "random_allocation", "accountant": "prv"}, "accountant='prv'.*random_allocation.*pld"),
    ({"sampling": "truncated_poisson", "accountant": "rdp"}, "accountant='rdp'.*truncated_poisson.*pld"),
    ({"sampling": "truncated_poisson", "accountant": "gdp"}, "accountant='gdp'"),
    ({"sampling": "random_allocation", "accountant": RDPAccountant()}, "accountant='rdp'"),
]


@pytest.mark.parametrize(("given", "message"), REFUSED, ids=[re.sub(r" object at \w+", "", str(given)) for given, _ in REFUSED])
@pytest.mark.filterwarnings("ignore:GDP accounting is experimental")
def test_what_cannot_be_is_refused_by_name(given: dict[str, Any], message: str) -> None:
    """Before anything is attached: values that are unknown, contradict each other, or that the accountant cannot charge."""
    model = build("mlp")
    with pytest.raises(InvalidArgumentError, match=message):
        private_training(model, sgd(model), in_order(6, 3), noise_multiplier=1.0, max_grad_norm=1.0, **given)


@each_new
def test_an_accountant_of_ones_own_is_refused(sampling: str) -> None:
    """Even one that calls itself "pld": what it makes of such charges is not known."""

    class Own(RDPAccountant):  # type: ignore[misc]
        @classmethod
        def mechanism(cls) -> str:
            return "pld"

    with pytest.raises(InvalidArgumentError, match="accountant='pld'"):
        scope_of(sampling, accountant=Own())


@each_new
@pytest.mark.filterwarnings("ignore:GDP accounting is experimental")
@pytest.mark.parametrize("mechanism", ["prv", "rdp", "gdp"])
def test_a_history_of_such_charges_has_no_epsilon_elsewhere(sampling: str, mechanism: str) -> None:
    """However it came into another accountant: an error names it, and nothing is added."""
    accountant = create_accountant(mechanism)
    accountant.history = [(1.0, RATES[sampling][0], 3)]
    scope = scope_over(build("mlp"), loader=in_order(6, 3), noise_multiplier=1.0, accountant=accountant, poisson_sampling=False)
    with pytest.raises(AccountingError, match=f"'{mechanism}' accountant cannot account for '{sampling}'"):
        scope.get_epsilon(DELTA)


# ---------------------------------------------------------------- states, checkpoints, ledgers


@each_sampling
@pytest.mark.parametrize("way", ["json", "torch.save"])
def test_a_state_goes_on(sampling: str, way: str) -> None:
    """State of scope and accountant come back from JSON and from ``torch.save`` as they were, and the run goes on with them."""
    budgets = {"target_epsilon": 3.0, "target_delta": DELTA, "epochs": 4}
    first = spend(scope_of(sampling, **budgets), 1)
    both = {"scope": first.state_dict(), "accountant": first.accountant.state_dict()}
    if way == "json":
        both = json.loads(json.dumps(both))
    else:
        file = io.BytesIO()
        torch.save(both, file)
        file.seek(0)
        both = torch.load(file, weights_only=True)
    accountant = PLDAccountant()
    accountant.load_state_dict(both["accountant"])
    assert accountant.history == first.accountant.history
    second = scope_of(sampling, **budgets)
    second.load_state_dict(both["scope"])
    assert second.accountant.history == first.accountant.history
    spend(second, 3)
    assert second.accountant.history == [(second.noise_multiplier, RATES[sampling][0], 4 * RATES[sampling][1])]
    assert 0.998 * 3 <= second.get_epsilon(DELTA) <= 3


BAD_RATES: list[Any] = [
    0,
    1.5,
    "poisson",
    [],
    ["random_allocation"],
    ["random_allocation", 1],
    ["random_allocation", 2.0],
    ["random_allocation", True],
    ["random_allocation", -3],
    ["random_allocation", 2, 2],
    ["truncated_poisson", 0.5, 6],
    ["truncated_poisson", 0.5, 6, 6],
    ["truncated_poisson", 0.5, 6, 0],
    ["truncated_poisson", 1.5, 6, 4],
    ["truncated_poisson", ["truncated_poisson", 0.5, 6, 4], 6, 4],
    ["truncated_poisson", 0.5, 6, 2**60],
    ["sorted", 2],
    [2, "random_allocation"],
    {"random_allocation": 2},
    None,
]


@pytest.mark.parametrize("rate", BAD_RATES, ids=str)
def test_damaged_rates_are_refused(rate: Any) -> None:
    """In a state, in its history and in that of an accountant: an error of this library, and nothing is taken over."""
    state = spend(scope_of("random_allocation")).state_dict()
    scope = scope_of("random_allocation")
    for damaged in ({**state, "sample_rate": rate}, {**state, "history": [[1.0, rate, 1]]}):
        with pytest.raises(InvalidArgumentError):
            scope.load_state_dict(damaged)
    with pytest.raises(InvalidArgumentError):
        scope.accountant.load_state_dict({"history": [[1.0, rate, 1]], "mechanism": "pld"})
    assert scope.accountant.history == []


def test_states_and_ledgers_from_before_still_load(tmp_path: Any) -> None:
    """A state whose rates are numbers, and a ledger of such lines."""
    state = spend(scope_of("poisson")).state_dict()
    assert state["history"] == [[1.0, 0.5, 2]]
    assert state["sample_rate"] == 0.5
    spend(scope_of("poisson", ledger=tmp_path / "ledger"))
    lines = [json.loads(line) for line in (tmp_path / "ledger").read_text().splitlines()]
    assert [line["rate"] for line in lines if line["kind"] == "charge"] == [0.5, 0.5]


@each_new
def test_a_ledger_adds_such_charges_up(sampling: str, tmp_path: Any) -> None:
    """They are read again as they were charged, a second run adds to them, and the command tells their epsilon."""
    path = tmp_path / "ledger"
    spend(scope_of(sampling, ledger=path), 2)
    spend(scope_of(sampling, ledger=path), 1)
    spend(scope_of("poisson", ledger=path), 1)
    rate, often = RATES[sampling]
    spending = budget(path, delta=DELTA)
    assert spending.epsilon == pld_epsilon(((1.0, rate, 2 * often), (1.0, rate, often), (1.0, 0.5, 2)), DELTA)
    assert [run.releases for run in spending.runs] == [2 * often, often, 2]
    with pytest.raises(DPHooksError, match=f"'prv' accountant cannot account for '{sampling}'"):
        budget(path, delta=DELTA, accountant="prv")
    assert main(["budget", str(path), "--accountant", "rdp"]) == 2


@each_new
def test_a_total_over_runs_counts_such_charges(sampling: str, tmp_path: Any) -> None:
    """A run stops where the total would be passed; an accountant that cannot tell the total is stopped before it spends."""
    path = tmp_path / "ledger"
    total = budget_of(sampling, 3)
    with pytest.raises(BudgetExhaustedError, match="all runs in the ledger"):
        spend(scope_of(sampling, ledger=Ledger(path, total_epsilon=total, total_delta=DELTA)), 9)
    often = RATES[sampling][1]
    assert sum(run.releases for run in budget(path).runs) == 3 * often
    other = scope_of("sequential", ledger=path, accountant="rdp")
    with pytest.raises(AccountingError, match=sampling):
        spend(other)
    assert other.accountant.history == []
    assert sum(run.releases for run in budget(path).runs) == 3 * often


def budget_of(sampling: str, passes: int) -> float:
    """Epsilon of so many passes, and a little more."""
    rate, often = RATES[sampling]
    return pld_epsilon(((1.0, rate, passes * often),), DELTA) * 1.001


@each_new
def test_the_engine_takes_it_and_its_checkpoints_keep_it(sampling: str) -> None:
    """``sampling=`` among the further arguments; an engine of Opacus's kind saves the charges and another one goes on with them."""
    model, file = build("mlp"), io.BytesIO()
    engine = PrivacyEngineHookBased(accountant="pld")
    data = DataLoader(TensorDataset(*examples(6)), batch_size=3)
    arguments = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, **options_of(sampling)}
    _, opt, loader = engine.make_private(module=model, optimizer=sgd(model), data_loader=data, **arguments)
    for _ in loader:
        opt.step_empty()
    engine.save_checkpoint(path=file, module=model, optimizer=opt)
    engine.cleanup()
    file.seek(0)
    other = PrivacyEngineHookBased(accountant="pld")
    other.load_checkpoint(path=file, module=model, optimizer=sgd(model))
    assert other.accountant.history == [(1.0, *RATES[sampling])]
    assert other.get_epsilon(DELTA) == pld_epsilon(((1.0, *RATES[sampling]),), DELTA)
    default = PrivacyEngineHookBased()
    with pytest.raises(InvalidArgumentError, match="accountant='prv'"):
        default.make_private(module=model, optimizer=sgd(model), data_loader=data, **arguments)
    with pytest.raises(InvalidArgumentError, match="poisson_sampling=False means"):
        other.make_private(module=model, optimizer=sgd(model), data_loader=data, poisson_sampling=False, **arguments)
    file.seek(0)
    with pytest.raises(ValueError, match="pld"):
        default.load_checkpoint(path=file, module=model)


# ---------------------------------------------------------------- plans, secure mode, other datasets


@each_sampling
def test_a_plan_is_that_of_the_run(sampling: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Noise, steps and epsilon by epoch are those of a scope with the same arguments."""
    sizes = {"n": 6, "batch_size": 3, "epochs": 4, "delta": DELTA}
    found = plan(**sizes, epsilon=3.0, **options_of(sampling))
    scope = scope_of(sampling, target_epsilon=3.0, target_delta=DELTA, epochs=4)
    assert found.noise_multiplier == scope.noise_multiplier
    assert found.steps == 8
    assert [row.steps for row in found.by_epoch] == [2, 4, 6, 8]
    rate, often = RATES[sampling]
    wanted = [pld_epsilon(((found.noise_multiplier, rate, k * often),), DELTA) for k in (1, 2, 3, 4)]
    assert [row.epsilon for row in found.by_epoch] == wanted
    assert {"poisson": "Poisson", "truncated_poisson": "at most 4 in a batch"}.get(sampling, sampling) in str(found)
    words = ["plan", "--n", "6", "--batch-size", "3", "--epochs", "4", "--delta", "1e-5", "--epsilon", "3", "--sampling", sampling]
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sampling"] == sampling


def test_a_plan_refuses_what_a_run_refuses() -> None:
    """Other accountants, unknown samplings, a largest batch without truncation."""
    sizes = {"n": 60, "batch_size": 3, "epochs": 4, "delta": DELTA, "epsilon": 3.0}
    for more, message in (
        ({"sampling": "random_allocation", "accountant": "prv"}, "accountant='prv'"),
        ({"sampling": "sorted"}, "sampling='sorted'"),
        ({"max_batch_size": 5}, "max_batch_size=5"),
    ):
        with pytest.raises(InvalidArgumentError, match=message):
            plan(**sizes, **more)


@each_new
def test_secret_batches_take_no_generator(sampling: str) -> None:
    """With secure_mode nobody may be able to draw the batches again; without a generator it trains."""
    with pytest.raises(InvalidArgumentError, match="secure_mode"):
        scope_of(sampling, secure_mode=True, loader=DataLoader(TensorDataset(*examples(6)), batch_size=3, generator=drawn(1)))
    scope = spend(scope_of(sampling, secure_mode=True, loader=DataLoader(TensorDataset(*examples(6)), batch_size=3)))
    assert scope.accountant.history == [(1.0, *RATES[sampling])]


class Table(Dataset[Any]):
    """A view of columns, as Arrow tables and ``datasets`` have it: rows are made when they are asked for."""

    def __init__(self, **columns: Any) -> None:
        self._columns = columns

    def __len__(self) -> int:
        return len(next(iter(self._columns.values())))

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {name: torch.as_tensor(values[i]) for name, values in self._columns.items()}


@each_sampling
def test_views_of_tables_are_datasets(sampling: str) -> None:
    """Anything with ``__len__`` and ``__getitem__`` is drawn from; batches are collated of its rows."""
    x, y = examples(6)
    table = Table(x=x.tolist(), y=y.tolist(), place=list(range(6)))
    with scope_of(sampling, loader=DataLoader(table, batch_size=3)) as (opt, loader):
        for batch in loader:
            torch.testing.assert_close(batch["x"].to(x.dtype), x[batch["place"]])
            opt.step_empty()


class Stream(IterableDataset[Any]):
    """Four examples, one after the other."""

    def __iter__(self) -> Any:
        return ({"x": [float(k)], "y": k} for k in range(4))


def test_a_stream_is_refused_with_recipes_that_work() -> None:
    """The error says what to make of it; both recipes make datasets that are drawn from."""
    with pytest.raises(InvalidArgumentError, match="IterableDataset") as error:
        scope_of("poisson", loader=DataLoader(Stream(), batch_size=2))
    message = str(error.value)
    assert "list(stream)" in message
    assert "datasets.Dataset.from_generator(lambda: iter(stream)).with_format('torch')" in message
    stream = Stream()
    with scope_of("random_allocation", loader=DataLoader(list(stream), batch_size=2)) as (_, loader):
        assert sorted(int(value) for batch in loader for value in batch["y"]) == [0, 1, 2, 3]
    stored = datasets.Dataset.from_generator(lambda: iter(stream)).with_format("torch")
    with scope_of("random_allocation", loader=DataLoader(stored, batch_size=2)) as (_, loader):
        assert sorted(int(value) for batch in loader for value in batch["y"]) == [0, 1, 2, 3]


def test_noise_may_not_be_lowered_within_a_pass_that_is_charged() -> None:
    """With random allocation a pass is paid for with the noise of its beginning."""
    with scope_of("random_allocation") as (opt, loader):
        next(iter(loader))
        opt.noise_multiplier = 0.5
        with pytest.raises(ScopeError, match="below"):
            opt.step_empty()
