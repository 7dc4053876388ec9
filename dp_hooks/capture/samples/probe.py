"""Where the batch is in every tensor that parameters meet: seen by running the model on another number of rows."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from ..._operations import CONSTANTS, DATA_SHAPED, KEEPS_TARGET, PADDED_TO, RESHAPES, SORTS, TO_PYTHON
from ..._tree import tensors_of, tree_map
from ...errors import UnsupportedModelError
from .axis import SampleAxis
from .custom_functions import custom_forwards
from .tracked import in_transform, is_float, plain
from .uses import BYPASSED, MIXED, ROUTED, UNCLEAR, UseLayout

_COMPARED = 1 << 16  # how many rows of a large axis are compared to find out in which order it holds the samples


@dataclass(eq=False)
class Frame:
    """One call of a module during a probe."""

    module: nn.Module
    name: str  # its qualified name
    clean: bool  # nothing that went in or came out is without a known order of the samples
    batched: bool  # a tensor with a sample axis went in
    routed: bool = False  # rows were picked by their values inside
    repeat: bool = False  # the module is to be repeated on each sample, since what came out is in order again
    ragged: bool = False  # numbers of samples were read into Python inside: sizes may depend on them


@dataclass(eq=False)
class Probe(TorchFunctionMode):
    """One run of the model on ``rows`` rows: the first sample once, the second in all other rows.

    As a context it watches operations: it marks tensors whose rows were picked or sorted by values, and what is made of them.
    """

    rows: int  # their number
    two_distinct: bool  # whether the second sample is another one than the first
    # What the samples share is marked where it is first laid out for each of them, so that it shows when rows of it end up with
    # other samples. They hold the same values there, but gradients go back to the row they came from.
    mark_first: bool = False
    # Constants that the model makes, and outputs of modules that are the same for all samples, are made others for the first one,
    # so that they tell the order of samples.
    tell_apart: bool = False
    uses: dict[Any, list[UseLayout]] = field(default_factory=dict)  # what was seen, by key, in order
    frames: list[Frame] = field(default_factory=list)  # the calls of modules
    out_of_order: list[Frame] = field(default_factory=list)  # those out of which rows came in no order, first the inner ones
    flat_bag: str | None = None  # the name of an ``EmbeddingBag`` that got flat ids from the inputs of the model
    _given: list[Tensor] = field(default_factory=list)
    _open: list[Frame] = field(default_factory=list)
    _marked: WeakIdKeyDictionary = field(default_factory=WeakIdKeyDictionary)
    _orders: dict[int, int] = field(default_factory=dict)  # for rows per sample, the order that was the only one to fit elsewhere
    _numbers: WeakIdKeyDictionary = field(default_factory=WeakIdKeyDictionary)

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name in ("__get__", "__set__"):
            return out
        tensors = tensors_of((args, kwargs))
        if name == "__iter__":
            parts = list(out)
            self._note_numbers(tensors, parts)
            return iter(parts)
        if name in TO_PYTHON:
            self._note_read(tensors)
        elif name not in PADDED_TO:
            self._note_numbers(tensors, out)
        if self.tell_apart and name in CONSTANTS and isinstance(out, Tensor):
            out = self._with_first_unlike(out)
        if name == "__getitem__":
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            ends = [end for i in index if isinstance(i, slice) for end in (i.start, i.stop)]
            self._note_read([end for end in ends if isinstance(end, Tensor)])
        if self._picks(name.strip("_"), args, kwargs):
            self._mark(out)
        elif any(t in self._marked for t in tensors):
            target = tensors[0] not in self._marked
            kept = target and (out is tensors[0] or name.startswith(KEEPS_TARGET) or name == "__setitem__")
            fixed = name in RESHAPES and isinstance(out, Tensor) and self.rows in out.shape
            if not kept and not fixed:
                self._mark(out)
        return out

    def counts_rows(self, tensor: Tensor) -> bool:
        """Whether an axis of ``tensor`` grows with the number of rows."""
        return any(size and size % self.rows == 0 for size in tensor.shape)

    def sample_axis(self, tensor: Tensor, marks: bool = True) -> tuple[SampleAxis | None, str | None]:
        """Return the layout of ``tensor`` (None: no sample axis) and a reason why there is none where one should be."""
        if in_transform():
            return None, BYPASSED
        if marks and tensor in self._marked:
            return None, ROUTED
        found = [axis for axis, size in enumerate(tensor.shape) if size and size % self.rows == 0]
        if not found:
            return None, None
        if len(found) > 1:
            return None, MIXED
        (axis,) = found
        ratio = tensor.shape[axis] // self.rows
        if ratio == 1:
            return SampleAxis(axis), None
        if any(frame.ragged for frame in self._open):
            return None, ROUTED  # as many rows as a number says that was read from the batch
        orders = (outer for outer in (1, ratio, *range(2, ratio)) if ratio % outer == 0)
        fits = [outer for outer in orders if self._in_order(tensor, axis, outer, ratio // outer)]
        if not fits:
            return None, UNCLEAR
        usual, sure = self._orders.get(ratio, fits[0]), len(fits) == 1
        outer = usual if usual in fits else fits[0]
        if sure:
            self._orders[ratio] = outer
        return SampleAxis(axis, None if outer == ratio else outer, None if outer == 1 else ratio // outer, sure), None

    def _in_order(self, tensor: Tensor, axis: int, outer: int, inner: int) -> bool:
        """Whether the rows after the first, which all hold the same sample, hold the same numbers."""
        if not self.two_distinct:
            return outer == 1
        if not tensor.numel():
            return True
        with torch._C.DisableTorchFunction():
            flat = tensor.detach().movedim(axis, 0).flatten(1) if tensor.dim() > 1 else tensor.detach()[:, None]
            flat = flat[:, : max(1, _COMPARED // max(1, flat.shape[0]))]
            rows = flat.reshape(outer, self.rows, inner, -1)[:, 1:]
            rows = (rows.to(torch.float64) if not rows.is_complex() else torch.view_as_real(rows)).nan_to_num()
            size = float(rows.abs().max())
            rough = tensor.dtype in (torch.float16, torch.bfloat16)
            return float((rows - rows[:, :1]).abs().max()) <= (3e-2 if rough else 1e-4) * size

    def _layout(
        self, tensors: Sequence[Tensor], known: str | None = None
    ) -> tuple[tuple[SampleAxis | None, ...], str | None, tuple[float, ...]]:
        """The sample axis of each tensor, a reason why samples cannot be told apart if none is known, and the ratios."""
        found = [self.sample_axis(t) for t in tensors]
        reason = known or next((why for _, why in found if why is not None), None)
        every = known is None and reason in (MIXED, UNCLEAR)  # a size that stays the same is no batch
        sizes = [size for t, (at, _) in zip(tensors, found, strict=True) if every or at is not None for size in t.shape]
        return tuple(at for at, _ in found), reason, tuple(s / self.rows for s in sizes if every or s % self.rows == 0)

    def arguments(self, tensors: Sequence[Tensor], name: str) -> UseLayout:
        """How a use of these tensors is laid out, as far as is known before it; ``name`` is for messages."""
        inputs, reason, ratios = self._layout(tensors)
        return UseLayout(inputs, (), reason is None and not any(inputs), reason, name, ratios, tuple(self._open))

    def bypassed(self, params: Sequence[nn.Parameter]) -> UseLayout:
        """How tensors made from ``params`` go into a custom autograd function."""
        return UseLayout(reason=BYPASSED, frames=tuple(self._open), params=tuple(params))

    def results(self, use: UseLayout, tensors: Sequence[Tensor]) -> UseLayout:
        """The same, completed by the results of the use."""
        outputs, reason, ratios = self._layout(tensors, use.reason)
        return replace(use, outputs=outputs, reason=reason, ratios=use.ratios + ratios, shared=False)

    def with_first_marked(self, leaf: Any) -> Any:
        """A tensor in which all samples have the same rows, with other ones for the first sample; else ``leaf`` as it is."""
        tensor = plain(leaf)
        return self._with_first_unlike(tensor) if self.mark_first else tensor

    def _with_first_unlike(self, tensor: Tensor) -> Tensor:
        if not is_float(tensor) or tensor.is_complex() or not tensor.numel():
            return tensor
        sample_axis, _ = self.sample_axis(tensor)
        with torch._C.DisableTorchFunction():
            if sample_axis is None or not bool(tensor.isfinite().all()):
                return tensor
            first = torch.zeros(self.rows, device=tensor.device, dtype=tensor.dtype)
            first[0] = 0.1 * float(tensor.abs().max()) or 0.1
            return tensor + sample_axis.spread(first, tensor) * (wave(tensor) if tensor.dim() > 1 else 1)

    def told_apart(self, output: Any) -> Any | None:
        """What a module gave out, with other numbers for the first sample where all are alike; None: as it is."""
        if not self.tell_apart:
            return None
        changed: list[Tensor] = []

        def visit(leaf: Any) -> Any:
            if isinstance(leaf, Tensor) and self._is_alike(leaf):
                changed.append(leaf)
                return self._with_first_unlike(leaf)
            return leaf

        out = tree_map(visit, output)
        return out if changed else None

    def _is_alike(self, tensor: Tensor) -> bool:
        """Whether the first sample has the rows of the others."""
        if type(tensor) is not Tensor or not tensor.is_floating_point() or not tensor.numel() or in_transform():
            return False
        at, _ = self.sample_axis(tensor, marks=False)
        if at is None or at != SampleAxis(at.axis):
            return False
        first, *_, last = tensor.detach().unbind(at.axis)
        return float((first - last).nan_to_num().abs().max()) <= 1e-3 * float(tensor.nan_to_num().abs().max())

    def note(self, key: Any, use: UseLayout) -> None:
        """Keep ``use``."""
        self.uses.setdefault(key, []).append(use)
        if use.reason == ROUTED and self._open:
            self._open[-1].routed = True

    def _mark(self, tree: Any) -> None:
        """Mark all tensors in ``tree`` as picked by value."""
        for tensor in tensors_of(tree):
            self._marked[tensor] = True

    def unmark(self, tensors: Sequence[Tensor]) -> None:
        """Take ``tensors`` as in the order of the samples again."""
        for tensor in tensors:
            self._marked.pop(tensor, None)

    def _tells_of_samples(self, tensor: Tensor) -> bool:
        return tensor in self._numbers or self.counts_rows(tensor)

    def _note_numbers(self, sources: Sequence[Tensor], out: Any) -> None:
        """Take note of numbers that were worked out from the batch: sizes that depend on them are no fixed layout."""
        for tensor in tensors_of(out):
            many = tensor.is_floating_point() and tensor.numel() > 1
            if many or tensor.dtype == torch.bool or self.counts_rows(tensor):
                continue
            if any(self._tells_of_samples(t) for t in sources):
                self._numbers[tensor] = True

    def _note_read(self, tensors: Sequence[Tensor]) -> None:
        """``tensors`` are read into Python: sizes may depend on their values from here on."""
        if self._open and any(self._tells_of_samples(t) for t in tensors):
            self._open[-1].ragged = True

    def _picks(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether the operation ``name`` picks or sorts rows by their values."""
        if name in DATA_SHAPED:
            return True
        if name == "repeat_interleave":
            return any(isinstance(a, Tensor) for a in (*args[1:], *kwargs.values()))
        if name == "where":
            return len(args) + len(kwargs) == 1
        if name == "getitem":
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            return any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in index)
        if name in SORTS and args and isinstance(args[0], Tensor) and args[0].dim():
            position = 2 if name == "topk" else 1
            dim = kwargs.get("dim", args[position] if len(args) > position else (0 if name == "msort" else -1))
            size = args[0].shape[dim] if isinstance(dim, int) and not isinstance(dim, bool) else 0
            return bool(size) and size % self.rows == 0
        return False

    def enter(self, name: str, module: nn.Module, tree: Any) -> None:
        """A module is called."""
        if not self.frames:
            self._given = tensors_of(tree)
        if isinstance(module, nn.EmbeddingBag) and self._is_flat(module, *tree):
            self.flat_bag = name
        found = [self.sample_axis(t) for t in tensors_of(tree)]
        frame = Frame(module, name, all(why is None for _, why in found), any(at is not None for at, _ in found))
        self.frames.append(frame)
        self._open.append(frame)

    def _is_flat(self, bag: nn.EmbeddingBag, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether ``bag`` got ids and offsets of different number that are the model's own inputs."""
        ids = args[0] if args else kwargs.get("input")
        offsets = args[1] if len(args) > 1 else kwargs.get("offsets")
        if not isinstance(ids, Tensor) or not isinstance(offsets, Tensor):
            return False
        return len(ids) != len(offsets) - bag.include_last_offset and any(ids is t for t in self._given)

    def check_inputs(self) -> None:
        """Refuse flat ids and offsets of an ``EmbeddingBag`` as inputs of the model: no rows can be taken from them."""
        if self.flat_bag is not None:
            raise UnsupportedModelError(
                f"{self.flat_bag or 'the model'} (EmbeddingBag): the model was called with flat ids and offsets, so its inputs "
                "have no sample axis, and single samples cannot be taken from them. Remedy: pass ids of shape [samples, longest] "
                "without offsets, filled up with the padding_idx of the bag, which it leaves out; or flatten such ids inside the "
                "model."
            )

    def leave(self, tree: Any) -> None:
        """The call of a module ends."""
        if not self._open:
            return
        frame = self._open.pop()
        tensors = [t for t in tensors_of(tree) if t.is_floating_point()]
        outputs = [self.sample_axis(t, marks=False) for t in tensors]
        kept = all(self._keeps_order(t, at) for t, (at, _) in zip(tensors, outputs, strict=True))
        if frame.clean and not kept:
            self.out_of_order.append(frame)
        frame.clean = frame.clean and all(why is None for _, why in outputs) and any(at for at, _ in outputs)
        if frame.ragged:
            self._leave_ragged(tree, tensors)
        if not frame.routed:
            return
        if frame.clean and frame.batched:
            frame.repeat = True
            self.unmark(tensors)
        elif self._open:
            self._open[-1].routed = True

    def _leave_ragged(self, tree: Any, tensors: Sequence[Tensor]) -> None:
        """What comes out of a call that read numbers of samples may have as many rows as they said."""
        numbers: list[Any] = []

        def visit(leaf: Any) -> Any:
            numbers.extend([leaf] if isinstance(leaf, (int, float)) and not isinstance(leaf, bool) else [])
            return leaf

        tree_map(visit, tree)
        if numbers and self._open:
            self._open[-1].ragged = True
        self._mark([t for t in tensors if self.counts_rows(t) and self.rows not in t.shape])

    def _keeps_order(self, tensor: Tensor, sample_axis: SampleAxis | None) -> bool:
        if sample_axis is None:
            return not self.counts_rows(tensor)
        return sample_axis != SampleAxis(sample_axis.axis) or self._in_order(tensor, sample_axis.axis, 1, 1)

    def misplaced_by(self, unmarked: "Probe") -> list[Frame]:
        """Calls, inner ones first, that put what is shared into rows of other samples: it shows in this probe only."""
        seen = {frame.name for frame in unmarked.out_of_order}
        return [frame for frame in self.out_of_order if frame.name not in seen and frame.batched]

    def around(self, key: Any) -> list[Frame]:
        """The innermost calls around the uses of ``key`` that samples go into and come out of in a known order.

        Parameters that a custom function got are to be found in the module: others would stay out of what is repeated.
        """
        found: list[Frame] = []
        for use in self.uses.get(key, []):
            ordered = (frame for frame in reversed(use.frames) if frame.clean and frame.batched)
            found += [frame for frame in ordered if {*use.params} <= {*frame.module.parameters()}][:1]
        return found


def wave(like: Tensor) -> Tensor:
    """Return numbers of the size of 1 that differ along the last axis of ``like``."""
    return torch.linspace(1, 2, like.shape[-1], device=like.device, dtype=like.dtype).sin()


def gradients_wanted(probe: Probe | None) -> bool:
    """Whether gradients may flow through what is being done."""
    # In a probe also inside autograd functions: checkpointing and reversible layers run what is inside again, for gradients.
    return torch.is_grad_enabled() or (probe is not None and next(custom_forwards(), None) is not None)
