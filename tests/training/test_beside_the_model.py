"""What takes part in training beside the parameters that the private optimizer manages, and batches that are left out."""

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dp_hooks import dp_step
from dp_hooks.errors import InvalidArgumentError, ScopeError, SelfCheckError, UnsupportedModelError

from ..models import examples, loader_of, scope_over
from .helpers import POISSON, Run, backward, step

# ---------------------------------------------------------------- parameters


def unfreeze(model: nn.Module) -> list[nn.Parameter]:
    model[0].requires_grad_(True)
    return list(model[0].parameters())


def append(model: nn.Module) -> list[nn.Parameter]:
    model.append(nn.Linear(3, 3).double())
    return list(model[-1].parameters())


def replace(model: nn.Module) -> list[nn.Parameter]:
    model[2] = nn.Linear(model[2].in_features, 3).double()
    return list(model[2].parameters())


def _over_the_rest(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model[2].parameters(), lr=1.0)


@pytest.mark.parametrize("how", ["private step, then another", "another at once"])
@pytest.mark.parametrize("change", [unfreeze, append, replace])
def test_a_parameter_that_becomes_trainable_later_is_refused(change: Callable[[nn.Module], list[nn.Parameter]], how: str) -> None:
    """Neither a private step nor another optimizer goes on with parameters that are neither clipped nor noised."""
    run = Run(prepare=lambda model: model[0].requires_grad_(False), optimizer=_over_the_rest)
    with run as (model, opt, loader):
        x, y = next(iter(loader))
        new = change(model)
        before = [p.detach().clone() for p in new]
        other = torch.optim.SGD(new, lr=1.0)
        backward(model, x, y)
        if how == "private step, then another":
            with pytest.raises(UnsupportedModelError, match="became trainable"):
                opt.step()
            assert all(p.grad is None for p in new)
        with pytest.raises(ScopeError, match="another optimizer"):
            other.step()
        assert all(torch.equal(p, old) for p, old in zip(new, before, strict=True))
        assert run.scope.steps == 0
        model[0].requires_grad_(False)


class Head(nn.Module):
    """A criterion with a layer of its own."""

    reduction = "mean"

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 3).double()

    def forward(self, out: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.head(out), y)


def test_a_criterion_with_parameters_of_its_own_is_refused_on_entering() -> None:
    """Its parameters belong into the model, or have to be frozen."""
    with pytest.raises(InvalidArgumentError, match=r"criterion='Head'.*head\.weight, head\.bias"):
        Run(criterion=Head())
    Run(criterion=Head().requires_grad_(False))


# ---------------------------------------------------------------- means over targets


@pytest.mark.parametrize("kind", [nn.CrossEntropyLoss, nn.NLLLoss])
def test_a_mean_weighted_by_classes_is_refused_on_entering(kind: Any) -> None:
    """Such a mean is divided by the weights of the whole batch; single losses are not."""
    weight = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    with pytest.raises(InvalidArgumentError, match="weights of all samples"):
        Run(criterion=kind(weight=weight))
    Run(criterion=kind(weight=weight, reduction="none"))


TARGETS: dict[str, tuple[Any, dict[str, Any], bool]] = {
    # the second batch of targets (the first is all ones), options of the loss, whether it is right
    "all counted": ([[0, 1], [2, 0]], {}, True),
    "one left out": ([[0, 1], [-100, 2]], {}, False),
    "one of each left out": ([[-100, 1], [2, -100]], {}, True),
    "by another number": ([[0, 1], [1, 2]], {"ignore_index": 0}, False),
    "weights": ([[0, 1], [1, 2]], {"weight": torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)}, False),
    "weights, a sum": ([[0, 1], [1, 2]], {"weight": torch.tensor([1.0, 2.0, 3.0]).double(), "reduction": "sum"}, True),
}


WAYS = ("function", "function, flattened", "criterion")  # of a flattened criterion samples cannot be told apart in any batch


@pytest.mark.parametrize(
    ("case", "way"), [(case, way) for case in TARGETS for way in WAYS if not (way == "criterion" and case == "weights")]
)
def test_a_mean_over_targets_is_looked_at_anew_when_some_do_not_count(case: str, way: str) -> None:
    """Targets that all count the same in the first batch say nothing about later ones, in which some are left out."""
    later, options, right = TARGETS[case]
    x = torch.randn(4, 2, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y = torch.tensor([[1, 1], [1, 1], *later])
    criterion = nn.CrossEntropyLoss(**options)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        out, target = model(batch[0]), batch[1]
        return criterion(out.flatten(0, 1), target.flatten()) if "flattened" in way else criterion(out.mT, target)

    model = nn.Sequential(nn.Linear(4, 3).double())
    scope = scope_over(
        model,
        loader=loader_of([x, y], batch_size=2),
        loss_reduction=options.get("reduction", "mean"),
        spot_check_rate=0.0,
        criterion=criterion if way == "criterion" else None,
    )
    with scope as (opt, private):
        batches = iter(private)
        _take(way, loss, model, opt, next(batches))
        with nullcontext() if right else pytest.raises(SelfCheckError):
            _take(way, loss, model, opt, next(batches))
        assert scope.steps == 1 + right


def _take(way: str, loss: Any, model: nn.Module, opt: Any, batch: Any) -> None:
    if way != "criterion":
        dp_step(loss)(model, batch)
    else:
        opt.zero_grad()
        loss(model, batch).backward()
        opt.step()


# ---------------------------------------------------------------- batches that are left out


LEFT: dict[str, tuple[Callable[[nn.Module, Any, Tensor, Tensor], Any], bool]] = {
    "stepped": (step, False),
    "a loss only": (lambda model, opt, x, y: F.cross_entropy(model(x), y), True),
    "a backward pass, too": (lambda model, opt, x, y: (backward(model, x, y), opt.zero_grad()), True),
    "without gradients": (lambda model, opt, x, y: torch.no_grad()(model)(x), False),
    "not looked at": (lambda model, opt, x, y: opt.skip_batch(), False),
    "left out on purpose": (lambda model, opt, x, y: (model(x), opt.skip_batch()), False),
    "stepped, and run after": (lambda model, opt, x, y: (step(model, opt, x, y), model(x)), False),
}


@pytest.mark.parametrize("case", LEFT)
def test_a_batch_that_was_run_but_not_stepped_is_warned_of(case: str) -> None:
    """Leaving batches out by their loss tells something of them; leaving them out on purpose, whatever they are, does not."""
    act, warned = LEFT[case]
    with Run() as (model, opt, loader), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        batches = iter(loader)
        act(model, opt, *next(batches))
        step(model, opt, *next(iter(loader)))
    assert any("no step was taken" in str(w.message) for w in caught) == warned
    assert all(w.filename == __file__ for w in caught if "no step was taken" in str(w.message))


def test_each_batch_that_is_left_is_warned_of_once() -> None:
    """A batch that nothing was done with is not taken for the one before it."""
    run = Run(loader=loader_of(examples(), batch_size=2))
    with run as (model, _, loader), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        x, _ = next(batches := iter(loader))
        model(x)
        assert len(list(batches)) == 2
    assert sum("no step was taken" in str(w.message) for w in caught) == 1


# ---------------------------------------------------------------- calls that cannot be told apart


def test_transforms_of_torch_func_are_refused_by_name() -> None:
    """Inside vmap and jvp there are no rows to tell."""
    run = Run(**POISSON)
    with run as (model, _, loader):
        x, _ = next(iter(loader))
        with pytest.raises(ScopeError, match=r"torch\.func"):
            torch.vmap(lambda row: model(row[None]))(x)
        with pytest.raises(ScopeError, match=r"torch\.func"):
            torch.func.jvp(model, (x,), (x,))
        run.assert_untouched()


@pytest.mark.parametrize("name", ["mlp", "tied", "lstm", "owner"])
def test_checkpointing_around_the_model_is_right(name: str) -> None:
    """The call of the model in a bare loop may be checkpointed: what the self-check runs beside it does not count there."""

    def act(model: nn.Module, opt: Any, x: Tensor, y: Tensor) -> None:
        F.cross_entropy(checkpoint(model, x, use_reentrant=False), y).backward()
        opt.step()

    Run(name).trained(by=act).assert_moved()


def test_arguments_beside_the_batch_are_named() -> None:
    """What belongs to the examples has to be in the batch."""
    whole = dp_step(lambda model, x, y: F.cross_entropy(model(x), y, reduction="none"))
    with Run() as (model, _, loader):
        x, y = next(iter(loader))
        with pytest.raises(SelfCheckError, match=r"came to .* in an argument after the batch"):
            whole(model, x, y)


# ---------------------------------------------------------------- trainable tensors outside the model


class Outside:
    """A private model with something trainable behind it or before it, which the loss reaches as well."""

    def __init__(self, where: str) -> None:
        self.layer, self.prompt = nn.Linear(3, 3).double(), torch.zeros(4, dtype=torch.float64, requires_grad=True)
        self.trained = [self.prompt] if where == "before" else list(self.layer.parameters())
        self.where = where

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        x, y = batch
        out = model(x + self.prompt) if self.where == "before" else self.layer(model(x))
        return F.cross_entropy(out, y, reduction="none")


@pytest.mark.parametrize("at", ["the first step", "a later step", "while paused", "unchecked"])
@pytest.mark.parametrize("where", ["before", "behind"])
def test_gradients_outside_the_model_cannot_be_applied(where: str, at: str) -> None:
    """An optimizer over a head or a prompt is stopped before it applies raw gradients of private samples."""
    outside, run = Outside(where), Run(self_check=at != "unchecked")
    other = torch.optim.SGD(outside.trained, lr=1.0)
    before = [p.detach().clone() for p in outside.trained]
    private = dp_step(outside.loss)
    with run as (model, _, loader):
        private(model, next(iter(loader)))
        if at == "a later step":
            other.zero_grad()
            private(model, next(iter(loader)))
        with run.scope.paused() if at == "while paused" else nullcontext(), pytest.raises(ScopeError, match="neither clipped"):
            other.step()
    assert all(torch.equal(p, old) for p, old in zip(outside.trained, before, strict=True))


@pytest.mark.parametrize("where", ["before", "behind"])
def test_an_outer_optimizer_with_a_loss_of_its_own_goes_on(where: str) -> None:
    """Once what the private loss left is cleared, and outside of the scope, another optimizer steps as ever."""
    outside, run = Outside(where), Run()
    other = torch.optim.SGD(outside.trained, lr=1.0)
    private = dp_step(outside.loss)
    with run as (model, _, loader):
        for _ in range(2):
            private(model, next(iter(loader)))
            other.zero_grad()
            sum(p.sum() for p in outside.trained).backward()
            before = [p.detach().clone() for p in outside.trained]
            other.step()
            assert all(torch.equal(p, old - 1) for p, old in zip(outside.trained, before, strict=True))
    other.step()


def test_a_head_that_is_trained_from_a_later_step_on_is_known_then() -> None:
    """Heads that take turns: the second is seen in the step that uses it, though nothing else is new."""
    first, second, run = Outside("behind"), Outside("behind"), Run()
    heads = [first, second]
    private = dp_step(lambda model, batch: heads[0].loss(model, batch))
    others = [torch.optim.SGD(head.trained, lr=1.0) for head in heads]
    with run as (model, _, loader):
        private(model, next(iter(loader)))
        others[0].zero_grad()
        heads.reverse()
        private(model, next(iter(loader)))
        before = [p.detach().clone() for p in second.trained]
        with pytest.raises(ScopeError, match="neither clipped"):
            others[1].step()
    assert all(torch.equal(p, old) for p, old in zip(second.trained, before, strict=True))


def test_nothing_of_private_samples_is_left_outside_the_model_after_the_scope() -> None:
    """Gradients that a private loss left at a head are gone when the scope ends."""
    outside, run = Outside("behind"), Run()
    with run as (model, _, loader):
        dp_step(outside.loss)(model, next(iter(loader)))
        assert all(p.grad is not None for p in outside.trained)
    assert all(p.grad is None for p in outside.trained)


def test_a_train_function_may_run_inside_another() -> None:
    """Two private models: the function of the one calls that of the other, and both take their step."""
    outer, inner = Run(self_check=False), Run(self_check=False)
    with outer as (model, _, loader), inner as (other, _, batches):

        @dp_step
        def train(m: nn.Module, batch: Any) -> Tensor:
            step_inside(other, next(iter(batches)))
            return F.cross_entropy(m(batch[0]), batch[1], reduction="none")

        train(model, next(iter(loader)))
    assert outer.scope.steps == inner.scope.steps == 1


@dp_step
def step_inside(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


@pytest.mark.parametrize("how", ["detached", "without gradients", "back-propagated"])
def test_a_loss_without_a_graph_is_refused_by_name(how: str) -> None:
    """A function that returns a loss no gradient can come from is told so."""

    @dp_step
    def train(m: nn.Module, batch: Any) -> Tensor:
        loss = F.cross_entropy(m(batch[0]), batch[1])
        if how == "back-propagated":
            loss.backward()
        return loss.detach()

    run = Run(**POISSON)
    with run as (model, _, loader):
        batch = next(iter(loader))
        with torch.set_grad_enabled(how != "without gradients"), pytest.raises(InvalidArgumentError, match="no gradient can come"):
            train(model, batch)
        assert run.scope.steps == 0
    run.assert_untouched()
