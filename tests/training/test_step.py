"""``@dp_step``: one call is one whole private step, or a clear error."""

import copy
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
from torch.utils.data import DataLoader, TensorDataset

from dp_hooks import dp_step
from dp_hooks.errors import InvalidArgumentError, ScopeError, SelfCheckError

from ..models import assert_same, build, charges, each_mode, examples, in_order, sample_gradients, scope_over, values
from .helpers import NOISY, POISSON, Run, backward

Loss = Callable[[nn.Module, Any], Any]


def loss_of(reduction: str) -> Loss:
    """Return a train function whose loss is reduced by ``reduction``."""

    def train_step(model: nn.Module, batch: Any) -> Tensor:
        x, y = batch
        return F.cross_entropy(model(x), y, reduction=reduction)

    return train_step


per_sample = dp_step(loss_of("none"))


def stepped(run: Run, step: Callable[..., Any] = per_sample) -> list[Any]:
    """Call ``step`` on every batch of one pass; return the losses."""
    with run as (model, _, loader):
        return [step(model, batch) for batch in loader]


FORMS: dict[str, Callable[[Any], Any]] = {
    "bare": dp_step,
    "called": lambda fn: dp_step()(fn),
    "auto": lambda fn: dp_step(reduction="auto")(fn),
}
each_declared = pytest.mark.parametrize("declared", ["mean", "sum"])


@each_mode
@each_declared
@pytest.mark.parametrize("form", list(FORMS))
@pytest.mark.parametrize("scalar", [False, True])
def test_a_call_is_a_private_step(scalar: bool, form: str, declared: str, mode: str) -> None:
    """Per-sample and scalar losses move the model by the hand-clipped gradients, and the loss comes back detached."""
    loss, run = loss_of(declared if scalar else "none"), Run(loss_reduction=declared, grad_sample_mode=mode)
    losses = stepped(run, FORMS[form](loss))
    assert len(losses) == run.scope.steps == 1
    assert not losses[0].requires_grad
    assert losses[0].grad_fn is None
    assert_same(losses, [loss(build("mlp"), examples()).detach()])
    run.assert_moved(divided_by=6 if declared == "mean" else 1)


@pytest.mark.parametrize("self_check", [True, False])
@each_declared
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_the_reduction_of_the_function_may_differ_from_the_scopes(reduction: str, declared: str, self_check: bool) -> None:
    """A function that says how it reduces its loss gives the same update in a scope that declares the other way."""
    run = Run(loss_reduction=declared, self_check=self_check)
    stepped(run, dp_step(reduction=reduction)(loss_of(reduction)))
    run.assert_moved(divided_by=6 if declared == "mean" else 1)


@each_mode
def test_several_steps_equal_a_loop_written_out(mode: str) -> None:
    """Three passes with ``dp_step`` and Adam end where the ordinary loop in a scope ends."""
    more = {"optimizer": lambda m: torch.optim.Adam(m.parameters(), lr=0.1), "grad_sample_mode": mode}
    runs = [Run(loader=in_order(6, 2), **more) for _ in range(2)]
    runs[0].trained(passes=3, by=lambda model, opt, x, y: per_sample(model, (x, y)))
    runs[1].trained(passes=3)
    assert_same(*[values(run.model) for run in runs])


@each_mode
@pytest.mark.parametrize("size", [1, 2, 4, 6])
def test_physical_batches_make_one_step(size: int, mode: str) -> None:
    """Calls on the parts of a logical batch make the step of the whole batch, once, after the last part."""
    run, steps = Run(max_physical_batch_size=size, grad_sample_mode=mode), []

    def step(model: nn.Module, batch: Any) -> None:
        assert per_sample(model, batch).shape == (len(batch[0]),)
        steps.append(run.scope.steps)

    stepped(run, step)
    assert steps == [0] * (len(steps) - 1) + [1]
    assert len(steps) == -(-6 // size)
    run.assert_moved()


def test_gradients_left_by_the_user_are_not_part_of_the_step() -> None:
    """What a backward pass outside the function captured before the call is discarded."""
    run = Run()

    def step(model: nn.Module, batch: Any) -> Tensor:
        x, y = batch
        backward(model, -x, y, 7)
        return per_sample(model, batch)

    stepped(run, step)
    run.assert_moved()


def test_extra_arguments_reach_the_function() -> None:
    """Further positional and keyword arguments are passed through, on every call."""
    seen = []

    @dp_step
    def step(model: nn.Module, batch: Any, scale: float, *, offset: float = 0.0) -> Tensor:
        seen.append((scale, offset))
        return scale * loss_of("none")(model, batch) + offset

    losses = stepped(Run(), lambda model, batch: step(model, batch, 2.0, offset=3.0))
    assert_same(losses, [2.0 * loss_of("none")(build("mlp"), examples()).detach() + 3.0])
    assert set(seen) == {(2.0, 3.0)}


Pair = namedtuple("Pair", ["x", "y"])


@dataclasses.dataclass
class Batch:
    x: Tensor
    y: Tensor


# From inputs and labels to a batch, and back.
KINDS: dict[str, tuple[Callable[[Tensor, Tensor], Any], Callable[[Any], tuple[Tensor, Tensor]]]] = {
    "tuple": (lambda x, y: (x, y), lambda b: (b[0], b[1])),
    "list": (lambda x, y: [x, y], lambda b: (b[0], b[1])),
    "dict": (lambda x, y: {"x": x, "y": y}, lambda b: (b["x"], b["y"])),
    "user dict": (lambda x, y: UserDict(x=x, y=y), lambda b: (b["x"], b["y"])),
    "named tuple": (Pair, lambda b: (b.x, b.y)),
    "dataclass": (Batch, lambda b: (b.x, b.y)),
    "nested": (lambda x, y: {"inputs": {"x": x}, "labels": [y]}, lambda b: (b["inputs"]["x"], b["labels"][0])),
}


def batches_of(kind: str, **options: Any) -> tuple[Run, Any, list[Any]]:
    """Return a run over batches of ``kind``, a private train function for them, and the classes it gets."""
    (pack, unpack), seen = KINDS[kind], []

    @dp_step
    def step(model: nn.Module, batch: Any) -> Tensor:
        seen.append(type(batch))
        return loss_of("none")(model, unpack(batch))

    def collate(rows: list[tuple[Tensor, Tensor]]) -> Any:
        return pack(*map(torch.stack, zip(*rows, strict=True)))

    return Run(loader=DataLoader(TensorDataset(*examples()), 6, collate_fn=collate), **options), step, seen


@each_mode
@pytest.mark.parametrize("kind", list(KINDS))
def test_batches_of_any_structure_work(kind: str, mode: str) -> None:
    """The function gets the batch as the collate function made it, and the step is right."""
    run, step, seen = batches_of(kind, grad_sample_mode=mode)
    stepped(run, step)
    assert set(seen) == {type(KINDS[kind][0](*examples()))}
    run.assert_moved()


@each_mode
@pytest.mark.parametrize("kind", list(KINDS))
def test_an_empty_batch_is_a_step_of_noise(kind: str, mode: str) -> None:
    """For a batch without examples the function is not run; noise is released and charged, and a zero loss returned."""
    run, step, seen = batches_of(kind, **NOISY, sample_rate=1e-9, grad_sample_mode=mode)
    with run as (model, _, batches):
        loss = step(model, next(iter(batches)))
    assert seen == []
    assert float(loss.sum()) == 0
    assert run.scope.steps == 1
    run.assert_moved_by_noise()


@each_mode
@pytest.mark.filterwarnings("ignore:a step was taken on a batch that did not come from")
@pytest.mark.parametrize("drawn_first", [True, False])
def test_a_batch_emptied_by_the_user_is_a_step_of_noise(drawn_first: bool, mode: str) -> None:
    """A batch whose rows were all filtered out, or an empty one from elsewhere, releases noise alone and is charged."""
    run = Run(**NOISY, grad_sample_mode=mode)
    with run as (model, _, loader):
        x, y = next(iter(loader)) if drawn_first else examples()
        backward(model, x, y)  # nothing of this may be released
        per_sample(model, (x[:0], y[:0]))
    run.assert_moved_by_noise()


def test_outside_a_scope_it_is_an_error() -> None:
    """A call before and after the scope raises, names the function, and does not run it."""
    run, ran = Run(), []

    @dp_step
    def my_step(model: nn.Module, batch: Any) -> Tensor:
        ran.append(1)
        return loss_of("none")(model, batch)

    with pytest.raises(ScopeError, match="my_step"):
        my_step(run.model, examples())
    assert ran == []
    stepped(run, my_step)
    after, count = values(run.model), len(ran)
    with pytest.raises(ScopeError, match="my_step"):
        my_step(run.model, examples())
    assert len(ran) == count >= 1
    assert_same(values(run.model), after)


WRONG: dict[str, Callable[[nn.Module], Any]] = {
    "equal model": lambda model: build("mlp"),
    "part": lambda model: model[0],
    "parent": nn.Sequential,
    "not a model": lambda model: 3,
}


@pytest.mark.parametrize("other", list(WRONG))
def test_another_model_is_an_error(other: str) -> None:
    """A call with anything else than the scope's own model raises and moves nothing."""
    run = Run()
    with run as (model, _, loader):
        batch = next(iter(loader))
        with pytest.raises(ScopeError, match="same model as first argument"):
            per_sample(WRONG[other](model), batch)
        assert_same(values(model), run.start)


def test_with_two_scopes_the_model_decides() -> None:
    """Inside two scopes a call steps the model it was given, and only that one."""
    first, second = Run(), Run()
    with first as (_, _, one), second as (_, _, two):
        per_sample(first.model, next(iter(one)))
        assert_same(values(second.model), second.start)
        per_sample(second.model, next(iter(two)))
    assert_same(values(first.model), values(second.model))
    first.assert_moved()


@pytest.mark.parametrize("managed", [True, False])
def test_a_function_may_run_through_a_second_model(managed: bool) -> None:
    """A generator's step through a critic, in a scope of its own or in none, is right and touches the critic once."""
    critic, twin = build("mlp"), nn.Linear(4, 4).double()
    run, (x, _) = Run(copy.deepcopy(twin)), examples()

    @dp_step
    def step(model: nn.Module, batch: Any) -> Tensor:
        return -critic(model(batch[0])).logsumexp(1)

    with run as (generator, _, loader):
        if managed:
            with scope_over(critic):
                step(generator, next(iter(loader)))
        else:
            step(generator, next(iter(loader)))
            found = [p.grad for p in critic.parameters()]
            critic.zero_grad()
            (-critic(twin(x)).logsumexp(1)).sum().backward()  # losses of samples are added up, whatever their update is divided by
            assert_same(found, [p.grad for p in critic.parameters()])
    run.assert_moved(sample_gradients(twin, x, x, lambda m, a, _: -critic(m(a)).logsumexp(1).sum()))


def test_a_second_call_for_the_same_batch_is_refused() -> None:
    """Two calls on one batch of the loader raise at the second, which moves and charges nothing."""
    run = Run(**POISSON)
    with run as (model, _, loader):
        batch = next(iter(loader))
        per_sample(model, batch)
        after = values(model)
        with pytest.raises(ScopeError, match="second"):
            per_sample(model, batch)
    assert_same(values(model), after)
    assert charges(run.scope) == 1


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("physical", [None, 3])
def test_an_exception_in_the_function_releases_nothing(physical: int | None, error: type[BaseException]) -> None:
    """An exception after the forward comes out as it is; nothing moves, and a later pass is clean."""
    run, original, broken = Run(max_physical_batch_size=physical), error("stop"), [False]

    @dp_step
    def step(model: nn.Module, batch: Any) -> Tensor:
        losses = loss_of("none")(model, batch)
        if broken[0]:
            raise original
        return losses

    with run as (model, _, loader):
        parts = iter(loader)
        if physical:
            step(model, next(parts))
        broken[0] = True
        with pytest.raises(error) as caught:
            step(model, next(parts))
        assert caught.value is original
        assert_same(values(model), run.start)
        broken[0] = False
        for batch in loader:
            step(model, batch)
    run.assert_moved()


def a_generator(model: nn.Module, batch: Any) -> Any:
    yield model


async def a_coroutine(model: nn.Module, batch: Any) -> Any:
    return model


async def an_async_generator(model: nn.Module, batch: Any) -> Any:
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
    "three things": ("auto", lambda out, y: (out.sum(1), y, y), "returned tuple"),
    "aux first": ("auto", lambda out, y: ({}, out.sum(1)), r"returned \(dict, aux\)"),
    "matrix and aux": ("auto", lambda out, y: (out, y), r"shape \(6, 3\)"),
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

    run = Run(**POISSON, self_check=self_check)
    with run as (model, _, loader):
        for batch in loader:
            with pytest.raises(InvalidArgumentError, match=message):
                step(model, batch)
    assert charges(run.scope) == 0
    assert_same(values(model), run.start)


def coupled(model: nn.Module, batch: Any) -> Tensor:
    losses = loss_of("none")(model, batch)
    return losses * losses.sum()


@pytest.mark.parametrize(("declared", "loss"), [("mean", loss_of("sum")), ("sum", loss_of("mean")), ("mean", coupled)])
def test_a_loss_that_is_not_what_it_should_be_is_caught_before_the_first_release(declared: str, loss: Loss) -> None:
    """The self-check runs the function: a scalar reduced otherwise than declared, or a loss that couples samples, is found."""
    run = Run(loss_reduction=declared)
    with run as (model, _, loader):
        batch = next(iter(loader))
        with pytest.raises(SelfCheckError, match="the train function"):
            dp_step(loss)(model, batch)
    assert_same(values(model), run.start)


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

    run = Run()
    stepped(run, dp_step(functools.partial(scaled, scale=1.0)))
    run.assert_moved()
