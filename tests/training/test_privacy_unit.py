"""Training that protects units of several examples: what a step releases, what one unit can move, and what is refused."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dp_hooks import PrivacyEngineHookBased, dp_step, private_training
from dp_hooks.checks import units as units_check
from dp_hooks.errors import InvalidArgumentError, ScopeError, SelfCheckError
from dp_hooks.gradients import unit_gradients
from dp_hooks.gradients.units import Units
from dp_hooks.privacy.accounting.opacus import make_accountant

from ..models import BOUND, BUILDERS, assert_same, build, charges, drawn, each_mode, examples, norm_of, sample_gradients
from ..privacy.clipping.helpers import KINDS, factors_of, made
from .helpers import Run, backward, sgd, step, train

N = 9
OF = [0, 1, 0, 2, 2, 1, 0, 3, 2]  # three examples each of the units 0 and 2, two of 1, one of 3
Rows = list[list[Tensor]]


def loader(data: tuple[Tensor, ...] | None = None, batch_size: int | None = None) -> DataLoader[Any]:
    """A loader whose batches, at rate 1, hold all examples; each says which it is."""
    data = (*examples(N), torch.arange(N)) if data is None else data
    return DataLoader(TensorDataset(*data), batch_size=batch_size or len(data[0]), generator=drawn(1))


def by_units(model: Any = "mlp", data: tuple[Tensor, ...] | None = None, of: Any = OF, **options: Any) -> Run:
    """A run in which every batch holds all units, and a step moves by the clipped sum."""
    options = {"poisson_sampling": True, "accountant": "rdp", "loss_reduction": "sum", "privacy_unit": of, **options}
    return Run(model, loader=loader(data), **options)


def plain(model: nn.Module, opt: Any, x: Tensor, y: Tensor) -> None:
    """An ordinary step on a loss that is a sum."""
    opt.zero_grad()
    backward(model, x, y, reduction="sum")
    opt.step()


def trained(run: Run) -> Run:
    """One pass over the data."""
    with run as (model, opt, own):
        for x, y, *_ in own:
            plain(model, opt, x, y)
    return run


def sums_of(rows: Rows, of: list[int]) -> Rows:
    """Add up the gradients of the examples of each unit, one by one."""
    found: dict[int, list[Tensor]] = {}
    for unit, row in zip(of, rows, strict=True):
        found[unit] = [a + b for a, b in zip(found[unit], row, strict=True)] if unit in found else list(row)
    return [found[unit] for unit in sorted(found)]


def clipped(rows: Rows, kind: str, model: nn.Module) -> list[Tensor]:
    """Clip each of ``rows`` by the formulas of a kind of clipping, and add up."""
    function = made(*KINDS[kind][0].values(), model)
    params, columns = list(model.parameters()), [torch.stack(column) for column in zip(*rows, strict=True)]
    squares = {p: g.flatten(1).square().sum(1) for p, g in zip(params, columns, strict=True)}
    factors = factors_of(function, squares)
    return [torch.tensordot(factors[p], g, 1) for p, g in zip(params, columns, strict=True)]


@each_mode
@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("most", [None, 4])
def test_a_step_moves_by_the_sum_of_units_clipped_as_one(kind: str, mode: str, most: int | None) -> None:
    """Of every kind of clipping, in one part or several; clipping single examples would move by something else."""
    options = {**KINDS[kind][0], "grad_sample_mode": mode, "max_physical_batch_size": most}
    run = trained(by_units(**options))
    rows = sample_gradients(run.first, *examples(N))
    assert_same(run.moved, clipped(sums_of(rows, OF), kind, run.first), 1e-7)
    wrong = clipped(rows, kind, run.first)
    assert float(norm_of([a - b for a, b in zip(run.moved, wrong, strict=True)])) > 1e-2
    assert charges(run.scope) == 1
    assert run.scope.accountant.history[0][1] == 1.0


@each_mode
@pytest.mark.parametrize("name", list(BUILDERS))
def test_every_model_is_right(name: str, mode: str) -> None:
    """Tied weights, convolutions, recurrent layers and attention: a step is that of units by plain autograd."""
    of = [0, 1, 1, 0, 2, 2, 2, 1, 1]
    model = build(name)
    if name == "tied":  # its labels are rows of the table
        x, y = examples(N)
        run = trained(by_units(name, (x, y), of, grad_sample_mode=mode))
    else:
        run = trained(by_units(name, None, of, grad_sample_mode=mode))
    rows = sample_gradients(model, *examples(N))
    sums = {str(k): torch.stack(column) for k, column in enumerate(zip(*sums_of(rows, of), strict=True))}
    norms = torch.stack([g.flatten(1).square().sum(1) for g in sums.values()]).sum(0).sqrt()
    factors = (BOUND / norms).clamp(max=1)
    assert_same(run.moved, [torch.tensordot(factors, g, 1) for g in sums.values()], 1e-7)


@each_mode
@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("scale", [1.0, 1e5])
def test_all_examples_of_a_unit_together_move_the_sum_by_at_most_the_sensitivity(kind: str, mode: str, scale: float) -> None:
    """Without the unit S is missing at most, and other examples in it move the sum by 2 S at most; as single ones by 3 S."""
    options, sensitivity = KINDS[kind]
    x, y = examples(N)
    mine = torch.tensor([unit == 0 for unit in OF])
    alike = x.clone()
    alike[mine], labels = scale * x[0], y.clone()
    labels[mine] = int(y[0])
    other = alike.clone()
    other[mine] = -7 * scale * x[3]
    kept = [i for i, unit in enumerate(OF) if unit != 0]
    moved = {
        name: trained(by_units("mlp", data, of, grad_sample_mode=mode, self_check=False, **options)).moved
        for name, data, of in [
            ("three", (alike, labels), OF),
            ("others", (other, labels), OF),
            ("none", (x[kept], y[kept]), [OF[i] for i in kept]),
            ("single", (alike, labels), list(range(N))),
        ]
    }

    def apart(one: str, two: str) -> float:
        return float(norm_of([a - b for a, b in zip(moved[one], moved[two], strict=True)]))

    assert apart("three", "none") <= sensitivity * (1 + 1e-6)
    assert apart("others", "none") <= sensitivity * (1 + 1e-6)
    assert apart("three", "others") <= 2 * sensitivity * (1 + 1e-6)
    if kind == "flat" and scale > 1:
        assert apart("three", "none") >= 0.99 * sensitivity
        assert apart("single", "none") >= 2.9 * sensitivity  # what the tests above would see


@each_mode
def test_units_with_one_example_are_single_examples_to_the_last_digit(mode: str) -> None:
    """Draws, sums, noise, rate and divisor are the same: nothing but the report tells that they are units."""
    states = []
    for more in ({}, {"privacy_unit": [f"user {i}" for i in range(24)]}):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
        data = examples(24, torch.float32)
        options = {"max_grad_norm": 0.3, "noise_multiplier": 1.0, "noise_generator": drawn(9), "grad_sample_mode": mode}
        scope = private_training(model, sgd(model), loader(data, 8), accountant="rdp", **options, **more)  # type: ignore[arg-type]
        with scope as (opt, own):
            for _ in range(3):
                train(model, opt, own, by=step)
        states.append([p.detach().clone() for p in model.parameters()])
        assert scope.accountant.history == [(1.0, 8 / 24, 9)]
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


def test_the_divisor_is_the_expected_number_of_examples() -> None:
    """With "mean" the sum over units is divided by ``batch_size``, as without units, whatever was drawn."""
    x, y = examples(N)
    model = build("mlp")
    scope = private_training(
        model,
        sgd(model),
        DataLoader(TensorDataset(x, y, torch.tensor(OF)), batch_size=4, generator=drawn(4)),
        noise_multiplier=0.0,
        max_grad_norm=BOUND,
        privacy_unit=2,
        max_examples_per_unit=2,
        accountant="rdp",
    )
    with scope as (opt, own):
        assert opt.expected_batch_size == 4
        assert own.sample_rate == pytest.approx(4 / 7)
        for xs, ys, of in own:
            before = [p.detach().clone() for p in model.parameters()]
            first = build("mlp")
            first.load_state_dict(model.state_dict())
            step(model, opt, xs, ys)
            if len(ys):
                sums = sums_of(sample_gradients(first, xs, ys), of.tolist())
                factors = [min(1.0, BOUND / float(norm_of(unit))) for unit in sums]
                wanted = [sum(f * g for f, g in zip(factors, column, strict=True)) / 4 for column in zip(*sums, strict=True)]
                assert_same([b - p.detach() for b, p in zip(before, model.parameters(), strict=True)], wanted, 1e-7)


@each_mode
def test_a_unit_with_an_example_that_is_not_finite_is_left_out_and_no_other(mode: str) -> None:
    """The step is that of the other units; NaN reaches nothing."""
    x, y = examples(N)
    x[5] = torch.nan  # of unit 1
    run = trained(by_units("mlp", (x, y), grad_sample_mode=mode, self_check=False))
    kept = [i for i, unit in enumerate(OF) if unit != 1]
    rows = sample_gradients(run.first, x[kept], y[kept])
    assert_same(run.moved, clipped(sums_of(rows, [OF[i] for i in kept]), "flat", run.first), 1e-7)


@each_mode
def test_weights_and_kept_rows_are_those_of_examples(mode: str) -> None:
    """``weigh_rows`` multiplies each example's gradient before its unit is added up; of kept rows units are told, in any order."""
    x, y = examples(N)
    kept = torch.tensor([4, 0, 3, 1, 6])
    weights = torch.tensor([0.5, 2.0, 0.0, 1.0, 3.0], dtype=torch.float64)
    run = by_units(data=(x, y, torch.arange(N)), grad_sample_mode=mode)
    with run as (model, opt, own):
        for xs, ys, numbers in own:
            chosen = torch.tensor([numbers.tolist().index(i) for i in kept.tolist()])
            opt.keep_rows(chosen)
            opt.weigh_rows(weights)
            plain(model, opt, xs[chosen], ys[chosen])
            if mode != "ghost":
                assert all(len(p.grad_sample) == len(kept) for p in model.parameters())
    rows = [[w * g for g in row] for w, row in zip(weights.tolist(), sample_gradients(run.first, x[kept], y[kept]), strict=True)]
    assert_same(run.moved, clipped(sums_of(rows, [OF[i] for i in kept.tolist()]), "flat", run.first), 1e-7)


def test_what_is_written_to_the_parameters_is_of_each_example() -> None:
    """``p.grad_sample`` has a row for each example, not for each unit."""
    run = by_units(grad_sample_mode="hooks")
    with run as (model, opt, own):
        for x, y, _ in own:
            backward(model, x, y, reduction="sum")
            rows = sample_gradients(run.first, x, y)
            for p, column in zip(model.parameters(), zip(*rows, strict=True), strict=True):
                assert p.grad_sample.shape == (N, *p.shape)
                torch.testing.assert_close(p.grad_sample, torch.stack(column))
            opt.step()


def test_a_train_function_is_covered_loss_and_units() -> None:
    """Under ``@dp_step`` the same is released, and the report says that the loss was verified."""

    @dp_step
    def of_losses(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    run = by_units()
    with run as (model, _, own):
        for batch in own:
            of_losses(model, batch)
    assert_same(run.moved, clipped(sums_of(sample_gradients(run.first, *examples(N)), OF), "flat", run.first), 1e-7)
    assert run.scope.report().loss_verified


def test_adaptive_clipping_counts_units() -> None:
    """Each unit adds a half to the count of those that were not clipped, and their number is what the count is divided by."""
    options = {"clipping": "adaptive", "max_grad_norm": 1e6, "loss_reduction": "mean"}
    with by_units(**options) as (model, opt, own):
        assert opt.clipping_details["unclipped_num_std"] == 0.0
        for x, y, *_ in own:
            step(model, opt, x, y)
        assert opt.max_grad_norm == pytest.approx(1e6 * math.exp(-0.2 * (1.0 - 0.5)))
    run = by_units(**options, noise_multiplier=0.1)
    with run as (_, opt, _):
        assert opt.clipping_details["unclipped_num_std"] == pytest.approx(4 / 20)


def test_statistics_are_of_units_and_so_named() -> None:
    """Norms and the fraction clipped are of units; the drawn size is of examples."""
    run = trained(by_units(nonprivate_statistics=True))
    norms = [float(norm_of(unit)) for unit in sums_of(sample_gradients(run.first, *examples(N)), OF)]
    assert run.scope.nonprivate_statistics is not None
    last = run.scope.nonprivate_statistics.last
    assert last["max_norm"] == pytest.approx(max(norms), rel=2e-3)
    assert last["fraction_clipped"] == sum(norm > BOUND for norm in norms) / 4
    assert last["drawn_batch_size"] == N


# ---------------------------------------------------------------- what is refused


def test_rows_in_another_order_are_refused() -> None:
    """A loop that shuffles the batch would clip rows of several units as one."""
    run = by_units(self_check=False)
    with run as (model, opt, own):
        for x, y, _ in own:
            order = torch.randperm(N, generator=drawn(8))
            with pytest.raises(ScopeError, match="another order"):
                plain(model, opt, x[order], y[order])
            plain(model, opt, x.clone(), y)
    assert charges(run.scope) == 1


def test_batches_from_elsewhere_are_refused() -> None:
    """Nothing is known of the units in a batch that is not from the private loader."""
    run = by_units()
    with run as (model, opt, _):
        backward(model, *examples(4), reduction="sum")
        with pytest.raises(ScopeError, match="did not come from the private loader"):
            opt.step()
    run.assert_untouched()


def test_two_passes_are_refused() -> None:
    """Norms across the rows of a unit are not taken in two passes."""

    @dp_step(two_pass=True)
    def twice(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    run = by_units()
    with run as (model, _, own):
        for batch in own:
            with pytest.raises(InvalidArgumentError, match=r"two_pass=True.*privacy_unit"):
                twice(model, batch)
    run.assert_untouched()


def test_what_was_spent_on_examples_does_not_add_up_with_what_is_spent_on_units() -> None:
    """An accountant or a saved state of single examples, or of other units, is refused; one of the same units goes on."""
    accountant = make_accountant("rdp")
    options: dict[str, Any] = {"noise_multiplier": 1.0, "accountant": accountant}
    single = trained(by_units(of=None, **options))
    with pytest.raises(ScopeError, match=r"single examples.*4 units"):
        by_units(**options)
    with pytest.raises(InvalidArgumentError, match="units is another one"):
        by_units(noise_multiplier=1.0).scope.load_state_dict(single.scope.state_dict())
    mine = trained(by_units(noise_multiplier=1.0))
    again = by_units(noise_multiplier=1.0)
    again.scope.load_state_dict(mine.scope.state_dict())
    assert trained(again).scope.accountant.history == [(1.0, 1.0, 2)]
    shared = make_accountant("rdp")
    first, second = (by_units(of=of, noise_multiplier=1.0, accountant=shared) for of in (None, OF))
    trained(first)
    with pytest.raises(ScopeError, match="single examples"):  # made before anything was spent, and entered after
        trained(second)
    for of in (None, [0, 1, 0, 1, 0, 1, 0, 1, 0]):
        with pytest.raises(ScopeError, match="4 units"):
            by_units(of=of, noise_multiplier=1.0, accountant=again.scope.accountant)


# ---------------------------------------------------------------- the self-check

BROKEN = {
    "norms of half the gradients": (Units, "added", lambda right, self, rows: right(self, rows) * 0.5),
    "sums of other rows": (unit_gradients.UnitGradients, "_of_rows", lambda right, self, factor: right(self, factor).roll(1)),
    "norms of other rows": (unit_gradients.UnitsAlike, "numbers", lambda right, self, device: (self.rows.flatten() + 1) % N),
}


@pytest.mark.parametrize("what", BROKEN)
def test_the_first_batch_shows_units_that_are_added_up_wrongly(what: str, monkeypatch: Any) -> None:
    """What is clipped is compared with plain autograd, which has no part in it: a fault is refused, and nothing released."""
    from dp_hooks.gradients import joined, terms

    if "other" in what:  # nothing is small
        monkeypatch.setattr(terms, "_GENEROSITY", 0)
        monkeypatch.setattr(joined, "_SMALL", {"cpu": -1})
    assert trained(by_units()).scope.report().model_verified
    where, name, wrong = BROKEN[what]
    right = getattr(where, name)
    monkeypatch.setattr(where, name, lambda self, *args: wrong(right, self, *args))
    run = by_units()
    with pytest.raises(SelfCheckError, match="gradient of a unit"):
        trained(run)
    run.assert_untouched()


def test_a_unit_is_looked_at_where_only_some_of_a_large_batch_are(monkeypatch: Any) -> None:
    """Of a batch with large activations, the few rows whose gradients are compared hold a unit of several."""
    from dp_hooks.checks import comparison

    monkeypatch.setattr(comparison, "_LITTLE", -1)
    seen: list[int] = []
    right = units_check.compare_unit
    from dp_hooks.checks import gradient_comparison

    def noted(found: Any, units: Units, *args: Any, **more: Any) -> None:
        seen.append(int(torch.bincount(units.of_rows).max()))
        right(found, units, *args, **more)

    monkeypatch.setattr(gradient_comparison, "compare_unit", noted)
    data = examples(40)
    trained(by_units("mlp", data, [i // 2 for i in range(40)]))
    assert seen
    assert max(seen) > 1


@pytest.mark.parametrize("units_first", [False, True])
def test_a_checkpoint_of_another_unit_is_refused(tmp_path: Path, units_first: bool) -> None:
    """What an engine has spent on examples is not taken for what was spent on units, nor the other way round."""
    data = TensorDataset(torch.randn(40, 3), torch.zeros(40))

    def private(engine: PrivacyEngineHookBased, by_units: bool) -> tuple[nn.Module, Any, Any]:
        model = nn.Linear(3, 1)
        more: dict[str, Any] = {"privacy_unit": [i // 4 for i in range(40)]} if by_units else {}
        loader = DataLoader(data, batch_size=8)
        return engine.make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            data_loader=loader,
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            **more,
        )

    with PrivacyEngineHookBased() as engine:
        model, opt, loader = private(engine, units_first)
        for x, _ in loader:
            opt.zero_grad()
            model(x).mean().backward()
            opt.step()
        engine.save_checkpoint(path=str(tmp_path / "saved"), module=model)
        spent = list(engine.accountant.history)
    with PrivacyEngineHookBased() as engine:
        model, _, _ = private(engine, units_first)
        engine.load_checkpoint(path=str(tmp_path / "saved"), module=model)
        assert engine.accountant.history == spent
    with PrivacyEngineHookBased() as engine:
        model, _, _ = private(engine, not units_first)
        with pytest.raises(ScopeError, match="was spent on"):
            engine.load_checkpoint(path=str(tmp_path / "saved"), module=model)
        assert not engine.accountant.history
    with PrivacyEngineHookBased() as engine:
        engine.load_checkpoint(path=str(tmp_path / "saved"), module=nn.Linear(3, 1))
        with pytest.raises(ScopeError, match="has counted what was spent on"):
            private(engine, not units_first)
