"""What can be known about a model before it is run: modules that mix samples, leak them, or hide the real model."""

from collections.abc import Iterable

import torch
from opacus.grad_sample import AbstractGradSampleModule
from opacus.utils.module_utils import trainable_modules
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy

from .._validate import bad
from ..errors import UnsupportedModelError, bullets
from ..rules import embedding_refusal
from .calls.session import LeakHook

_BATCH_NORM = (
    "in training mode it normalises every sample by statistics of the whole batch, so samples mix. Remedy: "
    "PrivacyEngineHookBased.get_compatible_module(model) replaces it by GroupNorm; or call .eval() on it and freeze it"
)


def check_is_module(model: object) -> nn.Module:
    """Return ``model``, or what it was compiled from; raise ``InvalidArgumentError`` if it is no module, or hidden in a wrapper."""
    model = uncompiled(model)
    if not isinstance(model, nn.Module):
        raise bad("model", model, "pass a torch.nn.Module.")
    if isinstance(model, (AbstractGradSampleModule, DataParallel, DistributedDataParallel)):
        raise bad("model", type(model).__name__, "the model is wrapped; pass the module inside. dp_hooks needs no wrapper.")
    return model


def uncompiled(model: object) -> object:
    """Return the module that ``torch.compile`` was called on, if ``model`` is what it returned; else ``model``."""
    compiled = getattr(torch._dynamo, "OptimizedModule", None) if hasattr(torch, "_dynamo") else None
    return model._orig_mod if compiled is not None and isinstance(model, compiled) else model


def trainable_beside(module: nn.Module, params: Iterable[nn.Parameter]) -> list[str]:
    """Return the names of the trainable parameters of ``module`` that are not among ``params``."""
    known = {id(p) for p in params}
    return [name for name, p in module.named_parameters() if p.requires_grad and id(p) not in known]


def mixes_samples(module: nn.Module) -> bool:
    """Whether ``module``, in its present mode, normalises with statistics of the batch or stores them."""
    if isinstance(module, _BatchNorm) and not isinstance(module, nn.modules.instancenorm._InstanceNorm):
        return module.training or module.running_mean is None
    return isinstance(module, nn.modules.instancenorm._InstanceNorm) and module.training and module.track_running_stats


def mixing_reason(module: nn.Module) -> str:
    """Say why ``module`` is refused and what to do."""
    if isinstance(module, nn.modules.instancenorm._InstanceNorm):
        return (
            "track_running_stats stores statistics of private samples without noise. "
            "Remedy: build it with track_running_stats=False"
        )
    return _BATCH_NORM


def _reasons(module: nn.Module, trainable: bool) -> list[str]:
    if mixes_samples(module):
        return [mixing_reason(module)]
    if not trainable:
        return []
    if isinstance(module, torch.jit.ScriptModule):
        return ["it is compiled by TorchScript, which accepts no hooks. Remedy: use the Python module it was made from"]
    reason = embedding_refusal(module) if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) else None
    return [] if reason is None else [reason]


def located_problems(model: nn.Module) -> list[tuple[str, str]]:
    """Return the qualified name of every offending module and parameter, and the line about it that is shown."""
    trainable = {id(module) for _, module in trainable_modules(model)}
    found = [
        (name, f"{name or 'the model itself'} ({type(module).__name__}): {reason}.")
        for name, module in model.named_modules()
        for reason in _reasons(module, id(module) in trainable)
    ]
    for name, param in model.named_parameters():
        reason = _parameter_reason(param) if param.requires_grad else None
        if reason is not None:
            owner = type(model.get_submodule(name.rpartition(".")[0])).__name__
            found.append((name, f"{name} (parameter of {owner}): {reason}."))
    return found


def _parameter_reason(param: nn.Parameter) -> str | None:
    if is_lazy(param):
        return "it has no shape yet. Remedy: run the model once on an example first"
    hooks = [*(param._backward_hooks or {}).values(), *(param._post_accumulate_grad_hooks or {}).values()]
    if not all(isinstance(hook, LeakHook) for hook in hooks):
        return (
            "it has a hook on its gradient (register_hook, register_post_accumulate_grad_hook), which would get gradients without "
            "clipping and noise, or none. Remedy: remove it, and work on the noised gradient: optimizer.register_step_pre_hook, or "
            "attach_step_hook of the private optimizer"
        )
    return None


def problems(model: nn.Module) -> list[str]:
    """Return one line per offending module and parameter: its name, class, the reason and the remedy."""
    return [line for _, line in located_problems(model)]


def check_model(model: nn.Module) -> None:
    """Raise ``UnsupportedModelError`` with :func:`problems` of ``model``, if there are any."""
    if found := problems(model):
        raise UnsupportedModelError(
            f"{len(found)} module(s) or parameter(s) of the model cannot be trained privately:\n{bullets(found)}"
        )
