"""``@dp_step``: one call is one whole private step, or a clear error."""

import dataclasses
import functools
import inspect
import typing
from collections import UserDict, namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from dp_hooks import dp_step
from dp_hooks.errors import InvalidArgumentError, ScopeError, SelfCheckError

from .models import (
    BOUND,
    assert_same,
    build,
    charges,
    clipped_sum,
    each_mode,
    examples,
    expected_move,
    in_order,
    moved,
    sample_gradients,
    scope_over,
    values,
)


@dp_step
def per_sample(model: nn.Module, batch: Any) -> Tensor:
    """Return one loss per sample."""
    x, y = batch
    return F.cross_entropy(model(x), y, reduction="none")


def loss_of(reduction: str) -> Callable[[nn.Module, Any], Tensor]:
    """Return a train function whose loss is reduced by ``reduction``."""

    def train_step(model: nn.Module, batch: Any) -> Tensor:
        x, y = batch
        return F.cross_entropy(model(x), y, reduction=reduction)

    return train_step


# ---------------------------------------------------------------- what a step is

FORMS: dict[str, Callable[[Any], Any]] = {
    "bare": dp_step,
    "called": lambda fn: dp_step()(fn),
    "auto": lambda fn: dp_step(reduction="auto")(fn),
}


@each_mode
@pytest.mark.parametrize("declared", ["mean", "sum"])
@pytest.mark.parametrize("form", list(FORMS))
@pytest.mark.parametrize("scalar", [False, True])
def test_a_call_is_a_private_step(scalar: bool, form: str, declared: str, mode: str) -> None:
    """Per-sample and scalar losses move the model by the hand-clipped gradients, and the loss comes back detached."""
    model, start = build("mlp"), values(build("mlp"))
    step = FORMS[form](loss_of(declared if scalar else "none"))
    x, y = examples()
    wanted = F.cross_entropy(build("mlp")(x), y, reduction=declared if scalar else "none").detach()
    scope = scope_over(model, loss_reduction=declared, grad_sample_mode=mode)
    with scope as (_, loader):
        losses = [step(model, batch) for batch in loader]
    assert len(losses) == scope.steps == 1
    assert not losses[0].requires_grad
    assert losses[0].grad_fn is None
    assert_same(losses, [wanted])
    assert_same(moved(start, model), expected_move(build("mlp"), divided_by=6 if declared == "mean" else 1))


@pytest.mark.parametrize("self_check", [True, False])
@pytest.mark.parametrize("declared", ["mean", "sum"])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_the_reduction_of_the_function_may_differ_from_the_scopes(
    reduction: str, declared: str, self_check: bool
) -> None:
    """A function that says how it reduces its loss gives the same update in a scope that declares the other way."""
    model, start = build("mlp"), values(build("mlp"))
    step = dp_step(reduction=reduction)(loss_of(reduction))
    with scope_over(model, loss_reduction=declared, self_check=self_check) as (_, loader):
        for batch in loader:
            step(model, batch)
    assert_same(moved(start, model), expected_move(build("mlp"), divided_by=6 if declared == "mean" else 1))


@each_mode
def test_several_steps_equal_a_loop_written_out(mode: str) -> None:
    """Three passes with ``dp_step`` and Adam end where the ordinary loop in a scope ends."""
    models = [build("mlp"), build("mlp")]
    optimizers = [torch.optim.Adam(m.parameters(), lr=0.1) for m in models]
    with scope_over(models[0], optimizer=optimizers[0], loader=in_order(6, 2), grad_sample_mode=mode) as (_, loader):
        for _ in range(3):
            for batch in loader:
                per_sample(models[0], batch)
    with scope_over(models[1], optimizer=optimizers[1], loader=in_order(6, 2), grad_sample_mode=mode) as (opt, loader):
        for _ in range(3):
            for x, y in loader:
                opt.zero_grad()
                F.cross_entropy(models[1](x), y).backward()
                opt.step()
    assert_same(values(models[0]), values(models[1]))


@each_mode
@pytest.mark.parametrize("size", [1, 2, 4, 6])
def test_physical_batches_make_one_step(size: int, mode: str) -> None:
    """Calls on the parts of a logical batch make the step of the whole batch, once, after the last part."""
    model, start = build("mlp"), values(build("mlp"))
    scope = scope_over(model, max_physical_batch_size=size, grad_sample_mode=mode)
    steps = []
    with scope as (_, loader):
        for batch in loader:
            loss = per_sample(model, batch)
            assert loss.shape == (len(batch[0]),)
            steps.append(scope.steps)
    assert steps == [0] * (len(steps) - 1) + [1]
    assert len(steps) == -(-6 // size)
    assert_same(moved(start, model), expected_move(build("mlp")))


def test_gradients_left_by_the_user_are_not_part_of_the_step() -> None:
    """What a backward pass outside the function captured before the call is discarded."""
    model, start = build("mlp"), values(build("mlp"))
    with scope_over(model) as (_, loader):
        for x, y in loader:
            (7 * F.cross_entropy(model(-x), y)).backward()
            per_sample(model, (x, y))
    assert_same(moved(start, model), expected_move(build("mlp")))


def test_extra_arguments_reach_the_function() -> None:
    """Further positional and keyword arguments are passed through, on every call."""
    seen = []

    @dp_step
    def step(model: nn.Module, batch: Any, scale: float, *, offset: float = 0.0) -> Tensor:
        x, y = batch
        seen.append((scale, offset))
        return scale * F.cross_entropy(model(x), y, reduction="none") + offset

    model = build("mlp")
    x, y = examples()
    wanted = 2.0 * F.cross_entropy(model(x), y, reduction="none").detach() + 3.0
    with scope_over(model) as (_, loader):
        losses = [step(model, batch, 2.0, offset=3.0) for batch in loader]
    assert_same(losses, [wanted])
    assert set(seen) == {(2.0, 3.0)}


# ---------------------------------------------------------------- batches

Pair = namedtuple("Pair", ["x", "y"])


@dataclasses.dataclass
class Batch:
    x: Tensor
    y: Tensor


def stacked(rows: list[Any]) -> tuple[Tensor, Tensor]:
    """Stack a list of examples."""
    return torch.stack([x for x, _ in rows]), torch.stack([y for _, y in rows])


KINDS: dict[str, tuple[Callable[[list[Any]], Any], Callable[[Any], tuple[Tensor, Tensor]]]] = {
    "tuple": (stacked, lambda b: (b[0], b[1])),
    "list": (lambda rows: list(stacked(rows)), lambda b: (b[0], b[1])),
    "dict": (lambda rows: dict(zip("xy", stacked(rows), strict=True)), lambda b: (b["x"], b["y"])),
    "user dict": (lambda rows: UserDict(zip("xy", stacked(rows), strict=True)), lambda b: (b["x"], b["y"])),
    "named tuple": (lambda rows: Pair(*stacked(rows)), lambda b: (b.x, b.y)),
    "dataclass": (lambda rows: Batch(*stacked(rows)), lambda b: (b.x, b.y)),
    "nested": (
        lambda rows: {"inputs": {"x": stacked(rows)[0]}, "labels": [stacked(rows)[1]]},
        lambda b: (b["inputs"]["x"], b["labels"][0]),
    ),
}


class Rows(Dataset[Any]):
    def __init__(self) -> None:
        self.x, self.y = examples()

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[index], self.y[index]


def loss_on(kind: str, seen: list[Any]) -> Callable[[nn.Module, Any], Tensor]:
    """Return a private train function for batches of ``kind`` that notes the classes it gets."""
    unpack = KINDS[kind][1]

    @dp_step
    def step(model: nn.Module, batch: Any) -> Tensor:
        seen.append(type(batch))
        x, y = unpack(batch)
        return F.cross_entropy(model(x), y, reduction="none")

    return step


@each_mode
@pytest.mark.parametrize("kind", list(KINDS))
def test_batches_of_any_structure_work(kind: str, mode: str) -> None:
    """The function gets the batch as the collate function made it, and the step is right."""
    model, start, seen = build("mlp"), values(build("mlp")), []
    step = loss_on(kind, seen)
    with scope_over(model, loader=DataLoader(Rows(), 6, collate_fn=KINDS[kind][0]), grad_sample_mode=mode) as (
        _,
        batches,
    ):
        for batch in batches:
            step(model, batch)
    assert set(seen) == {type(KINDS[kind][0]([Rows()[0]]))}
    assert_same(moved(start, model), expected_move(build("mlp")))


@each_mode
@pytest.mark.parametrize("kind", list(KINDS))
def test_an_empty_batch_is_a_step_of_noise(kind: str, mode: str) -> None:
    """For a batch without examples the function is not run; noise is released and charged, and a zero loss returned."""
    model, start, seen = build("mlp"), values(build("mlp")), []
    step = loss_on(kind, seen)
    scope = scope_over(
        model,
        loader=DataLoader(Rows(), 6, collate_fn=KINDS[kind][0]),
        poisson_sampling=True,
        sample_rate=1e-9,
        loss_reduction="sum",
        noise_multiplier=2.0,
        noise_generator=torch.Generator().manual_seed(5),
        accountant="rdp",
        grad_sample_mode=mode,
    )
    with scope as (_, batches):
        loss = step(model, next(iter(batches)))
    assert seen == []
    assert float(loss.sum()) == 0
    assert charges(scope) == scope.steps == 1
    replay = torch.Generator().manual_seed(5)
    noise = [torch.empty_like(p).normal_(0.0, 2.0 * BOUND, generator=replay) for p in start]
    assert_same(moved(start, model), noise)


@each_mode
@pytest.mark.filterwarnings("ignore:a step was taken on a batch that did not come from")
@pytest.mark.parametrize("drawn_first", [True, False])
def test_a_batch_emptied_by_the_user_is_a_step_of_noise(drawn_first: bool, mode: str) -> None:
    """A batch whose rows were all filtered out, or an empty one from elsewhere, releases noise alone and is charged."""
    model, start = build("mlp"), values(build("mlp"))
    step = loss_on("tuple", [])
    scope = scope_over(
        model,
        poisson_sampling=True,
        loss_reduction="sum",
        noise_multiplier=2.0,
        noise_generator=torch.Generator().manual_seed(5),
        accountant="rdp",
        grad_sample_mode=mode,
    )
    with scope as (_, loader):
        x, y = next(iter(loader)) if drawn_first else examples()
        F.cross_entropy(model(x), y).backward()  # nothing of this may be released
        step(model, (x[:0], y[:0]))
    assert charges(scope) == 1
    replay = torch.Generator().manual_seed(5)
    noise = [torch.empty_like(p).normal_(0.0, 2.0 * BOUND, generator=replay) for p in start]
    assert_same(moved(start, model), noise)


# ---------------------------------------------------------------- where it may be called


def test_outside_a_scope_it_is_an_error() -> None:
    """A call before and after the scope raises, names the function, and does not run it."""
    model, ran = build("mlp"), []

    @dp_step
    def my_step(model: nn.Module, batch: Any) -> Tensor:
        ran.append(1)
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    with pytest.raises(ScopeError, match="my_step"):
        my_step(model, examples())
    assert ran == []
    with scope_over(model) as (_, loader):
        for batch in loader:
            my_step(model, batch)
    after, count = values(model), len(ran)
    with pytest.raises(ScopeError, match="my_step"):
        my_step(model, examples())
    assert len(ran) == count >= 1
    assert_same(values(model), after)


@pytest.mark.parametrize("other", ["equal model", "part", "parent", "not a model"])
def test_another_model_is_an_error(other: str) -> None:
    """A call with anything else than the scope's own model raises and moves nothing."""
    model = build("mlp")
    wrong: Any = {"equal model": build("mlp"), "part": model[0], "parent": nn.Sequential(model), "not a model": 3}[
        other
    ]
    start = values(model)
    with scope_over(model) as (_, loader):
        batch = next(iter(loader))
        with pytest.raises(ScopeError, match="same model as first argument"):
            per_sample(wrong, batch)
        assert_same(values(model), start)


def test_with_two_scopes_the_model_decides() -> None:
    """Inside two scopes a call steps the model it was given, and only that one."""
    first, second = build("mlp"), build("mlp")
    start = values(first)
    with scope_over(first) as (_, one), scope_over(second) as (_, two):
        per_sample(first, next(iter(one)))
        assert_same(values(second), start)
        per_sample(second, next(iter(two)))
    assert_same(values(first), values(second))
    assert_same(moved(start, first), expected_move(build("mlp")))


@pytest.mark.parametrize("managed", [True, False])
def test_a_function_may_run_through_a_second_model(managed: bool) -> None:
    """A generator's step through a critic, in a scope of its own or in none, is right and touches the critic once."""
    critic, generator = build("mlp"), nn.Linear(4, 4).double()
    (x, _), twin = examples(), nn.Linear(4, 4).double()
    twin.load_state_dict(generator.state_dict())
    start = values(generator)

    @dp_step
    def step(model: nn.Module, batch: Any) -> Tensor:
        return -critic(model(batch[0])).logsumexp(1)

    with scope_over(generator) as (_, loader):
        if managed:
            with scope_over(critic):
                step(generator, next(iter(loader)))
        else:
            step(generator, next(iter(loader)))
            found = [p.grad for p in critic.parameters()]
            critic.zero_grad()
            (-critic(twin(x)).logsumexp(1)).mean().backward()
            assert_same(found, [p.grad for p in critic.parameters()])
    rows = sample_gradients(twin, x, x, lambda m, a, _: -critic(m(a)).logsumexp(1).sum())
    assert_same(moved(start, generator), [g / 6 for g in clipped_sum(rows, BOUND)])


def test_a_second_call_for_the_same_batch_is_refused() -> None:
    """Two calls on one batch of the loader raise at the second, which moves and charges nothing."""
    model = build("mlp")
    scope = scope_over(model, poisson_sampling=True, accountant="rdp")
    with scope as (_, loader):
        batch = next(iter(loader))
        per_sample(model, batch)
        after = values(model)
        with pytest.raises(ScopeError, match="second"):
            per_sample(model, batch)
    assert_same(values(model), after)
    assert charges(scope) == 1


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("physical", [None, 3])
def test_an_exception_in_the_function_releases_nothing(physical: int | None, error: type[BaseException]) -> None:
    """An exception after the forward comes out as it is; nothing moves, and a later pass is clean."""
    model, original, broken = build("mlp"), error("stop"), [False]

    @dp_step
    def step(model: nn.Module, batch: Any) -> Tensor:
        x, y = batch
        losses = F.cross_entropy(model(x), y, reduction="none")
        if broken[0]:
            raise original
        return losses

    start = values(model)
    with scope_over(model, max_physical_batch_size=physical) as (_, loader):
        parts = iter(loader)
        if physical:
            step(model, next(parts))
        broken[0] = True
        with pytest.raises(error) as caught:
            step(model, next(parts))
        assert caught.value is original
        assert_same(values(model), start)
        broken[0] = False
        for batch in loader:
            step(model, batch)
    assert_same(moved(start, model), expected_move(build("mlp")))


# ---------------------------------------------------------------- what it may decorate and return


def a_generator(model: nn.Module, batch: Any) -> Any:
    """Yield."""
    yield model


async def a_coroutine(model: nn.Module, batch: Any) -> Any:
    """Await."""
    return model


async def an_async_generator(model: nn.Module, batch: Any) -> Any:
    """Yield, asynchronously."""
    yield model


NOT_FUNCTIONS = {
    "class": nn.Linear,
    "generator": a_generator,
    "coroutine": a_coroutine,
    "async generator": an_async_generator,
    "static method": staticmethod(loss_of("none")),
    "class method": classmethod(loss_of("none")),
    "number": 3,
    "string": "mean",
}


@pytest.mark.parametrize("form", list(FORMS))
@pytest.mark.parametrize("kind", list(NOT_FUNCTIONS))
def test_only_plain_functions_can_be_decorated(kind: str, form: str) -> None:
    """Classes, generators, coroutines and non-functions are refused on decoration."""
    with pytest.raises(InvalidArgumentError, match="cannot be decorated"):
        FORMS[form](NOT_FUNCTIONS[kind])


@pytest.mark.parametrize("reduction", ["average", "", 1, True])
def test_an_unknown_reduction_is_refused_on_decoration(reduction: Any) -> None:
    """A reduction that does not exist is an error that names the argument and its value."""
    with pytest.raises(InvalidArgumentError, match="reduction="):
        dp_step(reduction=reduction)


BAD_LOSSES: dict[str, tuple[str, Callable[[Tensor, Tensor], Any], str]] = {
    "none": ("auto", lambda out, y: None, "returned NoneType"),
    "float": ("auto", lambda out, y: 1.0, "returned float"),
    "tuple": ("auto", lambda out, y: (out.sum(1), y), "returned tuple"),
    "integers": ("auto", lambda out, y: out.argmax(1), "returned Tensor"),
    "matrix": ("auto", lambda out, y: out, r"shape \(6, 3\)"),
    "vector for mean": ("mean", lambda out, y: F.cross_entropy(out, y, reduction="none"), r"shape \(6,\)"),
    "vector for sum": ("sum", lambda out, y: F.cross_entropy(out, y, reduction="none"), r"shape \(6,\)"),
    "scalar for none": ("none", lambda out, y: F.cross_entropy(out, y), r"shape \(\)"),
    "one loss per logit": ("auto", lambda out, y: out.flatten(), "18 losses for 6"),
    "fewer losses": ("none", lambda out, y: F.cross_entropy(out, y, reduction="none")[:3], "3 losses for 6"),
}


@pytest.mark.parametrize("self_check", [True, False])
@pytest.mark.parametrize("kind", list(BAD_LOSSES))
def test_what_is_no_loss_is_refused(kind: str, self_check: bool) -> None:
    """A function that returns something else than declared is an error, and nothing moves or is charged."""
    reduction, loss, message = BAD_LOSSES[kind]

    @dp_step(reduction=reduction)
    def step(model: nn.Module, batch: Any) -> Any:
        return loss(model(batch[0]), batch[1])

    model = build("mlp")
    start = values(model)
    scope = scope_over(model, poisson_sampling=True, accountant="rdp", self_check=self_check)
    with scope as (_, loader):
        for batch in loader:
            with pytest.raises(InvalidArgumentError, match=message):
                step(model, batch)
    assert charges(scope) == 0
    assert_same(values(model), start)


@pytest.mark.parametrize("declared", ["mean", "sum"])
def test_a_wrongly_declared_scalar_is_caught_before_the_first_release(declared: str) -> None:
    """A scalar loss reduced in another way than the scope declares is found by the self-check."""
    model = build("mlp")
    start = values(model)
    step = dp_step(loss_of("sum" if declared == "mean" else "mean"))
    with scope_over(model, loss_reduction=declared) as (_, loader):
        batch = next(iter(loader))
        with pytest.raises(SelfCheckError, match="the train function"):
            step(model, batch)
    assert_same(values(model), start)


def test_a_loss_that_couples_samples_is_caught_before_the_first_release() -> None:
    """A loss weighted by the whole batch is found by the self-check, which runs the whole function."""
    model = build("mlp")
    start = values(model)

    @dp_step
    def step(model: nn.Module, batch: Any) -> Tensor:
        losses = F.cross_entropy(model(batch[0]), batch[1], reduction="none")
        return losses * losses.sum()

    with scope_over(model) as (_, loader):
        batch = next(iter(loader))
        with pytest.raises(SelfCheckError, match="the train function"):
            step(model, batch)
    assert_same(values(model), start)


def test_metadata_and_signature_survive() -> None:
    """Name, docstring, annotations, attributes and signature are the function's own."""

    def original(model: nn.Module, batch: Any, scale: float = 2.0, *, flag: bool = False) -> Tensor:
        """Do it."""
        return torch.zeros(())

    original.mark = "kept"
    for decorated in (dp_step(original), dp_step(reduction="mean")(original)):
        assert decorated.__name__ == "original"
        assert decorated.__qualname__ == original.__qualname__
        assert decorated.__doc__ == "Do it."
        assert decorated.__module__ == __name__
        assert decorated.__wrapped__ is original
        assert decorated.mark == "kept"
        assert inspect.signature(decorated) == inspect.signature(original)
        assert typing.get_type_hints(decorated) == typing.get_type_hints(original)


def test_decorating_does_not_change_the_function() -> None:
    """The undecorated function stays an ordinary one, and partial functions can be decorated too."""
    plain = loss_of("none")
    dp_step(plain)
    x, y = examples()
    assert plain(build("mlp"), (x, y)).requires_grad

    def scaled(model: nn.Module, batch: Any, scale: float) -> Tensor:
        return scale * plain(model, batch)

    model, start = build("mlp"), values(build("mlp"))
    with scope_over(model) as (_, loader):
        for batch in loader:
            dp_step(functools.partial(scaled, scale=1.0))(model, batch)
    assert_same(moved(start, model), expected_move(build("mlp")))
