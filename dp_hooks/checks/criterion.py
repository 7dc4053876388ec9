"""CriterionCheck: whether a loss module treats the samples of a batch one by one, reduced as declared."""

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from .._no_randomness import NoRandomness
from .._rerun import undisturbed
from .._tree import one_sample, private_copy, tensors_of, tree_map
from ..capture.calls.call_recorder import CallRecorder
from ..capture.calls.trace import OpTrace, untraced
from ..capture.controller import HookController
from ..errors import SelfCheckError
from .compare import tolerance
from .single_samples import not_alone, some_samples


class CriterionCheck:
    """Compares the gradient of ``criterion`` on the batch with its gradients on single samples."""

    def __init__(self, criterion: nn.Module, controller: HookController, recorder: CallRecorder) -> None:
        self._criterion = criterion
        self._controller = controller
        self._recorder = recorder
        self._trace = OpTrace()
        self._call: tuple[Any, Any] | None = None
        self._what = f"criterion ({type(criterion).__name__})"

    def watch(self, stack: ExitStack) -> None:
        """Follow calls of the criterion until ``stack`` unwinds."""
        stack.callback(self._trace.close)
        before = self._criterion.register_forward_pre_hook(self._follow, prepend=True)
        stack.callback(before.remove)
        after = self._criterion.register_forward_hook(self._observe, with_kwargs=True, always_call=True)
        stack.callback(after.remove)

    def new_step(self) -> None:
        """Forget the call of an earlier step."""
        self._trace.unverified = set()
        self._call = None

    def _follow(self, criterion: nn.Module, args: Any) -> None:
        session = self._controller.session
        if torch.is_grad_enabled() and self._recorder.state is None and not session.in_backward():
            sized = [t.shape[session.axis] for t in tensors_of(args) if t.dim() > session.axis]
            self._trace.start("", sized[0] if sized else None)

    @untraced
    def _observe(self, criterion: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self._trace.stop()
        recorder = self._recorder
        if not recorder.paused and torch.is_grad_enabled() and (recorder.armed or self._trace.unverified):
            self._call = private_copy((args, kwargs))

    def takes_new_way(self, samples: int) -> bool:
        """Whether the criterion went through operations that no check on so many samples did."""
        return bool(self._trace.unchecked(self._trace.unverified, samples))

    def check(self, samples: int) -> None:
        """Compare.

        Raises:
            SelfCheckError: a disagreement, or the criterion was not called.
        """
        if self._call is None:
            raise SelfCheckError(
                "criterion was not called before this step, so it could not be checked. Pass the loss module that the "
                "training loop calls, or leave criterion out (the report then says that the loss was not checked)."
            )
        axis, call, reduction = self._controller.axis, self._call, self._controller.loss_reduction
        with undisturbed(self._criterion), NoRandomness(samples), self._trace.apart():
            whole = self._gradients(call)
            seen = self._trace.unverified
            if reduction == "mean":
                whole = [g * samples for g in whole]
            for i in some_samples(samples):
                try:
                    alone = self._gradients(one_sample(call, i, samples, axis))
                except Exception as error:
                    raise not_alone(self._what, i, error) from error
                for batched, single in zip(one_sample(whole, i, samples, axis), alone, strict=True):
                    off = float((batched - single).double().norm() / single.double().norm().clamp(min=1e-30))
                    if not off <= tolerance(single.dtype, coarse=False):
                        raise SelfCheckError(
                            f"{self._what}: its gradient for sample {i} of the batch is off by {off:.1e} from its gradient on "
                            "that sample alone; nothing was released. Either it couples the samples (a mean over all tokens, a "
                            f"contrastive term), or loss_reduction={reduction!r} is not how it reduces. Remedy: reduce within "
                            "each sample first, or declare the reduction."
                        )
        self._trace.verify(seen, samples)

    def _gradients(self, call: tuple[Any, Any]) -> list[Tensor]:
        leaves: list[Tensor] = []

        def leaf(value: Any) -> Any:
            if not isinstance(value, Tensor) or not value.is_floating_point():
                return value
            leaves.append(value.detach().requires_grad_())
            return leaves[-1]

        args, kwargs = tree_map(leaf, call)
        found = torch.autograd.grad(self._criterion(*args, **kwargs).sum(), leaves, allow_unused=True)
        return [torch.zeros_like(t) if g is None else g for t, g in zip(leaves, found, strict=True)]
