"""Gaussian noise on the clipped sum."""

import os

import torch
from torch import Tensor

from ._validate import bad


def fresh_generator(device: torch.device) -> torch.Generator:
    """Return a generator on ``device`` seeded from the operating system's entropy source."""
    generator = torch.Generator(device=device)
    generator.manual_seed(int.from_bytes(os.urandom(8), "little") >> 1)
    return generator


class GaussianNoise:
    """Adds ``N(0, std^2)`` to tensors in place.

    By default each device gets a generator of its own, seeded from the operating system's entropy and never saved:
    ``torch.manual_seed`` does not fix it, and nobody who knows the training script can replay it. A
    ``generator`` makes runs repeatable, and lets everybody who knows its seed subtract the noise.
    """

    def __init__(self, generator: torch.Generator | None = None) -> None:
        """Draw from ``generator``, or from fresh generators per device."""
        self.generator = generator
        self._fresh: dict[torch.device, torch.Generator] = {}

    def check_devices(self, devices: set[torch.device]) -> None:
        """Raise ``InvalidArgumentError`` unless the user's generator can serve all ``devices``."""
        if self.generator is not None and any(d.type != self.generator.device.type for d in devices):
            names = sorted(map(str, devices))
            raise bad(
                "noise_generator",
                self.generator,
                f"it lives on {self.generator.device}, the parameters on {names}; pass torch.Generator(device=...) there.",
            )

    def _for(self, device: torch.device) -> torch.Generator:
        if self.generator is not None:
            return self.generator
        if device not in self._fresh:
            self._fresh[device] = fresh_generator(device)
        return self._fresh[device]

    def add_(self, total: Tensor, std: float) -> Tensor:
        """Add noise of standard deviation ``std`` to ``total`` in place and return it.

        The draw is made in at least float32, so that half precision does not coarsen its tails.
        """
        if std > 0:
            dtype = torch.promote_types(total.dtype, torch.float32)
            draw = torch.empty_like(total, dtype=dtype, memory_format=torch.contiguous_format)
            draw.normal_(0.0, std, generator=self._for(total.device))
            total.add_(draw)
        return total
