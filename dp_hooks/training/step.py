"""dp_step: a train function that takes a whole private step."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Concatenate, Literal, Protocol, get_origin, overload

import torch
from torch import Tensor
from typing_extensions import ParamSpec, TypeVar

from .._tree import tensors_of, tree_map
from .._validate import bad, boolean, one_of
from ..capture.controller import HookController
from ..checks.self_check import SelfCheck
from ..errors import InvalidArgumentError, SelfCheckError
from .batch_rows import copy_of_batch, not_looked_into, rows_of_batch
from .step_call import Named, StepCall, check_named, name_of

P = ParamSpec("P")
First = TypeVar("First")
Second = TypeVar("Second")
Aux = TypeVar("Aux")
StepFunction = Callable[Concatenate[First, Second, P], Tensor]
AuxFunction = Callable[Concatenate[First, Second, P], tuple[Tensor, Aux]]
AuxStep = Callable[Concatenate[First, Second, P], tuple[Tensor, Aux | None]]
Reduction = Literal["auto", "none", "mean", "sum"]


class Decorator(Protocol):
    """What ``dp_step(...)`` with options returns."""

    @overload
    def __call__(self, fn: StepFunction[First, Second, P], /) -> StepFunction[First, Second, P]: ...
    @overload
    def __call__(self, fn: AuxFunction[First, Second, P, Aux], /) -> AuxStep[First, Second, P, Aux]: ...


@overload
def dp_step(fn: StepFunction[First, Second, P], /) -> StepFunction[First, Second, P]: ...
@overload
def dp_step(fn: AuxFunction[First, Second, P, Aux], /) -> AuxStep[First, Second, P, Aux]: ...
@overload
def dp_step(*, reduction: Reduction = "auto", two_pass: bool = False, scope: Named | None = None) -> Decorator: ...
def dp_step(fn: Any = None, /, *, reduction: Reduction = "auto", two_pass: bool = False, scope: Named | None = None) -> Any:
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

    The batch is the argument after the model, of any structure: tensors, NumPy arrays, lists with an entry per sample, in
    tuples, mappings, dataclasses and attributes of objects. The scope may have been opened in another thread; two threads that
    step, or run, one model at the same time are refused.

    Args:
        fn: a plain function, or a method ``fn(self, model, batch)``; ``@staticmethod`` and ``@classmethod`` stand above. It returns
            per-sample losses ``[n]`` (recommended: nothing can be coupled through the reduction) or a scalar; or
            ``(loss, aux)``, with whatever else it has to say. Like the loss, aux is not private.
        reduction: what ``fn`` returns: "none" for per-sample losses, "mean" or "sum" for a scalar; "auto" takes a vector as
            per-sample losses, and a scalar as reduced the way the scope declares (``loss_reduction``).
        two_pass: keep nothing of a layer beyond its own backward: norms are taken in one backward pass, and sums in a
            second one over the same graph. Memory stays that of the ordinary step, for the price of another backward pass. For
            models whose memory is mostly activations: gradient checkpointing, long sequences. In mode "ghost" only.
        scope: what ``private_training(...)`` returned, or a function that returns it, for functions decorated before it is there.
            Then that scope is stepped, and the first argument may be anything (several models, of which one is private); the batch
            comes after it, and after further models.

    Returns:
        A function with the signature of ``fn`` that returns its loss, detached; zero (or an empty vector) for an empty batch.
        If ``fn`` returns ``(loss, aux)``: the detached loss, and aux with the tensors in its containers detached; None in the
        place of aux for an empty batch. (If the very first batch is empty, the annotation ``-> tuple[...]`` tells of aux.)

    Raises:
        InvalidArgumentError: on decoration, for classes, generators and coroutines; on call, if ``fn`` returns
            something else than a loss, or the batch is not where it has to be.
        ScopeError: on call, if no scope over ``model`` (or not the one named) is open: never a silent step without privacy.
    """
    one_of("reduction", reduction, ("auto", "none", "mean", "sum"))
    boolean("two_pass", two_pass)
    check_named(scope)
    if fn is None:
        return functools.partial(_decorate, reduction=reduction, two_pass=two_pass, named=scope)
    return _decorate(fn, reduction=reduction, two_pass=two_pass, named=scope)


@dataclass
class _Form:
    """What a function returned last, to make the same of an empty batch."""

    vector: bool = False
    aux: bool = False


def _decorate(fn: Callable[..., Any], *, reduction: Reduction, two_pass: bool, named: Named | None) -> Callable[..., Any]:
    _check_function(fn)
    form = _Form(aux=_says_tuple(getattr(fn, "__annotations__", {}).get("return")))

    @functools.wraps(fn)
    def step(*args: Any, **kwargs: Any) -> Any:
        call = StepCall.of(fn, named, args, kwargs)
        assert call.scope.controller is not None  # the scope is open
        with call.scope.controller.session.threads.step():
            return _take(call, form, reduction, two_pass)

    step.is_dp_step = True  # type: ignore[attr-defined]
    return step


def is_dp_step(fn: object) -> bool:
    """Whether ``fn``, or the method that it is, was decorated with :func:`dp_step`."""
    return getattr(fn, "is_dp_step", False) is True


def _take(call: StepCall, form: _Form, reduction: Reduction, two_pass: bool) -> Any:
    """Take the step of one call."""
    fn, scope, batch = call.fn, call.scope, call.batch
    optimizer, controller = scope.optimizer, scope.controller
    assert optimizer is not None
    assert controller is not None
    if two_pass and scope.grad_sample_mode != "ghost":
        raise bad(
            "two_pass",
            True,
            f'grad_sample_mode={scope.grad_sample_mode!r} is there to keep what it saves. Use "ghost", or leave it out.',
        )
    if two_pass and optimizer.by_units:
        what = "norms over the examples of a unit (privacy_unit=) are not taken in two passes yet. Leave it out, and set a smaller "
        raise bad("two_pass", True, what + "max_physical_batch_size in the scope.")
    optimizer.zero_grad()
    drawn = optimizer.physical_batch
    if (drawn is not None and drawn.size == 0) or _has_no_rows(batch, controller.axis):
        optimizer.step_empty()
        nothing = torch.zeros(0 if form.vector else (), device=optimizer.params[0].device)
        return (nothing, None) if form.aux else nothing

    def run(part: Any, shared_by: int = 1) -> tuple[Tensor, tuple[Any, ...]]:
        trace = controller.session.trace if controller.hooks_enabled else None
        with nullcontext() if trace is None else trace.function():
            loss, aux = _checked(fn, call.on(part), reduction)
        return optimizer.loss_scale.multiplied(loss, shared_by), aux

    def how_reduced(loss: Tensor) -> str:
        # Divided by the number of rows, gradients in low precision would round otherwise when one example is missing: of a thousand
        # alike that moves the sum by twice the bound. Added up, a row's gradient is its own. (With a scale, float16 has no room.)
        if loss.dim() == 1 and not optimizer.loss_scale.is_held:
            return "sum"
        return scope.loss_reduction if loss.dim() == 1 or reduction == "auto" else reduction

    def back(loss: Tensor, *, again: bool) -> None:
        how = how_reduced(loss)
        with controller.reduced_by(how):
            optimizer.loss_scale.note(_reduced(loss, how)).backward(retain_graph=again)

    check = scope.self_check
    spare = batch
    if check is not None:
        check.new_step()  # nothing of an earlier step that was broken off
        spare = copy_of_batch(batch, tensors=check.armed)  # fn may consume its batch
    with (
        _dropped_on_error(controller),
        controller.two_passes(lambda: back(loss, again=False)) if two_pass else nullcontext(),
        nullcontext() if check is None else check.deferred(),
    ):
        with optimizer.outside.of(losses := []):
            loss, aux = run(batch)
            losses.append(loss)
            if not loss.requires_grad:
                raise InvalidArgumentError(
                    f"{name_of(fn)}() returned a loss that no gradient can come from: it was detached, computed under "
                    "torch.no_grad(), or back-propagated in the function. Return it as it is; the step back-propagates it."
                )
            form.vector, form.aux = loss.dim() == 1, bool(aux)
            back(loss, again=two_pass)
        samples = controller.samples
        if loss.dim() == 1 and samples and len(loss) != samples:
            raise InvalidArgumentError(
                f"{name_of(fn)}() returned {len(loss)} losses for {samples} samples; return one for each sample, in order."
            )
        needed = check is not None and check.needed_for_function(samples)
        if needed:
            optimizer.outside.look_inside(loss)

        def verify(norms: Tensor | None) -> None:
            assert check is not None
            how = how_reduced(loss)
            shared_by = samples if how == "mean" else 1  # the check adds up what is a mean in the step: float16 has room for that
            with _explained(call, samples, controller.axis), controller.reduced_by(how):
                _self_check(check, lambda part: run(part, shared_by)[0], spare, samples, controller.axis, norms)

        with optimizer.checked_by(verify if needed else None):
            optimizer.step()
    loss = optimizer.loss_scale.divided(loss.detach())
    returned = (loss, *aux)
    return tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, returned) if aux else loss


@contextmanager
def _dropped_on_error(controller: HookController) -> Iterator[None]:
    """A step that fails leaves no gradients of its samples behind."""
    try:
        yield
    except BaseException:
        controller.discard()
        raise


@contextmanager
def _explained(call: StepCall, samples: int, axis: int) -> Iterator[None]:
    """Say in an error of the self-check what may be its cause: rows of examples where nothing is taken apart."""
    try:
        yield
    except SelfCheckError as error:
        if any(t.dim() > axis and t.shape[axis] == samples for t in tensors_of(call.others)):
            raise SelfCheckError(
                f"{error}\n(A tensor with {samples} rows came to {name_of(call.fn)}() in an argument after the batch. Only the "
                "batch is taken apart by examples: pass all that belongs to them in it, as one tuple or dictionary.)"
            ) from error
        if closed := not_looked_into(call.batch):
            raise SelfCheckError(
                f"{error}\n(In the batch is a {' and a '.join(sorted(closed))}, in which no examples were found to take apart: let "
                "the loader yield tensors, arrays and lists, in tuples, dictionaries, dataclasses or attributes.)"
            ) from error
        raise


def _says_tuple(annotation: Any) -> bool:
    if isinstance(annotation, str):
        return annotation.replace("typing.", "").lower().startswith("tuple[")
    return get_origin(annotation) is tuple


def _check_function(fn: Any) -> None:
    reasons = (
        (inspect.isclass(fn), "it is a class; decorate a function that runs the model and returns the loss"),
        (isinstance(fn, (staticmethod, classmethod)), "put @staticmethod or @classmethod above @dp_step, not below"),
        (not callable(fn), "it is not a function"),
        (
            inspect.isgeneratorfunction(fn) or inspect.isasyncgenfunction(fn),
            "it is a generator; one call must be one step. Return the loss instead of yielding",
        ),
        (inspect.iscoroutinefunction(fn), "it is a coroutine; a step cannot be suspended half-way. Use a plain function"),
    )
    for wrong, reason in reasons:
        if wrong:
            raise InvalidArgumentError(f"fn={name_of(fn)} cannot be decorated with dp_step: {reason}.")


def _has_no_rows(batch: Any, axis: int) -> bool:
    sizes = [t.shape[axis] for t in tensors_of(batch) if t.dim() > axis]
    return bool(sizes) and not any(sizes)


def _reduced(loss: Tensor, how: str) -> Tensor:
    if loss.dim() == 0:
        return loss
    return loss.mean() if how == "mean" else loss.sum()


def _self_check(check: SelfCheck, run: Callable[[Any], Tensor], batch: Any, samples: int, axis: int, norms: Tensor | None) -> None:
    def some(rows: Tensor | None) -> Tensor:
        return run(copy_of_batch(batch) if rows is None else rows_of_batch(batch, rows, samples, axis))

    check.check_loss(samples, some, norms)


def _checked(fn: Any, out: Any, reduction: Reduction) -> tuple[Tensor, tuple[Any, ...]]:
    """Return the loss, and aux: one thing or none."""
    loss, *aux = out if isinstance(out, tuple) and len(out) == 2 else (out,)
    if not isinstance(loss, Tensor) or not loss.is_floating_point():
        what = f"({type(loss).__name__}, aux)" if aux else type(loss).__name__
        raise InvalidArgumentError(
            f"{name_of(fn)}() returned {what}; a dp_step function returns its loss as a tensor, or (loss, aux): per-sample "
            "losses [n] or a scalar."
        )
    wanted = {"none": (1,), "mean": (0,), "sum": (0,), "auto": (0, 1)}[reduction]
    if loss.dim() not in wanted:
        raise InvalidArgumentError(
            f"{name_of(fn)}() returned a loss of shape {tuple(loss.shape)}; with reduction={reduction!r} expected "
            f"{' or '.join('[n]' if d else 'a scalar' for d in wanted)}. Average token losses within each sample first."
        )
    return loss, tuple(aux)
