"""GradientComparison: captured gradients against plain autograd, of the same forward pass and of single samples."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from ..capture.calls.carried_state import CarriedState
from ..capture.controller import HookController
from ..errors import DPHooksError, SelfCheckError
from ..gradients.sample_gradients import SampleGradients
from ..gradients.terms import Sums
from ..gradients.units import Units
from .compare import NotFinite, all_together, compare, compare_sums, extreme_samples, jump_of
from .other_weights import rounded
from .repeat_call import RepeatedCall
from .repeat_function import RepeatedFunction
from .single_samples import back_propagate, custom_functions, not_alone
from .units import compare_unit
from .without_pattern import without_pattern

Repeated = RepeatedCall | RepeatedFunction
Begin = Callable[[Tensor | None], CarriedState]  # returns what the model carries at the start of the run
# How often gradients are compared before they are said to differ, where rounding can make them jump.
_ATTEMPTS = 4


class GradientComparison:
    """Compares gradients of a run that is given, which is run again for it.

    Attributes:
        coarse: whether autocast or half precision is in use.
        blocked: whether no gradient came to some parameter in the run compared last.
        units_of_step: asked which rows of the step belong to a protected unit; None: each to one of its own.
    """

    def __init__(self, controller: HookController, model: nn.Module, params: list[nn.Parameter]) -> None:
        self._controller, self._model, self._params = controller, model, params
        self.coarse = self.blocked = False
        self.units_of_step: Callable[[], Units | None] = lambda: None

    def capture(self, loss: Tensor) -> SampleGradients | None:
        """The per-sample gradients that hooks capture of a run that gave ``loss``."""
        back_propagate(loss, [self._controller.session.anchor, *self._controller.params])
        return self._controller.take()

    def compare(self, begin: Begin, again: Repeated, found: SampleGradients, what: str, *, values: bool = True) -> None:
        """Compare what was ``found`` in a run of ``again``; hooks are disabled; ``values``: of single samples, too.

        Raises:
            SelfCheckError: a disagreement beyond rounding.
        """
        norms = found.sq_norms(found.params)
        self.blocked = not all(bool(norm.any()) for norm in norms.values())
        finite = all(bool(torch.isfinite(norm).all()) for norm in norms.values())
        agreed = finite and self._compare_passes(begin, again, found, what)
        # Gradients can mix where no value does: behind weights that are zero, in hooks and functions of a backward pass.
        if again.samples > 1 or again.has_scalar or not agreed:
            self._compare_alone(begin, again, found, norms, what, jumps=agreed, values=values)

    def units(self, among: Tensor) -> Units | None:
        """The units of some rows of the step, if several rows may be of one."""
        units = self.units_of_step()
        return None if units is None or int(among.max()) >= len(units) else units.among(among)

    def compare_units(self, begin: Begin, again: Repeated, found: SampleGradients, what: str) -> None:
        """Compare what is clipped where several samples are one unit; hooks are disabled.

        Raises:
            SelfCheckError: a disagreement beyond rounding.
        """
        units = self.units(again.among)
        if units is None or not all(bool(torch.isfinite(norm).all()) for norm in found.sq_norms(found.params).values()):
            return

        def plain(rows: Tensor) -> dict[nn.Parameter, Tensor]:
            if again.has_scalar:
                alone = [self._alone(i, begin, again, what, compared=False) for i in rows.tolist()]
                return {p: sum((g[p] for g in alone if p in g), torch.zeros_like(p)) for p in {p for g in alone for p in g}}
            begin(None)
            return self.of(again.weighted(torch.zeros(again.samples, device="cpu").index_fill_(0, rows, 1.0)))

        compare_unit(found, units, plain, self._params, self._controller, what, coarse=self.coarse)

    def of(self, loss: Tensor) -> dict[nn.Parameter, Tensor]:
        """Gradients by plain autograd."""
        for p in self._model.parameters():
            p.grad = None
        if loss.requires_grad:
            back_propagate(loss, self._params)
        found = {p: p.grad.to_dense() if p.grad.is_sparse else p.grad for p in self._params if p.grad is not None}
        for p in found:  # the next run begins without any
            p.grad = None
        return found

    def _compare_passes(self, begin: Begin, again: Repeated, found: SampleGradients | None, what: str) -> bool:
        """Compare with plain autograd of the same forward pass, run once more; False if single samples have to tell.

        It need not come out to the last digit as it did: products depend on where tensors lie in memory. Where that switches a
        unit, the gradient jumps, but not in every run; what is wrong is wrong in all of them. A loss over the whole batch is
        compared as it is, one that has rows with a factor for each.
        """
        controller = self._controller
        factors = without_pattern((again.samples,))
        factors = torch.ones_like(factors) if again.has_scalar else factors.sign() * (0.25 + 0.75 * factors.abs())
        left = 1 if self._exact else _ATTEMPTS
        while True:
            assert found is not None
            begin(None)
            plain = again.weighted(factors)
            custom = custom_functions(plain)
            expected = self.of(plain)
            try:
                on_device = factors.to(plain.device)
                compare_sums(found, on_device, expected, self._params, controller, what, coarse=self.coarse)
                return not (custom and again.has_scalar)
            except SelfCheckError:
                left -= 1
                if custom:  # which may do anything with the gradients of several samples
                    return False
                if not left:
                    raise
            controller.enable_hooks()
            begin(None)
            found = self.capture(again.whole())
            controller.disable_hooks()

    @property
    def _exact(self) -> bool:
        """Whether rounding is too small to switch a unit of the model."""
        return all(p.dtype == torch.float64 for p in self._params)

    def _compare_alone(
        self, begin: Begin, again: Repeated, found: SampleGradients, norms: Sums, what: str, *, jumps: bool, values: bool
    ) -> None:
        """Compare with the gradients of single samples; ``jumps``: all that differs may be units that rounding has switched.

        How far they may differ then is measured, where it matters: by what rounding of the parameters, up and down, does to them.
        """
        # That gradients depend on others shows in any sample, where its own ones are known to be right.
        picked = extreme_samples(all_together(norms), again.samples, ends=again.has_scalar or not jumps)
        unseen: list[NotFinite] = []
        for i in picked:  # one after the other: the gradient of one is as large as the model
            try:
                self._compare_one(i, begin, again, found, norms, what, jumps=jumps, values=values)
            except NotFinite as error:
                unseen.append(error)
        if len(unseen) == len(picked):
            raise unseen[0]

    def _compare_one(
        self, i: int, begin: Begin, again: Repeated, found: SampleGradients, norms: Sums, what: str, *, jumps: bool, values: bool
    ) -> None:
        expected = self._alone(i, begin, again, what, compared=values)
        compared = partial(compare, found, norms, i, expected, self._params, self._controller, what, coarse=self.coarse)
        try:
            compared()
        except NotFinite:
            raise
        except SelfCheckError:
            if not jumps or self._exact:
                raise
            measured = []
            for sign in (1, -1):
                with rounded(self._model.parameters(), coarse=self.coarse, sign=sign):
                    measured.append(jump_of(expected, self._alone(i, begin, again, what, compared=False)))
            compared(jump=max(measured))

    def _alone(self, i: int, begin: Begin, again: Repeated, what: str, *, compared: bool = True) -> dict[nn.Parameter, Tensor]:
        """The gradients of a single sample; values are ``compared`` as well."""
        begin(torch.tensor([i], device="cpu"))
        try:
            return self.of(again.alone(i, compared=compared))
        except DPHooksError:
            raise
        except Exception as error:
            raise not_alone(what, [i], error) from error
