"""What a layer rule is: pure functions from one captured call of a module to its per-sample gradients.

Index legend used in all rules: ``n`` samples, ``t`` any dimensions between batch and features (tokens, pixels),
``i`` input features, ``o`` output features.
"""

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from .._precision import wide_dtype
from .._tree import tensors_of
from ..errors import UnsupportedModelError
from .outer import OuterProducts

RunModule = Callable[[Mapping[str, Tensor], tuple[Any, ...], dict[str, Any]], Any]


@dataclass(eq=False)
class Call:
    """One call of ``module`` in a forward pass, with the gradients that came back to its outputs.

    Attributes:
        module: the module that was called; its parameters are the user's own.
        name: its qualified name in the model, for messages.
        args: positional inputs, detached, as they were given.
        kwargs: keyword inputs, detached.
        grads: one entry per floating-point output tensor: the gradient of the loss, or None where the loss does not
            depend on that output.
        samples: number of samples ``n`` in the batch.
        batch_dim: the axis of inputs and outputs that counts samples.
        names: names (relative to ``module``) of the parameters whose gradients are wanted.
        run: calls the module with other tensors in its parameters' places; nothing is captured or left behind.
        memo: scratch space of the rule for this module, kept for the lifetime of the scope.
        cut: positions of the input tensors that are cut into samples: each, like each gradient, is ``[n, *input for one
            sample alone]``. None: the sample axis of inputs and gradients is ``batch_dim``.
        own: parameters by name, where the module may hold other tensors in their places.
    """

    module: nn.Module
    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    grads: list[Tensor | None]
    samples: int
    batch_dim: int
    names: tuple[str, ...]
    run: RunModule
    memo: dict[str, Any] = field(default_factory=dict)
    cut: frozenset[int] | None = None
    own: Mapping[str, nn.Parameter] = field(default_factory=dict)

    @property
    def inputs(self) -> list[Tensor]:
        """All input tensors as they were given, positional ones first."""
        return tensors_of((self.args, self.kwargs))

    @property
    def input(self) -> Tensor:
        """The first input tensor with the sample axis moved to the front: ``[n, ...]``."""
        first = self.args[0] if self.args and isinstance(self.args[0], Tensor) else self.inputs[0]
        return first.movedim(self.batch_dim, 0) if self.batch_dim else first

    @property
    def grad(self) -> Tensor:
        """The gradient of the only output with the sample axis moved to the front: ``[n, ...]``."""
        (grad,) = self.grads
        assert grad is not None  # a call none of whose outputs got a gradient is never recorded
        return grad.movedim(self.batch_dim, 0) if self.batch_dim else grad

    def parameter(self, name: str) -> nn.Parameter:
        """The module's parameter ``name``."""
        own = self.own.get(name, self.module._parameters.get(name))
        return own if isinstance(own, nn.Parameter) else self.module.get_parameter(name)


GradSamples = Callable[[Call], dict[str, Tensor]]
WeightedSums = Callable[[Call, Tensor], dict[str, Tensor]]
OuterProductsOf = Callable[[Call], dict[str, OuterProducts]]


def _always(module: nn.Module) -> bool:
    return True


@dataclass(frozen=True)
class Rule:
    """How per-sample gradients of one class of modules are computed.

    Only ``grad_samples`` is required; everything else is derived from it unless a faster function is given.
    """

    label: str  # name shown in messages and reports
    grad_samples: GradSamples  # ``call -> {name: [n, *param.shape]}``
    # ``call -> {name: [n]}``, the squared norms of the per-sample gradients, or an upper bound of them.
    sq_norms: GradSamples | None = None
    # ``(call, factors [n]) -> {name: param.shape}``, the sum over samples of factor times gradient.
    weighted_sums: WeightedSums | None = None
    # The factors for the same parameters: norms, also of shared parameters, and weighted sums follow.
    outer_products: OuterProductsOf | None = None
    # The names of the parameters the rule knows; a module that owns others is not given to it. None: any.
    parameters: frozenset[str] | None = frozenset({"weight", "bias"})
    # Whether subclasses that inherit ``forward`` unchanged and add no parameters are covered too; only right where ``forward``
    # calls nothing that a subclass could override.
    subclasses: bool = False
    applies: Callable[[nn.Module], bool] = _always  # whether the rule is right for this very module (padding modes and the like)
    batch_dim: int | None = None  # the sample axis, where the layer fixes it; None: as declared by the user
    keep: bool = False  # per-sample gradients are too dear to compute twice; hold them between norm and sum
    all_per_sample: bool = False  # every input has one row per sample; else only the first one is known to have
    whole_subtree: bool = False  # the rule differentiates the module together with everything below it
    any_rank: bool = False  # the rule allows any number of dimensions between samples and features
    # What of a module the gradients depend on, besides shapes: calls of modules of which it is the same can be computed as one
    # call on all their samples. None: they depend on more, as on the values of parameters.
    alike: Callable[[nn.Module], Hashable] | None = None


def always_alike(module: nn.Module) -> Hashable:
    """For :attr:`Rule.alike`: gradients depend on nothing but what a call got, and on shapes."""
    return None


def check_samples(call: Call) -> None:
    """Raise ``UnsupportedModelError`` unless every output gradient of ``call`` has one slice per sample."""
    for grad in call.grads:
        if grad is not None and (grad.dim() <= call.batch_dim or grad.shape[call.batch_dim] != call.samples):
            raise UnsupportedModelError(
                f"{call.name or 'the model'} ({type(call.module).__name__}): its output has shape "
                f"{tuple(grad.shape)}, but axis {call.batch_dim} should count the {call.samples} samples of the batch. "
                "The module works on something that all samples share or in another layout, so its per-sample "
                "gradients cannot be told apart. Remedy: give the module one row per sample (for position ids: "
                "ids.expand(batch_size, -1)), or freeze its parameters with requires_grad_(False)."
            )


def weighted_sum(grads: Tensor, factors: Tensor) -> Tensor:
    """Return the sum over samples of ``factors[n] * grads[n]``; ``grads`` is ``[n, *shape]``."""
    dtype = wide_dtype(grads.dtype)  # a sum rounded before the noise has no bounded sensitivity
    rows = grads.to(dtype).reshape(grads.shape[0], grads.shape[1:].numel())
    return (factors.to(dtype) @ rows).view(grads.shape[1:])
