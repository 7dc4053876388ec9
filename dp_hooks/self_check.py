"""The library checks itself: its per-sample gradients against plain autograd on single samples, before anything is released."""

import random
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ._tree import tensors_of, tree_map
from .errors import DPHooksError, SelfCheckError
from .gradients import SampleGradients
from .hook_controller import HookController
from .slots import attributes_kept

# How many samples of a batch are run alone. All of them are in the batched run that they are compared with.
_ALONE = 4
# How many outermost calls are remembered: those of one step, in practice one or two.
_CALLS = 8
# Largest disagreement relative to the gradient of a parameter, or to a hundredth of the sample's whole gradient where
# the parameter's own is smaller. Rounding stays well below; a mixed-up or missing sample is far above.
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-2}
_COARSE = 1e-1


class _NoDropout(TorchFunctionMode):
    """Replaces dropout by the identity. ``eval()`` would do that too, but would also hide BatchNorm's batch statistics."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name.rstrip("_").endswith("dropout") or name in ("dropout1d", "dropout2d", "dropout3d"):
            return args[0] if args else kwargs["input"]
        if name == "scaled_dot_product_attention":
            args = (*args[:4], 0.0, *args[5:]) if len(args) > 4 else args
            kwargs.pop("dropout_p", None)
        if name == "bernoulli_":  # stochastic depth: keep probability p, divided by p afterwards
            return args[0].fill_(args[1] if len(args) > 1 else kwargs.get("p", 0.5))
        if name == "bernoulli":
            return args[0].clone()
        return func(*args, **kwargs)


@dataclass(eq=False)
class _Observed:
    module: nn.Module
    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class SelfCheck:
    """Compares, on real inputs, what the controller captures with single-sample autograd; leaves no trace.

    A batch with one sample can only show that values are right, one with several also that samples do not mix:
    neither kind is released before it has been checked once. Random state, buffers, gradients and everything captured
    for the step in progress are the same afterwards. Cost: one more pass over the batch and up to four over single
    samples, once.
    """

    def __init__(
        self,
        controller: HookController,
        model: nn.Module,
        params: list[nn.Parameter],
        criterion: nn.Module | None = None,
    ) -> None:
        """Check the gradients of ``params`` that ``controller`` captures on ``model``, and those of ``criterion``."""
        self._criterion = criterion
        self._controller = controller
        self._model = model
        self._params = params
        self._checked: set[str] = set()
        self._observed: deque[_Observed] = deque(maxlen=_CALLS)
        self._depth = 0
        self._hooks = ExitStack()
        self._busy = False
        self._criterion_call: tuple[Any, Any] | None = None
        self.loss_verified = False

    # ---------------------------------------------------------------- watching

    def watch(self, stack: ExitStack) -> None:
        """Observe outermost calls into the model until checked, or until ``stack`` unwinds."""
        stack.callback(self._unwatch)
        if self._criterion is not None:
            handle = self._criterion.register_forward_hook(self._observe_criterion, with_kwargs=True)
            self._hooks.callback(handle.remove)
        for name, module in self._model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue  # accepts no hooks; has nothing trainable, or the model would have been refused
            self._controller.attach(self._hooks, module, self._before(name), self._after, outer=True)

    def _unwatch(self) -> None:
        self._observed.clear()
        self._hooks.__exit__(*sys.exc_info())  # keeps what is being handled in the context of what goes wrong here

    def _before(self, name: str) -> Callable[..., None]:
        def observe(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._busy or torch._C._current_graph_task_id() != -1:
                return
            self._depth += 1
            if self._depth == 1 and torch.is_grad_enabled():
                copied = tree_map(_private_copy, (args, kwargs))
                self._observed.append(_Observed(module, name, *copied))

        return observe

    def _after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if not self._busy and torch._C._current_graph_task_id() == -1:
            self._depth = max(0, self._depth - 1)

    def _observe_criterion(self, criterion: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if not self._busy and torch.is_grad_enabled():
            self._criterion_call = tree_map(_private_copy, (args, kwargs))

    def new_step(self) -> None:
        """Forget calls observed before a boundary."""
        self._observed.clear()
        self._criterion_call = None
        self._depth = 0

    # ---------------------------------------------------------------- checking

    def needed(self, samples: int) -> bool:
        """Whether a batch of this size may not be released before a check."""
        return samples > 0 and not self._busy and ("one" if samples == 1 else "many") not in self._checked

    def check_calls(self, samples: int) -> None:
        """Check every outermost call observed since the last boundary, with random cotangents on its outputs.

        Raises:
            SelfCheckError: a disagreement, or a check that could not be made.
        """
        calls = [call for call in self._observed if self._has_rows(call, samples)]
        if not calls:
            raise SelfCheckError(
                "the self-check saw no call into the model before this step, so nothing could be compared. Run the model "
                "inside the scope, in one process, with gradients enabled."
            )
        compared = 0
        for call in calls:
            compared += self._compare(
                samples,
                lambda call=call: self._loss_of_call(call, samples, None),  # type: ignore[misc]
                lambda i, call=call: self._loss_of_call(call, samples, i),  # type: ignore[misc]
                call.name or "the model",
            )
        if not compared:
            raise SelfCheckError(
                "no output of the model could be compared in the self-check: none has a row per sample or is a scalar loss. "
                "Remedy: declare the sample axis (batch_first), or train with a @dp_step function, which is checked whole."
            )
        if self._criterion is not None:
            self._check_criterion(samples)
        self._passed(samples)
        self.loss_verified = self._criterion is not None and "many" in self._checked

    def _has_rows(self, call: _Observed, samples: int) -> bool:
        axis = self._controller.axis
        return any(t.dim() > axis and t.shape[axis] == samples for t in tensors_of((call.args, call.kwargs)))

    def _check_criterion(self, samples: int) -> None:
        """Compare the gradient of the loss function on the batch with that on single samples."""
        if self._criterion_call is None:
            raise SelfCheckError(
                "criterion was not called before this step, so it could not be checked. Pass the loss module that the "
                "training loop calls, or leave criterion out (the report then says: loss not verified)."
            )
        axis, call = self._controller.axis, self._criterion_call
        with self._undisturbed():
            whole = self._criterion_gradients(call)
            if self._controller.loss_reduction == "mean":
                whole = [g * samples for g in whole]
            for i in _some(samples):
                alone = self._criterion_gradients(one_sample(call, i, samples, axis))
                for batched, single in zip(one_sample(whole, i, samples, axis), alone, strict=True):
                    off = float((batched - single).double().norm() / single.double().norm().clamp(min=1e-30))
                    if not off <= _TOLERANCE.get(single.dtype, _COARSE):
                        raise SelfCheckError(
                            f"criterion ({type(self._criterion).__name__}): its gradient for sample {i} of the batch is off by "
                            f"{off:.1e} from its gradient on that sample alone; nothing was released. Either it couples the "
                            "samples (a mean over all tokens, a contrastive term), or "
                            f"loss_reduction={self._controller.loss_reduction!r} is not how it reduces. Remedy: reduce within each "
                            "sample first, or declare the reduction."
                        )

    def _criterion_gradients(self, call: tuple[Any, Any]) -> list[Tensor]:
        assert self._criterion is not None
        leaves: list[Tensor] = []

        def leaf(value: Any) -> Any:
            if not isinstance(value, Tensor) or not value.is_floating_point():
                return value
            leaves.append(value.detach().requires_grad_())
            return leaves[-1]

        args, kwargs = tree_map(leaf, call)
        found = torch.autograd.grad(self._criterion(*args, **kwargs).sum(), leaves, allow_unused=True)
        return [torch.zeros_like(t) if g is None else g for t, g in zip(leaves, found, strict=True)]

    def check_loss(self, samples: int, whole: Callable[[], Tensor], alone: Callable[[int], Tensor]) -> None:
        """Check a whole train function, loss included.

        Args:
            samples: n.
            whole: runs on the batch and returns its loss, reduced as the scope declares.
            alone: runs on sample i alone and returns its loss as a scalar.

        Raises:
            SelfCheckError: a disagreement, or a check that could not be made.
        """
        self._compare(samples, whole, alone, "the train function")
        self._passed(samples)
        self.loss_verified = "many" in self._checked

    def _passed(self, samples: int) -> None:
        self._checked.add("one" if samples == 1 else "many")
        if samples > 1:
            self._checked.add("one")
            self._unwatch()

    def _loss_of_call(self, call: _Observed, samples: int, alone: int | None) -> Tensor:
        axis = self._controller.axis
        args, kwargs = (call.args, call.kwargs)
        if alone is not None:
            args, kwargs = one_sample((args, kwargs), alone, samples, axis)
        outputs = [t for t in tensors_of(call.module(*args, **kwargs)) if t.is_floating_point() and t.requires_grad]
        generator = torch.Generator().manual_seed(0)
        total = torch.zeros(())
        rows = samples if alone is None else 1
        for out in outputs:
            # Outputs may count samples along another axis than inputs do (a head that flattens a time-first sequence).
            along = next((d for d in (axis, 1 - axis) if out.dim() > d and out.shape[d] == rows), None)
            if along is not None and out.numel() > 0:
                shape = [samples if d == along else size for d, size in enumerate(out.shape)]
                weights = torch.randn(shape, generator=generator, dtype=torch.float64).to(out.device, out.dtype)
                weights = weights / max(1.0, (weights.numel() / samples) ** 0.5)
                if alone is not None:
                    weights = weights.narrow(along, alone, 1)
                term = (out * weights).sum()
                if self._controller.loss_reduction == "mean":
                    term = term / rows
            elif out.numel() == 1:
                term = out.sum()  # a loss that the model computes itself
            else:
                continue
            total = total.to(term.device, term.dtype) + term
        return total

    def _compare(self, samples: int, whole: Callable[[], Tensor], alone: Callable[[int], Tensor], what: str) -> bool:
        controller = self._controller
        picked = _some(samples)
        with self._undisturbed(), controller.separate():
            torch.manual_seed(0)
            loss = whole()
            if not loss.requires_grad:
                return False
            _backward(loss, [controller.token, *controller.params])
            found = controller.take()
            if found is None or found.samples != samples:
                raise SelfCheckError(
                    f"{what}: the repeated run captured {0 if found is None else found.samples} samples, the step had "
                    f"{samples}. Remedy: feed the model one row per example."
                )
            controller.disable_hooks()
            try:
                expected = [self._reference(alone, i, what) for i in picked]
            finally:
                controller.enable_hooks()
            self._judge(found, picked, expected, what)
        return True

    def _reference(self, alone: Callable[[int], Tensor], i: int, what: str) -> dict[nn.Parameter, Tensor]:
        torch.manual_seed(0)
        for p in self._model.parameters():
            p.grad = None
        try:
            loss = alone(i)
            if loss.requires_grad:
                _backward(loss, self._params)
        except DPHooksError:
            raise
        except Exception as error:
            raise SelfCheckError(
                f"{what}: sample {i} could not be run alone for the self-check ({type(error).__name__}: {error}). Remedy: "
                "the model and the loss must work on a batch of one; an input that all samples share must not have "
                "as many rows as the batch has samples."
            ) from error
        return {p: p.grad.to_dense() if p.grad.is_sparse else p.grad for p in self._params if p.grad is not None}

    def _judge(
        self,
        found: SampleGradients,
        picked: list[int],
        expected: list[dict[nn.Parameter, Tensor]],
        what: str,
    ) -> None:
        seen = [p for p in self._params if p in set(found.params)]
        reached = [p for p in self._params if p in set(seen) or any(p in e for e in expected)]
        if not reached:
            return
        device = reached[0].device
        rows = torch.tensor(picked, device=device)
        total = torch.stack(
            [
                sum((g.double().square().sum().to(device) for g in e.values()), torch.zeros((), device=device))
                for e in expected
            ]
        )
        norms = found.sq_norms(seen)
        dtype = torch.promote_types(reached[0].dtype, torch.float32)
        factors = torch.zeros(found.samples, device=device, dtype=dtype)
        factors[rows] = torch.linspace(0.5, 1.0, len(picked), device=device, dtype=dtype)
        everywhere = torch.ones(found.samples, dtype=torch.bool, device=device)
        sums = found.weighted_sums({p: factors.to(p.device) for p in seen}, everywhere)
        worst: list[tuple[float, str]] = []
        for p in reached:
            want = torch.stack([e[p] if p in e else torch.zeros_like(p) for e in expected]).double()
            have = found.grads(p, rows.to(p.device)).double() if p in sums else torch.zeros_like(want)
            have_sum = sums[p].double() if p in sums else torch.zeros_like(want[0])
            want_sum = torch.tensordot(factors[rows].to(want), want, dims=1)
            own = want.flatten(1).square().sum(1)
            scale = torch.maximum(own, 1e-4 * total.to(own)).sqrt().clamp(min=1e-30)
            off = (have - want).flatten(1).square().sum(1).sqrt() / scale
            off_sum = (have_sum - want_sum).square().sum().sqrt() / scale.sum()
            have_norm = norms[p][rows.to(p.device)].double() if p in norms else torch.zeros_like(own)
            off_norm = (own.sqrt() - have_norm.clamp(min=0).sqrt()).abs() / scale
            error = float(torch.stack([off.max(), off_sum, off_norm.max()]).nan_to_num(nan=float("inf")).max())
            if error > _TOLERANCE.get(p.dtype, _COARSE):
                worst.append((error, self._controller.name_of(p)))
        if worst:
            self._complain(sorted(worst, reverse=True), len(reached), found.samples, what)

    def _complain(self, worst: list[tuple[float, str]], params: int, samples: int, what: str) -> None:
        listing = "\n".join(f"  - {name}: off by {error:.1e} of its size" for error, name in worst[:8])
        more = f"\n  ... and {len(worst) - 8} more" if len(worst) > 8 else ""
        raise SelfCheckError(
            f"{what}: per-sample gradients of {len(worst)} of {params} parameters differ from plain autograd on single "
            f"samples (batch of {samples}); nothing was released.\n{listing}{more}\nLikely causes: samples mix (batch "
            "statistics, a loss averaged over tokens of the whole batch, contrastive or load-balancing terms); "
            f"loss_reduction={self._controller.loss_reduction!r} is not how the loss is reduced; an input that all samples "
            "share has as many rows as the batch; random numbers other than dropout. Remedy: return per-sample losses from a "
            "@dp_step function, replace the mixing module, or freeze the parameters named."
        )

    @contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """Run with dropout off, and put random state, buffers, attributes and gradients back afterwards."""
        devices = sorted({p.device.index or 0 for p in self._params if p.device.type == "cuda"})
        buffers = [(b, b.detach().clone()) for b in self._model.buffers()]
        grads = [(p, p.grad) for p in self._model.parameters()]
        self._busy = True
        try:
            with (
                attributes_kept(self._model),
                torch.random.fork_rng(devices=devices),
                torch.enable_grad(),
                _NoDropout(),
            ):
                yield
        finally:
            self._busy = False
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)
            for p, grad in grads:
                p.grad = grad


def _backward(loss: Tensor, leaves: Sequence[Tensor]) -> None:
    """Back-propagate to ``leaves`` only: other models in the same graph, private or not, must not notice."""
    try:
        loss.backward(inputs=[leaf for leaf in leaves if leaf.requires_grad])
    except RuntimeError as error:
        if "Checkpointing is not compatible" not in str(error):
            raise
        loss.backward()  # reentrant checkpointing allows nothing else


def _private_copy(leaf: Any) -> Any:
    return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf


def _some(samples: int) -> list[int]:
    """Choose the samples to run alone: the ends and some between them."""
    if samples <= _ALONE:
        return list(range(samples))
    between = random.Random(0).sample(range(1, samples - 1), _ALONE - 2)
    return sorted({0, samples - 1, *between})


def one_sample(batch: Any, i: int, samples: int, axis: int) -> Any:
    """Return sample ``i`` of ``batch`` as a batch of one: whatever counts ``samples`` along ``axis`` is cut."""

    def cut(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.dim() > axis and leaf.shape[axis] == samples:
            return leaf.narrow(axis, i, 1)
        return leaf

    return tree_map(cut, batch)
