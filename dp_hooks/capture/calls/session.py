"""Session: what is going on in a model at this moment, in one place that every hook reads and writes."""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import UnsupportedModelError
from ...gradients.sinks import Sink
from .backward_passes import BackwardPass, BackwardPasses, Refusals
from .call_recorder import CallRecorder
from .one_thread import OneThread
from .parameter_swap import ParameterSwap
from .recorded_call import RecordedCall
from .trace import OpTrace


@dataclass(eq=False)
class ModelCall:
    """One outermost call into the model: its own graph leads back to it when gradients come."""

    name: str = ""  # the qualified name of the module that was called
    module: nn.Module | None = None  # that module; None before the first call
    args: tuple[Any, ...] = ()  # positional inputs, while the call runs
    kwargs: dict[str, Any] = field(default_factory=dict)  # keyword inputs, while the call runs
    rows: int | None = None  # the number of samples; None: not known
    batch_number: int = 0  # which batch it was on
    running: bool = False  # whether it is running, with gradients captured
    # By key, the uses of tracked tensors and calls of modules so far: the shapes met, and the layout taken for it.
    uses: dict[Any, list[tuple[Any, Any]]] = field(default_factory=dict)
    strict: bool = False  # uses that no probe has shown are probed before they are guessed
    retries: int = 0  # how often probes were run anew in the middle of it
    record: RecordedCall | None = None  # what a check will need to run it again

    def end(self) -> None:
        """It is over, or was broken off: let go of its inputs."""
        self.running, self.args, self.kwargs = False, (), {}


@dataclass(frozen=True)
class LeakHook:
    """Tells a session of gradients that autograd delivers to a parameter.

    It hangs where the garbage collector does not see it: what it held would never be freed.
    """

    session: "weakref.ref[Session]"
    name: str

    def __call__(self, param: Tensor) -> None:
        """A gradient arrived."""
        session = self.session()
        if session is not None:
            session.leaked(self.name, param)


class Session:
    """The state of capture: calls and backward passes in progress, and what came back since the last boundary."""

    def __init__(self, sink: Sink, axis: int, loss_reduction: str) -> None:
        self.sink = sink  # takes what backward passes bring; one per mode
        self.axis = axis  # the sample axis of the model's inputs and outputs
        self.loss_reduction = loss_reduction  # "mean" or "sum"
        self.enabled = False  # whether anything is captured
        self.batch_number = 0  # counts the batches handed out
        self.call = ModelCall()  # the outermost call that is running, or was last, or that gradients come back to
        self.depth = 0  # how many calls of modules are open
        self.threads = OneThread()  # who may call them
        self.rerunning = 0  # how many modules are being called with tensors of ours, for gradients
        self.repeating = 0  # how many modules that are repeated as a whole are running: what is inside is theirs
        self.outer_task = -1  # the backward pass that a check runs in; -1: none
        self.retracked_task: int | None = None  # the backward pass for which parameters are tracked again
        self.swapped: dict[int, ParameterSwap] = {}  # modules that hold other tensors in place of their parameters now
        self.passes = BackwardPasses()  # backward passes since the last boundary
        # A leaf that requires a gradient, so that there always is a backward pass.
        self.anchor = torch.zeros((), device="cpu", requires_grad=True)
        # Held for its identity: it tells a backward() from an autograd.grad() that is after something else.
        self._anchor_node: Any = self.anchor.view_as(self.anchor).grad_fn.next_functions[0][0]  # type: ignore[union-attr]
        self.trace: OpTrace | None = None  # follows operations, if a check wants them
        self.recorder: CallRecorder | None = None  # keeps calls, if a check wants them
        # Around a train function: nodes that gradients come into the model by, and tensors that they leave it by.
        self.borders: tuple[set[Any], list[Tensor]] | None = None
        self.collected: Refusals | None = None  # refusals, where one wants to see them all; None: they are raised
        # Told the inputs of every outermost call with gradients, and may refuse it.
        self.before_call: Callable[[tuple[Any, Any], BackwardPasses], None] | None = None
        # Told each output of outermost calls, and what a backward pass brings to it.
        self.on_output: Callable[[ModelCall, int, Tensor], None] | None = None
        self.on_arrival: Callable[[ModelCall, int, Tensor], None] | None = None
        # Told how many samples a backward pass on the present batch was over, and may refuse that.
        self.check_rows: Callable[[int], None] | None = None
        # Looks at the loss of a backward pass that comes to its end, and may refuse it.
        self.check_loss: Callable[[], None] | None = None
        # Finds the input, by number, that counts samples; what was found last, by the name of the module called.
        self.find_counting: Callable[[Sequence[Tensor]], int] | None = None
        self.counting: dict[str, int] = {}

    def in_backward(self) -> bool:
        """Whether a backward pass is running, so that what is run forwards is run again."""
        return torch._C._current_graph_task_id() not in (-1, self.outer_task)

    def rows(self) -> int | None:
        """How many samples the present call is on; inside a backward pass those of the forward pass that is run again."""
        return self.call.rows if self.depth or self.in_backward() else None

    def scale(self, samples: int) -> float:
        """The factor that undoes the mean over the batch."""
        return float(samples) if self.loss_reduction == "mean" else 1.0

    def wants_gradients(self) -> bool:
        """Whether the backward pass that is running is a ``backward()``, not an ``autograd.grad()`` for something else."""
        return bool(torch._C._will_engine_execute_node(self._anchor_node))

    def running_pass(self, batch_number: int | None = None) -> BackwardPass:
        """The backward pass that is running."""
        if not self.passes.open:
            self.threads.begin_backward()
        return self.passes.running(self.batch_number if batch_number is None else batch_number, self._finish_pass)

    def leaked(self, name: str, param: Tensor) -> None:
        """Autograd delivered a gradient to a managed parameter: it was used where nothing captured it."""
        if self.enabled:
            param.grad = None
            self.running_pass()
            self.passes.leaks.add(name)

    def refuse(self, error: UnsupportedModelError, where: str, opened: BackwardPass | None = None) -> None:
        """Collect ``error`` where all are wanted; else raise it, at the end of a backward pass with all others."""
        if self.collected is not None:
            self.collected.add(error, where)
        elif opened is not None:
            opened.refusals.add(error, where)
        else:
            raise error

    def _finish_pass(self, task: int) -> None:
        """Runs at the end of a backward pass; one that was broken off never gets here."""
        if task == self.retracked_task:
            self.retracked_task = None
            self.restore_parameters()
        finished = self.passes.open.pop(task, None)
        if not self.depth and not self.passes.open:
            self.threads.end()
        if finished is None:
            return
        if self.check_rows is not None and finished.batch_number == self.batch_number:
            sizes: set[int | None] = {samples for _, samples in finished.sizes}
            sizes = sizes or {self.call.rows}
            for size in sizes:  # named before what may only follow from it
                if size is not None:
                    self.check_rows(size)
            if self.check_loss is not None:
                self.check_loss()
        leaked = self.passes.take_leaks()
        if leaked is not None:
            self.refuse(*leaked, finished)
        finished.refusals.raise_all()
        samples = self.passes.close(finished)
        if samples is None:
            return
        try:
            self.sink.finish(samples, finished.found)
        except BaseException:
            self.discard()
            raise

    def restore_parameters(self) -> None:
        """Put all parameters back that are not in place."""
        for swap in list(self.swapped.values()):
            swap.restore()

    def reset(self) -> None:
        """Forget what is in progress; what is kept in the sink stays."""
        if self.call.running and self.trace is not None:  # the pass was interrupted
            self.trace.stop()
        self.call.end()
        if (
            not self.depth and self.call.record is not None
        ):  # what was recorded of it lives as long as its graph, not as long as this
            self.call = replace(self.call, record=None)
        self.retracked_task = None
        self.restore_parameters()  # an interrupted forward could not
        self.passes = BackwardPasses()
        self.depth = 0
        self.threads.end()

    def discard(self) -> None:
        """Drop what was captured since the last boundary, ``grad_sample`` included."""
        self.reset()
        self.sink.discard()

    @contextmanager
    def separate(self) -> Iterator[None]:
        """Capture something else in between: what was captured before is back, unchanged, afterwards."""
        with self.threads.step(), self.sink.aside() as other:
            kept = dict(vars(self))
            self.reset()
            self.sink, self.call, self.outer_task = other, ModelCall(), torch._C._current_graph_task_id()
            self.before_call = self.check_rows = self.check_loss = self.find_counting = None
            self.on_output = self.on_arrival = None
            try:
                yield
            finally:
                self.discard()
                vars(self).update(kept)
