"""Opacus's BatchMemoryManager around a private loader and optimizer: parts of a batch, one charge and one update for the whole."""

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from opacus.utils.batch_memory_manager import BatchMemoryManager, BatchSplittingSampler, wrap_data_loader
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dp_hooks import PrivacyEngineHookBased, dp_step, private_training
from dp_hooks.errors import BudgetExhaustedError, ScopeError

from ..models import BOUND, assert_same, build, charges, clipped_sum, drawn, examples, moved, sample_gradients, scope_over, values
from ..training.helpers import POISSON, backward, step

N, BATCH, MOST = 20, 8, 3


def managed(loader: Any, opt: Any, most: int = MOST) -> Any:
    with BatchMemoryManager(data_loader=loader, max_physical_batch_size=most, optimizer=opt) as cut:
        return cut


def wrapped(loader: Any, opt: Any, most: int = MOST) -> Any:
    return wrap_data_loader(data_loader=loader, max_batch_size=most, optimizer=opt)


def by_hand(loader: Any, opt: Any, most: int = MOST) -> Any:
    sampler = BatchSplittingSampler(sampler=loader.batch_sampler, max_batch_size=most, optimizer=opt)
    return DataLoader(loader.dataset, batch_sampler=sampler, collate_fn=loader.collate_fn, generator=loader.generator)


def whole(loader: Any, opt: Any, most: int = MOST) -> Any:
    return loader


def zero_first(model: nn.Module, opt: Any, x: Tensor, y: Tensor) -> None:
    step(model, opt, x, y)


def zero_last(model: nn.Module, opt: Any, x: Tensor, y: Tensor) -> None:
    backward(model, x, y)
    opt.step()
    opt.zero_grad()


def never_zeroed(model: nn.Module, opt: Any, x: Tensor, y: Tensor) -> None:
    backward(model, x, y)
    opt.step()


def stepped_at_the_end(model: nn.Module, opt: Any, x: Tensor, y: Tensor) -> None:
    backward(model, x, y)
    if opt.physical_batch.last:
        opt.step()


@dp_step
def whole_step(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def decorated(model: nn.Module, opt: Any, x: Tensor, y: Tensor) -> None:
    whole_step(model, (x, y))


def trained(cut: Callable[..., Any], *, engine: bool = True, by: Callable[..., None] = zero_first, **options: Any) -> Any:
    """Return the parameters after two passes, the history of charges, and the sizes of all parts."""
    model, sizes = build("mlp"), []
    loader = DataLoader(TensorDataset(*examples(N)), batch_size=BATCH, shuffle=True, generator=drawn(3))
    sgd = torch.optim.SGD(model.parameters(), lr=0.5)
    options = {"noise_multiplier": 0.7, "max_grad_norm": BOUND, "noise_generator": drawn(5), **options}

    def run(opt: Any, own: Any) -> None:
        for _ in range(2):
            for x, y in cut(own, opt):
                sizes.append(len(x))
                by(model, opt, x, y)

    if engine:
        with PrivacyEngineHookBased(accountant="rdp") as private:
            _, opt, *_, own = private.make_private(module=model, optimizer=sgd, data_loader=loader, **options)
            run(opt, own)
        return values(model), private.accountant.history, sizes
    scope = private_training(model, sgd, loader, accountant="rdp", **options)
    with scope as (opt, own):
        run(opt, own)
    return values(model), scope.accountant.history, sizes


@functools.cache
def in_one_piece(mode: str, poisson: bool) -> Any:
    return trained(whole, grad_sample_mode=mode, poisson_sampling=poisson)


WAYS = {
    "manager": (managed, {}),
    "wrap_data_loader": (wrapped, {}),
    "BatchSplittingSampler": (by_hand, {}),
    "without the engine": (managed, {"engine": False}),
    "parts of the scope, cut again": (managed, {"max_physical_batch_size": 5}),
    "zero_grad last": (managed, {"by": zero_last}),
    "zero_grad never": (managed, {"by": never_zeroed}),
    "a step at the end alone": (managed, {"by": stepped_at_the_end}),
    "dp_step": (managed, {"by": decorated}),
}


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
@pytest.mark.parametrize("poisson", [True, False], ids=["Poisson", "in order"])
@pytest.mark.parametrize("way", WAYS)
def test_parts_make_the_update_of_the_whole_batch(way: str, poisson: bool, mode: str) -> None:
    """Weights, noise included, and charges are those of the same batches in one piece; no part is larger than asked for."""
    cut, more = WAYS[way]
    ours, reference = trained(cut, grad_sample_mode=mode, poisson_sampling=poisson, **more), in_one_piece(mode, poisson)
    assert_same(ours[0], reference[0])
    assert ours[1] == reference[1] == [(0.7, BATCH / N, 6) if poisson else (0.7, 1.0, 2)]
    assert max(ours[2]) <= MOST < max(reference[2])
    assert sum(ours[2]) == sum(reference[2])


def test_the_parameters_move_by_the_clipped_sum_of_the_whole_batch() -> None:
    """Six examples in parts of two are one update: the sum of their clipped gradients by plain autograd, charged once."""
    model = build("mlp")
    start, expected = values(model), clipped_sum(sample_gradients(model, *examples()), BOUND)
    scope = scope_over(model)
    with scope as (opt, own):
        for count, (x, y) in enumerate(managed(own, opt, 2), start=1):
            step(model, opt, x, y)
            part = opt.physical_batch
            assert (part.index, part.size, part.last) == (count - 1, 2, count == 3)
            if count < 3:
                assert_same(values(model), start)
    assert (charges(scope), scope.steps) == (1, 1)
    assert_same(moved(start, model), [g / 6 for g in expected])


def test_empty_batches_are_steps_of_their_own() -> None:
    """A batch of which no example was drawn comes as zero rows, and gets its noise and its charge."""
    model = build("mlp")
    before = values(model)
    scope = scope_over(model, **POISSON, sample_rate=1e-9, noise_multiplier=1.0, noise_generator=drawn(5), spot_check_rate=0.0)
    with scope as (opt, own):
        for x, y in itertools.islice(managed(own, opt), 3):
            assert len(x) == 0
            step(model, opt, x, y)
    assert scope.accountant.history == [(1.0, 1e-9, 3)]
    assert all(bool((a != b).all()) for a, b in zip(before, values(model), strict=True))


def test_a_manager_says_how_many_parts_it_expects() -> None:
    """``len`` of the manager's loader is what Opacus works out of batch size and number of batches."""
    with scope_over(build("mlp"), loader=DataLoader(TensorDataset(*examples(N)), batch_size=BATCH)) as (opt, own):
        assert len(managed(own, opt, 2)) == math.ceil(len(own) * BATCH / 2) == 12


def test_a_budget_ends_the_loader_of_a_manager() -> None:
    """With a target the manager's loader yields the calibrated batches, then none, with a warning; a further step is refused."""
    model = build("mlp")
    budget = {"noise_multiplier": None, "target_epsilon": 5.0, "target_delta": 1e-5, "epochs": 2}
    scope = scope_over(model, **POISSON, **budget, loader=DataLoader(TensorDataset(*examples(N)), batch_size=BATCH))
    with scope as (opt, own):
        cut = managed(own, opt)
        for _ in range(2):
            for x, y in cut:
                step(model, opt, x, y)
        assert scope.steps == 6
        with pytest.warns(UserWarning, match="budget is used up"):
            assert list(cut) == []
        with pytest.raises(BudgetExhaustedError):
            opt.step_empty()


def test_a_pass_that_is_broken_off_leaves_nothing_behind() -> None:
    """After a ``break`` amid a batch the next pass begins with a new one; what was added up before is forgotten."""
    model = build("mlp")
    start, expected = values(model), clipped_sum(sample_gradients(model, *examples()), BOUND)
    with scope_over(model) as (opt, own):
        cut = managed(own, opt, 2)
        for x, y in cut:
            step(model, opt, x, y)
            break
        for x, y in cut:
            step(model, opt, x, y)
    assert_same(moved(start, model), [g / 6 for g in expected])


class Unreadable(TensorDataset):
    """Its fourth example cannot be read for a while."""

    broken = False

    def __getitem__(self, i: int) -> Any:
        if self.broken and i == 3:
            raise OSError("disk")
        return super().__getitem__(i)

    def __getitems__(self, numbers: list[int]) -> list[Any]:
        return [self[i] for i in numbers]


def test_after_a_part_that_could_not_be_read_a_new_pass_begins() -> None:
    """The part before counts for nothing; in between no step can be taken, and the iterator that failed gives no more parts."""
    model, data = build("mlp"), Unreadable(*examples())
    start, expected = values(model), clipped_sum(sample_gradients(model, *examples()), BOUND)
    with scope_over(model, loader=DataLoader(data, batch_size=6)) as (opt, own):
        cut, data.broken = managed(own, opt, 2), True
        parts = iter(cut)
        step(model, opt, *next(parts))
        with pytest.raises(OSError, match="disk"):
            next(parts)
        for action in (opt.step, opt.step_empty, parts.__next__):
            with pytest.raises(ScopeError, match="was announced"):
                action()
        assert_same(values(model), start)
        del parts, action
        data.broken = False
        for x, y in cut:
            step(model, opt, x, y)
    assert_same(moved(start, model), [g / 6 for g in expected])


# ---------------------------------------------------------------- misuse


def workers(model: nn.Module, opt: Any, own: Any) -> None:
    sampler = BatchSplittingSampler(sampler=own.batch_sampler, max_batch_size=2, optimizer=opt)
    next(iter(DataLoader(own.dataset, batch_sampler=sampler, collate_fn=own.collate_fn, num_workers=1)))


def own_collate(model: nn.Module, opt: Any, own: Any) -> None:
    sampler = BatchSplittingSampler(sampler=own.batch_sampler, max_batch_size=2, optimizer=opt)
    for x, y in DataLoader(own.dataset, batch_sampler=sampler):
        step(model, opt, x, y)


def signal_before(model: nn.Module, opt: Any, own: Any) -> None:
    opt.signal_skip_step(do_skip=True)


def signal_for_the_own_loader(model: nn.Module, opt: Any, own: Any) -> None:
    x, y = next(iter(own))
    backward(model, x, y)
    opt.signal_skip_step(do_skip=True)


def signal_amid_a_batch(model: nn.Module, opt: Any, own: Any) -> None:
    parts = iter(managed(own, opt, 2))
    x, y = next(parts)
    backward(model, x, y)
    opt.signal_skip_step(do_skip=False)
    opt.step()


def signal_after_the_last_part(model: nn.Module, opt: Any, own: Any) -> None:
    x, y = next(iter(managed(own, opt, 6)))
    backward(model, x, y)
    opt.signal_skip_step()


def public_loader(model: nn.Module, opt: Any, own: Any) -> None:
    next(iter(managed(DataLoader(own.dataset, batch_size=6), opt)))


def two_managers(model: nn.Module, opt: Any, own: Any) -> None:
    for (x, y), _ in zip(managed(own, opt, 2), managed(own, opt, 2), strict=False):
        step(model, opt, x, y)


def beside_the_own_loader(model: nn.Module, opt: Any, own: Any) -> None:
    for (x, y), _ in zip(managed(own, opt, 2), own, strict=False):
        step(model, opt, x, y)


def read_ahead(model: nn.Module, opt: Any, own: Any) -> None:
    first, _ = itertools.islice(managed(own, opt, 2), 2)
    step(model, opt, *first)


def the_same_part_again(model: nn.Module, opt: Any, own: Any) -> None:
    parts = iter(managed(own, opt, 2))
    first = next(parts)
    step(model, opt, *first)
    next(parts)
    step(model, opt, *first)


def two_steps_for_a_part(model: nn.Module, opt: Any, own: Any) -> None:
    first = next(iter(managed(own, opt, 2)))
    for _ in range(2):
        step(model, opt, *first)


class Changed:
    """A sampler between ours and Opacus's that hands on other indices than were drawn."""

    def __init__(self, batches: Any, change: Callable[[list[int]], list[int]]) -> None:
        self.batches, self.change = batches, change

    def __iter__(self) -> Iterator[list[int]]:
        return map(self.change, self.batches)


def changed(change: Callable[[list[int]], list[int]], most: int) -> Callable[..., None]:
    def run(model: nn.Module, opt: Any, own: Any) -> None:
        sampler = BatchSplittingSampler(sampler=Changed(own.batch_sampler, change), max_batch_size=most, optimizer=opt)
        for x, y in DataLoader(own.dataset, batch_sampler=sampler, collate_fn=own.collate_fn):
            step(model, opt, x, y)

    return run


MISUSE = {
    "loader workers": (workers, "num_workers=0"),
    "another collate function": (own_collate, "collate function of the private loader"),
    "a signal before any batch": (signal_before, "no batch of the private loader is being cut"),
    "a signal for a batch of the own loader": (signal_for_the_own_loader, "no batch of the private loader is being cut"),
    "a signal amid a batch": (signal_amid_a_batch, "announced"),
    "a signal after the last part": (signal_after_the_last_part, "no batch of the private loader is being cut"),
    "a loader that is not private": (public_loader, "loader and the optimizer of one private scope"),
    "two managers at a time": (two_managers, "let go of its iterator"),
    "beside the own loader": (beside_the_own_loader, "read ahead"),
    "read ahead": (read_ahead, "read ahead"),
    "a part used again": (the_same_part_again, "handed out before the last one"),
    "two steps for a part": (two_steps_for_a_part, "second opt.step"),
    "indices twice": (changed(lambda batch: batch * 2, 2), "2 examples was made of a batch of 6"),
    "indices twice, in one part": (changed(lambda batch: batch * 2, 12), "12 examples was made of a batch of 6"),
    "indices left out": (changed(lambda batch: batch[:4], 12), "4 examples was made of a batch of 6"),
}


@pytest.mark.parametrize("poisson", [True, False], ids=["Poisson", "in order"])
@pytest.mark.parametrize("case", MISUSE)
def test_misuse_is_refused_before_anything_is_released(case: str, poisson: bool) -> None:
    """Each has an error of its own; no step is taken, and the parameters stay."""
    run, message = MISUSE[case]
    model = build("mlp")
    start = values(model)
    scope = scope_over(model, poisson_sampling=poisson, accountant="rdp")
    with scope as (opt, own):
        with pytest.raises(ScopeError, match=message):
            run(model, opt, own)
        assert scope.steps == 0
        assert_same(values(model), start, 0.0)


def test_a_loader_and_an_optimizer_of_two_scopes_are_refused() -> None:
    """Neither scope moves, and each goes on with a manager of its own."""
    one, two = build("mlp"), build("mlp")
    start = values(one)
    with scope_over(one) as (opt1, own1), scope_over(two) as (opt2, own2):
        for opt, own in ((opt1, own2), (opt2, own1)):
            with pytest.raises(ScopeError, match="loader and the optimizer of one private scope"):
                next(iter(managed(own, opt)))
        assert_same([*values(one), *values(two)], [*start, *start], 0.0)
        for model, opt, own in ((one, opt1, own1), (two, opt2, own2)):
            for x, y in managed(own, opt, 4):
                step(model, opt, x, y)
    assert_same(values(one), values(two))
    assert float(moved(start, one)[0].abs().max()) > 0


def test_a_manager_is_dead_after_the_scope() -> None:
    """Neither a pass that has begun nor a new one gives a batch after the scope's end."""
    with scope_over(build("mlp")) as (opt, own):
        cut = managed(own, opt, 2)
        parts = iter(cut)
        next(parts)
    for iterator in (parts, iter(cut)):
        with pytest.raises(ScopeError, match="after the end of its scope"):
            next(iterator)
