"""The laws of per-sample gradients, each a function of a case and a mode: what holds for every model in every mode."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dp_hooks import HookController, dp_step
from dp_hooks.errors import SelfCheckError, UnsupportedModelError
from dp_hooks.gradients import joined, terms
from dp_hooks.gradients.sample_gradients import SampleGradients

from .cases import Case
from .models import loader_of, moved, norm_of, put, scope_over, values
from .reference import by_name, clipped_sum, losses_of, rows_by_backward, sample_grads
from .snapshot import Snapshot

Losses = Callable[..., Tensor]
Step = Callable[[Any, Any, Any], Any]
Grads = dict[str, Tensor]


@dataclass(frozen=True)
class Mode:
    """A way to come by clipped gradients; a new one is one row of ``MODES``."""

    name: str
    grad_sample_mode: str
    two_pass: bool = False
    deferred: bool = False  # norms and sums come from captured tensors: nothing is written out in the backward pass

    def __str__(self) -> str:
        return self.name

    @contextmanager
    def on(self) -> Iterator[str]:
        """Switch to this mode; gives the ``grad_sample_mode`` to ask for."""
        with pytest.MonkeyPatch.context() as patch:
            if self.deferred:
                patch.setattr(terms, "_GENEROSITY", 0)
                patch.setattr(joined, "_SMALL", {"cpu": -1})
            yield self.grad_sample_mode


MODES = [
    Mode("ghost", "ghost"),
    Mode("deferred", "ghost", deferred=True),
    Mode("hooks", "hooks"),
    Mode("functorch", "functorch"),
    Mode("two-pass", "ghost", two_pass=True),
]
MODE = {mode.name: mode for mode in MODES}


@contextmanager
def attached(model: nn.Module, mode: Mode, **options: object) -> Iterator[HookController]:
    """A controller over ``model``."""
    with mode.on() as name:
        controller = HookController(model, grad_sample_mode=name, **options)  # type: ignore[arg-type]
        try:
            yield controller
        finally:
            controller.cleanup()


@contextmanager
def captured(controller: HookController, mode: Mode, losses: Callable[[], Tensor]) -> Iterator[SampleGradients]:
    """Back-propagate ``losses()``, reduced as is declared, and give what was captured; two passes give one sum of it."""
    with controller.two_passes(lambda: loss.backward()) if mode.two_pass else nullcontext():
        values = losses()
        loss = values.sum() / (1 if controller.loss_reduction == "sum" else max(1, len(values)))
        loss.backward(retain_graph=mode.two_pass)
        written = {p: p.grad_sample for p in controller.params if hasattr(p, "grad_sample")}
        found = controller.take()
        assert found is not None
        assert written.keys() >= set(found.params if mode.grad_sample_mode != "ghost" else ())
        for p in written.keys() & set(found.params):
            torch.testing.assert_close(written[p], found.grads(p), rtol=0, atol=0, equal_nan=True)
        yield found


def step_in(mode: Mode, losses: Losses = losses_of) -> Step:
    """Return ``step(model, opt, batch)`` on the mean of ``losses(model, *batch)``: bare, or by a train function."""
    whole = dp_step(lambda model, batch: losses(model, *batch), two_pass=True)

    def step(model: nn.Module, opt: Any, batch: Any) -> None:
        if mode.two_pass:
            whole(model, batch)
            return
        opt.zero_grad()
        losses(model, *batch).mean().backward()
        opt.step()

    return step


def assert_close(found: Grads, expected: Grads, tolerance: float) -> None:
    """Compare gradients, or what comes of them, name by name."""
    assert found.keys() == expected.keys()
    near = {"rtol": tolerance, "atol": tolerance / 10}
    for name, want in expected.items():
        have = found[name]
        if (have.shape, have.dtype, have.layout) != (want.shape, want.dtype, want.layout) or not torch.allclose(have, want, **near):
            torch.testing.assert_close(have, want, **near, msg=lambda m, n=name: f"{n}: {m}")  # slower, and says where


def agrees(
    controller: HookController,
    mode: Mode,
    losses: Callable[[], Tensor],
    expected: Grads,
    tolerance: float = 1e-8,
    *,
    one_by_one: bool = False,
) -> None:
    """Gradients, their squared norms and their weighted sums, of all samples and of some, are those of ``expected``.

    Of a parameter that the loss does not reach there may be nothing instead of zeros. Two passes write no gradients out;
    ``one_by_one``, they are told by sums of one sample each.
    """

    def close(found: Mapping[nn.Parameter, Tensor], wanted: Grads) -> None:
        unused = {name: torch.zeros_like(want) for name, want in wanted.items()}
        assert_close(unused | {controller.name_of(p): t for p, t in found.items()}, wanted, tolerance)

    n = len(next(iter(expected.values())))
    factors, everyone = torch.linspace(0.1, 1.0, n, dtype=torch.float64), torch.ones(n, dtype=torch.bool)
    weighed = [(factors, everyone), (factors, torch.arange(n) != 1)]
    if mode.two_pass and one_by_one:
        weighed += [(one, everyone) for one in torch.eye(n, dtype=torch.float64)]
    while weighed:
        with captured(controller, mode, losses) as found:
            assert found.samples == n
            norms = {k: g.reshape(n, g[0:1].numel()).abs().square().sum(1) for k, g in expected.items()}
            close(found.sq_norms(found.params), norms)
            if found.params:
                (joint,) = found.group_sq_norms([found.params])  # the first sum after it is made of what it has joined
                torch.testing.assert_close(joint.double(), sum(norms.values()).double(), rtol=tolerance, atol=tolerance / 10)  # type: ignore[union-attr]
            for rows in [] if mode.two_pass else [slice(None), slice(n // 3, n), torch.arange(n - 1, -1, -2)]:
                close({p: found.grads(p, rows) for p in found.params}, {k: g[rows] for k, g in expected.items()})
            for _ in range(1 if mode.two_pass else len(weighed)):
                weights, finite = weighed.pop()
                sums = found.weighted_sums(dict.fromkeys(found.params, weights), finite)
                close(sums, {k: torch.tensordot(weights[finite].to(g.dtype), g[finite], 1) for k, g in expected.items()})
    assert all(p.grad is None for p in controller.params)


def released(
    model: nn.Module, data: list[Tensor], step: Step | None = None, mode: Mode = MODE["ghost"], **options: Any
) -> Exception | None:
    """Take one step on all of ``data``; return what it was refused with, after seeing that it moved and charged all or nothing."""
    start, step, error = values(model), step or step_in(mode), None
    options = {"max_grad_norm": 1.0, "poisson_sampling": True, "accountant": "rdp", **options}
    with mode.on() as name:
        scope = scope_over(model, loader=loader_of(data), grad_sample_mode=name, **options)
        with scope as (opt, loader):
            for batch in loader:
                try:
                    step(model, opt, batch)
                except (SelfCheckError, UnsupportedModelError) as caught:
                    error = caught
    still = all(torch.equal(a, b) for a, b in zip(start, values(model), strict=True))
    assert still == (error is not None)
    assert scope.steps == (error is None)
    if error is not None:
        assert not scope.accountant.history
        assert not scope.report().loss_verified
        assert all(p.grad is None and "grad_sample" not in vars(p) for p in model.parameters())
    return error


def gradients_are_those_of_single_samples(case: Case, mode: Mode) -> None:
    """What is captured of a batch is what plain autograd gives for each sample alone, and nothing is left of the capture.

    A gradient of NaN changes nothing but its own sample's contribution, which is left out by selection.
    """
    model, batch = case.made()
    own, expected = list(model.parameters()), sample_grads(model, case.loss, *batch)
    before = Snapshot(model)
    with attached(model, mode) as controller:
        agrees(controller, mode, lambda: case.loss(model, *batch), expected, case.tolerance, one_by_one=True)
        assert all(a is b for a, b in zip(own, model.parameters(), strict=True))
        finite = torch.tensor([True, True, False])
        weights = torch.where(finite, 1.0, torch.nan).double()
        with captured(controller, mode, lambda: case.loss(model, *batch) * weights) as found:
            norms = torch.stack(list(found.sq_norms(found.params).values()))
            assert norms.isfinite().all(0).tolist() == finite.tolist()
            sums = found.weighted_sums(dict.fromkeys(found.params, torch.ones_like(weights)), finite)
        sums = {controller.name_of(p): s for p, s in sums.items()}
        assert_close(sums, {name: g[:2].sum(0) for name, g in expected.items()}, case.tolerance)
    assert before.differences() == []


def frozen_parts_change_nothing(case: Case, mode: Mode) -> None:
    """With every other parameter frozen, the rest have the gradients that they have without it.

    Both halves are frozen in mode "ghost"; the other modes, which capture alike, take one of them in turn.
    """
    model, batch = case.made()
    params = [p for p in model.parameters() if p.requires_grad]
    halves = [params[1::2], params[0::2]] if len(params) > 1 else []
    for frozen in halves if mode.name == "ghost" else halves[MODES.index(mode) % 2 :][:1]:
        for p in params:
            p.requires_grad_(all(p is not other for other in frozen))
        expected = sample_grads(model, case.loss, *batch)
        with attached(model, mode) as controller:
            agrees(controller, mode, lambda: case.loss(model, *batch), expected, case.tolerance)


def any_size_is_right_after_the_first(case: Case, mode: Mode) -> None:
    """What was learned on the first batch, here of one sample, holds for batches of none and of more."""
    model, batch = case.made()
    sizes = [size for size in (1, 0, 4) if size or case.empty]
    batches = [[torch.cat([part] * 2)[:size].roll(size, -1) for part in batch] for size in sizes]
    expected = [sample_grads(model, case.loss, *parts) for parts in batches]
    if not case.empty:
        with pytest.raises((RuntimeError, IndexError, ValueError)):
            case.loss(model, *(part[:0] for part in batch))
    with attached(model, mode) as controller:
        for parts, wanted in zip(batches, expected, strict=True):
            agrees(controller, mode, lambda parts=parts: case.loss(model, *parts), wanted, case.tolerance)


def nothing_comes_of_a_batch_without_a_finite_sample(case: Case, mode: Mode) -> None:
    """Where every sample is left out, as one that is alone may be, sums are zero."""
    model, batch = case.made()
    with attached(model, mode) as controller:
        with captured(controller, mode, lambda: case.loss(model, *batch) * torch.nan) as found:
            ones, none = torch.ones(len(batch[0]), dtype=torch.float64), torch.zeros(len(batch[0]), dtype=torch.bool)
            sums = found.weighted_sums(dict.fromkeys(found.params, ones), none)
        assert not any(total.any() for total in sums.values())


def a_step_moves_by_the_clipped_sum(case: Case, mode: Mode) -> None:
    """Without noise, SGD with rate 1 moves by the mean of clipped gradients, also when one is missing: by C and no more.

    Parameters are the user's own all the time, and after the scope everything is as it was: plain training goes on. The first step
    checks itself in mode "ghost"; of the other modes, which are checked alike, one does in turn.
    """
    model, batch = case.made()

    def plain_gradients() -> Grads:
        return by_name(model, rows_by_backward(model, [case.loss(model, *batch).sum()]))

    plain, grads = plain_gradients(), sample_grads(model, case.loss, *batch)
    norms = torch.stack([g.reshape(len(g), -1).abs().square().sum(1) for g in grads.values()]).sum(0).sqrt()
    order, bound, n = norms.argsort(descending=True), float(norms.median()), len(norms)
    data = [torch.cat([part[order], part[order[1:]]]) for part in batch]  # all, then all but the one with most to clip
    own = [(name, id(p), p.requires_grad) for name, p in model.named_parameters()]

    def losses(model: nn.Module, *parts: Tensor) -> Tensor:
        found = case.loss(model, *parts)
        assert [(name, id(p), p.requires_grad) for name, p in model.named_parameters()] == own
        assert all(p.grad is None for p in model.parameters())
        return found

    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before, start, moves, step = Snapshot(model, optimizer), values(model), [], step_in(mode, losses)
    with mode.on() as way:
        checked = mode.name == "ghost" or mode is MODES[1:][zlib.crc32(str(case).encode()) % (len(MODES) - 1)]
        options = {"max_grad_norm": bound, "grad_sample_mode": way, "self_check": checked}
        scope = scope_over(model, optimizer=optimizer, loader=loader_of(data, n), **options)
        with scope as (opt, loader):
            for part, kept in zip(loader, (order, order[1:]), strict=True):
                step(model, opt, part)
                assert all(type(p) is nn.Parameter for p in model.parameters())
                moves.append([n * m for m in moved(start, model)])
                wanted = clipped_sum({k: g[kept] for k, g in grads.items()}, bound)
                for (name, _, _), move in zip(own, moves[-1], strict=True):
                    want = wanted.get(name, torch.zeros_like(move))  # nothing, of what is frozen
                    torch.testing.assert_close(move, want, rtol=max(1e-6, case.tolerance), atol=case.tolerance / 10)
                assert norm_of(moves[-1]) <= len(kept) * bound * 1.001
                put(model, start)
    assert 0.999 * bound <= norm_of([a - b for a, b in zip(*moves, strict=True)]) <= 1.001 * bound
    assert before.differences() == []
    assert_close(plain_gradients(), plain, case.tolerance)


LAWS = [
    gradients_are_those_of_single_samples,
    frozen_parts_change_nothing,
    any_size_is_right_after_the_first,
    nothing_comes_of_a_batch_without_a_finite_sample,
    a_step_moves_by_the_clipped_sum,
]
