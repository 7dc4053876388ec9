"""What private training would do with a model: how each parameter's gradients are separated, or why they cannot be."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .._no_randomness import other_generators_kept
from .._rerun import AmbientContext, attributes_kept
from .._tree import private_copy, tensors_of
from .._validate import bad, boolean, one_of
from ..capture.controller import MODES, HookController
from ..capture.module_hooks import is_hooked
from ..capture.samples.tracked_gradients import BatchedOpGradients, TrackedGradients
from ..capture.validate import check_is_module, check_model, located_problems, mixes_samples
from ..errors import ScopeError, SelfCheckError, UnsupportedModelError
from ..gradients.sample_gradients import SampleGradients
from ..gradients.terms import Deferred, Instantiated, Term
from ..rules import Dims, OuterProducts, Rule
from ..rules.generic import grad_samples as generic
from ..rules.generic import needs_loop
from .recorded_call import RecordedCall
from .self_check import SelfCheck, _backward

STRATEGIES = {
    "ghost": "norms and sums from what was captured; no gradient per sample is written out",
    "instantiate": "the gradient of each sample is written out, by the rule for its module",
    "lifted": "the parameter is followed to where it meets the batch; each sample gets a row of its own there",
    "vmap": "no rule: the module is repeated under torch.func.vmap",
    "loop": "no rule: the module is repeated on one sample at a time",
    "unused": "the loss does not depend on it; it gets noise all the same",
    "refused": "see below",
    "unknown": "the model was refused before it got there",
}


@dataclass(frozen=True)
class ParameterRow:
    """How one trainable parameter would be treated.

    Attributes:
        name: its first name in the model.
        shape: its shape.
        module: the class of the module that owns it.
        rule: the rule that reads its gradients, "-" where no rule does; several uses by different rules are joined by "+".
        strategy: one of :data:`STRATEGIES`, several joined by "+".
        uses: in how many places it was used.
        multiplications: per sample, for its norm; None where that is not known (modules that are repeated).
        held: numbers held per sample after the backward pass; inputs and output gradients of a module count for each of
            its parameters.
    """

    name: str
    shape: tuple[int, ...]
    module: str
    rule: str
    strategy: str
    uses: int
    multiplications: int | None
    held: int


@dataclass(frozen=True)
class Explanation:
    """What :func:`explain` found; ``print`` shows a table, ``as_dict()`` is for logs.

    Attributes:
        model: the class of the model.
        rows: one per trainable parameter, each once.
        refusals: why the model would be refused, with the remedies; empty if it would not.
        checked: whether per-sample gradients agreed with plain autograd on single samples.
        samples: number of samples in the example.
        training: whether the model was in training mode.
        frozen: number of parameters that are not trained.
        grad_sample_mode: the mode that was asked about.
    """

    model: str
    rows: tuple[ParameterRow, ...]
    refusals: tuple[str, ...]
    checked: bool
    samples: int
    training: bool
    frozen: int
    grad_sample_mode: str

    @property
    def unused(self) -> tuple[str, ...]:
        """Names of the parameters that the loss does not depend on."""
        return tuple(row.name for row in self.rows if row.strategy == "unused")

    def as_dict(self) -> dict[str, Any]:
        """Return all fields as a plain dictionary."""
        return asdict(self)

    def __str__(self) -> str:
        """Lay the rows out as a table, and say below what would be refused."""
        numbers = sum(_numel(row.shape) for row in self.rows)
        lines = [
            f'{self.model} in {"training" if self.training else "eval"} mode, grad_sample_mode="{self.grad_sample_mode}", '
            f"example of {self.samples} samples",
            f"{len(self.rows)} trainable parameters ({numbers:,} numbers), {self.frozen} frozen",
        ]
        lines += _table(self.rows)
        used = {name for row in self.rows for name in row.strategy.split("+")}
        lines += [f"  {name}: {text}" for name, text in STRATEGIES.items() if name in used]
        if self.unused:
            lines.append(
                f"unused: {', '.join(self.unused)}. Freeze them with requires_grad_(False) to spare the noise."
            )
        lines.append(f"checked against single-sample autograd: {'yes' if self.checked else 'no'}")
        if self.refusals:
            lines.append(f"would be refused, for {len(self.refusals)} reason(s):")
            lines += [f"  - {text}" for text in self.refusals]
        else:
            lines.append("nothing would be refused")
        return "\n".join(lines)


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def _table(rows: tuple[ParameterRow, ...]) -> list[str]:
    head = ("parameter", "shape", "module", "rule", "strategy", "mult./sample", "held/sample")
    cells = [head] + [
        (
            row.name,
            "x".join(map(str, row.shape)) or "scalar",
            row.module,
            row.rule,
            row.strategy + (f" ({row.uses} uses)" if row.uses > 1 else ""),
            "-" if row.multiplications is None else f"{row.multiplications:,}",
            f"{row.held:,}",
        )
        for row in rows
    ]
    width = [max(len(line[i]) for line in cells) for i in range(len(head))]
    return [
        "  ".join(
            cell.rjust(w) if i > 4 else cell.ljust(w) for i, (cell, w) in enumerate(zip(line, width, strict=True))
        )
        for line in cells
    ]


@dataclass(eq=False)
class _Origin:
    """What is known of a source before it is reduced, without its tensors."""

    rule: Rule | None
    loops: Callable[[], bool]
    dims: Mapping[str, Dims]
    names: Mapping[nn.Parameter, str]
    held: int


@dataclass(eq=False)
class _Notes:
    refusals: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    pairs: list[tuple[Term, _Origin]] = field(default_factory=list)
    on: bool = True


class _Watcher(HookController):
    """A controller that notes what each source is made of, and goes on after a refusal to find the next."""

    def __init__(self, model: nn.Module, *, batch_first: bool, grad_sample_mode: str) -> None:
        self.notes = _Notes()
        super().__init__(
            model, batch_first=batch_first, loss_reduction="sum", strict=False, grad_sample_mode=grad_sample_mode
        )

    def _guard(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Go on: ``located_problems`` lists these modules."""

    def _check_buffers(self) -> None:
        known = {f"{name}." if name else "" for name, module in self._module.named_modules() if mixes_samples(module)}
        self._buffers = {n: v for n, v in self._buffers.items() if n[: n.rfind(".") + 1] not in known}
        try:
            super()._check_buffers()
        except UnsupportedModelError as error:
            self._note(error, "")

    def _note(self, error: UnsupportedModelError, where: str) -> None:
        if not self.notes.on:
            raise error
        if str(error) not in self.notes.refusals:
            self.notes.refusals.append(str(error))
        self.notes.refused.append(where)

    def _refuse(self, opened: Any, error: UnsupportedModelError, where: str) -> None:
        if self.notes.on:
            self._note(error, where)
        else:
            super()._refuse(opened, error, where)

    def _reduced(self, source: Any) -> list[Term]:
        origin = _origin(source)
        found = super()._reduced(source)
        if self.notes.on:
            self.notes.pairs += [(one, origin) for one in found]
        return found


def _origin(source: Any) -> _Origin:
    n = max(1, source.samples)
    if isinstance(source, Deferred):
        call, rule = source.call, source.rule
        held = sum(t.numel() for t in (*call.inputs, *call.grads) if t is not None) // n
        dims = rule.dims(call) if rule.dims is not None and call.samples else {}
        module, memo = call.module, call.memo
        return _Origin(rule, lambda: needs_loop(module) or "loop" in memo, dims, dict(source.names), held)
    if isinstance(source, TrackedGradients):
        held = source.rows.numel() // n
    elif isinstance(source, BatchedOpGradients):
        tensors = [*source.plain.values(), *source.output_grads]
        held = sum(t.numel() for t in tensors if t is not None) // n
    else:
        held = 0
    return _Origin(None, lambda: False, {}, {}, held)


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Put back everything of ``model``, and the random state of PyTorch, Python and NumPy, as it was before the block."""
    params = list(model.parameters())
    values = [*model.buffers(), *(p for p in params if not p.requires_grad)]
    kept = [(t, t.detach().clone()) for t in values]
    own = [(p, p.grad, dict(vars(p)), p._post_accumulate_grad_hooks) for p in params]
    devices = sorted({p.device.index or 0 for p in params if p.device.type == "cuda"})
    for p in params:
        vars(p).pop("grad_sample", None)  # another library's, which the controller would add to
    try:
        with attributes_kept(model), torch.random.fork_rng(devices=devices), other_generators_kept():
            yield
    finally:
        with torch.no_grad():
            for tensor, value in kept:
                if not torch.equal(tensor, value):
                    tensor.copy_(value)
        for p, grad, attributes, hooks in own:
            p.grad = grad
            vars(p).clear()
            vars(p).update(attributes)
            p._post_accumulate_grad_hooks = hooks


def _inputs(example: Any, axis: int) -> tuple[tuple[Any, ...], dict[str, Any], int]:
    """Return positional and keyword inputs of their own, and the number of samples."""
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(example, Tensor):
        args = (example,)
    elif isinstance(example, Mapping):
        kwargs = dict(example)
    elif isinstance(example, (tuple, list)):
        args = tuple(example)
    else:
        remedy = "pass a tensor, a tuple of positional inputs, or a mapping of keyword inputs."
        raise bad("example_inputs", type(example).__name__, remedy)
    args, kwargs = private_copy((args, kwargs))
    counts = [int(t.shape[axis]) for t in tensors_of((args, kwargs)) if t.dim() > axis]
    if not counts or counts[0] < 2:
        found = f"{counts[0]} sample(s)" if counts else "no sample axis"
        raise bad("example_inputs", found, f"pass at least 2 samples, counted along axis {axis} of the first input.")
    return args, kwargs, counts[0]


def explain(
    model: nn.Module, example_inputs: Any, *, batch_first: bool = True, grad_sample_mode: str = "ghost"
) -> Explanation:
    """Say what private training would do with ``model``, before any training and without leaving anything behind.

    ::

        print(explain(model, torch.randn(4, 3, 32, 32)))
        print(explain(bert, {"input_ids": ids, "attention_mask": mask}))

    One forward and backward pass over the example, with made-up gradients of the outputs, shows for each trainable parameter
    which rule reads its gradients and by what strategy; which strategy is cheapest depends on sizes, so give inputs as
    long as those of the training. The model runs in the mode it is in (``model.train()``, ``model.eval()``). Then the
    self-check compares with plain autograd on single samples. Everything that stands in the way is collected, not only the
    first.

    Args:
        model: a bare ``nn.Module`` that is not in a private scope.
        example_inputs: a tensor, a tuple of positional inputs, or a mapping of keyword inputs, with at least 2 samples.
        batch_first: samples are counted by axis 0 of all inputs and outputs; else by axis 1.
        grad_sample_mode: "ghost", "hooks" or "functorch", as for ``private_training``.

    Returns:
        The explanation. What the model itself raises on the example is raised.

    Raises:
        InvalidArgumentError: an argument that cannot be used.
        UnsupportedModelError: lazy modules that have not run yet.
        ScopeError: the model has hooks of an open scope, engine or controller.
    """
    check_is_module(model)
    mode = one_of("grad_sample_mode", grad_sample_mode, MODES)
    args, kwargs, samples = _inputs(example_inputs, 0 if boolean("batch_first", batch_first) else 1)
    if any(is_hooked(module) for module in model.modules()):
        raise ScopeError(
            "the model is in an open private scope, engine or controller: explain it before or after that."
        )
    if any(is_lazy(p) for p in model.parameters()):
        check_model(model)  # raises: nothing can be said before the model has run once
    known = located_problems(model)
    refusals = [line for _, line in known]
    offending = [name for name, _ in known]
    params = [p for p in model.parameters() if p.requires_grad]
    reached, checked, ran = None, False, False
    with ExitStack() as stack:
        stack.enter_context(_untouched(model))
        watcher = _Watcher(model, batch_first=batch_first, grad_sample_mode=mode)
        stack.callback(watcher.cleanup)
        check = SelfCheck(watcher, model, params)
        check.watch(stack)
        stack.enter_context(torch.enable_grad())
        try:
            with check.deferred():
                reached = _run(watcher, check, args, kwargs, samples) if params else None
            ran = True
        except (UnsupportedModelError, ScopeError) as error:
            watcher.notes.refusals.append(str(error))
        refusals += [text for text in watcher.notes.refusals if text not in refusals]
        rows = _rows(model, watcher, reached, [*offending, *watcher.notes.refused], ran)
        refusals += [text for text in watcher.notes.refusals if text not in refusals]
        if not refusals and params:
            watcher.notes.on = False
            try:
                check.check_calls(samples)
                checked = True
            except UnsupportedModelError as error:
                refusals.append(str(error))
    frozen = sum(not p.requires_grad for p in model.parameters())
    return Explanation(
        type(model).__name__, tuple(rows), tuple(refusals), checked, samples, model.training, frozen, mode
    )


def _run(
    watcher: _Watcher, check: SelfCheck, args: tuple[Any, ...], kwargs: dict[str, Any], samples: int
) -> SampleGradients | None:
    """Run forwards and backwards as training does; what was captured, or None."""
    model = watcher._module
    device = next((t.device.type for t in (*model.parameters(), *tensors_of((args, kwargs)))), "cpu")
    call = RecordedCall(model, "", args, kwargs, AmbientContext.current(device))
    loss = call.loss(watcher, samples, None)
    if not loss.requires_grad:
        if watcher.params and not watcher.notes.refusals:
            raise SelfCheckError(
                f"the model itself ({type(model).__name__}): no output has a row per sample, or is a scalar loss, and depends "
                "on the parameters. Remedy: declare the sample axis (batch_first), or return what the loss is made of."
            )
        return None
    _backward(loss, [watcher.anchor, *watcher.params])
    kept = watcher.take()
    if kept is not None and kept.samples != samples:
        raise SelfCheckError(
            f"the model itself ({type(model).__name__}): gradients came back for {kept.samples} samples, the example has "
            f"{samples}. Remedy: give the model one row per sample, or declare the sample axis (batch_first)."
        )
    return kept


def _rows(
    model: nn.Module, watcher: _Watcher, reached: SampleGradients | None, refused: list[str], ran: bool
) -> list[ParameterRow]:
    uses: dict[nn.Parameter, list[tuple[Term, _Origin]]] = {}
    for source, origin in reversed(watcher.notes.pairs):  # in the order of the forward pass
        for param in source.params:
            uses.setdefault(param, []).append((source, origin))
    seen = set() if reached is None else set(reached.params)
    rows = []
    for name, param in model.named_parameters():
        if not param.requires_grad:
            continue
        found = uses.get(param, [])
        if reached is not None and param in seen:
            try:
                reached.sq_norms([param])  # a module without a rule is repeated here at the latest
            except UnsupportedModelError as error:
                watcher._note(error, name)
        owner = type(model.get_submodule(name.rpartition(".")[0])).__name__
        aliases = [name, *(n for n, p in model.named_parameters(remove_duplicate=False) if p is param and n != name)]
        if any(_covers(where, alias) for where in refused for alias in aliases) or name in watcher.notes.refused:
            strategy, cost, held = "refused", None, 0
        elif not found:
            strategy, cost, held = ("unused" if ran else "unknown"), 0 if ran else None, 0
        else:
            strategy, cost, held = _how(param, found, watcher.grad_sample_mode)
        labels = [origin.rule.label if origin.rule is not None else "-" for _, origin in found]
        rule = "+".join(dict.fromkeys(labels)) or "-"
        rows.append(ParameterRow(name, tuple(param.shape), owner, rule, strategy, len(found), cost, held))
    return rows


def _covers(where: str, name: str) -> bool:
    """Whether a refusal at ``where`` (a module, or names of parameters) is about the parameter ``name``."""
    return any(part == name or name.startswith(f"{part}.") for part in where.split(", ") if part)


def _how(param: nn.Parameter, uses: list[tuple[Term, _Origin]], mode: str) -> tuple[str, int | None, int]:
    """Return strategy, multiplications and numbers held for a parameter, from all its uses."""
    factors = [source.outer_products(param) if isinstance(source, Deferred) else None for source, _ in uses]
    together = [use for use in factors if use is not None]
    writes = len(together) < len(uses) if len(uses) > 1 else False  # one that has no factors: all are written out
    strategies, costs, held = [], [], 0
    grams = 0.0
    if together and not writes:
        tokens = sum(use.tokens for use in together)
        lone = len(together) == 1 and (together[0].is_lookup or tokens == 1)
        gram = sum(use.gram_cost(tokens) for use in together)
        written = sum(use.instantiation_cost() for use in together)
        if lone:
            first = together[0]
            grams = first.tokens * first.columns + (0 if first.is_lookup else first.tokens * first.rows)
            writes = False
        else:
            grams, writes = min(gram, written), gram >= written
    for (source, origin), use in zip(uses, factors, strict=True):
        held += param.numel() if isinstance(source, Instantiated) else origin.held
        strategy, cost = _one(param, source, origin, use, writes)
        strategies.append(strategy)
        costs.append(cost)
    if together and len(together) == len(uses):
        total: float | None = grams
    else:
        total = None if None in costs else sum(cost for cost in costs if cost is not None)
    return "+".join(dict.fromkeys(strategies)), None if total is None else round(total), held


def _one(
    param: nn.Parameter, source: Term, origin: _Origin, use: OuterProducts | None, writes: bool
) -> tuple[str, float | None]:
    """Strategy and multiplications per sample of one use; None where the cost is not known."""
    rule = origin.rule
    if rule is None:
        if isinstance(source, BatchedOpGradients):
            return "lifted", None
        return "lifted", float(source.tracked.value.numel() if isinstance(source, TrackedGradients) else param.numel())
    if rule.grad_samples is generic:
        return ("loop" if origin.loops() else "vmap"), None
    if use is not None:
        return ("instantiate", use.instantiation_cost()) if writes else ("ghost", 0.0)
    if isinstance(source, Deferred) and rule.sq_norms is not None:
        return "ghost", None
    dims = origin.dims.get(origin.names.get(param, ""))
    if dims is None:
        return "instantiate", float(param.numel())
    return "instantiate", _size(dims, origin).instantiation_cost()


def _size(dims: Dims, origin: _Origin) -> OuterProducts:
    """The factors of that size, without values, for the cost functions."""
    assert origin.rule is not None
    empty = torch.empty((1, dims.tokens, dims.columns), device="meta")
    lookup = "mbedding" in origin.rule.label
    left = torch.empty((1, dims.tokens) if lookup else (1, dims.tokens, dims.rows), device="meta")
    return OuterProducts(left, empty, torch.Size((dims.rows, dims.columns)))
