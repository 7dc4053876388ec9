"""CallRecorder: keeps the outermost calls of one step, for a check that may want to run them again."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any
from weakref import WeakSet

from torch import Tensor, nn

from ..._rerun import AmbientContext
from ..._tree import modules_of, private_copy
from .carried_state import CarriedState, Unlike
from .changes import Changes
from .forward_frame import call_in, forward_around
from .module_state import ModuleState
from .recorded_call import RecordedCall, kind_of
from .trace import OpTrace

LIMIT = 64  # how many outermost calls are remembered: those of one step, in practice one or two


class CallRecorder:
    """Records calls that are new: inputs as they were, which way they took, which outputs gradients came back from."""

    def __init__(self, model: nn.Module, params: Sequence[nn.Parameter], trace: OpTrace) -> None:
        self._model = model
        self._params = params
        self._names = {id(module): name for name, module in model.named_modules()}
        self._device = next((p.device.type for p in self._params), "cpu")
        self._views: list[tuple[RecordedCall, int, Tensor, int]] = []
        # Whose state is let go at the next step, kept or not: it holds what the call before left in attributes.
        self._recorded: WeakSet[RecordedCall] = WeakSet()
        self.quiet: list[RecordedCall] = []  # calls that left something in the model, and that no gradients came back from
        self.trace = trace  # follows the operations of calls
        self.checked: set[tuple[Any, ...]] = set()  # states of the model that a check has covered
        # For each state of the model and kind of call, numbers of the outputs that checks have covered.
        self.covered: dict[tuple[Any, Any], set[int]] = {}
        # What such calls were found to leave of their samples, by the name and mode of what was called.
        self.left_quietly: dict[tuple[str, bool], tuple[Unlike, CarriedState, CarriedState]] = {}
        self.harmless: set[tuple[Any, Any]] = set()  # states and kinds of calls without gradients that leave nothing of the samples
        self._left_by_training, self._left_quietly = Changes(), Changes()
        self.situation = ""  # what else is special about the present batch
        self.paused = False  # whether nothing is recorded, since a check is running calls
        # While a whole function is to be checked, attributes of the model at its start; calls need none then.
        self.state: ModuleState | None = None
        self.carried: CarriedState | None = None
        self._begin: ModuleState | None = None  # what the model was when the first call of the step began
        self._last: ModuleState | None = None  # the same of the step before, if the model held the same at its end
        self.new_step()

    def new_step(self) -> None:
        """Forget calls recorded before a boundary."""
        # What is left by calls that no gradients came back to can reach any later step.
        self.quiet = [call for call in self.quiet if not call.reached]
        for call in self._recorded:
            if call not in self.quiet:
                call.state = call.carried = None
        self._recorded.clear()
        self.calls: list[RecordedCall] = []  # those of the present step that a check may have to look at
        self._views = []
        self.came_back_to: list[RecordedCall] = []  # all that gradients came back from in this step, known ones too
        if self._begin is not None:  # else it would keep alive what the model has let go of
            self._last = None if self._begin.differs or self._begin.holds_graphs else self._begin
        self._begin = None
        self._frame: FrameType | None = None  # of a forward method that was called past the hooks
        self.overflowed = False  # whether there were more than LIMIT
        self._left_by_training.open.clear()
        self.trace.unverified = set()

    def close(self) -> None:
        """Nothing is recorded any more."""
        self.new_step()
        self._last = None

    def forget(self, situation: str | None = None) -> None:
        """What was checked so far (in a situation) says nothing any more, such as where samples turn out to be elsewhere."""
        keys = {key for key in self.checked if situation in (None, key[1])}
        self.checked -= keys
        self.covered = {known: outputs for known, outputs in self.covered.items() if known[0] not in keys}
        self.harmless = {known for known in self.harmless if known[0] not in keys}

    def key(self, samples: int) -> tuple[Any, ...]:
        """What a check has shown something about: one sample or several, the modes of modules, what is trainable."""
        modes = tuple([2 * len(module._forward_hooks) + module.training for module in modules_of(self._model)])
        return ("one" if samples == 1 else "many", self.situation, modes, tuple(p.requires_grad for p in self._params))

    @property
    def armed(self) -> bool:
        """Whether the next batch with several samples would be checked, as things stand."""
        return self.key(2) not in self.checked

    def begin(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> RecordedCall | None:
        """An outermost call begins: keep its inputs as they are now, if they will be needed."""
        if self.paused:
            return None
        kind, key = kind_of(name, args, kwargs), self.key(2)
        new = (key, kind) not in self.covered
        if name and self.state is None:
            self._begin_around(module, key)
        return self._begun(module, name, args, kwargs, key, kind, new)

    def _begin_around(self, module: nn.Module, key: Any, *, with_gradients: bool = True) -> None:
        """A part of the model is called: by a forward method that was called past the hooks, it may be."""
        frame = forward_around(module, self._names)
        if frame is None or frame is self._frame:  # by the second part called in it, its inputs may be other ones
            return
        self._frame = frame
        owner, args, kwargs = call_in(frame)
        name = self._names[id(owner)]
        kind = ("forward", *kind_of(name, args, kwargs))
        if not with_gradients:
            if (key, kind) not in self.harmless and all(call.kind != kind for call in self.quiet):
                self.quiet.append(self._begun(owner, name, args, kwargs, key, kind, around=True, with_gradients=False))
        elif (key, kind) not in self.covered and all(call.kind != kind for call in self.calls):
            self._keep(self._begun(owner, name, args, kwargs, key, kind, around=True))

    def _begun(
        self, module: nn.Module, name: str, args: Any, kwargs: Any, key: Any, kind: Any, copied: bool = True, **how: Any
    ) -> RecordedCall:
        """A call, with copies of its inputs and of what the model carries now if it is to be ``copied``."""
        if copied:
            args, kwargs = private_copy((args, kwargs))
        call = RecordedCall(module, name, args, kwargs, AmbientContext.current(self._device), key, kind, copied, **how)
        if self.state is None:
            last, self._last = self._last, None
            call.state = ModuleState(self._model, renewable=True) if last is None else last.renewed()
            call.carried = CarriedState(self._model, call.state) if copied else None
            if call.with_gradients:
                self._recorded.add(call)
                self._begin = self._begin or call.state
        return call

    def begin_quiet(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> RecordedCall | None:
        """An outermost call begins, without gradients: it may leave something in the model all the same."""
        kind, key = kind_of(name, args, kwargs), self.key(2)
        if self.paused or self.state is not None:
            return None
        if name:
            self._begin_around(module, key, with_gradients=False)
        if any((call.key, call.kind) == (key, kind) for call in self.quiet):
            return None
        return self._begun(module, name, args, kwargs, key, kind, (key, kind) not in self.harmless, with_gradients=False)

    def end_quiet(self, call: RecordedCall) -> None:
        """It is over; what such a call left that was harmless so far may be something else now."""
        if call.carried is None and call.state is not None:
            if self._left_quietly.note(call.state):
                again = self._begun(call.module, call.name, call.args, call.kwargs, call.key, call.kind, with_gradients=False)
                self.quiet.append(again)  # from where it left off
        elif self._left_something(call):
            self._left_quietly.note(call.state)
            self.quiet.append(call)
        else:
            self.harmless.add((call.key, call.kind))

    def _left_something(self, call: RecordedCall) -> bool:
        return call.carried is not None and bool(CarriedState(self._model).unlike(call.carried))

    def end(self, call: RecordedCall) -> list[Tensor]:
        """The call is over; return what it left in attributes of the model: it can be used in a loss like its outputs."""
        call.transitions, call.draws = self.trace.unverified, self.trace.draws
        changed = self._left_by_training.note(call.state)
        if changed and call.carried is None and self.state is None:  # it may be that no gradients come back: from where it left off
            again = self._begun(call.module, call.name, call.args, call.kwargs, call.key, call.kind)
            again.reached = call.reached
            self.quiet.append(again)
        known = (call.key, call.kind) in self.harmless
        if call.carried is not None and self._left_something(call) and (not known or self._left_quietly.note(call.state)):
            self.quiet.append(call)  # looked at as such, unless gradients come back from it
        if call.copied or call.transitions or changed or self.quiet:
            self._keep(call)
        return call.left if call.state is None or call.state.differs else []

    @property
    def changed(self) -> bool:
        """Whether something in the model changed in this step that never did in one that a check has covered."""
        return bool(self._left_by_training.open or self._left_by_training.new_in(self.state or self._begin))

    def cover_changed(self) -> None:
        """A check has covered it."""
        self._left_by_training.note(self.state or self._begin)
        self._left_by_training.cover()

    def remember(self, quiet: RecordedCall, left: Sequence[CarriedState]) -> None:
        """Two runs of it, on other samples each, left these two things behind: where they differ, they are of the samples."""
        first, second = left
        if unlike := first.unlike(second):
            what = (quiet.name or "the model", quiet.training)
            self.left_quietly[what] = (unlike, first.narrowed(unlike.names), second.narrowed(unlike.names))

    def cover_quiet(self) -> None:
        """A check has looked at what calls without gradients left."""
        self.harmless |= {(call.key, call.kind) for call in self.quiet if not call.reached}
        self._left_quietly.cover()
        self.quiet = []

    def has_view(self, call: RecordedCall, index: int, output: Tensor) -> None:
        """An output is a view: when it is changed in place it gets another history, and :meth:`reached` may not be called."""
        if index not in self.covered.get((call.key, call.kind), ()):
            self._views.append((call, index, output.detach(), output._version))

    def reached(self, call: RecordedCall, index: int) -> None:
        """Gradients come back from floating-point output number ``index`` of the call."""
        if self.paused:
            return
        call.reached.add(index)
        if call not in self.came_back_to:
            self.came_back_to.append(call)
        if call not in self.calls and index not in self.covered.get((call.key, call.kind), ()):
            self._keep(call)

    def _keep(self, call: RecordedCall) -> None:
        if len(self.calls) == LIMIT:
            self.overflowed = True
        else:
            self.calls.append(call)

    def used(self) -> list[RecordedCall]:
        """The calls that gradients came back from; all, where none did: a loss may only use what is inside them."""
        views, self._views = self._views, []
        for call, index, alias, version in views:
            if alias._version != version:  # which it shares with the output, changed in place
                self.reached(call, index)
        # Nothing was captured of a call while all was frozen: a generator trained through a model that is not.
        calls = [call for call in self.calls if any(call.key[-1])]
        return [call for call in calls if call.reached or call.around] if self.came_back_to else calls

    def began(self, call: RecordedCall | None) -> tuple[ModuleState | None, CarriedState | None]:
        """What the model was when ``call``, or the function around it, began."""
        if call is None or call.state is None:
            return self.state, self.carried
        return call.state, call.carried

    @contextmanager
    def whole_function(self) -> Iterator[None]:
        """A function is recorded that runs the model: it is run again as a whole, from its start."""
        self.state = ModuleState(self._model)
        self.carried = CarriedState(self._model, self.state) if self.armed else None
        try:
            yield
        finally:
            self.state = self.carried = None
