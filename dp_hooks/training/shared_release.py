"""SharedRelease: how clipped sums get their noise, in one process or in several that take their steps together."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .._precision import wide_dtype
from ..distributed.peers import Peers
from ..distributed.sums import add_up
from ..distributed.world import processes
from ..errors import ScopeError
from ..privacy.clipping import ClippingFunction
from ..privacy.noise.noise import Noise
from .clipped_sum import ClippedSum

_FIRST, _EVERY = 3, 32  # steps before which the parameters of all processes are compared: the first ones, and each so many


class SharedRelease:
    """Noise, and what goes with it, for sums of samples that may be in several processes.

    Guarantee: every number that is released got noise of the whole standard deviation once, and is the same in all processes.
    """

    def __init__(self, noise: Noise, clipped_sum: ClippedSum, peers: Peers | None, params: Sequence[Tensor]) -> None:
        """For ``params``; of this process alone, without ``peers``."""
        self._params = params
        self._noise = noise
        self._sum = clipped_sum
        self._peers = peers
        self._steps = 0

    def prepared(self, number: int, settings: Callable[[], Any]) -> AbstractContextManager[None]:
        """In the block the release of logical batch ``number`` is prepared here; afterwards in all processes, or it is refused.

        Raises:
            ScopeError: another process does something else, has other ``settings``, or is not known to the scope.
        """
        if self._peers is not None:
            return self._peers.step(number, lambda: (settings(), self._digest()))
        if processes() > 1:
            raise ScopeError(
                "torch.distributed was initialised after the scope was made, which knows of no other process: each would train and "
                "release by itself. Call init_process_group() before private_training()."
            )
        return nullcontext()

    def check_foreign(self, *, by_units: bool) -> None:
        """A step is asked for on a batch that did not come from the private loader.

        Raises:
            ScopeError: of which something has to be known here.
        """
        if by_units or self._peers is not None:
            unknown = "that its rows belong to" if by_units else "that are in it: one can be in the batches of several processes"
            what, which = ("privacy_unit=", "units") if by_units else ("several processes", "examples")
            raise ScopeError(
                f"opt.step() on a batch that did not come from the private loader: with {what} nothing is known of the {which} "
                f"{unknown}. Nothing was released. Iterate the loader that the scope hands out."
            )

    def applied(self) -> AbstractContextManager[None]:
        """In the block the released step is applied here; the others learn of it where that fails."""
        return nullcontext() if self._peers is None else self._peers.told_of_failure()

    def _digest(self) -> list[Any]:
        """What parameters add up to, in some steps: they have to stay the same in all processes."""
        if self._steps >= _FIRST and self._steps % _EVERY:
            return []
        return [p.detach().sum(dtype=wide_dtype(p.dtype, torch.float64)).item() for p in self._params]

    def add_noise(self, totals: Sequence[Tensor], std: float, scale: float, sensitivity: float) -> bool:
        """Add up ``totals``, with noise, in place: :meth:`.Noise.add_`."""
        add = partial(self._noise.add_, std=std, scale=scale, sensitivity=sensitivity)
        return add(totals) if self._peers is None else add_up(totals, self._peers, add, self._noise.is_repeatable)

    def charged(self) -> None:
        """The step was charged here: wait until it was everywhere."""
        self._steps += 1
        if self._peers is not None:
            self._peers.charged(self._steps)

    def learn(self, clipping: ClippingFunction, statistic: Tensor | None, sigma: float) -> None:
        """Let ``clipping`` learn from the samples of all processes: :meth:`.ClippingFunction.update`."""
        if self._peers is not None and clipping.learns:
            mine = torch.zeros((), device="cpu") if statistic is None else statistic
            statistic = self._peers.total(mine)
        clipping.update(statistic, self._noise, sigma)
        if self._peers is not None and clipping.learns:  # each has drawn noise of its own
            self._sum.change_bound(self._peers.first(clipping.max_grad_norm))
