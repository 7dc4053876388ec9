"""Differentially private training for PyTorch models that are neither wrapped nor rewritten."""

from . import errors
from .explain import Explanation, explain
from .hook_controller import HookController
from .optimizer import PrivateOptimizer
from .privacy_engine import PrivacyEngineHookBased
from .report import PrivacyReport
from .rules import register_rule
from .sampling import PrivateDataLoader
from .scope import PrivateTraining, private_training
from .step import dp_step

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
    "dp_step",
    "errors",
    "explain",
    "private_training",
    "register_rule",
]
