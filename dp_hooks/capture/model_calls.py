"""ModelCalls: what happens when the model is called from outside: which call is the outermost, and where its graph leads."""

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .._tree import outputs_of, tensors_of
from ..errors import UnsupportedModelError
from .calls.session import ModelCall, Session
from .calls.trace import untraced
from .calls.written import Written
from .discovery import Discovery
from .hooked_modules import HookedModules
from .module_calls import ModuleCalls
from .samples.rows_of_inputs import refuse_without_rows, rows_of_inputs
from .samples.tracker import Tracker
from .validate import mixes_samples, mixing_reason


@dataclass(eq=False)
class ModelCalls:
    """The hooks around all modules of a model, hooked ones or not."""

    model: nn.Module
    session: Session
    hooked_modules: HookedModules
    tracker: Tracker
    discovery: Discovery
    module_calls: ModuleCalls
    _running: ModelCall = field(default_factory=ModelCall)
    _written: Written | None = None

    def guard(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Refuse a module that mixes samples in the mode it is in now."""
        if self.session.enabled and mixes_samples(module) and (module.training or torch.is_grad_enabled()):
            text = f"{name} ({type(module).__name__}): {mixing_reason(module)}."
            self.session.refuse(UnsupportedModelError(text), name)

    @untraced
    def straighten(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """A batch of one comes out of BatchNorm: see to it that its gradient comes back in the usual order in memory.

        On a CPU PyTorch (2.7 to 2.14 at least) computes wrong gradients if it does not, as behind ``flatten(2).transpose(1, 2)``.
        """
        if isinstance(output, Tensor) and output.requires_grad and output.shape[0] == 1:
            output.register_hook(Tensor.contiguous)

    def enter(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A module is called; the first input of the outermost one tells the number of samples."""
        session = self.session
        session.threads.check()
        if session.rerunning:
            return
        if self.tracker.probe is not None:
            self.tracker.probe.enter(name, module, (args, kwargs))
        elif not session.in_backward():
            if not session.depth:
                session.threads.begin_call()
            session.depth += 1
            if session.depth == 1:
                try:
                    self._begin(name, module, args, kwargs)
                except BaseException:
                    session.depth = 0  # the hook after the call will not run
                    session.threads.end()
                    raise
            elif session.trace is not None:
                session.trace.enter(name)
        hooked = self.hooked_modules.repeated(module)
        if hooked is not None:
            self.module_calls.before(hooked, module, args, kwargs)
            session.repeating += hooked.swap.swapped

    @untraced
    def _begin(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The outermost call begins."""
        session = self.session
        inputs = tensors_of((args, kwargs))
        if session.enabled and torch.is_grad_enabled():
            refuse_without_rows(inputs, session.axis, name)
        rows = self._rows_of(name, inputs)
        session.call = self._running = call = ModelCall(name, module, args, kwargs, rows, session.batch_number)
        session.repeating = 0
        if not torch.is_grad_enabled():
            if session.recorder is not None and session.enabled:
                call.record = session.recorder.begin_quiet(name, module, args, kwargs)
            return
        if session.recorder is not None:
            call.record = session.recorder.begin(name, module, args, kwargs)
        if self.module_calls.capturing():
            if session.borders is not None:
                session.borders[1].extend(t for t in inputs if t.requires_grad)
            if session.before_call is not None:
                session.before_call((args, kwargs), session.passes)
            call.running = True
            try:
                self.discovery.learn(call)
            except UnsupportedModelError:
                if session.check_rows is not None and rows is not None:
                    session.check_rows(rows)  # the cause, if these are not the rows of the batch
                raise
            self._written = Written(self.model)
            self.hooked_modules.track_outside()
            if session.trace is not None:
                session.trace.start(name, rows)

    def _rows_of(self, name: str, inputs: list[Tensor]) -> int | None:
        """How many samples a call is on; a check, which calls a module on some of them, goes by the same input."""
        session = self.session
        if session.find_counting is not None:
            session.counting[name] = session.find_counting(inputs)
        return rows_of_inputs(inputs[session.counting.get(name, 0) :], session.axis)

    def leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """The call of a module is over; return other outputs in the place of its own, or None."""
        session = self.session
        if session.rerunning or session.threads.is_other():
            return None
        hooked = self.hooked_modules.repeated(module)
        replaced = None
        if hooked is not None and hooked.swap.swapped:
            session.repeating -= 1
            replaced = self.module_calls.after(hooked, module, args, kwargs, output)
        if self.tracker.probe is not None:
            self.tracker.probe.leave(output)
            return replaced if replaced is not None else self.tracker.probe.told_apart(output)
        if not session.in_backward():
            session.depth = max(0, session.depth - 1)
            if session.trace is not None and session.depth:
                session.trace.leave()
            if session.depth == 0:
                return self._end(output, replaced)
        return replaced

    @untraced
    def _end(self, output: Any, replaced: Any) -> Any:
        """The outermost call ends."""
        session = self.session
        # A backward pass in the middle of the call may have gone back to an earlier one.
        session.call = call = self._running
        self._running, recorder = ModelCall(), session.recorder
        if session.trace is not None:
            session.trace.stop()
        session.retracked_task = None
        session.restore_parameters()
        call.end()
        session.threads.end()
        self._check_written()
        ordinary = self.tracker.untrack(output)
        result = replaced if ordinary is output else ordinary
        if recorder is not None and call.record is not None and not call.record.with_gradients:
            recorder.end_quiet(call.record)
        elif session.enabled and torch.is_grad_enabled():
            left = [] if recorder is None or call.record is None else recorder.end(call.record)
            self._watch(call, [*outputs_of(output if result is None else result), *left])
        return result

    def _check_written(self) -> None:
        """Refuse a forward pass that wrote to a buffer: what comes from private samples gets no noise there."""
        written, self._written = self._written, None
        names = [] if written is None else written.since()
        names = [name for name in names if not mixes_samples(self.model.get_submodule(name.rpartition(".")[0]))]
        if names and self.session.trace is not None:
            self.session.trace.note_written(names)
        elif names:
            error = UnsupportedModelError(
                f"{', '.join(names)}: written during the forward pass. What is written to buffers from private samples gets "
                "no noise. Remedy: call .eval() on the module that does it, or replace it."
            )
            self.session.refuse(error, "")

    def _watch(self, call: ModelCall, outputs: list[Tensor]) -> None:
        """Be told when a backward pass comes to the outputs of an outermost call."""
        recorder = self.session.recorder
        for index, tensor in enumerate(t for t in outputs if t.is_floating_point()):
            if tensor.grad_fn is not None:
                if self.session.borders is not None:
                    self.session.borders[0].add(tensor.grad_fn)
                if self.session.on_output is not None:
                    self.session.on_output(call, index, tensor)
                # What is kept of the call lives as long as its graph does.
                tensor.grad_fn.register_prehook(functools.partial(self._arrived, call, index, tensor.output_nr))
                if recorder is not None and call.record is not None and tensor._is_view():
                    recorder.has_view(call.record, index, tensor)

    def _arrived(self, call: ModelCall, index: int, output_nr: int, grads: tuple[Tensor | None, ...]) -> None:
        session = self.session
        arrived = grads[output_nr]
        if not session.enabled or arrived is None:
            return
        if session.on_arrival is not None and session.wants_gradients():
            session.on_arrival(call, index, arrived)
        # Checkpointing runs parts of this call again, and the model may have been called on other samples since.
        session.call = call
        if session.recorder is not None and call.record is not None:
            session.recorder.reached(call.record, index)
        if session.retracked_task is None and self.hooked_modules.any_tracked():
            session.running_pass(call.batch_number)  # whose end is the end of this
            session.retracked_task = torch._C._current_graph_task_id()
            self.hooked_modules.track_again()
