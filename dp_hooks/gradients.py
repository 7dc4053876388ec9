"""The per-sample gradients of one physical batch, as captured: norms first, weighted sums afterwards."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from ._tree import join, split
from .errors import UnsupportedModelError
from .rules import Call, Rule, squared_norms, weighted_sum

# How many numbers of per-sample gradients are held at once where they have to be written out.
_CHUNK = 1 << 24


class Source(Protocol):
    """Something that contributed to the gradients of some parameters."""

    @property
    def params(self) -> Sequence[nn.Parameter]:
        """The parameters it contributed to."""

    def grads(self, param: nn.Parameter, rows: slice | Tensor) -> Tensor:
        """Per-sample gradients ``[len(rows), *param.shape]`` of the chosen samples."""

    def sq_norms(self, params: Sequence[nn.Parameter]) -> dict[nn.Parameter, Tensor] | None:
        """Squared norms ``[n]`` by a faster way than writing the gradients out, or None."""

    def weighted_sums(
        self, params: Sequence[nn.Parameter], factors: Tensor, rows: Tensor | None
    ) -> dict[nn.Parameter, Tensor] | None:
        """Weighted sums over the samples ``rows`` (None: all) by a faster way, or None."""


def _narrow(call: Call, rows: slice | Tensor, names: tuple[str, ...]) -> Call:
    """Return ``call`` restricted to the samples ``rows`` and the parameters ``names``."""
    if isinstance(rows, slice) and rows == slice(None):
        return dataclasses.replace(call, names=names)
    axis, n = call.batch_dim, call.samples
    index = (slice(None),) * axis + (rows,)

    def pick(t: Tensor) -> Tensor:
        return t[index] if t.dim() > axis and t.shape[axis] == n else t

    skeleton, tensors = split((call.args, call.kwargs))
    args, kwargs = join(skeleton, [pick(t) for t in tensors])
    count = len(range(n)[rows]) if isinstance(rows, slice) else int(rows.shape[0])
    grads = [None if g is None else g[index] for g in call.grads]
    return dataclasses.replace(call, args=args, kwargs=kwargs, grads=grads, samples=count, names=names)


@dataclass(eq=False)
class Captured:
    """A captured call of one module: gradients are worked out from it when they are asked for.

    ``scale`` undoes the mean over the batch: the true per-sample gradient is ``scale`` times what the rule returns.
    """

    call: Call
    rule: Rule
    scale: float
    names: dict[nn.Parameter, str] = field(init=False)
    _kept: dict[str, Tensor] | None = None

    def __post_init__(self) -> None:
        """Look up the parameters of the call."""
        self.names = {self.call.parameter(name): name for name in self.call.names}

    @property
    def samples(self) -> int:
        """Number of samples."""
        return self.call.samples

    @property
    def name(self) -> str:
        """Name of the module."""
        return self.call.name

    @property
    def params(self) -> Sequence[nn.Parameter]:
        """The parameters of the module that the call used."""
        return list(self.names)

    def _run(self, call: Call) -> dict[str, Tensor]:
        found = self.rule.grad_samples(call)
        for name in call.names:
            shape = (call.samples, *call.parameter(name).shape)
            if name in found and tuple(found[name].shape) != shape:
                raise UnsupportedModelError(
                    f"{call.name} ({type(call.module).__name__}): rule {self.rule.label!r} returned shape "
                    f"{tuple(found[name].shape)} for {name}, expected {shape}. Remedy: correct the rule."
                )
            if name not in found:
                raise UnsupportedModelError(
                    f"{call.name} ({type(call.module).__name__}): rule {self.rule.label!r} returned no gradient for "
                    f"{name}. Remedy: return one for every name in call.names."
                )
        return {name: grad * self.scale if self.scale != 1 else grad for name, grad in found.items()}

    def grads(self, param: nn.Parameter, rows: slice | Tensor) -> Tensor:
        """Per-sample gradients of ``param`` for the samples ``rows``."""
        name = self.names[param]
        if self.rule.keep:
            if self._kept is None:
                self._kept = self._run(self.call)
            return self._kept[name][rows]
        return self._run(_narrow(self.call, rows, (name,)))[name]

    def all_grads(self) -> dict[nn.Parameter, Tensor]:
        """Per-sample gradients of all parameters and samples."""
        found = self._run(self.call)
        return {param: found[name] for param, name in self.names.items()}

    def sq_norms(self, params: Sequence[nn.Parameter]) -> dict[nn.Parameter, Tensor] | None:
        """Squared norms by the rule's own formula, if it has one."""
        if self.rule.sq_norms is None:
            return None
        call = _narrow(self.call, slice(None), tuple(self.names[p] for p in params))
        found = self.rule.sq_norms(call)
        return {p: found[self.names[p]] * self.scale**2 for p in params}

    def weighted_sums(
        self, params: Sequence[nn.Parameter], factors: Tensor, rows: Tensor | None
    ) -> dict[nn.Parameter, Tensor] | None:
        """Weighted sums by the rule's own formula, if it has one."""
        if self.rule.weighted_sums is None:
            return None
        chosen = slice(None) if rows is None else rows
        call = _narrow(self.call, chosen, tuple(self.names[p] for p in params))
        found = self.rule.weighted_sums(call, factors[chosen] * self.scale)
        return {p: found[self.names[p]] for p in params}


@dataclass(eq=False)
class Stored:
    """Per-sample gradients that are written out already (``p.grad_sample``)."""

    tensors: dict[nn.Parameter, Tensor]

    @property
    def params(self) -> Sequence[nn.Parameter]:
        """The parameters with a ``grad_sample``."""
        return list(self.tensors)

    def grads(self, param: nn.Parameter, rows: slice | Tensor) -> Tensor:
        """The stored rows."""
        return self.tensors[param][rows]

    def sq_norms(self, params: Sequence[nn.Parameter]) -> dict[nn.Parameter, Tensor] | None:
        """Nothing is faster than the stored rows themselves."""
        return None

    def weighted_sums(
        self, params: Sequence[nn.Parameter], factors: Tensor, rows: Tensor | None
    ) -> dict[nn.Parameter, Tensor] | None:
        """Nothing is faster than the stored rows themselves."""
        return None


class SampleGradients:
    """The gradients of ``samples`` samples, from all backward passes between two boundaries.

    A parameter that was used more than once (tied weights, a layer called again, a second backward pass over the same
    samples) has several sources: their gradients are added per sample before any norm is taken, so that a sample counts once,
    however often it was used.
    """

    def __init__(self, samples: int, sources: Sequence[Source]) -> None:
        """Collect ``sources``."""
        self.samples = samples
        self._sources: dict[nn.Parameter, list[Source]] = {}
        for source in sources:
            for param in source.params:
                self._sources.setdefault(param, []).append(source)

    @property
    def params(self) -> list[nn.Parameter]:
        """The parameters that got a gradient."""
        return list(self._sources)

    def grads(self, param: nn.Parameter, rows: slice | Tensor = slice(None)) -> Tensor:
        """Per-sample gradients ``[len(rows), *param.shape]``, all uses added up."""
        first, *more = self._sources[param]
        total = first.grads(param, rows)
        for source in more:
            total = total + source.grads(param, rows)
        return total

    def _single(self, wanted: Sequence[nn.Parameter]) -> dict[int, tuple[Source, list[nn.Parameter]]]:
        """Group by source the parameters that have one source only."""
        groups: dict[int, tuple[Source, list[nn.Parameter]]] = {}
        for param in wanted:
            if len(self._sources[param]) == 1:
                source = self._sources[param][0]
                groups.setdefault(id(source), (source, []))[1].append(param)
        return groups

    def _step(self, param: nn.Parameter) -> int:
        return max(1, _CHUNK // max(1, param.numel()))

    def _chunks(self, param: nn.Parameter, size: int) -> list[slice]:
        step = self._step(param)
        return [slice(i, min(i + step, size)) for i in range(0, size, step)]

    def sq_norms(self, wanted: Sequence[nn.Parameter]) -> dict[nn.Parameter, Tensor]:
        """Return ``[samples]`` squared norms, or upper bounds of them, for the parameters in ``wanted``."""
        out: dict[nn.Parameter, Tensor] = {}
        for source, params in self._single(wanted).values():
            out.update(source.sq_norms(params) or {})
        for param in wanted:
            if param not in out:
                parts = [squared_norms(self.grads(param, rows)) for rows in self._chunks(param, self.samples)]
                empty = param.new_zeros(0, dtype=torch.promote_types(param.dtype, torch.float32))
                out[param] = torch.cat([*parts, empty])
        return out

    def weighted_sums(self, factors: dict[nn.Parameter, Tensor], finite: Tensor) -> dict[nn.Parameter, Tensor]:
        """Return, per parameter, the sum over samples of factor times gradient, in the parameter's shape.

        Sums are in at least float32, whatever the parameters are in: rounding to less must come after the noise, since a
        rounded sum of many samples can move by more than C when one sample goes.

        Args:
            factors: ``[samples]`` for every wanted parameter.
            finite: ``[samples]`` bool; the other samples are left out by selection, not by a factor of 0.
        """
        chosen = None if bool(finite.all()) else finite.nonzero().flatten()
        out: dict[nn.Parameter, Tensor] = {}

        def add(param: nn.Parameter, value: Tensor) -> None:
            value = value.to(torch.promote_types(param.dtype, torch.float32))
            out[param] = out[param] + value if param in out else value

        for param, factor in factors.items():
            rows = None if chosen is None else chosen.to(factor.device)
            for source in self._sources[param]:
                fast = source.weighted_sums([param], factor, rows)
                if fast is not None:
                    add(param, fast[param])
                    continue
                for part in self._chunks(param, self.samples) if rows is None else rows.split(self._step(param)):
                    add(param, weighted_sum(source.grads(param, part), factor[part]))
            if param not in out:  # no sample at all
                out[param] = torch.zeros_like(param, dtype=torch.promote_types(param.dtype, torch.float32))
        return out
