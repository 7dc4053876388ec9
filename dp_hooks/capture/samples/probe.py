"""Where the batch is in every tensor that parameters meet: seen by running the model on another number of rows."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from ..._operations import DATA_SHAPED, KEEPS_TARGET, PADDED_TO, RESHAPES, SORTS, TO_PYTHON
from ..._tree import tensors_of, tree_map
from ...errors import UnsupportedModelError
from .axis import SampleAxis
from .custom_functions import custom_forwards
from .uses import BYPASSED, MIXED, ROUTED, UNCLEAR, UseLayout

# How many rows of a large axis are compared to find out in which order it holds the samples.
_COMPARED = 1 << 16


@dataclass(eq=False)
class _Frame:
    """One call of a module during a probe."""

    module: nn.Module
    name: str
    clean: bool
    batched: bool
    routed: bool = False
    repeat: bool = False
    ragged: bool = False


class _Watch(TorchFunctionMode):
    """Marks tensors whose rows were picked or sorted by values, and what is computed from them."""

    def __init__(self, probe: "Probe") -> None:
        super().__init__()
        self._trial = probe

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name in ("__get__", "__set__"):
            return out
        probe = self._trial
        tensors = tensors_of((args, kwargs))
        if name == "__iter__":
            parts = list(out)
            probe.note_numbers(tensors, parts)
            return iter(parts)
        if name in TO_PYTHON:
            probe.note_read(tensors)
        elif name not in PADDED_TO:
            probe.note_numbers(tensors, out)
        if name == "__getitem__":
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            ends = [end for i in index if isinstance(i, slice) for end in (i.start, i.stop)]
            probe.note_read([end for end in ends if isinstance(end, Tensor)])
        if probe.picks(name.strip("_"), args, kwargs):
            probe.mark(out)
        elif any(probe.is_marked(t) for t in tensors):
            first = tensors[0] if tensors else None
            target = first is not None and not probe.is_marked(first)
            kept = target and (out is first or name.startswith(KEEPS_TARGET) or name == "__setitem__")
            fixed = name in RESHAPES and isinstance(out, Tensor) and probe.rows in out.shape
            if not kept and not fixed:
                probe.mark(out)
        return out


@dataclass(eq=False)
class Probe:
    """One run of the model on ``rows`` rows: the first sample once, the second in all other rows.

    With ``mark_first``, what the samples share is marked where it is first laid out for each of them, so that it shows when rows
    of it end up with other samples. They hold the same values there, but gradients go back to the row that a value came from.
    ``check_order``: also compare rows where there is one per sample.
    """

    rows: int
    two_distinct: bool
    mark_first: bool = False
    check_order: bool = False
    uses: dict[Any, list[UseLayout]] = field(default_factory=dict)
    frames: list[_Frame] = field(default_factory=list)
    out_of_order: list[int] = field(
        default_factory=list
    )  # calls out of which rows came in no order, first the inner ones
    flat_bag: str | None = None
    _given: list[Tensor] = field(default_factory=list)
    _open: list[int] = field(default_factory=list)
    _marked: WeakIdKeyDictionary = field(default_factory=WeakIdKeyDictionary)
    _numbers: WeakIdKeyDictionary = field(default_factory=WeakIdKeyDictionary)

    # ---------------------------------------------------------------- what is seen

    def counts_rows(self, tensor: Tensor) -> bool:
        """Whether an axis of ``tensor`` grows with the number of rows."""
        return any(size and size % self.rows == 0 for size in tensor.shape)

    def sample_axis(self, tensor: Tensor, marks: bool = True) -> tuple[SampleAxis | None, str | None]:
        """Return the layout of ``tensor`` (None: no sample axis) and a reason why there is none where one should be."""
        if marks and self.is_marked(tensor):
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
        if any(self.frames[i].ragged for i in self._open):
            return None, ROUTED  # as many rows as a number says that was read from the batch
        for outer in sorted((d for d in range(1, ratio + 1) if ratio % d == 0), key=lambda d: (d != 1, d != ratio, d)):
            if self._in_order(tensor, axis, outer, ratio // outer):
                if outer == 1:
                    return SampleAxis(axis, 1, None, ratio), None
                if outer == ratio:
                    return SampleAxis(axis, None, 1, ratio), None
                return SampleAxis(axis, outer, ratio // outer, ratio), None
        return None, UNCLEAR

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

    def arguments(self, tensors: Sequence[Tensor]) -> UseLayout:
        """The entry for a use of these tensors, as far as it is known before it."""
        found = [self.sample_axis(t) for t in tensors]
        reason = next((why for _, why in found if why is not None), None)
        sample_axes = tuple(at for at, _ in found)
        shared = reason is None and not any(sample_axes)
        return UseLayout(sample_axes, (), shared, reason, tuple(self._open), self._sizes(reason, tensors))

    def _sizes(self, reason: str | None, tensors: Sequence[Tensor]) -> tuple[float, ...]:
        return tuple(size / self.rows for t in tensors for size in t.shape) if reason in (MIXED, UNCLEAR) else ()

    def bypassed(self, params: Sequence[nn.Parameter]) -> UseLayout:
        """The entry for a custom autograd function that got tensors made from ``params``."""
        return UseLayout(reason=BYPASSED, frames=tuple(self._open), params=tuple(params))

    def results(self, use: UseLayout, tensors: Sequence[Tensor]) -> UseLayout:
        """The entry, completed by the results of the use."""
        found = [self.sample_axis(t) for t in tensors]
        reason = use.reason or next((why for _, why in found if why is not None), None)
        sizes = use.sizes or self._sizes(reason, tensors)
        return replace(use, outputs=tuple(at for at, _ in found), reason=reason, shared=False, sizes=sizes)

    def with_first_marked(self, tensor: Tensor) -> Tensor:
        """``tensor``, in which all samples have the same rows, with other ones for the first sample."""
        sample_axis, _ = self.sample_axis(tensor)
        with torch._C.DisableTorchFunction():
            if (
                not tensor.numel()
                or not self.mark_first
                or sample_axis is None
                or not tensor.is_floating_point()
                or not bool(tensor.isfinite().all())
            ):
                return tensor
            wave = torch.linspace(1, 2, tensor.shape[-1], device=tensor.device, dtype=tensor.dtype).sin()
            first = torch.zeros(self.rows, device=tensor.device, dtype=tensor.dtype)
            first[0] = 0.1 * float(tensor.abs().max()) or 0.1
            outer, inner = sample_axis.factors(tensor.shape[sample_axis.axis], self.rows) or (1, 1)
            shape = [1] * tensor.dim()
            shape[sample_axis.axis] = -1
            return tensor + first.repeat_interleave(inner).repeat(outer).reshape(shape) * (
                wave if tensor.dim() > 1 else 1
            )

    def note(self, key: Any, use: UseLayout) -> None:
        """Keep ``use``."""
        self.uses.setdefault(key, []).append(use)
        if use.reason == ROUTED and self._open:
            self.frames[self._open[-1]].routed = True

    # ---------------------------------------------------------------- rows picked by value

    def mark(self, tree: Any) -> None:
        """Mark all tensors in ``tree`` as picked by value."""
        for tensor in tensors_of(tree):
            self._marked[tensor] = True

    def unmark(self, tensors: Sequence[Tensor]) -> None:
        """Take ``tensors`` as in the order of the samples again."""
        for tensor in tensors:
            self._marked.pop(tensor, None)

    def _tells_of_samples(self, tensor: Tensor) -> bool:
        return tensor in self._numbers or self.counts_rows(tensor)

    def note_numbers(self, sources: Sequence[Tensor], out: Any) -> None:
        """Take note of numbers that were worked out from the batch: sizes that depend on them are no fixed layout."""
        for tensor in tensors_of(out):
            many = tensor.is_floating_point() and tensor.numel() > 1
            if many or tensor.dtype == torch.bool or self.counts_rows(tensor):
                continue
            if any(self._tells_of_samples(t) for t in sources):
                self._numbers[tensor] = True

    def note_read(self, tensors: Sequence[Tensor]) -> None:
        """``tensors`` are read into Python: sizes may depend on their values from here on."""
        if self._open and any(self._tells_of_samples(t) for t in tensors):
            self.frames[self._open[-1]].ragged = True

    def is_marked(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` was picked by value, or computed from such."""
        return tensor in self._marked

    def picks(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
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

    # ---------------------------------------------------------------- calls of modules

    def enter(self, name: str, module: nn.Module, tree: Any) -> None:
        """A module is called."""
        if not self.frames:
            self._given = tensors_of(tree)
        if isinstance(module, nn.EmbeddingBag) and self._is_flat(module, *tree):
            self.flat_bag = name
        found = [self.sample_axis(t) for t in tensors_of(tree)]
        self.frames.append(
            _Frame(module, name, all(why is None for _, why in found), any(at is not None for at, _ in found))
        )
        self._open.append(len(self.frames) - 1)

    def _is_flat(self, bag: nn.EmbeddingBag, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether ``bag`` got ids and offsets of different number that are the model's own inputs."""
        ids = args[0] if args else kwargs.get("input")
        offsets = args[1] if len(args) > 1 else kwargs.get("offsets")
        if not isinstance(ids, Tensor) or not isinstance(offsets, Tensor):
            return False
        return len(ids) != len(offsets) - bag.include_last_offset and any(ids is t for t in self._given)

    def check_inputs(self) -> None:
        """Refuse inputs whose rows are not samples.

        Raises:
            UnsupportedModelError: flat ids and offsets of an ``EmbeddingBag``, from which no rows can be taken.
        """
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
        index = self._open.pop()
        frame = self.frames[index]
        tensors = [t for t in tensors_of(tree) if t.is_floating_point()]
        outputs = [self.sample_axis(t, marks=False) for t in tensors]
        if (
            (self.mark_first or self.check_order)
            and frame.clean
            and not all(self._keeps_order(t, at) for t, (at, _) in zip(tensors, outputs, strict=True))
        ):
            self.out_of_order.append(index)
        frame.clean = frame.clean and all(why is None for _, why in outputs) and any(at for at, _ in outputs)
        if frame.ragged:
            self._leave_ragged(tree, tensors)
        if not frame.routed:
            return
        if frame.clean and frame.batched:
            frame.repeat = True
            self.unmark(tensors)
        elif self._open:
            self.frames[self._open[-1]].routed = True

    def _leave_ragged(self, tree: Any, tensors: Sequence[Tensor]) -> None:
        """What comes out of a call that read numbers of samples may have as many rows as they said."""
        numbers = False

        def visit(leaf: Any) -> Any:
            nonlocal numbers
            numbers = numbers or (isinstance(leaf, (int, float)) and not isinstance(leaf, bool))
            return leaf

        tree_map(visit, tree)
        if numbers and self._open:
            self.frames[self._open[-1]].ragged = True
        self.mark([t for t in tensors if self.counts_rows(t) and self.rows not in t.shape])

    def _keeps_order(self, tensor: Tensor, sample_axis: SampleAxis | None) -> bool:
        if sample_axis is None:
            return not self.counts_rows(tensor)
        return not sample_axis.is_plain or self._in_order(tensor, sample_axis.axis, 1, 1)

    def misplaced_by(self, untinted: "Probe") -> list[tuple[str, nn.Module]]:
        """Calls, inner ones first, that put what is shared into rows of other samples: it shows in this probe only."""
        seen = {untinted.frames[index].name for index in untinted.out_of_order}
        frames = [self.frames[index] for index in self.out_of_order]
        return [(frame.name, frame.module) for frame in frames if frame.name not in seen and frame.batched]

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch operations inside the block."""
        with _Watch(self):
            yield

    def repeated_module(self, use: UseLayout) -> tuple[str, nn.Module] | None:
        """The innermost call around ``use`` that samples go into and come out of in a known order.

        The parameters are to be found in its module: others would stay out of what is repeated.
        """
        for index in reversed(use.frames):
            frame = self.frames[index]
            if frame.clean and frame.batched and {*use.params} <= {*frame.module.parameters()}:
                return frame.name, frame.module
        return None


# Numbers of rows to try. Primes that sizes in a model are rarely multiples of; two of them must agree.
_PRIMES = (5, 7, 11, 13, 17, 19, 23)


def numbers_of_rows(model: nn.Module, tree: Any) -> list[int]:
    """Choose numbers of rows that no size in the model or its inputs is a multiple of, where there are such."""
    sizes = {size for t in (*model.parameters(), *model.buffers(), *tensors_of(tree)) for size in t.shape if size}
    good = [p for p in _PRIMES if all(size % p for size in sizes)]
    return [*good, 29, 31, 37][:5]


def rows_for_probe(tree_tensors: Tensor, rows: int, count: int, axis: int) -> Tensor:
    """Return the first row once and the second ``count - 1`` times, of a tensor that has ``rows`` rows along ``axis``."""
    if tree_tensors.dim() <= axis or tree_tensors.shape[axis] != rows:
        return tree_tensors
    index = torch.full((count,), min(1, rows - 1), device=tree_tensors.device)
    index[0] = 0
    return tree_tensors.detach().index_select(axis, index)


def gradients_wanted(probe: Probe | None) -> bool:
    """Whether gradients may flow through what is being done.

    In a probe also inside autograd functions: checkpointing and reversible layers run what is inside again, for gradients.
    """
    return torch.is_grad_enabled() or (probe is not None and next(custom_forwards(), None) is not None)
