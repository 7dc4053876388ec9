"""Runs of a model on other numbers of rows, to find out where the batch is and what has to be repeated sample by sample."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from .._no_randomness import Draws, NoRandomness
from .._tree import tensors_of, tree_map
from ..errors import DPHooksError
from .calls.session import ModelCall, Session
from .calls.trace import untraced
from .calls.undisturbed import undisturbed
from .hooked_modules import HookedModules
from .samples.axis import SampleAxis
from .samples.probe import Frame, Probe, wave
from .samples.tracked import is_float
from .samples.tracker import Tracker
from .samples.uses import Seen, UseLayout, doubtful, merged

# What a model may raise when it is run on another number of rows than it was given.
_CANNOT_RUN = (DPHooksError, ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


class Discovery:
    """Tells the hooked modules and the tracker of a model what runs on a few rows have shown."""

    def __init__(self, model: nn.Module, session: Session, hooked_modules: HookedModules, tracker: Tracker) -> None:
        self._model = model
        self._session = session
        self._hooked_modules = hooked_modules
        self._tracker = tracker
        # Modules that were probed, with their mode and whether on several samples; those that could be run.
        self._tried: set[tuple[str, bool, bool]] = set()
        self._shown: set[tuple[str, bool]] = set()
        self._unsure: set[tuple[str, bool]] = set()  # those in which more than one order of samples fits what was seen
        tracker.discover = self._learn_again

    @untraced
    def _learn_again(self) -> None:
        """Learn in the middle of a call, the way that it went so far; then it goes on as if nothing had been."""
        session = self._session
        if not session.call.running or session.in_backward():
            return
        held = [
            (one, {name: owner._parameters[key] for owner, key, name in one.swap.places}, one.captures, one.use)
            for one in self._hooked_modules
            if one.swap.swapped
        ]
        self.learn(session.call, None if session.trace is None else session.trace.drawn_inside, again=True)
        for one, tensors, captures, use in held:
            one.swap.put(tensors)  # type: ignore[arg-type]
            one.captures, one.use = captures, use
        self._hooked_modules.track_outside()

    def learn(self, call: ModelCall, draws: Draws | None = None, again: bool = False) -> None:
        """Find out, once per outermost module and mode, which axes count samples, by runs on other numbers of rows."""
        rows = call.rows
        assert call.module is not None
        key = (call.name, call.module.training)
        call.strict = key in self._shown
        if not rows:
            return
        unsure = rows > 1 and key in self._unsure
        if not again and not unsure and not self._tried.isdisjoint({(*key, rows > 1), (*key, True)}):
            return
        for hooked in self._hooked_modules:
            if hooked.swap.swapped:  # an interrupted forward could not put them back
                hooked.swap.restore()
            if hooked.swap.foreign():
                return  # a probe would put them back
        mark = (*key, rows > 1)
        self._tried.add(mark)
        try:
            call.strict = self._probe(call, rows, draws) or call.strict
        except BaseException:  # interrupted: nothing was found out
            self._tried.discard(mark)
            raise

    def _probe(self, call: ModelCall, rows: int, draws: Draws | None) -> bool:
        """Run probes until two agree, and tell what they have shown; False: the model cannot be run on other rows."""
        assert call.module is not None
        probes: list[Probe] = []
        counts = _numbers_of_rows(self._model, (call.args, call.kwargs))
        done = False
        while not done:
            count, mark_first = counts[len(probes)], rows > 1 and len(probes) == 1
            probe = self._run_probe(call, rows, count, draws, mark_first=mark_first)
            if mark_first and (probe is None or probe.out_of_order):
                marked, probe = probe, self._run_probe(call, rows, count, draws)
                if marked is not None and probe is not None and any(map(self._repeat, marked.misplaced_by(probe))):
                    probes = []  # the first one is repeated as a whole now: all is tried anew
                    continue
            if probe is None:
                return False
            probes.append(probe)
            agreed = merged([p.uses for p in probes])
            done = len(probes) == len(counts) or (len(probes) > 1 and None not in agreed.values())
            if self._repeat_where_needed(probes, agreed if done else {}):
                probes, done = [], False
        self._take_over(call, rows, [p.uses for p in probes], counts[0], draws)
        self._shown.add((call.name, call.module.training))
        self._hooked_modules.set_outside()
        return True

    def _take_over(self, call: ModelCall, rows: int, seen: list[Seen], count: int, draws: Draws | None) -> None:
        """Keep what probes have seen; where all rows are alike, samples are told apart by one more, else in the next batch."""
        assert call.module is not None
        axes, key = self._tracker.axes, (call.name, call.module.training)
        apart = None
        if rows > 1 and doubtful(merged(seen)):
            apart = self._run_probe(call, rows, count, draws, tell_apart=True, whole_numbers=True)
            apart = apart or self._run_probe(call, rows, count, draws, tell_apart=True)
        other = axes.learn(seen, two_distinct=rows > 1, apart=None if apart is None else apart.uses)
        self._unsure.discard(key)
        if rows > 1 and axes.unsure & {use for uses in seen for use in uses}:
            self._unsure.add(key)
        if other and self._session.recorder is not None:
            self._session.recorder.forget()

    def forget(self) -> None:
        """The hooks are gone, and with them what was told to hooked modules."""
        self._tried, self._shown, self._unsure = set(), set(), set()

    def _repeat_where_needed(self, probes: list[Probe], agreed: Mapping[Any, list[UseLayout] | None]) -> bool:
        """Have modules repeated sample by sample where rows are picked by their values inside; whether any is new."""
        wanted = [frame for probe in probes for frame in probe.frames if frame.repeat]
        for key, uses in agreed.items():
            if uses is None or any(use.is_routed for use in uses):
                wanted += [frame for probe in probes for frame in probe.around(key)]
        return True in [self._repeat(frame) for frame in wanted]

    def _repeat(self, frame: Frame) -> bool:
        """Have the module that was called repeated from now on; False: it is already."""
        new = self._hooked_modules.repeated(frame.module) is None
        if new:
            self._hooked_modules.repeat(frame.name, frame.module)
        return new

    def _run_probe(
        self,
        call: ModelCall,
        rows: int,
        count: int,
        draws: Draws | None,
        *,
        mark_first: bool = False,
        tell_apart: bool = False,
        whole_numbers: bool = False,
    ) -> Probe | None:
        """Run the module on ``count`` rows, without gradients or random numbers, and leave no trace.

        Inputs of the first row are made others to ``tell_apart`` samples, ``whole_numbers`` only where they could not tell.
        """
        module, session, hooked_modules, tracker = call.module, self._session, self._hooked_modules, self._tracker
        assert module is not None
        probe = Probe(count, two_distinct=rows > 1, mark_first=mark_first, tell_apart=tell_apart)
        args, kwargs = tree_map(lambda leaf: _rows_for_probe(leaf, rows, count, session.axis), (call.args, call.kwargs))
        if tell_apart:
            args, kwargs = tree_map(lambda leaf: _first_unlike(leaf, count, session.axis, whole_numbers), (args, kwargs))
        kept = (session.call, session.repeating)
        tracker.probe, session.call = probe, ModelCall(rows=count)
        ran = False
        try:
            with suppress(*_CANNOT_RUN), undisturbed(module), NoRandomness(draws=draws) as without, ExitStack() as stack, probe:
                if tell_apart:
                    stack.enter_context(_zeros_filled(module.parameters()))
                without.begin_again()
                for hooked in hooked_modules:
                    if hooked_modules.repeated(hooked.module) is None:
                        hooked.outside = tuple(hooked.swap.params)
                        hooked.track_outside(tracker)
                try:
                    module(*args, **kwargs)
                finally:
                    session.restore_parameters()
                ran = True
        finally:
            for hooked in hooked_modules:
                hooked.outside = ()
            tracker.probe = None
            session.call, session.repeating = kept
        probe.check_inputs()
        return probe if ran else None


# Numbers of rows to try. Primes that sizes in a model are rarely multiples of; two of them must agree.
_PRIMES = (5, 7, 11, 13, 17, 19, 23)


def _numbers_of_rows(model: nn.Module, tree: Any) -> list[int]:
    """Choose numbers of rows that no size in the model or its inputs is a multiple of, where there are such."""
    known = [t for t in (*model.parameters(), *model.buffers(), *tensors_of(tree)) if not t.is_nested]
    sizes = {size for t in known for size in t.shape if size}
    good = [p for p in _PRIMES if all(size % p for size in sizes)]
    return [*good, 29, 31, 37][:5]


def _rows_for_probe(leaf: Any, rows: int, count: int, axis: int) -> Any:
    """Return the first row once and the second ``count - 1`` times, of a tensor that has ``rows`` rows along ``axis``."""
    if not isinstance(leaf, Tensor) or leaf.dim() <= axis or leaf.shape[axis] != rows:
        return leaf
    index = torch.full((count,), min(1, rows - 1), device=leaf.device)
    index[0] = 0
    return leaf.detach().index_select(axis, index)


def _first_unlike(leaf: Any, rows: int, axis: int, whole_numbers: bool) -> Any:
    """Return a tensor with other numbers in the first of ``rows`` rows: of the size of 1, or one next to what all rows have."""
    if not isinstance(leaf, Tensor) or leaf.dim() <= max(axis, 1) or leaf.shape[axis] != rows or not leaf.numel():
        return leaf
    first = SampleAxis(axis).spread(torch.arange(rows, device=leaf.device) == 0, leaf)
    if is_float(leaf):
        return leaf if leaf.is_complex() else torch.where(first, 0.5 * wave(leaf), leaf)
    alike = whole_numbers and leaf.dtype != torch.bool and bool((leaf == leaf.narrow(axis, 0, 1)).all())
    # A number may be an index: beyond the end of a table it raises an error on CPU, and is the end of the process elsewhere.
    other = torch.where(leaf > 0, leaf - 1, leaf + 1 if leaf.device.type == "cpu" else leaf)
    return torch.where(first & _at_the_end(leaf, axis), other, leaf) if alike else leaf


def _at_the_end(tensor: Tensor, axis: int) -> Tensor:
    """Where the last number of every row is."""
    row = torch.ones((), dtype=torch.bool, device=tensor.device)
    for at, size in enumerate(tensor.shape):
        if at != axis:
            last = (torch.arange(size, device=tensor.device) == size - 1).reshape(
                [-1 if d == at else 1 for d in range(tensor.dim())]
            )
            row = row & last
    return row


@contextmanager
def _zeros_filled(params: Iterable[nn.Parameter]) -> Iterator[None]:
    """Fill parameters that are zero: what they make of different samples would be alike. They are not seen to have changed."""
    zeros = [p for p in params if is_float(p) and not p.is_complex() and p.numel() and not bool(p.detach().any())]
    try:
        for p in zeros:
            p.data.copy_(0.1 * wave(p) if p.dim() else torch.full_like(p, 0.1))
        yield
    finally:
        for p in zeros:
            p.data.zero_()
