"""Clipping functions: from per-sample squared norms to factors, each with the sensitivity it guarantees."""

from .adaptive import AdaptiveClipping
from .base import ClippingFunction
from .fixed import AutomaticClipping, FlatClipping, GroupClipping
from .make import ADAPTIVE_OPTIONS, CLIPPING_MODES, make_clipping
from .norms import SampleNorms

__all__ = [
    "ADAPTIVE_OPTIONS",
    "CLIPPING_MODES",
    "AdaptiveClipping",
    "AutomaticClipping",
    "ClippingFunction",
    "FlatClipping",
    "GroupClipping",
    "SampleNorms",
    "make_clipping",
]
