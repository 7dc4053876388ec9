"""Rows are examples: calls on other rows than those of the batch, and batches that are not used in the order they come."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, default_collate

from dp_hooks.errors import InvalidArgumentError, ScopeError

from ..models import (
    BOUND,
    Net,
    assert_same,
    build,
    clipped_sum,
    each_mode,
    examples,
    in_order,
    moved,
    sample_gradients,
    scope_over,
    values,
)
from .helpers import POISSON, Run, backward, step

KEPT = torch.tensor([True, False, True, True, False, True])


def micro_batches(model: nn.Module, x: Tensor, y: Tensor) -> None:
    for part, labels in zip(x.chunk(2), y.chunk(2), strict=True):
        backward(model, part, labels)


def two_halves(model: nn.Module, x: Tensor, y: Tensor) -> None:
    sum(F.cross_entropy(model(part), labels) for part, labels in zip(x.chunk(2), y.chunk(2), strict=True)).backward()


def rows_left_out(model: nn.Module, x: Tensor, y: Tensor) -> None:
    backward(model, x[KEPT], y[KEPT])


def joined_rows(model: nn.Module, x: Tensor, y: Tensor) -> None:
    backward(model, x[::2] + x[1::2], y[::2])


def packed_rows(model: nn.Module, x: Tensor, y: Tensor) -> None:
    F.cross_entropy(model(x[None])[0], y).backward()


def time_first(model: nn.Module, x: Tensor, y: Tensor) -> None:
    F.cross_entropy(model(x.expand(4, 6, 4)).mean(0), y).backward()


def augmented_copies(model: nn.Module, x: Tensor, y: Tensor) -> None:
    backward(model, torch.cat([x, -x]), torch.cat([y, y]))


def generated_rows(model: nn.Module, x: Tensor, y: Tensor) -> None:
    real, fake = model(x), model(torch.randn(8, 4, dtype=x.dtype))
    (F.softplus(-real).sum() + F.softplus(fake).sum()).backward()


def few_generated_rows(model: nn.Module, x: Tensor, y: Tensor) -> None:
    real, fake = model(x), model(torch.randn(4, 4, dtype=x.dtype))
    (F.softplus(-real).sum() + F.softplus(fake).sum()).backward()


FEWER, MORE = ("max_physical_batch_size", "collate", "batch_first=False", "keep_rows"), ("augmented copies", "generated")
COUNTS = [
    (micro_batches, 3, FEWER),
    (two_halves, 3, FEWER),
    (rows_left_out, 4, FEWER),
    (joined_rows, 3, FEWER),
    (packed_rows, 1, FEWER),
    (time_first, 4, FEWER),
    (augmented_copies, 12, MORE),
    (generated_rows, 8, MORE),
    (few_generated_rows, 4, ("generated rows beside those of the loader",)),
]


@each_mode
@pytest.mark.parametrize(("loss", "rows", "causes"), COUNTS, ids=[row[0].__name__ for row in COUNTS])
def test_another_number_of_rows_than_examples_is_refused(
    loss: Callable[..., None], rows: int, causes: tuple[str, ...], mode: str
) -> None:
    """Where a call is not on one row per example, the error tells both numbers and likely causes, and nothing moves."""
    run = Run(**POISSON, grad_sample_mode=mode)
    with run as (model, opt, loader):
        x, y = next(iter(loader))
        with pytest.raises(ScopeError, match=f"on {rows} rows, but the private loader handed out 6 examples") as refused:
            loss(model, x, y)
        assert [cause for cause in causes if cause not in str(refused.value)] == []
        run.assert_untouched()
        step(model, opt, *next(iter(loader)))
        run.assert_moved()


# ---------------------------------------------------------------- rows that are kept


@each_mode
@pytest.mark.parametrize("declared", [KEPT, torch.tensor([0, 2, 3, 5])], ids=["mask", "numbers"])
def test_kept_rows_are_clipped_and_added_up(declared: Tensor, mode: str) -> None:
    """With ``opt.keep_rows`` a step on some rows moves by the sum of their clipped gradients, over the batch size."""
    run = Run(**POISSON, grad_sample_mode=mode)
    with run as (model, opt, loader):
        x, y = next(iter(loader))
        opt.keep_rows(declared)
        backward(model, x[declared], y[declared])
        opt.step()
    run.assert_moved(run.rows(*(t[KEPT] for t in examples())))


@pytest.mark.parametrize("called", [[3, 4, 5], [2, 1, 0]], ids=["the others", "another order"])
def test_a_call_on_rows_that_were_not_declared_is_refused(called: list[int]) -> None:
    """Halves of a batch are not called in turn under the declaration of one of them."""
    run = Run(**POISSON)
    with run as (model, opt, loader):
        x, y = next(iter(loader))
        opt.keep_rows(torch.tensor([0, 1, 2]))
        backward(model, x[:3], y[:3])
        with pytest.raises(ScopeError, match=r"declared by opt\.keep_rows|another order"):
            backward(model, x[called], y[called])
        opt.skip_batch()
    run.assert_untouched()


@pytest.mark.parametrize("none", [torch.zeros(6, dtype=torch.bool), torch.tensor([], dtype=torch.long)], ids=["mask", "numbers"])
def test_without_kept_rows_the_step_is_noise_alone(none: Tensor) -> None:
    """A batch of which no row is kept needs no backward pass, and is charged."""
    run = Run(**POISSON, loss_reduction="sum", noise_multiplier=2.0)
    with run as (_, opt, loader):
        next(iter(loader))
        opt.keep_rows(none)
        opt.step()
    run.assert_moved_by_noise()


@pytest.mark.parametrize(
    "rows",
    [
        KEPT[:5],
        torch.tensor([0, 0, 1]),
        torch.tensor([0, 6]),
        torch.tensor([-1]),
        torch.tensor([0.0, 1.0]),
        torch.tensor([[0], [1]]),
    ],
    ids=["short", "twice", "beyond", "negative", "floats", "matrix"],
)
def test_rows_that_the_batch_does_not_have_are_refused(rows: Tensor) -> None:
    """``keep_rows`` takes a whole mask, or numbers of rows that exist, each once; after a refusal nothing is declared."""
    run = Run(**POISSON)
    with run as (model, opt, loader):
        x, y = next(iter(loader))
        with pytest.raises(InvalidArgumentError, match="mask of bool with one entry for each of the 6 rows"):
            opt.keep_rows(rows)
        step(model, opt, x, y)
    run.assert_moved()


def test_rows_are_declared_once_and_of_a_batch_that_came() -> None:
    """Before the first batch, or a second time for the same, ``keep_rows`` is refused."""
    with Run(**POISSON) as (_, opt, loader):
        with pytest.raises(ScopeError, match="not from the private loader"):
            opt.keep_rows(KEPT)
        next(iter(loader))
        opt.keep_rows(KEPT)
        with pytest.raises(ScopeError, match="declared already"):
            opt.keep_rows(KEPT)


def test_other_rows_than_those_declared_are_refused() -> None:
    """Four rows were declared, the whole batch was used: an error."""
    run = Run(**POISSON)
    with run as (model, opt, loader):
        x, y = next(iter(loader))
        opt.keep_rows(KEPT)
        with pytest.raises(ScopeError, match="the rows that were declared are 4 examples"):
            backward(model, x, y)
        run.assert_untouched()


@pytest.mark.parametrize("ends", ["step", "skip_batch"])
def test_declared_rows_are_forgotten_after_the_step(ends: str) -> None:
    """The next batch is expected whole again."""
    run = Run(**POISSON)
    with run as (model, opt, loader):
        x, y = next(iter(loader))
        opt.keep_rows(KEPT)
        if ends == "step":
            backward(model, x[KEPT], y[KEPT])
            opt.step()
        else:
            opt.skip_batch()
        x, y = next(iter(loader))
        with pytest.raises(ScopeError, match="on 4 rows, but the private loader handed out 6"):
            rows_left_out(model, x, y)


# ---------------------------------------------------------------- batches that are read ahead


def one_ahead(loader: Any) -> Iterator[Any]:
    """Yield batches as a prefetcher does: the next is read before one is used."""
    batches = iter(loader)
    now = next(batches)
    for following in batches:
        yield now
        now = following
    yield now


@each_mode
@pytest.mark.parametrize("options", [{}, {"max_physical_batch_size": 2}], ids=["batches", "parts"])
@pytest.mark.parametrize("copied", [False, True], ids=["same tensors", "copies"])
def test_reading_ahead_is_refused(copied: bool, options: dict[str, Any], mode: str) -> None:
    """A batch or a part that is used after the next was read is refused, and nothing moves."""
    run = Run(loader=in_order(6, 3), grad_sample_mode=mode, **options)
    with run as (model, _, loader):
        x, y = next(one_ahead(loader))
        with pytest.raises(ScopeError, match="read ahead"):
            backward(model, x.clone() if copied else x, y)
        assert_same(values(model), run.start)


@each_mode
def test_batches_fetched_for_accumulation_are_refused(mode: str) -> None:
    """Two batches that are fetched before the first backward pass cannot be added up by hand."""
    run = Run(loader=in_order(6, 3), grad_sample_mode=mode)
    with run as (model, _, loader):
        (x, y), _ = list(loader)
        with pytest.raises(ScopeError, match="gradient accumulation"):
            backward(model, x, y)
        assert_same(values(model), run.start)


def half_a_pass(by: str, **options: Any) -> Run:
    """Leave out the first batch of three examples, and step on the second."""
    run = Run(loader=in_order(6, 3), **options)
    with run as (model, opt, loader):
        for i, (x, y) in enumerate(loader):
            if i == 0:
                if by == "skip_batch":
                    opt.skip_batch()
                continue
            step(model, opt, x if by != "skip_batch" else 1.0 * x[:], y)
    return run


@each_mode
@pytest.mark.parametrize("by", ["continue", "skip_batch"])
def test_a_batch_can_be_left_out(by: str, mode: str) -> None:
    """A batch left out by ``continue`` or ``opt.skip_batch()`` does not disturb the next, which is released alone."""
    run = half_a_pass(by, grad_sample_mode=mode)
    x, y = examples()
    run.assert_moved(run.rows(x[3:], y[3:]), divided_by=3)


def test_a_part_that_got_no_step_is_in_no_later_batch() -> None:
    """After a pass was broken off amid a batch, and with the next part left out, nothing of the old part is added up."""
    run = Run(max_physical_batch_size=2, self_check=False)
    with run as (model, opt, loader):
        x, y = next(iter(loader))
        backward(model, x, y)
        parts = iter(loader)
        with pytest.warns(UserWarning, match="no step was taken"):
            next(parts)
        for x, y in parts:
            step(model, opt, x, y)
    assert run.scope.steps == 1
    run.assert_moved(run.rows()[2:])


def test_a_batch_left_out_needs_a_word_where_tensors_do_not_tell() -> None:
    """After ``continue`` a call on changed tensors cannot be told from reading ahead; the error names ``skip_batch``."""
    with Run(loader=in_order(6, 3)) as (model, _, loader):
        batches = iter(loader)
        next(batches)
        x, y = next(batches)
        with pytest.raises(ScopeError, match=r"call opt\.skip_batch\(\)"):
            backward(model, 2.0 * x, y)


def test_skip_batch_drops_what_was_captured() -> None:
    """Gradients of a batch that is left out after its backward pass are released nowhere."""
    run = Run(loader=in_order(6, 3))
    with run as (model, opt, loader):
        for i, (x, y) in enumerate(loader):
            backward(model, x, y)
            if i == 0:
                opt.skip_batch()
            else:
                opt.step()
    x, y = examples()
    run.assert_moved(run.rows(x[3:], y[3:]), divided_by=3)


# ---------------------------------------------------------------- batches from elsewhere


@each_mode
@pytest.mark.parametrize("way", ["another batch", "chunks of one tensor", "chunks before one backward pass"])
def test_several_batches_from_elsewhere_in_one_step_are_refused(way: str, mode: str) -> None:
    """Rows of two batches would be clipped as one: the second call, or chunks of one tensor, are refused."""
    run, (x, y) = Run(grad_sample_mode=mode), examples()
    with run as (model, _, _):
        one, two = (x[:3], x[3:]) if "chunks" in way else (x[:3].clone(), x[3:].clone())
        loss = F.cross_entropy(model(one), y[:3])
        if "before" not in way:
            loss.backward()
        with pytest.raises(ScopeError, match="on other rows"):
            model(two)
        run.assert_untouched()


@pytest.mark.filterwarnings("ignore:a step was taken on a batch")
@each_mode
def test_the_same_rows_from_elsewhere_may_be_used_twice(mode: str) -> None:
    """Two passes over the same foreign rows add up sample by sample, before clipping; the next step takes other rows."""
    run, (x, y) = Run(grad_sample_mode=mode), examples()
    with run as (model, opt, _):
        for _ in range(2):
            (F.cross_entropy(model(x), y) / 2).backward()
        opt.step()
        moves = run.moved
        step(model, opt, x.clone(), y)
    assert_same(moves, [g / 6 for g in clipped_sum(run.rows(), BOUND)])
    assert run.scope.report().foreign_steps == 2


@each_mode
def test_augmented_copies_in_separate_passes_are_right(mode: str) -> None:
    """One call per copy: losses of an example add up before its gradient is clipped."""
    run = Run(**POISSON, grad_sample_mode=mode)

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return (F.cross_entropy(model(x), y) + F.cross_entropy(model(-0.5 * x), y)) / 2

    with run as (model, opt, loader):
        x, y = next(iter(loader))
        for copy in (x, -0.5 * x):
            backward(model, copy, y, scale=0.5)
        opt.step()
    run.assert_moved(run.rows(loss=loss))


def test_rows_joined_by_the_collate_function_are_refused_without_its_check() -> None:
    """Also where the collate function is not tried, a batch that holds half as many rows as examples is refused."""

    def joined(rows: list[Any]) -> Any:
        x, y = default_collate(rows)
        return x[::2] + x[1::2], y[::2]

    model = Net(lambda m, x: m.layer(x), layer=build("mlp"))
    loader = DataLoader(in_order().dataset, batch_size=6, collate_fn=joined)
    run = Run(model, loader=loader, check_collate=False)
    with run as (_, _, private):
        with pytest.raises(ScopeError, match="packed or joined"):
            backward(model, *next(iter(private)))
        assert_same(moved(run.start, model), [torch.zeros_like(p) for p in run.start])


@pytest.mark.parametrize("poisson", [False, True])
def test_a_batch_that_was_handed_out_before_is_refused(poisson: bool) -> None:
    """A step on it was not paid for, whether the loader samples or not; the step on the batch itself was."""
    model, first = build("mlp"), []
    with scope_over(model, loader=in_order(6, 6 if poisson else 2), poisson_sampling=poisson) as (opt, loader):
        for k, batch in enumerate(batch for _ in range(2) for batch in loader):
            first = first or batch
            with pytest.raises(ScopeError, match="handed out before the last one") if k else nullcontext():
                step(model, opt, *first)
            if k:
                opt.skip_batch()


@pytest.mark.parametrize("other", [lambda x: x.flip(0), lambda x: x[torch.tensor([1, 0, 2, 3, 4, 5])], lambda x: x.roll(2, 0)])
@each_mode
def test_rows_in_another_order_in_a_second_call_are_refused(other: Callable[[Tensor], Tensor], mode: str) -> None:
    """Rows are added up by their number, so that the second call has to have them where the first one has."""
    model = build("mlp")
    start = values(model)
    with scope_over(model, loader=in_order(), grad_sample_mode=mode, **POISSON) as (opt, loader):
        for x, y in loader:
            with pytest.raises(ScopeError, match="another order"):
                (F.cross_entropy(model(x), y) + F.cross_entropy(model(other(x)), other(y))).backward()
            opt.skip_batch()
    assert_same(values(model), start)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("form", [lambda x: x * 1, lambda x: x[:, :, None], lambda x: x.double()])
def test_an_order_is_known_when_the_inputs_of_the_first_call_are_gone(form: Callable[[Tensor], Tensor], late: bool) -> None:
    """Inputs that live for one call only, or have another shape in the second, are told by what their rows add up to."""
    model = Net(lambda s, x: s.layer(x.flatten(1)), layer=build("mlp"))
    start = values(model)
    with scope_over(model, loader=in_order(), **POISSON) as (opt, loader):
        x, y = next(iter(loader))
        first = F.cross_entropy(model(form(x)), y)
        if late:
            first.backward()
        with pytest.raises(ScopeError, match="another order"):
            model(x.roll(1, 0) * 1)
        opt.skip_batch()
    assert_same(values(model), start)


@pytest.mark.parametrize("numbers", [[0, 1], [3, 7], [5, 2, 9, 4, 1, 0]])
def test_numbers_that_come_in_another_order_by_chance_are_no_reason_to_refuse(numbers: list[int]) -> None:
    """Two calls on the batch, each with lengths or time steps of its own: these may be the same in another order."""
    model = Net(lambda s, x, t: s.layer(x * (1 + t[:, None])), layer=build("mlp"))
    n, t = len(numbers), torch.tensor(numbers)
    with scope_over(model, loader=in_order(n, n), **POISSON) as (opt, loader):
        x, y = next(iter(loader))
        for second in (x, x + 1):
            (F.cross_entropy(model(x, t), y) + F.cross_entropy(model(second, t.flip(0)), y)).backward()
        opt.step()


@pytest.mark.parametrize("order", [[1, 2, 3, 4, 5, 0], [0, 1, 2, 3, 5, 4]])
def test_rows_beside_rows_in_another_order_in_one_call_are_refused(order: list[int]) -> None:
    """Each row would be made of two examples; both inputs in the same other order are no such thing."""
    model = Net(lambda s, x, z: s.layer(x * (1 + z)), layer=build("mlp"))
    start = values(model)
    with scope_over(model, loader=in_order(), **POISSON) as (opt, loader):
        x, _ = next(iter(loader))
        with pytest.raises(ScopeError, match="beside rows of it in another order"):
            model(x, x[order])
        with pytest.raises(ScopeError, match="beside rows of it in another order"):
            model(x * 1, x[order])
        model(x[order], x[order])
        opt.skip_batch()
    assert_same(values(model), start)


def test_texts_in_another_order_beside_the_same_images_are_refused() -> None:
    """Pairs that do not belong together: an example has a part in the rows of two."""
    model = Net(lambda s, x, ids: s.layer(x * (1 + ids.double().mean(1, keepdim=True))), layer=build("mlp"))
    ids = torch.arange(48).reshape(6, 8)
    with scope_over(model, loader=in_order(), **POISSON) as (opt, loader):
        x, _ = next(iter(loader))
        model(x, ids)
        with pytest.raises(ScopeError, match="another order"):
            model(x, ids.roll(1, 0))
        opt.skip_batch()


@pytest.mark.parametrize("size", [2, 3, 6])
def test_rows_of_the_batch_in_another_order_are_refused_in_small_batches_too(size: int) -> None:
    """One-hot rows, which all add up to the same, and few of them."""
    rows = torch.eye(8)[torch.arange(6 * 3).reshape(6, 3) % 8].double()
    loader = DataLoader(TensorDataset(rows, torch.arange(6) % 3), batch_size=size)
    model = Net(lambda s, x: s.layer(x.flatten(1)), layer=nn.Linear(24, 3)).double()
    with scope_over(model, loader=loader, poisson_sampling=False) as (opt, batches):
        x, _ = next(iter(batches))
        model(x)
        with pytest.raises(ScopeError, match="another order"):
            model(x.flip(0) * 1)
        opt.skip_batch()


def test_rows_that_are_not_the_first_axis_are_told_as_well() -> None:
    """With ``batch_first=False`` the examples of a call are its columns."""
    model = Net(lambda s, x: s.layer(x.transpose(0, 1).flatten(1)).unsqueeze(0), layer=nn.Linear(15, 3)).double()
    loader = DataLoader(TensorDataset(torch.randn(6, 5, 3).double()), batch_size=6)
    with scope_over(model, loader=loader, batch_first=False, poisson_sampling=False) as (opt, batches):
        (x,) = next(iter(batches))
        x = x.transpose(0, 1)
        model(x)
        with pytest.raises(ScopeError, match="another order"):
            model(x.roll(1, 1))
        opt.skip_batch()


def test_keeping_no_row_is_a_step_on_none() -> None:
    """A mask without any example in it."""
    run = Run(loader=in_order())
    with run as (model, opt, loader):
        for x, y in loader:
            keep = torch.zeros(len(x), dtype=torch.bool)
            opt.keep_rows(keep)
            F.cross_entropy(model(x[keep]), y[keep], reduction="sum").backward()
            opt.step()


def by_sign(x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    signs = torch.tensor([[0.5, -0.5, 0.5], [-0.5, 0.5, -0.5]]).double()
    yield from ((x, signs), (x, -signs))


def by_level(x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    levels = torch.tensor([[0.3], [0.7]])[: len(x)].double()
    yield from ((x + 1, levels), (x + 2, levels.flip(0)))


def by_prototype(x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    prototypes = torch.arange(12.0).reshape(3, 4).double() + 0.5
    yield from ((x, prototypes[y]), (x, prototypes[1 - y % 2]))


@pytest.mark.parametrize("calls", [by_level, by_prototype, by_sign])
def test_few_rows_of_few_kinds_may_change_places(calls: Callable[[Tensor, Tensor], Iterator[tuple[Tensor, Tensor]]]) -> None:
    """Levels of noise, and what is known of the right and of the wrong class, beside the examples in their order."""
    model = Net(lambda s, x, t: s.layer(x) * t.sum(1, keepdim=True), layer=build("mlp"))
    with scope_over(model, loader=in_order(2, 2), **POISSON) as (opt, loader):
        x, y = next(iter(loader))
        sum(F.cross_entropy(model(*given), y) for given in calls(x, y)).backward()  # type: ignore[union-attr]
        opt.step()


def test_pairs_that_are_in_the_batch_both_ways_are_no_other_order() -> None:
    """Both calls are on what the loader handed out, as it did."""
    a, b = torch.randn(4, 4).double(), torch.randn(4, 4).double()
    first, second = torch.stack([a, b], 1).flatten(0, 1), torch.stack([b, a], 1).flatten(0, 1)
    model = build("mlp")
    with scope_over(model, loader=DataLoader(TensorDataset(first, second), batch_size=2), poisson_sampling=False) as (opt, loader):
        for one, other in loader:
            opt.zero_grad()
            (model(one) - model(other)).square().mean().backward()
            opt.step()


def test_equal_rows_tell_nothing_of_an_order() -> None:
    """Masks and classes of few kinds may be the same numbers in another order, and of the same examples all the same."""
    model = Net(lambda s, x, mask: s.layer(x) * mask[:, None], layer=build("mlp"))
    with scope_over(model, loader=in_order(), **POISSON) as (opt, loader):
        x, y = next(iter(loader))
        mask = (torch.arange(6) % 2).double()
        loss = F.cross_entropy(model(x, mask), y) + F.cross_entropy(model(x + 1, 1 - mask), y)
        loss.backward()
        opt.step()


@pytest.mark.parametrize("other", [lambda x: x, lambda x: x.clone(), lambda x: x + 1, lambda x: -x])
@each_mode
def test_copies_in_a_second_call_are_right_in_the_same_order(other: Callable[[Tensor], Tensor], mode: str) -> None:
    """Both gradients of an example are added up before they are clipped."""

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model(x), y) + F.cross_entropy(model(other(x)), y)

    model = build("mlp")
    expected, start = clipped_sum(sample_gradients(model, *examples(), loss), BOUND), values(model)
    with scope_over(model, loader=in_order(), grad_sample_mode=mode, **POISSON) as (opt, loader):
        for x, y in loader:
            loss(model, x, y).backward()
            opt.step()
    assert_same([6 * change for change in moved(start, model)], expected)


def test_what_does_not_count_examples_may_be_in_another_order_in_a_second_call() -> None:
    """Places in a sequence, or times of a batch whose examples are counted by axis 1, may be reversed."""
    places = torch.arange(4, dtype=torch.float64)
    model = Net(lambda s, x, order: s.net(x * order), net=build("mlp")).double()
    start = values(model)
    with scope_over(model, loader=in_order(), **POISSON) as (opt, loader):
        for x, y in loader:
            (F.cross_entropy(model(x, places), y) + F.cross_entropy(model(x, places.flip(0)), y)).backward()
            opt.step()
    assert all(bool(change.any()) for change in moved(start, model))
