"""The one assumption under all clipping: row i of what the model sees is example i of the batch that was handed out."""

import weakref
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._rerun import checking, is_copy
from .._tree import outputs_of, tensors_of
from .._validate import bad
from ..capture.calls.backward_passes import BackwardPasses
from ..errors import ScopeError
from ..gradients.units import Units
from ..privacy.sampling.physical import PhysicalBatch
from .row_order import RowOrder, check_in_order, check_kept

AHEAD = (
    "Batches were read ahead of their use (a prefetcher, or several batches fetched for gradient accumulation), and rows would "
    "be taken for the examples of another batch. Remedy: take the step of a batch before the next one is read from the private "
    "loader; loader workers (num_workers) fetch in advance without that. To accumulate, set a larger batch_size in the loader and "
    "max_physical_batch_size in the scope."
)

_REMEMBERED = 64  # how many earlier parts are told from the present one


class Rows:
    """Knows which part of which batch the loader handed out last, and refuses rows that are not its examples.

    Guarantee: between two boundaries, every call that gradients come back from has one row for each example of the part (or
    for each that was kept, see :meth:`keep`), and is on tensors of that part, as far as that can be seen. Rows that are made of
    several examples, and examples in several rows, show here unless the counts agree by chance; the probe of the collate function
    and the self-check look for those.

    Attributes:
        part: what was handed out last; None before the first.
        weights: what the gradient of each row is multiplied by in this step; None: by 1.
        was_run: whether the model was called on it with gradients, and it was neither stepped nor skipped since.
    """

    def __init__(self, axis: int = 0) -> None:
        """Nothing was handed out yet; the model counts rows along ``axis``."""
        self._axis = axis
        self.part: PhysicalBatch | None = None
        self._kept: int | None = None
        self._rows: Tensor | None = None  # which they are
        self.weights: Tensor | None = None
        # Tensors of the parts handed out since one was used; the last are those of `part`.
        self._unused: list[list[Tensor]] = []
        self._earlier: deque[list[weakref.ref[Tensor]]] = deque(maxlen=_REMEMBERED)  # tensors of the parts before
        self._present: list[weakref.ref[Tensor]] = []  # those of `part`
        self._order = RowOrder()  # of the calls on `part`
        self.was_run = False
        # Without the private loader: inputs of the first call of a step, and the backward passes that belong to it.
        self._first: tuple[BackwardPasses, list[weakref.ref[Tensor]]] | None = None

    def hand_out(self, part: PhysicalBatch, batch: Any) -> None:
        """``part`` is handed out as ``batch``."""
        self.part, self._kept, self._rows, self.weights = part, None, None, None
        self.was_run = False
        self._order.new_part()
        self._earlier.append(self._present)
        tensors = outputs_of(batch)
        self._present = [weakref.ref(t) for t in tensors]
        if part.size:
            self._unused.append(tensors)

    def used(self) -> None:
        """The part was used, or is skipped on purpose: the next one may be handed out."""
        self.was_run = False
        self._unused.clear()

    def stepped(self) -> None:
        """The step of the part was taken: what was declared about its rows is over."""
        self._kept, self._rows, self.weights = None, None, None
        self.used()

    @property
    def units(self) -> Units | None:
        """Which rows of a call belong to which protected unit; None where every example is one of its own."""
        if self.part is None or self.part.units is None:
            return None
        sizes = torch.tensor(self.part.units, dtype=torch.long, device="cpu")
        units = Units(torch.arange(len(sizes), device="cpu").repeat_interleave(sizes))
        return units if self._rows is None else units.among(self._rows.cpu())

    @property
    def expected(self) -> int | None:
        """How many rows a call has to have; None: not known, since the batch is not from the private loader."""
        return None if self.part is None else self.part.size if self._kept is None else self._kept

    def keep(self, rows: Tensor) -> None:
        """Declare which rows of the part the calls of this step are on: a mask ``[n]`` of bool, or numbers of rows, each once.

        Raises:
            InvalidArgumentError: ``rows`` are not rows of the part.
            ScopeError: no part was handed out, or rows were declared for it already.
        """
        if self.part is None or self._kept is not None:
            state = "were declared already for this batch" if self.part else "of a batch that is not from the private loader"
            raise ScopeError(f"keep_rows(): rows {state}. Declare them once, after the batch came and before the model is called.")
        size, rows = self.part.size, torch.as_tensor(rows)
        if rows.dtype == torch.bool and rows.shape == (size,):
            self._kept, self._rows = int(rows.sum()), rows.nonzero().flatten()
        elif rows.dim() == 1 and not rows.is_floating_point() and rows.dtype != torch.bool:
            numbers = set(rows.tolist())
            if len(numbers) == len(rows) and all(0 <= i < size for i in numbers):
                self._kept, self._rows = len(rows), rows
        if self._kept is None:
            raise bad(
                "rows", rows, f"pass a mask of bool with one entry for each of the {size} rows, or numbers of rows, each once."
            )

    def weigh(self, weights: Tensor) -> None:
        """Declare what the gradient of each row is multiplied by in this step.

        Raises:
            InvalidArgumentError: they are not finite numbers of 0 or more, one for each row.
        """
        n = self.expected
        if not isinstance(weights, Tensor) or weights.dim() != 1 or (n is not None and len(weights) != n):
            raise bad("weights", weights, f"pass a tensor with one number for each of the {'' if n is None else f'{n} '}rows.")
        if not weights.is_floating_point() or not bool(((weights >= 0) & weights.isfinite()).all()):
            raise bad("weights", weights, "pass finite floating point numbers of 0 or more.")
        self.weights = weights.detach()

    # ---------------------------------------------------------------- what the model sees

    def find_counting(self, inputs: Sequence[Tensor]) -> int:
        """Return the number of the first input of a call that has a row for each example, unless rows of the batch come before it.

        What all samples share, an adjacency matrix for one, may be the first input and have rows of its own: not such as the batch
        has, of which it might be made.
        """
        if inputs and inputs[0].shape[self._axis : self._axis + 1] == (self.expected,):
            return 0
        rows = [t for t in (*inputs, *_alive(self._present)) if t.dim() > self._axis and t.shape[self._axis] == self.expected]
        kinds = {_row_of(t, self._axis) for t in rows}
        for i, t in enumerate(inputs):
            if t.dim() > self._axis and t.shape[self._axis] == self.expected:
                return i
            if torch._C._functorch.is_functorch_wrapped_tensor(t) or _any_same_memory([t], self._present):
                break
            if t.dim() > self._axis and _row_of(t, self._axis) in kinds:
                break
        return 0

    def before_call(self, arguments: tuple[tuple[Any, ...], dict[str, Any]], passes: BackwardPasses) -> None:
        """An outermost call with gradients begins, with ``arguments``; ``passes`` are the backward passes since the last boundary.

        Raises:
            ScopeError: the inputs are of another batch than the one that gradients would be taken for.
        """
        if checking():  # of another model, which calls this one
            return
        inputs = tensors_of(arguments)
        if any(torch._C._functorch.is_functorch_wrapped_tensor(t) for t in inputs):
            raise ScopeError(
                "the model was called inside a transform of torch.func (vmap, jvp, grad): gradients of single samples cannot "
                "be told apart there. Remedy: call it on the batch, and let loss.backward() differentiate it."
            )
        self._check_lists(*arguments)
        if self.part is None:
            self._check_foreign(inputs, passes)
        else:
            if len(self._unused) > 1:
                self._check_whose(inputs)
            self._check_not_stale(inputs)
            present = _alive(self._present)
            if self._rows is not None and self._kept is not None:
                check_kept(inputs, self._rows, present, self.part.size)
            if self.part.units is not None and self._kept is None:
                check_in_order(inputs, present, self.part.size, self._axis)
            self._order.check(inputs, self.expected, present, self._axis)
        self.used()
        self.was_run = self.part is not None

    def _check_lists(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        n = self.expected
        for value in (v for v in (*args, *kwargs.values()) if n and isinstance(v, (list, tuple))):
            tensors = [t for t in value if isinstance(t, Tensor)]
            if len(tensors) == len(value) == n and not all(n in t.shape[:2] for t in tensors):
                raise ScopeError(
                    f"the model was given a list of {n} tensors, one for each example, so none of them has a row for each, and "
                    "single examples cannot be told apart. Remedy: let the collate function stack them to one tensor (pad or "
                    "resize them to one size), and let the model take that."
                )

    def _check_whose(self, inputs: list[Tensor]) -> None:
        *earlier, present = self._unused
        for same in (_same_memory, is_copy):
            if any(same(t, own) for t in inputs for own in present):
                return
            if any(same(t, own) for t in inputs for part in earlier for own in part):
                raise ScopeError(f"the model was called on a batch that is not the one handed out last. {AHEAD}")
        raise ScopeError(
            "a batch of the private loader was not used before the next one was read, and the model is called on tensors of "
            f"which cannot be told to which batch they belong. {AHEAD} To leave out a batch on purpose, call opt.skip_batch()."
        )

    def _check_not_stale(self, inputs: list[Tensor]) -> None:
        if not _any_same_memory(inputs, self._present) and any(_any_same_memory(inputs, part) for part in self._earlier):
            raise ScopeError(
                "the model was called on a batch that was handed out before the last one. What a batch costs is charged once, for "
                "the step it was handed out for, so a further step on it would not be paid for. Remedy: take each step on the "
                "batch that the loader has just handed out."
            )

    def _check_foreign(self, inputs: list[Tensor], passes: BackwardPasses) -> None:
        if self._first is None or self._first[0] is not passes:
            self._first = (passes, [weakref.ref(t) for t in inputs])
            return
        before = _alive(self._first[1])
        same = any(_same_memory(t, own) for t in inputs for own in before)
        parts = any(_disjoint(t, own) for t in inputs for own in before)
        if parts or (passes.samples is not None and not same):
            raise ScopeError(
                "the model was called on other rows after a backward pass of the same step: an example of each would be clipped "
                "as if both were one, row by row. Batches from elsewhere than the private loader cannot be accumulated: take "
                "opt.step() for each, or pass them through the private loader, which splits large batches "
                "(max_physical_batch_size)."
            )

    def check_pass(self, samples: int) -> None:
        """A pass over ``samples`` rows comes to its end: refuse another number of rows than there are examples, or weights.

        Raises:
            ScopeError: it is another one.
        """
        if self.weights is not None and len(self.weights) != samples:
            raise ScopeError(f"the model was called on {samples} rows, but weights were given for {len(self.weights)}.")
        expected = self.expected
        if expected is None or samples == expected:
            return
        had = "the private loader handed out" if self._kept is None else "the rows that were declared are"
        if samples < expected:
            causes = (
                "micro-batches cut by hand (set max_physical_batch_size, which splits batches and accumulates their gradients); "
                "examples packed or joined to fewer rows by the collate function; a batch whose examples are not counted by axis "
                "0 (declare batch_first=False); rows left out of the batch (weight their losses by 0, or declare them: "
                "opt.keep_rows(mask)); generated rows beside those of the loader (as many as the batch has)"
            )
        else:
            causes = (
                "several rows per example (augmented copies, pairs, tokens: call the model once for each copy, and add up the "
                "losses of an example); rows of other batches, or generated ones, beside those of the loader (as many as the "
                "batch has); a batch whose examples are not counted by axis 0 (declare batch_first=False)"
            )
        raise ScopeError(
            f"the model was called on {samples} rows, but {had} {expected} examples. Every example needs one row of its own, "
            f"since rows are what is clipped; nothing was released. Likely causes: {causes}."
        )


def _alive(known: list[weakref.ref[Tensor]]) -> list[Tensor]:
    return [t for t in (ref() for ref in known) if t is not None]


def _row_of(tensor: Tensor, axis: int) -> torch.Size:
    """The shape of one row."""
    return torch.Size([*tensor.shape[:axis], *tensor.shape[axis + 1 :]])


def _any_same_memory(inputs: list[Tensor], known: list[weakref.ref[Tensor]]) -> bool:
    return any(_same_memory(t, own) for t in inputs for own in _alive(known))


def _same_memory(one: Tensor, other: Tensor) -> bool:
    if one is other:
        return True
    if one.device != other.device or one.layout != torch.strided or other.layout != torch.strided or not one.numel():
        return False
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr() != 0 and not _disjoint(one, other)


def _disjoint(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are different rows of one (``chunk``, ``split``, slices)."""
    if one.shape[1:] != other.shape[1:] or one.stride() != other.stride() or one.device != other.device or not one.dim():
        return False
    if not one.numel() or not other.numel() or one.untyped_storage().data_ptr() != other.untyped_storage().data_ptr():
        return False
    first, second = sorted((one, other), key=lambda t: t.storage_offset())
    step = first.stride(0)
    return step > 0 and bool(second.storage_offset() - first.storage_offset() >= len(first) * step)
