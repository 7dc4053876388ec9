"""The forms of ``@dp_step`` functions: what else they return, methods, and scopes that are named."""

import copy
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dp_hooks import checking, dp_step
from dp_hooks.errors import InvalidArgumentError, ScopeError

from ..models import assert_same, build, charges, each_mode, examples, sample_gradients, values
from .helpers import NOISY, POISSON, Run


def losses(model: nn.Module, batch: Any) -> Tensor:
    x, y = batch
    return F.cross_entropy(model(x), y, reduction="none")


def with_logits(model: nn.Module, batch: Any) -> tuple[Tensor, Any]:
    logits = model(batch[0])
    return F.cross_entropy(logits, batch[1], reduction="none"), {"logits": logits, "more": [logits.argmax(1), "text", None]}


# ---------------------------------------------------------------- (loss, aux)


@each_mode
@pytest.mark.parametrize("scalar", [False, True])
def test_aux_comes_back_detached_and_moves_nothing(scalar: bool, mode: str) -> None:
    """The step is that of the loss alone; the tensors of aux are those of the real run, without history."""

    @dp_step
    def step(model: nn.Module, batch: Any) -> tuple[Tensor, Any]:
        found, aux = with_logits(model, batch)
        return found.mean() if scalar else found, aux

    run = Run(grad_sample_mode=mode)
    with run as (model, _, loader):
        loss, aux = step(model, next(iter(loader)))
    run.assert_moved()
    assert not loss.requires_grad
    expected = build("mlp")(examples()[0]).detach()
    assert_same([aux["logits"]], [expected])
    assert aux["logits"].grad_fn is None
    assert torch.equal(aux["more"][0], expected.argmax(1))
    assert aux["more"][1:] == ["text", None]
    assert run.scope.report().loss_verified


def test_what_checks_return_as_aux_reaches_nobody() -> None:
    """Aux that differs from run to run (counts, other shapes, an object each) is that of the one real run."""
    counts = {False: 0, True: 0}

    @dp_step
    def step(model: nn.Module, batch: Any) -> tuple[Tensor, Any]:
        counts[checking()] += 1
        return losses(model, batch), (len(batch[0]), checking(), sum(counts.values()))

    run = Run()
    with run as (model, _, loader):
        assert step(model, next(iter(loader)))[1] == (6, False, 1)
    assert counts[False] == 1
    assert counts[True] > 1
    run.assert_moved()


def unannotated(model: nn.Module, batch: Any):
    return with_logits(model, batch)


ANNOTATED: dict[str, tuple[Callable[..., Any], bool]] = {
    "a tuple": (with_logits, True),
    "text": (types.FunctionType(with_logits.__code__, globals(), "text"), True),
    "a tensor": (losses, False),
    "nothing": (unannotated, False),
}
ANNOTATED["text"][0].__annotations__["return"] = "tuple[Tensor, dict]"


@pytest.mark.parametrize("kind", list(ANNOTATED))
def test_aux_of_a_first_empty_batch_is_none_where_the_annotation_tells_of_it(kind: str) -> None:
    """Noise is released; (zero, None) comes back if the function says that it returns a tuple, else zero alone."""
    fn, told = ANNOTATED[kind]
    run = Run(**NOISY, sample_rate=1e-9)
    with run as (model, _, loader):
        found = dp_step(fn)(model, next(iter(loader)))
    loss, aux = found if told else (found, None)
    assert float(loss.sum()) == 0
    assert aux is None
    run.assert_moved_by_noise()


def test_aux_of_a_later_empty_batch_is_none() -> None:
    """A function without annotations is known by what it returned last: an empty vector and None."""
    step, run = dp_step(unannotated), Run(**POISSON)
    with run as (model, _, loader):
        x, y = next(iter(loader))
        step(model, (x, y))
        x, y = next(iter(loader))
        loss, aux = step(model, (x[:0], y[:0]))
    assert loss.shape == (0,)
    assert aux is None
    assert charges(run.scope) == 2


# ---------------------------------------------------------------- methods


class Task:
    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale

    @dp_step
    def train(self, model: nn.Module, batch: Any, offset: float = 0.0) -> Tensor:
        return self.scale * losses(model, batch) + offset

    @dp_step(reduction="mean")
    def by_mean(self, model: nn.Module, batch: Any) -> Tensor:
        return losses(model, batch).mean()

    @staticmethod
    @dp_step
    def static(model: nn.Module, batch: Any) -> Tensor:
        return losses(model, batch)

    @classmethod
    @dp_step
    def of_class(cls, model: nn.Module, batch: Any) -> Tensor:
        assert cls is Task
        return losses(model, batch)


def owner() -> nn.Module:
    """A module with its own training step."""

    class Owner(nn.Sequential):
        @dp_step
        def training_step(self, batch: Any) -> Tensor:
            return losses(self, batch)

    return Owner(*build("mlp"))


METHODS: dict[str, Callable[[nn.Module, Any], Any]] = {
    "method": lambda model, batch: Task().train(model, batch),
    "its options": lambda model, batch: Task().train(model, batch, offset=1.0),
    "by name": lambda model, batch: Task().train(model=model, batch=batch),
    "batch by name": lambda model, batch: Task().train(model, batch=batch),
    "options": lambda model, batch: Task().by_mean(model, batch),
    "static": lambda model, batch: Task.static(model, batch),
    "static, by name": lambda model, batch: Task().static(batch=batch, model=model),
    "class": lambda model, batch: Task().of_class(model, batch),
    "of the model": lambda model, batch: model.training_step(batch),
    "unbound": lambda model, batch: Task.train(Task(), model, batch),
}


@pytest.mark.parametrize("kind", list(METHODS))
def test_methods_are_private_steps(kind: str) -> None:
    """A method of whatever kind steps the model that it is given, or that it belongs to, and is checked."""
    run = Run(owner())
    with run as (model, _, loader):
        METHODS[kind](model, next(iter(loader)))
    run.assert_moved()
    assert run.scope.report().loss_verified


WRONG_CALLS: dict[str, tuple[Callable[[nn.Module, Any], Any], type[Exception], str]] = {
    "method outside": (lambda m, b: Task().train(build("mlp"), b), ScopeError, r"Task.train\(\) is a private train step"),
    "no model": (lambda m, b: Task().train(3, b), ScopeError, r"The first argument was a Task"),
    "no batch": (lambda m, b: Task().train(m), TypeError, "missing a required argument: 'batch'"),
    "nothing": (lambda m, b: dp_step(losses)(), TypeError, "missing a required argument"),
    "a model for a batch": (
        lambda m, b: dp_step(losses)(m, nn.Linear(2, 2)),
        InvalidArgumentError,
        "with a Linear where the batch",
    ),
    "another model first": (lambda m, b: dp_step(losses)(nn.Linear(2, 2), m, b), ScopeError, "same model as first argument"),
}


@pytest.mark.parametrize("kind", list(WRONG_CALLS))
def test_calls_that_cannot_be_understood_are_refused(kind: str) -> None:
    """Without a scope over the model, or without a batch in its place, nothing runs, moves or is charged."""
    call, error, message = WRONG_CALLS[kind]
    run = Run(**POISSON)
    with run as (model, _, loader):
        batch = next(iter(loader))
        with pytest.raises(error, match=message):
            call(model, batch)
    run.assert_untouched()


# ---------------------------------------------------------------- scope=


class Pair:
    """A container of two models, of which a scope knows one."""

    def __init__(self, private: nn.Module, public: nn.Module) -> None:
        self.private, self.public = private, public


def through(pair: Pair, batch: Any) -> Tensor:
    x, y = batch
    return F.cross_entropy(pair.private(pair.public(x)), y, reduction="none")


@pytest.mark.parametrize("late", [False, True], ids=["the scope", "a function"])
@each_mode
def test_a_named_scope_is_stepped_whatever_the_first_argument_is(mode: str, late: bool) -> None:
    """Of a container of two models the one in the scope is trained, right and checked; the other gets no step."""
    public = nn.Linear(4, 4).double().requires_grad_(False)
    run, before = Run(grad_sample_mode=mode), values(public)
    step = dp_step(scope=(lambda: run.scope) if late else run.scope)(through)
    with run as (model, _, loader):
        step(Pair(model, public), next(iter(loader)))
    run.assert_moved(sample_gradients(run.first, public(examples()[0]), examples()[1]))
    assert_same(values(public), before)
    assert run.scope.report().loss_verified


NAMED_CALLS: dict[str, Callable[[Any, nn.Module, Any], Any]] = {
    "model": lambda step, model, batch: step(model, batch),
    "models": lambda step, model, batch: step(nn.Linear(2, 2), model, batch),
    "self and model": lambda step, model, batch: step(object(), model, batch),
    "anything": lambda step, model, batch: step("name", batch),
}


@pytest.mark.parametrize("kind", list(NAMED_CALLS))
def test_with_a_named_scope_the_batch_comes_after_all_models(kind: str) -> None:
    """The batch is found behind whatever comes first and further models, and is taken apart by the check."""
    run = Run()
    step = dp_step(scope=run.scope)(lambda *args: losses(run.model, args[-1]))
    with run as (model, _, loader):
        NAMED_CALLS[kind](step, model, next(iter(loader)))
    run.assert_moved()
    assert run.scope.report().loss_verified


@pytest.mark.parametrize("late", [False, True])
def test_a_named_scope_that_is_not_open_is_an_error(late: bool) -> None:
    """Before and after the block, and inside the block of another scope over the same model, nothing is run."""
    run, ran = Run(), []
    named = dp_step(scope=(lambda: run.scope) if late else run.scope)(lambda model, batch: ran.append(1))
    with pytest.raises(ScopeError, match="is not open here"):
        named(run.model, examples())
    with run:
        pass
    with Run(run.model), pytest.raises(ScopeError, match="is not open here"):
        named(run.model, examples())
    assert ran == []


@pytest.mark.parametrize("value", [3, "scope", nn.Linear(2, 2).double, Run])
def test_what_is_no_scope_is_refused(value: Any) -> None:
    """On decoration for what can be no scope, and on call for a function that returns something else."""
    if callable(value) and not isinstance(value, type):
        step = dp_step(scope=value)(losses)
        with pytest.raises(InvalidArgumentError, match="has to return an open private scope"):
            step(build("mlp"), examples())
    else:
        with pytest.raises(InvalidArgumentError, match="scope="):
            dp_step(scope=value)


def test_two_scopes_are_stepped_by_turns_and_charged_each_for_itself() -> None:
    """A generator and a critic, each in a scope: each step moves and charges its own, by its single samples' gradients."""
    generator, critic = nn.Linear(4, 4).double(), build("mlp")
    runs = Run(generator, **POISSON), Run(critic, **POISSON)
    x, y = examples()

    def critic_loss(models: tuple[nn.Module, nn.Module], batch: Any) -> Tensor:
        return F.cross_entropy(models[1](models[0](batch[0]).detach()), batch[1], reduction="none")

    def generator_loss(models: tuple[nn.Module, nn.Module], batch: Any) -> Tensor:
        return -models[1](models[0](batch[0])).logsumexp(1)

    train_critic = dp_step(scope=runs[1].scope)(critic_loss)
    train_generator = dp_step(scope=lambda: runs[0].scope)(generator_loss)
    both = (generator, critic)
    with runs[0] as (_, _, one), runs[1] as (_, _, two):
        train_critic(both, next(iter(two)))
        runs[1].assert_moved(sample_gradients(runs[1].first, runs[0].first(x).detach(), y))
        assert_same(values(generator), runs[0].start)
        then = copy.deepcopy(critic)
        train_generator(both, next(iter(one)))
        runs[0].assert_moved(sample_gradients(runs[0].first, x, x, lambda m, a, _: -then(m(a)).logsumexp(1).sum()))
        assert_same(values(critic), values(then))
        train_critic(both, next(iter(two)))
        train_generator(both, next(iter(one)))
        train_critic(both, next(iter(two)))
    assert (charges(runs[0].scope), charges(runs[1].scope)) == (2, 3)
