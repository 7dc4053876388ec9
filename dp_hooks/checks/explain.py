"""What private training would do with a model: how each parameter's gradients are separated, or why they cannot be."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .._rerun import AmbientContext
from .._tree import private_copy, tensors_of
from .._validate import bad, boolean, one_of
from ..capture.calls.backward_passes import Refusals
from ..capture.calls.recorded_call import RecordedCall
from ..capture.calls.undisturbed import undisturbed
from ..capture.controller import MODES, HookController
from ..capture.module_hooks import is_hooked
from ..capture.samples.tracked_gradients import BatchedOpGradients, TrackedGradients
from ..capture.validate import check_is_module, check_model, located_problems
from ..errors import ScopeError, SelfCheckError, UnsupportedModelError
from ..gradients.sample_gradients import SampleGradients
from ..gradients.sinks import Sink
from ..gradients.terms import Deferred, Instantiated, Term
from ..rules import OuterProducts, Rule
from ..rules.generic import grad_samples as generic
from ..rules.generic import needs_loop
from ..rules.ghost_norms import choose_way
from .explanation import Explanation, ParameterRow
from .repeat_call import RepeatedCall
from .self_check import SelfCheck
from .single_samples import back_propagate


@dataclass(eq=False)
class _Origin:
    """What is known of a term before it is reduced, without its tensors."""

    rule: Rule | None
    loops: Callable[[], bool]
    costs: Mapping[nn.Parameter, float]  # multiplications for the gradients of one sample, written out, by parameter
    held: int


class _NotingSink(Sink):
    """Hands everything on to another sink, and notes what each term was made of."""

    def __init__(self, inner: Sink) -> None:
        self.inner = inner
        self.pairs: list[tuple[Term, _Origin]] = []
        self.finish, self.take, self.discard = inner.finish, inner.take, inner.discard  # type: ignore[method-assign]

    def receive(self, term: Term) -> Sequence[Term]:
        origin = _origin(term)
        found = self.inner.receive(term)
        self.pairs += [(one, origin) for one in found]
        return found


def _origin(term: Term) -> _Origin:
    n = max(1, term.samples)
    if isinstance(term, Deferred):
        call, rule = term.call, term.rule
        held = _numbers((*call.inputs, *call.grads)) // n
        products = {p: term.outer_products(p) for p in term.params} if call.samples else {}
        costs = {p: OuterProducts.instantiation_cost(found) for p, found in products.items() if found is not None}
        module, memo = call.module, call.memo
        return _Origin(rule, lambda: needs_loop(module) or "loop" in memo, costs, held)
    tensors: list[Tensor | None] = [term.rows] if isinstance(term, TrackedGradients) else []
    if isinstance(term, BatchedOpGradients):
        tensors = [*term.plain.values(), *term.output_grads]
    return _Origin(None, lambda: False, {}, _numbers(tensors) // n)


def _numbers(tensors: Iterable[Tensor | None]) -> int:
    return sum(t.numel() for t in tensors if t is not None)


def _inputs(example: Any, axis: int) -> tuple[tuple[Any, ...], dict[str, Any], int]:
    """Return positional and keyword inputs of their own, and the number of samples."""
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(example, Mapping):
        kwargs = dict(example)
    elif isinstance(example, (Tensor, tuple, list)):
        args = (example,) if isinstance(example, Tensor) else tuple(example)
    else:
        remedy = "pass a tensor, a tuple of positional inputs, or a mapping of keyword inputs."
        raise bad("example_inputs", type(example).__name__, remedy)
    args, kwargs = private_copy((args, kwargs))
    counts = [int(t.shape[axis]) for t in tensors_of((args, kwargs)) if t.dim() > axis]
    if not counts or counts[0] < 2:
        found = f"{counts[0]} sample(s)" if counts else "no sample axis"
        raise bad("example_inputs", found, f"pass at least 2 samples, counted along axis {axis} of the first input.")
    return args, kwargs, counts[0]


def explain(model: nn.Module, example_inputs: Any, *, batch_first: bool = True, grad_sample_mode: str = "ghost") -> Explanation:
    """Say what private training would do with ``model``, before any training and without leaving anything behind.

    ::

        print(explain(model, torch.randn(4, 3, 32, 32)))
        print(explain(bert, {"input_ids": ids, "attention_mask": mask}))

    One forward and backward pass over the example, with made-up gradients of the outputs, shows for each trainable parameter which
    rule reads its gradients and by what strategy; which strategy is cheapest depends on sizes, so give inputs as long as those of
    the training. The model runs in the mode it is in (``model.train()``, ``model.eval()``). Then the self-check compares with plain
    autograd on single samples. Everything that stands in the way is collected, not only the first.

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
        raise ScopeError("the model is in an open private scope, engine or controller: explain it before or after that.")
    if any(is_lazy(p) for p in model.parameters()):
        check_model(model)  # raises: nothing can be said before the model has run once
    known = located_problems(model)
    refusals = [line for _, line in known]
    params = [p for p in model.parameters() if p.requires_grad]
    reached, checked, ran = None, False, False
    with ExitStack() as stack:
        stack.enter_context(undisturbed(model))
        for p in model.parameters():
            vars(p).pop("grad_sample", None)  # another library's, which the controller would add to
        controller = HookController(model, batch_first=batch_first, loss_reduction="sum", strict=False, grad_sample_mode=mode)
        stack.callback(controller.cleanup)
        session = controller.session
        session.collected = notes = Refusals()
        check = SelfCheck(controller, model, params)
        check.watch(stack)
        session.sink = sink = _NotingSink(session.sink)
        try:
            with check.deferred():
                reached = _run(controller, args, kwargs, samples) if params else None
            ran = True
        except (UnsupportedModelError, ScopeError) as error:
            notes.add(error if isinstance(error, UnsupportedModelError) else UnsupportedModelError(str(error)), "")
        rows = _rows(controller, sink, reached, notes, [name for name, _ in known], ran)
        refusals += [str(error) for error, _ in notes.errors if str(error) not in refusals]
        if not refusals and params:
            session.collected, session.sink = None, sink.inner
            try:
                check.check_calls(samples)
                checked = True
            except UnsupportedModelError as error:
                refusals.append(str(error))
    frozen = sum(not p.requires_grad for p in model.parameters())
    return Explanation(type(model).__name__, tuple(rows), tuple(refusals), checked, samples, model.training, frozen, mode)


def _run(controller: HookController, args: tuple[Any, ...], kwargs: dict[str, Any], samples: int) -> SampleGradients | None:
    """Run forwards and backwards as training does; what was captured, or None."""
    model, session = controller.model, controller.session
    device = next((t.device.type for t in (*controller.params, *tensors_of((args, kwargs)))), "cpu")
    call = RecordedCall(model, "", args, kwargs, AmbientContext.current(device))
    loss = RepeatedCall(call, controller, samples).whole()
    what = f"the model itself ({type(model).__name__})"
    if not loss.requires_grad:
        if controller.params and session.collected is not None and not session.collected.errors:
            raise SelfCheckError(
                f"{what}: no output has a row per sample, or is a scalar loss, and depends on the parameters. Remedy: "
                "declare the sample axis (batch_first), or return what the loss is made of."
            )
        return None
    back_propagate(loss, [session.anchor, *controller.params])
    kept = controller.take()
    if kept is not None and kept.samples != samples:
        raise SelfCheckError(
            f"{what}: gradients came back for {kept.samples} samples, the example has {samples}. Remedy: give the model "
            "one row per sample, or declare the sample axis (batch_first)."
        )
    return kept


def _rows(
    controller: HookController, sink: _NotingSink, reached: SampleGradients | None, notes: Refusals, offending: list[str], ran: bool
) -> list[ParameterRow]:
    model = controller.model
    uses: dict[nn.Parameter, list[tuple[Term, _Origin]]] = {}
    for term, origin in reversed(sink.pairs):  # in the order of the forward pass
        for param in term.params:
            uses.setdefault(param, []).append((term, origin))
    seen = set() if reached is None else set(reached.params)
    places = [*offending, *(where for _, where in notes.errors)]
    names: dict[nn.Parameter, list[str]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        names.setdefault(param, []).append(name)
    rows = []
    for param, aliases in names.items():
        if not param.requires_grad:
            continue
        found = uses.get(param, [])
        if reached is not None and param in seen:
            try:
                reached.sq_norms([param])  # a module without a rule is repeated here at the latest
            except UnsupportedModelError as error:
                notes.add(error, aliases[0])
                places.append(aliases[0])
        owner = type(model.get_submodule(aliases[0].rpartition(".")[0])).__name__
        if any(_covers(where, alias) for where in places for alias in aliases):
            strategy, cost, held = "refused", None, 0
        elif not found:
            strategy, cost, held = ("unused" if ran else "unknown"), 0 if ran else None, 0
        else:
            strategy, cost, held = _how(param, found)
        labels = [origin.rule.label if origin.rule is not None else "-" for _, origin in found]
        rule = "+".join(dict.fromkeys(labels)) or "-"
        rows.append(ParameterRow(aliases[0], tuple(param.shape), owner, rule, strategy, len(found), cost, held))
    return rows


def _covers(where: str, name: str) -> bool:
    """Whether a refusal at ``where`` (a module, or names of parameters) is about the parameter ``name``."""
    return any(part == name or name.startswith(f"{part}.") for part in where.split(", ") if part)


def _how(param: nn.Parameter, uses: list[tuple[Term, _Origin]]) -> tuple[str, int | None, int]:
    """Return strategy, multiplications and numbers held for a parameter, from all its uses."""
    products = [term.outer_products(param) if isinstance(term, Deferred) else None for term, _ in uses]
    together = [product for product in products if product is not None]
    way = choose_way(together) if len(together) == len(uses) else None  # one use without factors: all are written out
    strategies, costs, held = [], [], 0
    for (term, origin), product in zip(uses, products, strict=True):
        held += param.numel() if isinstance(term, Instantiated) else origin.held
        instantiates = (len(uses) > 1) if way is None else way.instantiates
        strategy, cost = _one(param, term, origin, product, instantiates)
        strategies.append(strategy)
        costs.append(cost)
    if way is not None:
        costs = [way.multiplications]
    total = None if None in costs else round(sum(cost for cost in costs if cost is not None))
    return "+".join(dict.fromkeys(strategies)), total, held


def _one(
    param: nn.Parameter, term: Term, origin: _Origin, product: OuterProducts | None, instantiates: bool
) -> tuple[str, float | None]:
    """Strategy and multiplications per sample of one use; None where the cost is not known."""
    rule = origin.rule
    if rule is None:
        if isinstance(term, BatchedOpGradients):
            return "lifted", None
        return "lifted", float(term.tracked.value.numel() if isinstance(term, TrackedGradients) else param.numel())
    if rule.grad_samples is generic:
        return ("loop" if origin.loops() else "vmap"), None
    if product is not None:
        return ("instantiate", product.instantiation_cost()) if instantiates else ("ghost", 0.0)
    if isinstance(term, Deferred) and rule.sq_norms is not None:
        return "ghost", None
    return "instantiate", origin.costs.get(param, float(param.numel()))
