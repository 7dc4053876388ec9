"""Gradients of units: sums over the rows of each, their norms, and their weighted sums, for every case in every mode."""

import pytest
import torch
from torch import Tensor, nn

from dp_hooks import register_rule
from dp_hooks.gradients import joined, unit_gradients
from dp_hooks.gradients.unit_gradients import UnitGradients
from dp_hooks.gradients.units import Units
from dp_hooks.privacy.clipping import FlatClipping
from dp_hooks.rules import registry
from dp_hooks.training.clipped_sum import ClippedSum

from .. import laws
from ..cases import Case
from ..cases.followed import FOLLOWED
from ..cases.layers import LAYERS
from ..cases.models import MODELS
from ..models import drawn, norm_of
from ..reference import clipped_sum, sample_grads

ALL = [case for case in (*LAYERS, *FOLLOWED, *MODELS) if not case.refused]
# What mode "functorch" writes out is taken as that of "hooks" is; norms of units are refused in two passes.
each_mode = pytest.mark.parametrize("mode", [laws.MODE[name] for name in ("ghost", "deferred", "hooks")], ids=str)
# Which of the three rows of a case are of one unit: apart from each other, next to each other, all.
TOGETHER = ([0, 1, 0], [0, 1, 1], [3, 3, 3])

pytestmark = pytest.mark.filterwarnings(
    "ignore:Using padding='same' with even kernel", "ignore:.*None of the inputs have requires_grad"
)


def by_unit(grads: laws.Grads, units: Units, weights: Tensor | None = None) -> laws.Grads:
    """Return ``{name: [units, *shape]}``, the weighted sums over the rows of each unit, added up one by one."""
    weights = torch.ones(len(units), dtype=torch.float64) if weights is None else weights
    found = {}
    for name, rows in grads.items():
        sums = torch.zeros(units.count, *rows.shape[1:], dtype=rows.dtype)
        for i, unit in enumerate(units.of_rows.tolist()):
            sums[unit] += weights[i].to(rows.dtype) * rows[i]
        found[name] = sums
    return found


def squares_of(grads: laws.Grads) -> Tensor:
    return torch.stack([g.reshape(len(g), -1).abs().square().sum(1) for g in grads.values()]).sum(0)


@each_mode
@pytest.mark.parametrize("case", ALL, ids=str)
def test_a_unit_is_clipped_as_one_whatever_its_rows_are_made_of(case: Case, mode: laws.Mode) -> None:
    """Norms of units are those of sums of single-sample gradients, or a little more, and units are clipped by them."""
    number = ALL.index(case) + laws.MODES.index(mode)
    units = Units(TOGETHER[number % 3])
    weights = torch.tensor([0.5, 2.0, 1.5], dtype=torch.float64) if number % 2 else None
    model, batch = case.made()
    expected = by_unit(sample_grads(model, case.loss, *batch), units, weights)
    squares = squares_of(expected)
    with laws.attached(model, mode) as controller, laws.captured(controller, mode, lambda: case.loss(model, *batch)) as found:
        params = found.params
        (norms,) = UnitGradients(found, units, weights).group_sq_norms([params])
        torch.testing.assert_close(norms.double(), squares.double(), rtol=max(2e-3, case.tolerance), atol=1e-8)
        assert bool((norms.double() >= squares * (1 - 10 * case.tolerance) - 1e-12).all())
        bound = 0.5 * float(squares.max()) ** 0.5 + 1e-9
        total = ClippedSum(lambda c: FlatClipping(c), bound)
        spread = total.add(found, params, weights, units)
        assert spread.shape == (3,)
        sums = {controller.name_of(p): t for p, t in total.take()[0].items()}
    wanted = clipped_sum({name: g for name, g in expected.items() if name in sums}, bound)
    for name, want in wanted.items():
        torch.testing.assert_close(sums[name], want.to(sums[name].dtype), rtol=max(2e-3, case.tolerance), atol=1e-6 * bound)
    if units.count == 1:
        assert float(norm_of([s.abs() for s in sums.values()])) <= bound * (1 + 1e-6)


def test_units_are_numbered_and_put_together_by_size() -> None:
    """Every row is in one place of one unit; what follows each other in the batch is not copied; padding is at most half more."""
    generator = drawn(3)
    of_rows = torch.randint(0, 9, (40,), generator=generator)
    units = Units(of_rows)
    seen = []
    for alike in units.alike:
        places = alike.rows if alike.blank is None else alike.rows.masked_fill(alike.blank, -1)
        for unit, rows in zip(alike.units.tolist(), places.tolist(), strict=True):
            own = [row for row in rows if row >= 0]
            assert own == units.rows_of(unit).tolist()
            assert len(own) <= alike.size <= max(1.5 * len(own), 1)
            seen += own
    assert sorted(seen) == list(range(40))
    (two, three) = Units([0, 0, 1, 1, 2, 2, 2]).alike
    assert isinstance(two.numbers(torch.device("cpu")), slice)
    assert isinstance(three.numbers(torch.device("cpu")), slice)
    (lone, apart) = Units([0, 1, 0]).alike
    assert lone.numbers(torch.device("cpu")) == slice(1, 2)
    assert apart.numbers(torch.device("cpu")).tolist() == [0, 2]


class Half(nn.Module):
    """Multiplies with its one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.full((4,), 2.0, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


def test_formulas_of_a_rule_for_rows_are_not_taken_for_those_of_units() -> None:
    """A rule's own squared norms are of rows; the norm of a unit comes from its gradients, and its own sums are used."""
    calls = []

    def norms(call):
        calls.append("norms")
        return {"factor": (call.input * call.grad).square().sum(1)}

    def sums(call, factors):
        calls.append("sums")
        return {"factor": factors @ (call.input * call.grad)}

    try:
        register_rule(Half, sq_norms=norms, weighted_sums=sums)(lambda call: {"factor": call.input * call.grad})
        model, x = Half(), torch.randn(4, 4, dtype=torch.float64, generator=drawn(2))
        with laws.attached(model, laws.MODE["ghost"], loss_reduction="sum") as controller:
            model(x).square().sum().backward()
            found = controller.take()
            assert found is not None
            of_units = UnitGradients(found, Units([0, 0, 1, 1]))
            (squares,) = of_units.group_sq_norms([found.params])
            total = of_units.weighted_sums({model.factor: torch.tensor([1.0, 0.5]).double()}, torch.tensor([True, True]))
        rows = 4 * x * x
        torch.testing.assert_close(squares, torch.stack([rows[:2].sum(0), rows[2:].sum(0)]).square().sum(1))
        torch.testing.assert_close(total[model.factor], rows[:2].sum(0) + 0.5 * rows[2:].sum(0))
        assert "norms" not in calls
        assert "sums" in calls
    finally:
        registry._RULES.pop(Half, None)


@pytest.mark.parametrize("mode", ["ghost", "deferred", "hooks"])
@pytest.mark.parametrize("tokens", [1, 5, 100])
def test_rows_that_cancel_each_other_do_not_bring_more_than_the_bound_by_rounding(tokens: int, mode: str) -> None:
    """Two rows of one unit with gradients of 10^7 that cancel in float32 move the clipped sum by no more than C."""
    generator = drawn(tokens)
    model = nn.Linear(40, 40, bias=False)
    x = torch.randn(2, tokens, 40, generator=generator)
    signs = torch.randn(2, tokens, 40, generator=generator) * 1e5
    x[1], signs[1] = x[0], -signs[0] * (1 + 1e-7 * torch.randn(tokens, 40, generator=generator))
    with laws.attached(model, laws.MODE[mode], loss_reduction="sum") as controller:
        (model(x) * signs).sum().backward()
        found = controller.take()
        assert found is not None
        total = ClippedSum(lambda c: FlatClipping(c), 1.0)
        total.add(found, [model.weight], None, Units([0, 0]))
        (moved,) = total.take()[0].values()
    exact = torch.einsum("nto,nti->oi", signs.double(), x.double())
    assert float(exact.norm()) < 1e7
    assert float(moved.norm()) <= 1.0 + 1e-3


def test_rows_that_are_not_finite_take_their_unit_with_them_and_no_other() -> None:
    """A unit with one row that is not finite is left out by selection; the sums over the others are what they are without it."""
    for mode in ("ghost", "deferred", "hooks"):
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
        x = torch.randn(6, 5, 3, dtype=torch.float64, generator=drawn(4))
        weights = torch.tensor([1.0, torch.nan, 1.0, 1.0, torch.inf, 1.0], dtype=torch.float64)
        units = Units([0, 1, 0, 2, 2, 1])

        def losses(model=model, x=x, weights=weights):
            return model(x).square().sum((1, 2)) * weights

        grads = sample_grads(model, lambda m, *batch: m(batch[0]).square().sum((1, 2)), x)
        with laws.attached(model, laws.MODE[mode]) as controller, laws.captured(controller, laws.MODE[mode], losses) as found:
            total = ClippedSum(lambda c: FlatClipping(c), 1e6)
            total.add(found, found.params, None, units)
            sums = {controller.name_of(p): t for p, t in total.take()[0].items()}
        for name, g in grads.items():
            torch.testing.assert_close(sums[name], g[0] + g[2])


@pytest.mark.parametrize("mode", ["deferred", "hooks"])
def test_little_room_changes_nothing(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where gradients of all rows are too large to be held at once, units are taken in parts, and rows one after the other."""
    layers = (
        nn.Conv1d(3, 4, 2),
        nn.GroupNorm(2, 4),
        nn.Conv1d(4, 4, 3, padding=1),
        nn.Flatten(),
        nn.Linear(24, 5),
        nn.LayerNorm(5),
    )
    model = nn.Sequential(*layers).double()
    x = torch.randn(7, 3, 7, dtype=torch.float64, generator=drawn(6))
    units, found = Units([0, 1, 1, 2, 2, 2, 0]), []
    expected = by_unit(sample_grads(model, lambda m, *batch: m(batch[0]).sin().sum(1), x), units)
    monkeypatch.setattr(joined, "_SMALL", {"cpu": -1})
    for room in (unit_gradients.CHUNK, 20):
        monkeypatch.setattr(unit_gradients, "CHUNK", room)
        with laws.attached(model, laws.MODE[mode], loss_reduction="sum") as controller:
            model(x).sin().sum().backward()
            rows = controller.take()
            assert rows is not None
            of_units = UnitGradients(rows, units)
            names = [controller.name_of(p) for p in rows.params]
            found.append(dict(zip(names, of_units.group_sq_norms([[p] for p in rows.params]), strict=True)))
    squares = {name: squares_of({name: g}) for name, g in expected.items()}
    for norms in found:
        assert norms.keys() == squares.keys()
        for name, one in norms.items():
            torch.testing.assert_close(one, squares[name], rtol=1e-8, atol=1e-12)
