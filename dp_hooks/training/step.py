"""dp_step: a train function that takes a whole private step."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Concatenate, Literal, overload

import torch
from torch import Tensor, nn
from typing_extensions import ParamSpec, TypeVar

from .._tree import private_copy, rows_of, tensors_of, tree_map
from .._validate import bad, boolean, one_of
from ..capture.controller import HookController
from ..capture.validate import uncompiled
from ..checks.self_check import SelfCheck
from ..errors import InvalidArgumentError, ScopeError, SelfCheckError
from .scope import open_scopes

P = ParamSpec("P")
M = TypeVar("M", bound=nn.Module)
Batch = TypeVar("Batch")
StepFunction = Callable[Concatenate[M, Batch, P], Tensor]
Reduction = Literal["auto", "none", "mean", "sum"]


@overload
def dp_step(fn: StepFunction[M, Batch, P], /) -> StepFunction[M, Batch, P]: ...
@overload
def dp_step(
    *, reduction: Reduction = "auto", two_pass: bool = False
) -> Callable[[StepFunction[M, Batch, P]], StepFunction[M, Batch, P]]: ...
def dp_step(fn: Any = None, /, *, reduction: Reduction = "auto", two_pass: bool = False) -> Any:
    """Make ``fn(model, batch, *args, **kwargs) -> loss`` take a whole private step.

    ::

        @dp_step
        def train_step(model, batch):
            x, y = batch
            return F.cross_entropy(model(x), y, reduction="none")   # one loss per sample

        with private_training(model, optimizer, loader, ...) as (opt, loader):
            for batch in loader:
                losses = train_step(model, batch)

    A call inside a scope over ``model`` clears gradients, runs ``fn``, back-propagates, clips, adds noise, charges the
    accountant and steps the optimizer. A physical part of a larger logical batch is only added up until the last
    part; for an empty batch, where there is nothing to run ``fn`` on, noise alone is released.

    At a first step, on another way through the model and in spot checks the self-check runs ``fn`` several times more, on parts
    of the batch; the model and the generators are put back afterwards, but not what ``fn`` does elsewhere (counters, logs).
    :func:`dp_hooks.checking` is True in those runs.

    Args:
        fn: a plain function. It returns per-sample losses ``[n]`` (recommended: nothing can be coupled through the
            reduction) or a scalar.
        reduction: what ``fn`` returns: "none" for per-sample losses, "mean" or "sum" for a scalar; "auto" takes a vector as
            per-sample losses, and a scalar as reduced the way the scope declares (``loss_reduction``).
        two_pass: keep nothing of a layer beyond its own backward: norms are taken in one backward pass, and sums in a
            second one over the same graph. Memory stays that of the ordinary step, for the price of another backward pass. For
            models whose memory is mostly activations: gradient checkpointing, long sequences. In mode "ghost" only.

    Returns:
        A function with the signature of ``fn`` that returns its loss, detached; zero (or an empty vector) for an empty batch.

    Raises:
        InvalidArgumentError: on decoration, for classes, generators and coroutines; on call, if ``fn`` returns
            something else than a loss.
        ScopeError: on call, if no scope over ``model`` is open: never a silent step without privacy.
    """
    one_of("reduction", reduction, ("auto", "none", "mean", "sum"))
    boolean("two_pass", two_pass)
    if fn is None:
        return functools.partial(_decorate, reduction=reduction, two_pass=two_pass)
    return _decorate(fn, reduction=reduction, two_pass=two_pass)


def _decorate(fn: Callable[..., Tensor], *, reduction: Reduction, two_pass: bool) -> Callable[..., Tensor]:
    _check_function(fn)
    shape_seen: list[bool] = []

    @functools.wraps(fn)
    def step(model: Any, batch: Any, *args: Any, **kwargs: Any) -> Tensor:
        scope = open_scopes.innermost(uncompiled(model))
        if scope is None or scope.optimizer is None:
            raise ScopeError(
                f"{_name(fn)}() is a private train step, but no private_training scope over this model is open here. Call it "
                "inside `with private_training(model, ...) as (opt, loader):`, with that same model as first argument."
                + ("" if isinstance(model, nn.Module) else f" {_NO_MODEL.format(type(model).__name__)}")
            )
        optimizer, controller = scope.optimizer, scope.controller
        assert controller is not None  # the scope is open
        if two_pass and scope.grad_sample_mode != "ghost":
            raise bad(
                "two_pass",
                True,
                f'grad_sample_mode={scope.grad_sample_mode!r} is there to keep what it saves. Use "ghost", or leave it out.',
            )
        optimizer.zero_grad()
        drawn = optimizer.physical_batch
        if (drawn is not None and drawn.size == 0) or _has_no_rows(batch, controller.axis):
            optimizer.step_empty()
            return torch.zeros(0 if shape_seen and shape_seen[-1] else (), device=optimizer.params[0].device)

        def run(part: Any) -> Tensor:
            trace = controller.session.trace if controller.hooks_enabled else None
            with nullcontext() if trace is None else trace.function():
                return _checked(fn, fn(model, part, *args, **kwargs), reduction)

        def how_reduced(loss: Tensor) -> str:
            return scope.loss_reduction if loss.dim() == 1 or reduction == "auto" else reduction

        def back(loss: Tensor, *, again: bool) -> None:
            how = how_reduced(loss)
            with controller.reduced_by(how):
                _reduced(loss, how).backward(retain_graph=again)

        check = scope.self_check
        spare = batch
        if check is not None:
            check.new_step()  # nothing of an earlier step that was broken off
            # fn may consume its batch
            spare = private_copy(batch) if check.armed else tree_map(lambda leaf: leaf, batch)
        with (
            _dropped_on_error(controller),
            controller.two_passes(lambda: back(loss, again=False)) if two_pass else nullcontext(),
            nullcontext() if check is None else check.deferred(),
        ):
            with optimizer.outside.of(losses := []):
                loss = run(batch)
                losses.append(loss)
                if not loss.requires_grad:
                    raise InvalidArgumentError(
                        f"{_name(fn)}() returned a loss that no gradient can come from: it was detached, computed under "
                        "torch.no_grad(), or back-propagated in the function. Return it as it is; the step back-propagates it."
                    )
                shape_seen[:] = [loss.dim() == 1]
                back(loss, again=two_pass)
            samples = controller.samples
            if loss.dim() == 1 and samples and len(loss) != samples:
                raise InvalidArgumentError(
                    f"{_name(fn)}() returned {len(loss)} losses for {samples} samples; return one for each sample, in order."
                )
            needed = check is not None and check.needed_for_function(samples)
            if needed:
                optimizer.outside.look_inside(loss)

            def verify(norms: Tensor | None) -> None:
                assert check is not None
                with _explained(fn, samples, controller.axis, (args, kwargs)), controller.reduced_by(how_reduced(loss)):
                    _self_check(check, run, spare, samples, controller.axis, norms)

            with optimizer.checked_by(verify if needed else None):
                optimizer.step()
        return loss.detach()

    return step


@contextmanager
def _dropped_on_error(controller: HookController) -> Iterator[None]:
    """A step that fails leaves no gradients of its samples behind."""
    try:
        yield
    except BaseException:
        controller.discard()
        raise


_NO_MODEL = "(It was a {}: dp_step is for functions of a model and a batch. A method can call such a function.)"


@contextmanager
def _explained(fn: Any, samples: int, axis: int, further: Any) -> Iterator[None]:
    """Say in an error of the self-check what may be its cause: rows of examples in arguments that are not taken apart."""
    try:
        yield
    except SelfCheckError as error:
        if any(t.dim() > axis and t.shape[axis] == samples for t in tensors_of(further)):
            raise SelfCheckError(
                f"{error}\n(A tensor with {samples} rows came to {_name(fn)}() in an argument after the batch. Only the batch is "
                "taken apart by examples: pass all that belongs to them in it, as one tuple or dictionary.)"
            ) from error
        raise


def _name(fn: Any) -> str:
    return getattr(fn, "__qualname__", repr(fn))


def _check_function(fn: Any) -> None:
    reasons = (
        (inspect.isclass(fn), "it is a class; decorate a function that runs the model and returns the loss"),
        (isinstance(fn, (staticmethod, classmethod)), "put @staticmethod above @dp_step, not below"),
        (not callable(fn), "it is not a function"),
        (
            inspect.isgeneratorfunction(fn) or inspect.isasyncgenfunction(fn),
            "it is a generator; one call must be one step. Return the loss instead of yielding",
        ),
        (inspect.iscoroutinefunction(fn), "it is a coroutine; a step cannot be suspended half-way. Use a plain function"),
    )
    for wrong, reason in reasons:
        if wrong:
            raise InvalidArgumentError(f"fn={_name(fn)} cannot be decorated with dp_step: {reason}.")


def _has_no_rows(batch: Any, axis: int) -> bool:
    sizes = [t.shape[axis] for t in tensors_of(batch) if t.dim() > axis]
    return bool(sizes) and not any(sizes)


def _reduced(loss: Tensor, how: str) -> Tensor:
    if loss.dim() == 0:
        return loss
    return loss.mean() if how == "mean" else loss.sum()


def _self_check(check: SelfCheck, run: Callable[[Any], Tensor], batch: Any, samples: int, axis: int, norms: Tensor | None) -> None:
    def some(rows: Tensor | None) -> Tensor:
        return run(private_copy(batch if rows is None else rows_of(batch, rows, samples, axis)))

    check.check_loss(samples, some, norms)


def _checked(fn: Any, loss: Any, reduction: Reduction) -> Tensor:
    if not isinstance(loss, Tensor) or not loss.is_floating_point():
        raise InvalidArgumentError(
            f"{_name(fn)}() returned {type(loss).__name__}; a dp_step function returns its loss as a tensor: per-sample "
            "losses [n] or a scalar."
        )
    wanted = {"none": (1,), "mean": (0,), "sum": (0,), "auto": (0, 1)}[reduction]
    if loss.dim() not in wanted:
        raise InvalidArgumentError(
            f"{_name(fn)}() returned a loss of shape {tuple(loss.shape)}; with reduction={reduction!r} expected "
            f"{' or '.join('[n]' if d else 'a scalar' for d in wanted)}. Average token losses within each sample first."
        )
    return loss
