"""Buffers that a forward pass wrote to: what comes from private samples gets no noise there."""

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModelError

Versions = dict[str, tuple[Tensor, int]]


def versions(module: nn.Module) -> Versions:
    """Floating-point buffers with the number of times they were written to."""
    return {n: (b, b._version) for n, b in module.named_buffers() if b.is_floating_point()}


def check_unwritten(module: nn.Module, before: Versions) -> None:
    """Raise ``UnsupportedModelError`` with the names of the buffers in ``before`` that were written to since."""
    after = versions(module) if before else {}
    changed = []
    for name, (buffer, version) in before.items():
        now, times = after.get(name, (None, 0))
        if now is buffer:
            written = times != version
        else:
            written = now is None or now.shape != buffer.shape or not torch.equal(now.nan_to_num(), buffer.nan_to_num())
        if written:
            changed.append(name)
    if changed:
        raise UnsupportedModelError(
            f"{', '.join(changed)}: written during the forward pass. What is written to buffers from private samples gets "
            "no noise. Remedy: call .eval() on the module that does it, or replace it."
        )
