"""CallRecorder: keeps the outermost calls of one step, for a check that may want to run them again."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

from torch import Tensor, nn

from ..._rerun import AmbientContext, ModuleState
from ..._tree import private_copy
from .recorded_call import RecordedCall, kind_of
from .trace import OpTrace
from .written import Written

LIMIT = 64  # how many outermost calls are remembered: those of one step, in practice one or two


class CallRecorder:
    """Records calls that are new: inputs as they were, which way they took, which outputs gradients came back from."""

    def __init__(self, model: nn.Module, params: Sequence[nn.Parameter], trace: OpTrace) -> None:
        self._model = model
        self._params = params
        self._device = next((p.device.type for p in self._params), "cpu")
        self._views: list[tuple[RecordedCall, int, Tensor, int]] = []
        # Whose state is let go at the next step, kept or not: it holds what the call before left in attributes.
        self._recorded: WeakSet[RecordedCall] = WeakSet()
        self.trace = trace  # follows the operations of calls
        self.checked: set[tuple[Any, ...]] = set()  # states of the model that a check has covered
        # For each state of the model and kind of call, numbers of the outputs that checks have covered.
        self.covered: dict[tuple[Any, Any], set[int]] = {}
        self.situation = ""  # what else is special about the present batch
        self.paused = False  # whether nothing is recorded, since a check is running calls
        # While a whole function is to be checked, attributes of the model at its start; calls need none then.
        self.state: ModuleState | None = None
        self.new_step()

    def new_step(self) -> None:
        """Forget calls recorded before a boundary."""
        for call in self._recorded:
            call.state = None
        self._recorded.clear()
        self.calls: list[RecordedCall] = []  # those of the present step that a check may have to look at
        self._views = []
        self.overflowed = False  # whether there were more than LIMIT
        self.came_back = False  # whether a backward pass came to any call
        self.written: Written | None = None  # buffers and frozen parameters before the first of the calls
        self.trace.unverified = set()

    def key(self, samples: int) -> tuple[Any, ...]:
        """What a check has shown something about: one sample or several, the modes of modules, what is trainable."""
        modes = tuple((module.training, len(module._forward_hooks)) for module in self._model.modules())
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
        if new:
            if not self.calls:
                self.written = Written(self._model, frozen=True)
            args, kwargs = private_copy((args, kwargs))
        call = RecordedCall(module, name, args, kwargs, AmbientContext.current(self._device), key, kind, new)
        if self.state is None:
            call.state = ModuleState(self._model)
            self._recorded.add(call)
        return call

    def end(self, call: RecordedCall) -> list[Tensor]:
        """The call is over; return what it left in attributes of the model: it can be used in a loss like its outputs."""
        call.transitions, call.draws = self.trace.unverified, self.trace.draws
        if call.copied or call.transitions:
            self._keep(call)
        return call.left

    def has_view(self, call: RecordedCall, index: int, output: Tensor) -> None:
        """An output is a view: when it is changed in place it gets another history, and :meth:`reached` may not be called."""
        if index not in self.covered.get((call.key, call.kind), ()):
            self._views.append((call, index, output.detach(), output._version))

    def reached(self, call: RecordedCall, index: int) -> None:
        """Gradients come back from floating-point output number ``index`` of the call."""
        if self.paused:
            return
        self.came_back = True
        call.reached.add(index)
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
        return [call for call in self.calls if call.reached] if self.came_back else self.calls

    @contextmanager
    def whole_function(self) -> Iterator[None]:
        """A function is recorded that runs the model: it is run again as a whole, from its start."""
        self.state = ModuleState(self._model)
        try:
            yield
        finally:
            self.state = None
