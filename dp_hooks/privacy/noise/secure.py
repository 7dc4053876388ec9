"""Noise that stands up to somebody who knows the code and sees every digit of what is released."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..._validate import bad
from .gaussian import GaussianNoise, at_most, finite, flat_view, real_view
from .grid import Grid
from .rounded_gaussian import rounded_gaussian
from .secret_bytes import ReadBytes, secret_bytes, source_of_bytes

_BLOCK = {"cpu": 1 << 14}  # numbers noised at a time: on CPU what is needed for them stays in the cache
_ELSEWHERE = 1 << 22


class SecureNoise:
    """Rounds sums to a grid, adds rounded normal noise there, in whole numbers, and only then makes floats of them again.

    Normal noise in floats leaks: a generator makes some floats only, and which ones are released tells what they were added to
    (Mironov, CCS 2012, for Laplace noise; Jin et al., arXiv:2112.05307, for the normal noise of DP-SGD). Here, with g the grid's
    spacing and M its units (:class:`Grid`), what is released for sums x is a function of::

        round(x / g) + round(M X),    X standard normal, independent for each number

    Guarantee: the accounting holds for it as for noise in real numbers. ``round(x / g)`` is a whole number, so the sum above equals
    ``round(round(x / g) + M X)``: post-processing of the Gaussian mechanism on ``round(x / g)``. Its sensitivity is at most
    ``S / g + sqrt(d)``, and M is ``std / S`` times that or more: its noise multiplier is at least what is charged. Nothing else of
    x goes into the result. So every accountant of the (subsampled) Gaussian mechanism applies as it is, PRV and PLD included. The
    discrete Gaussian (Canonne, Kamath, Steinke 2020, arXiv:2004.00010), which is often used on grids, has the same zCDP (Theorem 4
    there) but other privacy losses, for which those two were not made.

    The law that is drawn from is within 2^-160 of the stated one for each number (:func:`.rounded_gaussian`): for 2^60 numbers in a
    run delta grows by less than ``(1 + e^epsilon) 2^-100``, and by as much as ChaCha20, or the operating system's generator, can be
    told from random bits.

    Not covered: the sum has been added up in floats before, whose rounding can move it by a little more than S (Casacuberta et al.
    2022, arXiv:2207.10635); and how long a step takes.
    """

    is_secure, is_repeatable = True, False

    def __init__(self, read: ReadBytes = secret_bytes) -> None:
        """Draw from ``read``; anything but the default is for tests, which have to be repeatable."""
        self._read = read

    @property
    def random_numbers(self) -> str:
        """Where they are from."""
        return f"secure: {source_of_bytes()}, rounded to a grid"

    def check_devices(self, devices: set[torch.device]) -> None:
        """Raise ``InvalidArgumentError`` for devices that have no float64, in which sums are rounded."""
        if any(device.type == "mps" for device in devices):
            raise bad("secure_mode", True, "it needs float64, which there is none of on MPS. Train on a CPU or a CUDA device.")

    def add_(self, totals: Sequence[Tensor], std: float, scale: float = 1.0, *, sensitivity: float) -> bool:
        """Replace each of ``totals`` by ``scale * (total + noise)``, in place; see :class:`~.noise.Noise`.

        What is not finite stays so.
        """
        if std == 0:
            return GaussianNoise().add_(totals, 0.0, scale)
        parts = [part for part in map(real_view, totals) if part.numel()]
        grid = Grid.of(std, sensitivity, max(1, sum(part.numel() for part in parts)))
        sums: list[Tensor] = []
        for device in {part.device for part in parts}:
            block = _BLOCK.get(device.type, _ELSEWHERE)
            here = [part for part in parts if part.device == device]
            views = [(part, flat_view(part)) for part in here]
            flat = [part.flatten() if view is None else view for part, view in views]
            for pieces in at_most(block, [piece for whole in flat for piece in whole.split(block)]):
                sums.append(self._add(pieces, grid, scale))
            for (part, view), noised in zip(views, flat, strict=True):
                if view is None:
                    part.copy_(noised.view(part.shape))
        return finite(sums)

    def _add(self, pieces: list[Tensor], grid: Grid, scale: float) -> Tensor:
        """Noise some tensors ``[n]`` of one device, and return what is finite if they are."""
        numbers = torch.cat([piece.to(torch.float64) for piece in pieces])
        points = grid.points(numbers)
        points += rounded_gaussian(points.numel(), grid.units, points.device, self._read)
        # Functions of the points alone from here on; 0 times the sums themselves is 0, or NaN if they cannot be released.
        noised = points.to(torch.float64).mul_(grid.spacing * scale).add_(numbers.mul_(0))
        for piece, new in zip(pieces, noised.split([piece.numel() for piece in pieces]), strict=True):
            piece.copy_(new)
        return noised.sum()
