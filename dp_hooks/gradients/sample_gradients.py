"""SampleGradients: the per-sample gradients of one physical batch; tied weights and repeated uses are added up here."""

import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from .._precision import full_precision, wide_dtype
from ..rules import CHUNK, OuterProducts, ghost_norms, sum_of_squares, weighted_sum
from .joined import Joined, Piece, is_small
from .terms import Instantiated, Sums, Term


class SampleGradients:
    """The gradients of ``samples`` samples, from all backward passes between two boundaries.

    A parameter that was used more than once (tied weights, a layer called again, a second backward pass over the same
    samples) has several terms: their gradients are added per sample before any norm is taken, so that a sample counts once,
    however often it was used.
    """

    def __init__(self, samples: int, terms: Sequence[Term], count_as: int = 0) -> None:
        """Of ``terms``; where it depends on the number of samples how gradients are worked out, there are at least ``count_as``."""
        self.samples = samples
        self._count = max(samples, count_as)
        self._joined: list[Joined] = []
        self._terms: dict[nn.Parameter, list[Term]] = {}
        for term in terms:
            for param in term.params:
                self._terms.setdefault(param, []).append(term)

    @property
    def params(self) -> list[nn.Parameter]:
        """The parameters that got a gradient."""
        return list(self._terms)

    def terms(self, param: nn.Parameter) -> list[Term]:
        """What the uses of a parameter add to its gradients."""
        return self._terms[param]

    def grads(self, param: nn.Parameter, rows: slice | Tensor = slice(None)) -> Tensor:
        """Per-sample gradients ``[len(rows), *param.shape]``, all uses added up."""
        return functools.reduce(torch.add, (term.grads(param, rows) for term in self._terms[param]))

    def _groups(self, wanted: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
        """Put together the parameters that have one term only, and the same one."""
        groups: dict[int, list[nn.Parameter]] = {}
        for param in wanted:
            first, *more = self._terms[param]
            groups.setdefault(id(param) if more else id(first), []).append(param)
        return list(groups.values())

    def _chunks(self, param: nn.Parameter, rows: Tensor | None) -> list[slice] | list[Tensor]:
        step = max(1, CHUNK // max(1, param.numel()))
        if rows is not None:
            return list(rows.split(step))
        return [slice(i, min(i + step, self.samples)) for i in range(0, self.samples, step)]

    @torch.no_grad()
    @full_precision()
    def sq_norms(self, wanted: Sequence[nn.Parameter]) -> Sums:
        """Return ``[samples]`` squared norms, or upper bounds of them, for the parameters in ``wanted``."""
        out: Sums = {}
        with ghost_norms.looked_at_together():
            for group in self._groups(wanted):
                first, *more = self._terms[group[0]]
                found = {} if more else first.sq_norms(group) or {}
                out |= {p: found[p] if p in found else self._shared_norms(p) for p in group}
        return out

    @torch.no_grad()
    @full_precision()
    def group_sq_norms(self, groups: Sequence[Sequence[nn.Parameter]]) -> list[Tensor]:
        """Return ``[samples]`` squared norms, or upper bounds of them, over each of ``groups``; NaN where one is below 0.

        What is small is written out side by side for it, and kept so for :meth:`weighted_sums`.
        """
        self._joined, out = [], []
        with ghost_norms.looked_at_together():
            for group in groups:
                joined = self._join(group)
                done = {id(p) for some in joined for p in some.params}
                parts = [some.sq_norms() for some in joined]
                out.append([*parts, *self.sq_norms([p for p in group if id(p) not in done]).values()])
                self._joined += joined
        return [parts[0] if len(parts) == 1 else added(parts) for parts in out]

    def _join(self, group: Sequence[nn.Parameter]) -> list[Joined]:
        found: dict[int, tuple[Piece | None, list[nn.Parameter]]] = {}
        for p in group:
            terms = self._terms[p]
            first = terms[0]
            if len(terms) == 1 and isinstance(first, Instantiated) and first.piece is not None:  # which are of small ones
                found.setdefault(id(first.piece), (first.piece, []))[1].append(p)
            elif is_small(p, self._count) and not any(term.has_formulas for term in terms):
                found[id(p)] = (None, [p])
        pieces: list[Piece] = []
        for piece, params in found.values():
            if piece is not None and len(params) == len(piece.params):
                pieces.append(piece)
            else:
                pieces += [self._piece(p) for p in params]
        return Joined.make(pieces)

    def _piece(self, p: nn.Parameter) -> Piece:
        first, *more = self._terms[p]
        grads, scale = (self.grads(p), 1.0) if more else first.unscaled(p)
        return Piece([p], grads.reshape(self.samples, p.numel()), scale)

    def _shared_norms(self, param: nn.Parameter) -> Tensor:
        """Squared norms of a parameter with several uses: from their factors if all have some, else written out."""
        uses = [term.outer_products(param) for term in self._terms[param]]
        outer_products = [use for use in uses if use is not None]
        if len(outer_products) == len(uses):
            return ghost_norms.sq_norms(OuterProducts.joined(outer_products))
        parts = [sum_of_squares(self.grads(param, rows)) for rows in self._chunks(param, None)]
        if not parts:
            return sum_of_squares(param.detach().new_zeros(0, 1))
        return torch.cat(parts)

    def weighted_sums(self, factors: Sums, finite: Tensor, *, consume: bool = False) -> Sums:
        """Return, per parameter, the sum over samples of factor times gradient, in the parameter's shape.

        Sums are in at least float32, whatever the parameters are in: rounding to less must come after the noise, since a
        rounded sum of many samples can move by more than C when one sample goes. There are ``factors`` ``[samples]`` for every
        wanted parameter; samples that are not ``finite`` ``[samples]`` are left out by selection, not by a factor of 0. With
        ``consume`` what a parameter's sum was made of is let go as soon as it is there.
        """
        return dict(self.sums_in_turn(factors, finite, consume=consume))

    def sums_in_turn(self, factors: Sums, finite: Tensor, *, consume: bool = False) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """The same, one parameter after the other: of a large model all together are large."""
        chosen = None if bool(finite.all()) else finite.nonzero().flatten()
        if chosen is not None and not len(chosen):
            yield from ((p, torch.zeros_like(p, dtype=wide_dtype(p.dtype))) for p in factors)
            return
        joined, self._joined = self._joined, []
        done: set[nn.Parameter] = set()
        for some in joined:
            with torch.no_grad(), full_precision():
                sums = list(some.weighted_sums(factors, chosen))
            if consume and len(some.params) == len(self._terms):
                self._terms.clear()
            for param in some.params if consume and self._terms else ():
                del self._terms[param]
            done.update(some.params)
            yield from sums
        if len(done) == len(factors):
            return
        for param, factor in factors.items():
            if param in done:
                continue
            with torch.no_grad(), full_precision():
                total = self._weighted_sum(param, factor, None if chosen is None else chosen.to(factor.device))
            if consume:
                del self._terms[param]
            yield param, total

    def _weighted_sum(self, param: nn.Parameter, factor: Tensor, rows: Tensor | None) -> Tensor:
        dtype = wide_dtype(param.dtype)
        total: Tensor | None = None
        for term in self._terms[param]:
            for value in self._summands(term, param, factor, rows):
                if total is None:  # the gradient of a sum is expanded, that of a conjugate is lazy: neither can be written to
                    total = value.to(dtype).resolve_conj()
                    total = total.contiguous() if 0 in total.stride() else total
                else:
                    total.add_(value)
        return torch.zeros_like(param, dtype=dtype) if total is None else total  # None: no sample at all

    def _summands(self, term: Term, param: nn.Parameter, factor: Tensor, rows: Tensor | None) -> list[Tensor]:
        fast = term.weighted_sums([param], factor, rows)
        if fast is not None and param in fast:
            return [fast[param]]
        return [weighted_sum(term.grads(param, part), factor[part]) for part in self._chunks(param, rows)]


def added(squares: Sequence[Tensor]) -> Tensor:
    """Return the sum of ``squares``, each ``[n]``; NaN where one is below 0: that cannot be right, and adding it would hide it."""
    stacked = torch.stack([square.to(squares[0].device) for square in squares])
    total = stacked.sum(0)
    return torch.where((stacked >= 0).all(0), total, torch.full_like(total, torch.nan))
