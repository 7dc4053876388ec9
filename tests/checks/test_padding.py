"""A model that does not leave padding out lets one long example change the rows of others: found at the first padded batch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence
from torch.utils.data import DataLoader

from dp_hooks import dp_step
from dp_hooks.errors import SelfCheckError

from ..models import BOUND, Net, assert_same, clipped_sum, drawn, moved, scope_over, values
from ..reference import rows_by_backward

LENGTHS = (3, 5, 2, 4)


def texts(lengths: tuple[int, ...] = LENGTHS) -> list[Any]:
    generator = drawn(1)
    return [(torch.randint(1, 9, (n,), generator=generator), i % 3) for i, n in enumerate(lengths)]


def collate_to(side: str) -> Callable[[list[Any]], Any]:
    def collate(rows: list[Any]) -> Any:
        x = pad_sequence([ids for ids, _ in rows], batch_first=True, padding_side=side)
        return x, torch.tensor([y for _, y in rows])

    return collate


def mean_of_all(m: Any, x: Tensor) -> Tensor:
    return m.head(m.table(x).mean(1))


def last_state(m: Any, x: Tensor) -> Tensor:
    return m.head(m.lstm(m.table(x))[0][:, -1])


def masked_mean(m: Any, x: Tensor) -> Tensor:
    mask = (x != 0)[..., None].double()
    return m.head((m.table(x) * mask).sum(1) / mask.sum(1))


def state_at_length(m: Any, x: Tensor) -> Tensor:
    last = (x != 0).sum(1) - 1
    return m.head(m.lstm(m.table(x))[0][torch.arange(len(x)), last])


def packed_states(m: Any, x: Tensor) -> Tensor:
    lengths = (x != 0).sum(1)
    packed = pack_padded_sequence(m.table(x), lengths, batch_first=True, enforce_sorted=False)
    out, _ = pad_packed_sequence(m.lstm(packed)[0], batch_first=True)
    return m.head(out.sum(1))


def model_of(forward: Callable[..., Tensor]) -> nn.Module:
    torch.manual_seed(1)
    parts = {"table": nn.Embedding(9, 4), "head": nn.Linear(4, 3)}
    if forward not in (mean_of_all, masked_mean):
        parts["lstm"] = nn.LSTM(4, 4, batch_first=True)
    return Net(forward, **parts).double()


def loop(model: nn.Module, opt: Any, x: Tensor, y: Tensor) -> None:
    opt.zero_grad()
    F.cross_entropy(model(x), y).backward()
    opt.step()


@dp_step
def function(model: nn.Module, batch: Any) -> Tensor:
    x, y = batch
    return F.cross_entropy(model(x), y, reduction="none")


def decorated(model: nn.Module, opt: Any, x: Tensor, y: Tensor) -> None:
    function(model, (x, y))


each_way = pytest.mark.parametrize("by", [loop, decorated], ids=["loop", "dp_step"])


def loader_of(items: list[Any], side: str, batch_size: int | None = None) -> DataLoader:
    return DataLoader(items, batch_size=batch_size or len(items), collate_fn=collate_to(side))  # type: ignore[arg-type]


@each_way
@pytest.mark.parametrize(("forward", "side"), [(mean_of_all, "right"), (mean_of_all, "left"), (last_state, "right")])
def test_a_model_that_counts_padding_is_refused(forward: Callable[..., Tensor], side: str, by: Callable[..., None]) -> None:
    """A mean over all positions, or the state after the last, depends on the longest text of the batch; the remedy is a mask."""
    model = model_of(forward)
    before, scope = values(model), scope_over(model, loader=loader_of(texts(), side))
    with scope as (opt, loader), pytest.raises(SelfCheckError, match=r"2 of 5 positions are its own.*attention mask"):
        by(model, opt, *next(iter(loader)))
    assert_same(values(model), before)
    assert scope.steps == 0


@each_way
@pytest.mark.parametrize(
    ("forward", "side"), [(masked_mean, "right"), (masked_mean, "left"), (state_at_length, "right"), (packed_states, "right")]
)
def test_a_model_that_leaves_padding_out_is_right(forward: Callable[..., Tensor], side: str, by: Callable[..., None]) -> None:
    """With a mask, lengths or packed sequences a step is the clipped sum of texts alone, and the report has no remark left."""
    model, items = model_of(forward), texts()
    losses = (F.cross_entropy(model(ids[None]), torch.tensor([label])) for ids, label in items)
    expected = clipped_sum(rows_by_backward(model, losses), BOUND)
    before, scope = values(model), scope_over(model, loader=loader_of(items, side))
    with scope as (opt, loader):
        assert "leaves padding out has not been seen" in scope.report().collate
        for x, y in loader:
            by(model, opt, x, y)
    assert_same(moved(before, model), [g / len(items) for g in expected])
    assert scope.report().collate == ""


@each_way
def test_padding_that_comes_late_is_checked_when_it_comes(by: Callable[..., None]) -> None:
    """The first batches have texts of one length; the first batch that is padded is checked before its step."""
    items = texts((3, 3, 3, 3, 4, 2))
    model = model_of(mean_of_all)
    scope = scope_over(model, loader=loader_of(items, "right", 2), poisson_sampling=False)
    with scope as (opt, loader):
        batches = iter(loader)
        for _ in range(2):
            by(model, opt, *next(batches))
        before = values(model)
        assert "has not been seen" in str(scope.report())
        with pytest.raises(SelfCheckError, match="2 of 4 positions"):
            by(model, opt, *next(batches))
        assert_same(values(model), before)


def test_the_check_can_be_left_out() -> None:
    """Without the self-check, or with the collate function untried, nothing is compared, and the report says so."""
    for options in ({"self_check": False}, {"check_collate": False}):
        model = model_of(mean_of_all)
        scope = scope_over(model, loader=loader_of(texts(), "right"), **options)
        with scope as (opt, loader):
            for x, y in loader:
                loop(model, opt, x, y)
        assert "not verified" in str(scope.report())
