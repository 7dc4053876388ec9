"""The table of rules: which function computes the per-sample gradients of which module class."""

from collections.abc import Callable

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from ..errors import InvalidArgumentError
from .convolution import CONVOLUTION, CONVOLUTIONS
from .elementwise import BILINEAR, PRELU
from .embedding import EMBEDDING, EMBEDDING_BAG
from .generic import FEATURE_NORM, GENERIC, needs_loop
from .linear import CONV1D, LINEAR
from .normalisation import GROUP_NORM, INSTANCE_NORM, LAYER_NORM, RMS_NORM, is_feature_norm
from .opacus import opacus_rules
from .recurrent import CELL, CELLS
from .rule import GradSamples, Rule, WeightedSums

_RULES: dict[type[nn.Module], Rule] = {
    nn.Linear: LINEAR,
    nn.Embedding: EMBEDDING,
    nn.EmbeddingBag: EMBEDDING_BAG,
    **dict.fromkeys(CONVOLUTIONS, CONVOLUTION),
    nn.LayerNorm: LAYER_NORM,
    nn.RMSNorm: RMS_NORM,
    nn.GroupNorm: GROUP_NORM,
    **dict.fromkeys((nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d), INSTANCE_NORM),
    nn.PReLU: PRELU,
    nn.Bilinear: BILINEAR,
    **dict.fromkeys(CELLS, CELL),
}

# Classes of packages that need not be installed, by where they are defined.
_BY_NAME: dict[str, Rule] = {"transformers.pytorch_utils.Conv1D": CONV1D}

# Modules whose forward reads the weights of their children directly: the children's own hooks never fire.
_READS_CHILDREN = (nn.MultiheadAttention, nn.RNNBase)


def register_rule(
    module_class: type[nn.Module], *, sq_norms: GradSamples | None = None, weighted_sums: WeightedSums | None = None
) -> Callable[[GradSamples], GradSamples]:
    """Register the decorated function as the rule for ``module_class``.

    The function gets a :class:`~dp_hooks.rules.Call` and returns ``{parameter name: [n, *parameter.shape]}``, the
    gradient of the loss for each of the ``n`` samples, for the names in ``call.names``. Scopes that are already open keep
    the table they started with.

    Args:
        module_class: the class whose calls the function handles. Subclasses are not included: what they compute is not known.
        sq_norms: optional faster function ``call -> {name: [n]}`` for the squared norms of the same gradients. It may
            return an upper bound, never less: the clipping bound, and with it epsilon, rests on it.
        weighted_sums: optional faster function ``(call, factors [n]) -> {name: parameter.shape}``.

    Raises:
        InvalidArgumentError: ``module_class`` is not a module class, or has a rule already.
    """
    if not (isinstance(module_class, type) and issubclass(module_class, nn.Module)):
        raise InvalidArgumentError(
            f"module_class={module_class!r} cannot be used: pass a subclass of torch.nn.Module, as in @register_rule(MyLayer)."
        )
    if module_class in _RULES:
        raise InvalidArgumentError(
            f"module_class={module_class.__name__} has a rule already ({_RULES[module_class].label}): a second one would "
            "silently change what others get. Register a subclass instead."
        )

    def decorator(grad_samples: GradSamples) -> GradSamples:
        _RULES[module_class] = Rule(module_class.__name__, grad_samples, sq_norms, weighted_sums, parameters=None)
        return grad_samples

    return decorator


class RuleTable:
    """A snapshot of the registered rules, Opacus's included; later registrations do not change it."""

    def __init__(self, *, generic_only: bool = False) -> None:
        """Take the snapshot; with ``generic_only`` every module is handled by ``torch.func`` (mode "functorch")."""
        self._rules: dict[type[nn.Module], Rule] = {**opacus_rules(), **_RULES}
        self._generic_only = generic_only

    def owns_subtree(self, module: nn.Module) -> bool:
        """Whether ``module`` must be differentiated as a whole, children included."""
        return isinstance(module, _READS_CHILDREN) or is_parametrized(module)

    def tracks(self, module: nn.Module) -> bool:
        """Whether the parameters of ``module`` are followed one operation at a time, for want of a rule."""
        return self._special(module) is GENERIC and not needs_loop(module)

    def find(self, module: nn.Module) -> Rule:
        """Return the rule for ``module``; the generic one unless another is certainly right for it."""
        return GENERIC if self._generic_only else self._special(module)

    def _special(self, module: nn.Module) -> Rule:
        if self.owns_subtree(module) or "forward" in vars(module) or any(p.is_complex() for p in module.parameters(recurse=False)):
            return GENERIC
        names = {name for name, _ in module.named_parameters(recurse=False)}
        for cls in type(module).__mro__:
            if (rule := self._rules.get(cls)) is not None:
                inherits = rule.subclasses and getattr(type(module), "forward", None) is getattr(cls, "forward", None)
                known = rule.parameters is None or names <= rule.parameters
                return rule if (type(module) is cls or inherits) and known and rule.applies(module) else GENERIC
        named = _BY_NAME.get(f"{type(module).__module__}.{type(module).__qualname__}")
        return named or (FEATURE_NORM if is_feature_norm(module) else GENERIC)
