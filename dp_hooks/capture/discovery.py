"""Runs of a model on other numbers of rows, to find out where the batch is and what has to be repeated sample by sample."""

from collections.abc import Sequence

from torch import Tensor, nn

from .._no_randomness import Draws, NoRandomness
from .._rerun import undisturbed
from .._tree import tree_map
from ..errors import DPHooksError
from .calls.session import ModelCall, Session
from .calls.trace import untraced
from .hooked_modules import HookedModules
from .samples.probe import Probe, numbers_of_rows, rows_for_probe
from .samples.tracker import Tracker
from .samples.uses import SampleAxes

# What a model may raise when it is run on another number of rows than it was given.
_CANNOT_RUN = (
    DPHooksError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)


class Discovery:
    """Tells the hooked modules and the tracker of a model what runs on a few rows have shown."""

    def __init__(self, model: nn.Module, session: Session, hooked_modules: HookedModules, tracker: Tracker) -> None:
        """What is learned goes to ``tracker.axes`` and ``hooked_modules``."""
        self._model = model
        self._session = session
        self._hooked_modules = hooked_modules
        self._tracker = tracker
        tracker.discover = self._learn_again

    def learn(self, call: ModelCall) -> None:
        """Find out, once per outermost module and mode, which axes count samples, by runs on other numbers of rows."""
        self._learn(call)

    @untraced
    def _learn_again(self) -> None:
        """The same in the middle of a call, the way that it went so far; then it goes on as if nothing had been."""
        session = self._session
        if not session.call.running or session.in_backward():
            return
        held = [
            (one, {name: owner._parameters[key] for owner, key, name in one.swap.places}, one.captures, one.use)
            for one in self._hooked_modules
            if one.swap.swapped
        ]
        self._learn(session.call, None if session.trace is None else session.trace.drawn_inside, again=True)
        for one, tensors, captures, use in held:
            one.swap.put(tensors)  # type: ignore[arg-type]
            one.captures, one.use = captures, use
        self._hooked_modules.track_outside()

    def _learn(self, call: ModelCall, draws: Draws | None = None, again: bool = False) -> None:
        axes, rows = self._tracker.axes, call.rows
        assert call.module is not None
        key, two_distinct = (call.name, call.module.training), (call.name, call.module.training, "several")
        call.strict = key in axes.shown
        if not rows or (not again and (two_distinct in axes.tried or (rows == 1 and key in axes.tried))):
            return
        for hooked in self._hooked_modules:
            if hooked.swap.swapped:  # an interrupted forward could not put them back
                hooked.swap.restore()
            if hooked.swap.foreign():
                return  # a probe would put them back
        axes.tried |= {key} if rows == 1 else {key, two_distinct}
        probes: list[Probe] = []
        counts = numbers_of_rows(self._model, (call.args, call.kwargs))
        done = False
        while not done:
            count, mark_first = counts[len(probes)], rows > 1 and len(probes) == 1
            probe = self._run_probe(call, rows, count, draws, mark_first=mark_first)
            if mark_first and (probe is None or probe.out_of_order):
                with_first_marked, probe = probe, self._run_probe(call, rows, count, draws, check_order=True)
                if (
                    with_first_marked is not None
                    and probe is not None
                    and self._repeat_one(with_first_marked.misplaced_by(probe))
                ):
                    probes = []
                    continue
            if probe is None:
                return
            probes.append(probe)
            done = len(probes) == len(counts) or (len(probes) > 1 and SampleAxes.agree([p.uses for p in probes]))
            if self._repeat_where_needed(probes, done):
                probes, done = [], False  # what is repeated as a whole is tried anew
        axes.learn([p.uses for p in probes], two_distinct=all(p.two_distinct for p in probes))
        axes.shown.add(key)
        call.strict = True
        self._hooked_modules.set_outside()

    def _repeat_where_needed(self, probes: list[Probe], done: bool) -> bool:
        """Have modules repeated sample by sample where rows are picked by their values inside; whether any is new."""
        wanted = [(frame.name, frame.module) for probe in probes for frame in probe.frames if frame.repeat]
        for key, agreed in SampleAxes.merged([p.uses for p in probes]).items() if done else ():
            if agreed is None or any(use.is_routed for use in agreed):
                around = [probe.repeated_module(e) for probe in probes for e in probe.uses.get(key, [])]
                wanted += [found for found in around if found is not None]
        new = False
        while self._repeat_one(wanted):
            new = True
        return new

    def _repeat_one(self, calls: Sequence[tuple[str, nn.Module]]) -> bool:
        """Have the first of ``calls`` repeated that is not yet; whether there is one."""
        for name, module in calls:
            if self._hooked_modules.repeated(module) is None:
                self._hooked_modules.repeat(name, module)
                return True
        return False

    def _run_probe(
        self,
        call: ModelCall,
        rows: int,
        count: int,
        draws: Draws | None,
        *,
        mark_first: bool = False,
        check_order: bool = False,
    ) -> Probe | None:
        """Run the module on ``count`` rows, without gradients or random numbers, and leave no trace."""
        module, session, hooked_modules, tracker = call.module, self._session, self._hooked_modules, self._tracker
        assert module is not None
        probe = Probe(count, two_distinct=rows > 1, mark_first=mark_first, check_order=check_order)
        args, kwargs = tree_map(
            lambda leaf: rows_for_probe(leaf, rows, count, session.axis) if isinstance(leaf, Tensor) else leaf,
            (call.args, call.kwargs),
        )
        kept = (session.call, session.repeating)
        tracker.probe, session.call = probe, ModelCall(rows=count)
        try:
            with undisturbed(module), NoRandomness(draws=draws) as without, probe.watching():
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
        except _CANNOT_RUN:
            ran = False
        finally:
            for hooked in hooked_modules:
                hooked.outside = ()
            tracker.probe = None
            session.call, session.repeating = kept
        probe.check_inputs()
        return probe if ran else None
