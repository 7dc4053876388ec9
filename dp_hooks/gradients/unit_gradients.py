"""UnitGradients: the gradients of units, each the sum over the rows of one unit, from those of the rows."""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .._precision import full_precision
from ..rules import CHUNK, OuterProducts, ghost_norms, sum_of_squares
from .joined import Joined
from .sample_gradients import SampleGradients, added
from .terms import Sums, Term
from .units import Units, UnitsAlike

# In units of rounding: how far a sum over rows that cancel each other may be off, as a part of the sum of their norms.
_ROUNDING = 8


class UnitGradients:
    """``G[u] = sum of weight[n] g[n] over the rows n of unit u``, with ``g`` the gradients of the rows, by a parameter's every use.

    Norms across the rows of a unit need the inner products of all pairs of their tokens, as those of a parameter that is used
    several times do: to a rule a unit is a sample with more tokens. What is small is written out and added up. The sum over
    units of factor times gradient is that over rows, each with the factor of its unit.

    Guarantee: where rows of a unit cancel each other, so that digits are lost in whatever order they are added up, its norm is
    taken to be larger by a bound of that.
    """

    def __init__(self, rows: SampleGradients, units: Units, weights: Tensor | None = None) -> None:
        """Of ``rows`` that belong to ``units``; the gradient of each is multiplied by its weight, of ``weights`` ``[n]``."""
        assert rows.samples == len(units)
        self.samples = units.count
        self._rows = rows
        self._units = units
        self._weights = weights
        self._joined: list[Joined] = []

    @torch.no_grad()
    @full_precision()
    def group_sq_norms(self, groups: Sequence[Sequence[nn.Parameter]]) -> list[Tensor]:
        """Return ``[units]`` squared norms, or upper bounds of them, over each of ``groups``; NaN where one is below 0."""
        self._joined, parts, rest = [], [], []
        for group in groups:
            joined = [self._added(some) for some in self._rows._join(group)]
            done = {id(p) for some in joined for p in some.params}
            parts.append([some.sq_norms() for some in joined])
            rest.append([p for p in group if id(p) not in done])
            self._joined += joined
        left = [p for group in rest for p in group]
        known = dict(zip(left, self._bounds(left), strict=True)) if left else {}
        parts = [[*some, *(known[p] for p in group)] for some, group in zip(parts, rest, strict=True)]
        return [some[0] if len(some) == 1 else added(some) for some in parts]

    def _added(self, joined: Joined) -> Joined:
        rows = joined.rows if self._weights is None else joined.rows * self._weights.to(joined.rows)[:, None]
        return Joined(joined.params, self._units.added(rows), joined.scale)

    def _bounds(self, params: list[nn.Parameter]) -> Sequence[Tensor]:
        """Squared norms ``[units]`` for each parameter, a little more where digits may have been lost."""
        device = params[0].device
        squares = None
        for alike in self._units.alike:
            terms = {id(term): _OfUnits(term, alike, self._weights) for p in params for term in self._rows.terms(p)}
            found = SampleGradients(len(alike), list(terms.values())).sq_norms(params)
            stacked = torch.stack([found[p].to(device) for p in params])
            squares = stacked.new_zeros(len(params), self.samples) if squares is None else squares
            squares[:, alike.units.to(device)] = stacked
        assert squares is not None  # there is a unit
        sizes = torch.stack([self._units.added(self._sizes(p).to(device)) for p in params]).to(squares.dtype)
        eps = torch.finfo(squares.dtype).eps
        lone = torch.bincount(self._units.of_rows, minlength=self.samples) == 1
        lost = sizes.mul_(_ROUNDING * eps).masked_fill_(lone.to(device), 0)
        lost = lost.where(squares >= 0, 0)  # a square below 0 is to be seen
        return (squares + 2 * lost * squares.clamp(min=0).sqrt() + lost.square()).unbind()

    def _sizes(self, param: nn.Parameter) -> Tensor:
        """``[n]``: norms of the rows' gradients, or sums of the norms of what they are made of."""
        sizes = functools.reduce(torch.add, (_sizes(term, param) for term in self._rows.terms(param)))
        return sizes if self._weights is None else sizes * self._weights.to(sizes)

    def weighted_sums(self, factors: Sums, finite: Tensor, *, consume: bool = False) -> Sums:
        """Return the sum over units of factor times gradient; see :meth:`.SampleGradients.weighted_sums`.

        There are ``factors`` ``[units]`` for every wanted parameter. Of units that are not ``finite`` ``[units]`` all rows are left
        out by selection.
        """
        return dict(self.sums_in_turn(factors, finite, consume=consume))

    def sums_in_turn(self, factors: Sums, finite: Tensor, *, consume: bool = False) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """The same, one parameter after the other."""
        chosen = None if bool(finite.all()) else finite.nonzero().flatten()
        joined, self._joined = self._joined, []
        done: set[int] = set()
        for some in joined:
            with torch.no_grad(), full_precision():
                yield from list(some.weighted_sums(factors, chosen))
            done.update(map(id, some.params))
        of_rows = {id(factor): self._of_rows(factor) for p, factor in factors.items() if id(p) not in done}
        rest = {p: of_rows[id(factor)] for p, factor in factors.items() if id(p) not in done}
        if rest:
            yield from self._rows.sums_in_turn(rest, self._units.spread(finite), consume=consume)

    def _of_rows(self, factor: Tensor) -> Tensor:
        spread = self._units.spread(factor)
        return spread if self._weights is None else spread * self._weights.to(spread)


@dataclass(eq=False)
class _OfUnits(Term):
    """What one use of some parameters adds to the gradients of units with about as many rows."""

    term: Term
    alike: UnitsAlike
    weights: Tensor | None

    def __post_init__(self) -> None:
        self.samples, self.name, self.params = len(self.alike), self.term.name, self.term.params

    def grads(self, param: nn.Parameter, rows: slice | Tensor) -> Tensor:
        """``[len(rows), *param.shape]``, the gradients of the chosen units."""
        part = self.alike.part(rows)
        use = self.term.outer_products(param)
        if use is not None:
            return self._as_units(use, part).grads()
        if part.rows.numel() * param.numel() <= CHUNK:
            return part.put_together(self.term.grads(param, part.numbers(param.device)), self.weights).sum(1)
        columns = (part.column(place) for place in range(part.size))
        each = (one.put_together(self.term.grads(param, one.numbers(param.device)), self.weights)[:, 0] for one in columns)
        return functools.reduce(torch.add, each)

    def outer_products(self, param: nn.Parameter) -> OuterProducts | None:
        """The tokens of all rows of a unit, as those of one sample; None where its factors are large once they are written out."""
        use = self.term.outer_products(param)
        return self._as_units(use, self.alike) if use is not None and self._is_small(use) else None

    def sq_norms(self, params: Sequence[nn.Parameter]) -> Sums | None:
        """Squared norms from the factors, where there are any: a rule's own formula for rows is none for units."""
        uses = {p: self.term.outer_products(p) for p in params}
        return {p: self._norms(use) for p, use in uses.items() if use is not None}

    def _norms(self, use: OuterProducts) -> Tensor:
        if self._is_small(use):
            return ghost_norms.sq_norms([self._as_units(use, self.alike)])
        step = max(1, CHUNK // max(1, self.alike.size * use.tokens * use.columns))
        parts = (self.alike.part(slice(i, i + step)) for i in range(0, len(self.alike), step))
        with ghost_norms.looked_at_together(few=True):
            return torch.cat([ghost_norms.sq_norms([self._as_units(use, part)]) for part in parts])

    def _is_small(self, use: OuterProducts) -> bool:
        """Whether the factors of units take no more memory than what was captured: patches would."""
        return type(use) is OuterProducts or self.alike.size == 1

    def _as_units(self, use: OuterProducts, part: UnitsAlike) -> OuterProducts:
        device = use.left.device
        picked, weights = use.pick(part.numbers(device)), part.weights(self.weights, device)
        picked = picked if weights is None else picked.weighed(weights)
        return picked if part.size == 1 else picked.together(part.size)


def _sizes(term: Term, param: nn.Parameter) -> Tensor:
    """``[n]``: sums of the norms of the outer products that a row's gradient is made of; its norm where it is made of none."""
    use = term.outer_products(param)
    numbers = param.numel() if use is None else use.tokens * use.columns
    step = max(1, CHUNK // max(1, numbers))
    slices = [slice(i, min(i + step, term.samples)) for i in range(0, term.samples, step)]
    if use is None:
        return torch.cat([sum_of_squares(term.grads(param, part)).sqrt() for part in slices])
    norms = [use.pick(part).norms() for part in slices]
    return torch.cat([(left * right).sum(1) for left, right in norms]) * abs(use.scale)
