"""Layer rules taken from Opacus's ``GradSampleHooks.GRAD_SAMPLERS``, stock ones and those users registered there."""

from collections.abc import Callable

import torch
from opacus.grad_sample import GradSampleHooks
from opacus.layers.dp_rnn import RNNLinear
from torch import Tensor, nn

from .rule import Call, Rule

OpacusSampler = Callable[[nn.Module, list[Tensor], Tensor], dict[nn.Parameter, Tensor]]

_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def _applies(module: nn.Module) -> bool:
    # The layers themselves have rules of their own and never come here; subclasses for which a user registered Opacus's
    # sampler do. The one of convolutions ignores padding_mode, the one of EmbeddingBag is wrong for repeated ids.
    return not (isinstance(module, _CONV) and module.padding_mode != "zeros") and not isinstance(module, nn.EmbeddingBag)


def _plain_strides(value: Tensor) -> Tensor:
    """Return ``value`` laid out row by row, which is what the convolution samplers' ``as_strided`` assumes.

    ``contiguous()`` is not enough: a tensor with axes of size 1 counts as contiguous with any strides on them.
    """
    plain = value.contiguous()
    laid_out = plain.stride() == torch.empty(plain.shape, device="meta").stride()
    return plain if laid_out else plain.clone(memory_format=torch.contiguous_format)


def from_sampler(cls: type[nn.Module], sampler: OpacusSampler) -> Rule:
    """Wrap the Opacus grad sampler of ``cls`` (``fn(layer, activations, backprops) -> {param: [n, *shape]}``)."""

    def grad_samples(call: Call) -> dict[str, Tensor]:
        if call.samples == 0:  # several samplers return one row for no sample
            return {name: p.new_zeros((0, *p.shape)) for name in call.names for p in [call.parameter(name)]}
        found = sampler(call.module, [_plain_strides(call.input)], _plain_strides(call.grad))
        names = {call.parameter(name): name for name in call.names}
        return {names[p]: g for p, g in found.items() if p in names}

    known = frozenset({"weight", "bias"}) if cls.__module__.startswith("torch.nn") else None
    return Rule(
        f"Opacus {cls.__name__}", grad_samples, parameters=known, applies=_applies, batch_dim=0 if cls is RNNLinear else None
    )


def opacus_rules() -> dict[type[nn.Module], Rule]:
    """Return a rule for every class in Opacus's registry, as it is now."""
    return {cls: from_sampler(cls, sampler) for cls, sampler in GradSampleHooks.GRAD_SAMPLERS.items()}
