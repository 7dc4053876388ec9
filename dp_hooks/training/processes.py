"""Training in several processes: what has to be the same in all of them, and what cannot be had there."""

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..capture.validate import uncompiled
from ..distributed.peers import Peers
from ..errors import ScopeError
from ..privacy.accounting.meter import PrivacyMeter
from ..privacy.noise.entropy import fresh_generator
from ..privacy.noise.noise import Noise
from ..privacy.sampling.plan import POISSON, SamplingPlan
from .attributes import put


def replicated(model: Any) -> Any:
    """Return the module inside of ``DistributedDataParallel``, or ``model`` where it is in none."""
    inner = uncompiled(model)
    return inner.module if isinstance(inner, DistributedDataParallel) else model


def check_alone(peers: Peers | None, plan: SamplingPlan, noise: Noise, params: Iterable[Tensor], **others: bool) -> None:
    """Refuse what can only be had in one process, if there are several; ``others`` tell whether more was asked for.

    Raises:
        ScopeError: it is asked for.
    """
    if peers is None:
        return
    asked = {
        "secure_mode=True": noise.is_secure,
        f"sampling={plan.sampling!r}": plan.sampling != POISSON,
        "privacy_unit": plan.units is not None,
        "parameters that are sharded (FSDP, tensor parallelism)": any(hasattr(p, "device_mesh") for p in params),
        **others,
    }
    for what in [what for what, given in asked.items() if given]:
        raise ScopeError(
            f"{what}: not in several processes of torch.distributed (there are {peers.size}). Leave it out, or train in one "
            "process. With Poisson sampling, plain or DistributedDataParallel models are trained by several."
        )


def is_replica(model: Any) -> bool:
    """Whether it is in ``DistributedDataParallel``."""
    return isinstance(uncompiled(model), DistributedDataParallel)


def be_quiet(stack: ExitStack, model: Any) -> None:
    """Keep ``DistributedDataParallel`` from adding up gradients, of which there are none, and from sending buffers around.

    A process whose part of a batch is empty need not call the model, for which the others would wait.
    """
    inner = uncompiled(model)
    if isinstance(inner, DistributedDataParallel):
        put(stack, inner, require_backward_grad_sync=False, require_forward_param_sync=False)


def shared_facts(
    model: nn.Module, params: Iterable[nn.Parameter], plan: SamplingPlan, meter: PrivacyMeter, **settings: Any
) -> dict[str, Any]:
    """What has to be the same in all processes, by the name that an error calls it by."""
    facts: dict[str, Any] = {
        "the number of examples": plan.examples,
        "the sampling rate": plan.sample_rate,
        "the number of batches in a pass": plan.batches_per_pass,
        "noise_multiplier": meter.noise_multiplier,
        "the budget": (meter.budget, meter.releases),
        "accountant": (meter.accountant.mechanism(), [tuple(entry) for entry in meter.accountant.history]),
        "the number of steps": meter.steps,
        **settings,
    }
    trained = {id(p) for p in params}
    for name, p in (*model.named_parameters(), *model.named_buffers()):
        kind = "the parameter" if isinstance(p, nn.Parameter) else "the buffer"
        facts[f"{kind} {name}"] = (tuple(p.shape), str(p.dtype), id(p) in trained, _digest(p))
    return facts


class PeersDraws:
    """Draws the same batches in all processes, and takes the part of this one.

    Attributes:
        generator: what draws: in the first process its loader's own, or a fresh one; in others one with its state as a pass begins.
    """

    def __init__(self, peers: Peers, own: torch.Generator | None) -> None:
        """``own`` is the generator of the loader here, if it has one."""
        self._peers = peers
        self.generator = own if own is not None and peers.is_first else fresh_generator(torch.device("cpu"))

    def begin_pass(self) -> None:
        """Take over the state of the first process's generator."""
        self._peers.begin_pass()
        state = self._peers.first(self.generator.get_state())
        if not self._peers.is_first:  # the first one's goes on: a later scope must not draw the same batches
            self.generator.set_state(state)

    def part(self, indices: list[int]) -> list[int]:
        """What this process has of a batch with these examples."""
        return self._peers.part(indices)


def _digest(tensor: Tensor) -> tuple[str, str]:
    """Two numbers that are others where values are, or have other places."""
    if tensor.is_meta or not tensor.numel():
        return "", ""
    values = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    flat = values.detach().double().flatten()
    places = torch.linspace(1, 2, flat.numel(), dtype=torch.float64, device=flat.device)
    return repr(float(flat.sum())), repr(float(flat @ places))  # NaN is like NaN
