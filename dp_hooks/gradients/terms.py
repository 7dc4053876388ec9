"""Terms: what one use of some parameters adds to their per-sample gradients, deferred or written out."""

import dataclasses
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from .._tree import tree_map
from ..errors import UnsupportedModelError
from ..rules import Call, OuterProducts, Rule, ghost_norms, sum_of_squares, weighted_sum, wide
from .joined import Piece, is_little, is_small

Sums = dict[nn.Parameter, Tensor]

_GENEROSITY = 1.5  # see Deferred.instantiate_small


class Term:
    """What one use of some parameters adds to their per-sample gradients."""

    samples: int  # number of samples
    name: str  # the module or the parameters it came from
    params: Sequence[nn.Parameter]  # the parameters it adds to
    has_formulas = False  # whether norms or sums come from formulas that a user gave: they are used whatever the size

    def grads(self, param: nn.Parameter, rows: slice | Tensor) -> Tensor:
        """Per-sample gradients ``[len(rows), *param.shape]`` of the chosen samples."""
        raise NotImplementedError

    def unscaled(self, param: nn.Parameter) -> tuple[Tensor, float]:
        """Gradients ``[n, ...]`` of all samples in at least float32, and the number that they have to be multiplied with."""
        return self.grads(param, slice(None)), 1.0

    def outer_products(self, param: nn.Parameter) -> OuterProducts | None:
        """The same gradients as a sum of outer products, if they are known to be one."""
        return None

    def sq_norms(self, params: Sequence[nn.Parameter]) -> Sums | None:
        """Squared norms ``[n]`` by a faster way than writing the gradients out, or None."""
        return None

    def weighted_sums(self, params: Sequence[nn.Parameter], factors: Tensor, rows: Tensor | None) -> Sums | None:
        """Weighted sums over the samples ``rows`` (None: all) by a faster way, or None."""
        return None


def scaled(grads: Tensor, scale: float) -> Tensor:
    """Return ``scale * grads`` in at least float32: what norms are taken of must be what is summed up, digit by digit."""
    grads = wide(grads)
    return grads * scale if scale != 1 else grads


def _narrow(call: Call, rows: slice | Tensor, names: tuple[str, ...]) -> Call:
    """Return ``call``, all of whose inputs have one row per sample, for the samples ``rows`` and the parameters ``names``."""
    index = (slice(None),) * call.batch_dim + (rows,)
    args, kwargs = tree_map(lambda leaf: leaf[index] if isinstance(leaf, Tensor) else leaf, (call.args, call.kwargs))
    count = len(range(call.samples)[rows]) if isinstance(rows, slice) else int(rows.shape[0])
    grads = [None if g is None else g[index] for g in call.grads]
    return dataclasses.replace(call, args=args, kwargs=kwargs, grads=grads, samples=count, names=names)


@dataclass(eq=False)
class Deferred(Term):
    """A captured call of one module: gradients are worked out from it when they are asked for.

    ``scale`` undoes the mean over the batch: the true per-sample gradient is ``scale`` times what the rule returns.
    """

    call: Call
    rule: Rule
    scale: float
    names: Mapping[nn.Parameter, str] = field(
        default_factory=dict
    )  # of its parameters; found in the module where they are not given
    # What has to be the same in calls that are computed as one; None: it is not one of those that wait for others.
    kind: Hashable = field(default=None, init=False)
    _kept: dict[str, Tensor] | None = None
    _products: dict[nn.Parameter, OuterProducts | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.names:
            self.names = {self.call.parameter(name): name for name in self.call.names}
        self.samples, self.name, self.params = self.call.samples, self.call.name, list(self.names)
        rule = self.rule
        self.has_formulas = rule.outer_products is None and (rule.sq_norms is not None or rule.weighted_sums is not None)

    @property
    def _narrows(self) -> bool:
        """Whether the call can be cut to some samples: an input after the first may be shared by all, whatever its size."""
        axis = self.call.batch_dim
        lone = [t.shape[axis : axis + 1] for t in self.call.inputs] == [(self.call.samples,)]
        return not self.rule.keep and (self.rule.all_per_sample or lone)

    def run(self, call: Call) -> dict[str, Tensor]:
        """What the rule returns for ``call``, this one or one like it."""
        found = self.rule.grad_samples(call)
        shapes = {name: p.shape for p, name in self.names.items()}
        for name in call.names:
            shape, problem = (call.samples, *shapes[name]), None
            if name not in found:
                problem = f"no gradient for {name}. Remedy: return one for every name in call.names."
            elif tuple(found[name].shape) != shape:
                problem = f"shape {tuple(found[name].shape)} for {name}, expected {shape}. Remedy: correct the rule."
            if problem is not None:
                where = f"{call.name} ({type(call.module).__name__})"
                raise UnsupportedModelError(f"{where}: rule {self.rule.label!r} returned {problem}")
        return found

    def grads(self, param: nn.Parameter, rows: slice | Tensor) -> Tensor:
        """Per-sample gradients of ``param`` for the samples ``rows``."""
        factors, name = self.outer_products(param), self.names[param]
        if factors is not None:
            return factors.pick(rows).grads()
        if self._narrows:
            return scaled(self.run(_narrow(self.call, rows, (name,)))[name], self.scale)
        if self._kept is None:
            self._kept = self.run(self.call)
        return scaled(self._kept[name][rows], self.scale)

    def all_grads(self) -> dict[nn.Parameter, Tensor]:
        """Per-sample gradients of all parameters and samples."""
        found = self.run(self.call)
        return {param: scaled(found[name], self.scale) for param, name in self.names.items()}

    def outer_products(self, param: nn.Parameter) -> OuterProducts | None:
        """The factors that the rule gives, if it does; made once, unless that would hold copies of what was captured."""
        if param in self._products or self.rule.outer_products is None:
            return self._products.get(param)
        name = self.names[param]
        found = self.rule.outer_products(dataclasses.replace(self.call, names=(name,))).get(name)
        if found is not None:
            found.scale = self.scale
        captured = {t.untyped_storage().data_ptr() for t in self.captured}
        if found is None or found.storages <= captured:
            self._products[param] = found
            if found is not None:
                found.is_kept = True
        return found

    def sq_norms(self, params: Sequence[nn.Parameter]) -> Sums | None:
        """Squared norms by the rule's own formula, if it has one, or from its factors."""
        if self.rule.sq_norms is not None:
            found = self.rule.sq_norms(dataclasses.replace(self.call, names=tuple(self.names[p] for p in params)))
            return {p: found[self.names[p]] * self.scale**2 for p in params}
        factors = {p: self.outer_products(p) for p in params}
        return {p: ghost_norms.sq_norms([use]) for p, use in factors.items() if use is not None}

    def weighted_sums(self, params: Sequence[nn.Parameter], factors: Tensor, rows: Tensor | None) -> Sums | None:
        """Weighted sums by the rule's own formula, if it has one, or from its factors."""
        chosen = slice(None) if rows is None else rows
        if self.rule.weighted_sums is not None and (rows is None or self._narrows):
            names = tuple(self.names[p] for p in params)
            call = dataclasses.replace(self.call, names=names) if rows is None else _narrow(self.call, rows, names)
            found = self.rule.weighted_sums(call, factors[chosen] * self.scale)
            return {p: found[self.names[p]] for p in params}
        uses = {p: self.outer_products(p) for p in params}
        return {p: use.pick(chosen).weighted_sum(factors[chosen]) for p, use in uses.items() if use is not None}

    @property
    def captured(self) -> list[Tensor]:
        """What is kept of the call."""
        return [t for t in (*self.call.inputs, *self.call.grads) if t is not None]

    def instantiate_small(self, count_as: int = 0) -> "list[Term]":
        """Write out at once what takes about as much memory as what it was captured with; keep the rest as it is.

        Per parameter the gradients of a sample are ``numel`` numbers, and the captured inputs and output gradients ``held``.
        Once they are written out, the captured tensors can go, and norm and weighted sum cost one reading each: no multiplication
        beyond those of an ordinary backward pass. For a linear layer with ``t`` tokens ``held`` is ``t (o + i)``; ``o i <= t (o +
        i)`` is also where Gram matrices would cost more than the gradients (see :func:`dp_hooks.rules.ghost_norms.sq_norms`). Up
        to ``_GENEROSITY`` times as much is allowed: by then the backward pass has let other activations go. So is what is small
        anyway (:func:`.is_small`). Calls of which all is small wait for others like them, see :meth:`waits`.
        """
        call, rule = self.call, self.rule
        if call.samples == 0 or self.has_formulas or self.waits(count_as):
            return [self]
        count = max(call.samples, count_as)
        held = sum(t.numel() for t in self.captured) // call.samples
        small = {p: name for p, name in self.names.items() if p.numel() <= _GENEROSITY * held or is_small(p, count)}
        if not small or (rule.whole_subtree and len(small) < len(call.names)):  # the latter would be run twice
            return [self]
        rest = tuple([name for p, name in self.names.items() if p not in small])
        tensors = self.run(dataclasses.replace(call, names=tuple(small.values())) if rest else call)
        stored = Instantiated({p: tensors[name] for p, name in small.items()}, call.samples, call.name, self.scale)
        return [stored, Deferred(dataclasses.replace(call, names=rest), rule, self.scale)] if rest else [stored]

    def waits(self, count_as: int = 0) -> bool:
        """Whether the call is to be computed together with others like it, see :mod:`.stacked`: all of it is small."""
        if self.kind is None and self.samples > 0 and not self.has_formulas:
            self.kind = self._kind(max(self.samples, count_as))
        return self.kind is not None

    def _kind(self, count: int) -> Hashable:
        call, alike = self.call, self.rule.alike
        if alike is None or len(call.args) != 1 or call.kwargs or len(call.grads) != 1:
            return None
        (x,), (grad,) = call.args, call.grads
        if type(x) is not Tensor or type(grad) is not Tensor:
            return None
        if not is_little((x.numel() + grad.numel()) // call.samples * count, grad.device):
            return None
        if not all(is_small(p, count) for p in self.names):
            return None
        shapes = tuple([(name, p.shape) for p, name in self.names.items()])
        tensors = (x.shape, x.dtype, x.device, grad.shape, grad.dtype)
        kind = (id(self.rule), alike(call.module), shapes, *tensors, call.samples, call.batch_dim, call.cut, self.scale)
        try:
            hash(kind)
        except TypeError:  # settings may be lists
            return None
        return kind


@dataclass(eq=False)
class Instantiated(Term):
    """Per-sample gradients of ``samples`` samples, written out already; the true ones are ``scale`` times these."""

    tensors: Mapping[nn.Parameter, Tensor]
    samples: int
    name: str
    scale: float = 1.0
    piece: Piece | None = None  # all of them side by side, if they are

    def __post_init__(self) -> None:
        self.params = list(self.tensors)

    def grads(self, param: nn.Parameter, rows: slice | Tensor) -> Tensor:
        """The stored rows."""
        return scaled(self.tensors[param][rows], self.scale)

    def unscaled(self, param: nn.Parameter) -> tuple[Tensor, float]:
        """The stored rows."""
        return wide(self.tensors[param]), self.scale

    def sq_norms(self, params: Sequence[nn.Parameter]) -> Sums | None:
        """One reading of the stored rows."""
        return {p: sum_of_squares(self.tensors[p]) * self.scale**2 for p in params}

    def weighted_sums(self, params: Sequence[nn.Parameter], factors: Tensor, rows: Tensor | None) -> Sums | None:
        """One reading of the stored rows."""
        chosen = slice(None) if rows is None else rows
        return {p: weighted_sum(self.tensors[p][chosen], factors[chosen] * self.scale) for p in params}
