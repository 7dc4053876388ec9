"""Differentially private training for PyTorch models that are neither wrapped nor rewritten."""

from . import errors
from ._rerun import checking
from .capture.controller import HookController
from .checks.explain import explain
from .checks.explanation import Explanation
from .integrations.opacus import PrivacyEngineHookBased
from .privacy.report import PrivacyReport
from .privacy.sampling.loader import PrivateDataLoader
from .rules import register_rule
from .training.optimizer import PrivateOptimizer
from .training.scope import PrivateTraining, private_training, release
from .training.step import dp_step

__version__ = "0.1.0"

__all__ = [
    "Explanation",
    "HookController",
    "PrivacyEngineHookBased",
    "PrivacyReport",
    "PrivateDataLoader",
    "PrivateOptimizer",
    "PrivateTraining",
    "__version__",
    "checking",
    "dp_step",
    "errors",
    "explain",
    "private_training",
    "register_rule",
    "release",
]
