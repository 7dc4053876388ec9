"""Differentially private training for PyTorch models that are neither wrapped nor rewritten."""

from . import errors

if not errors.RUN_AS_COMMAND:
    from . import audit
    from ._rerun import checking
    from .capture.controller import HookController
    from .checks.explain import explain
    from .checks.explanation import Explanation
    from .integrations.opacus import PrivacyEngineHookBased
    from .privacy.accounting import pld_accountant  # noqa: F401  registers it with Opacus
    from .privacy.accounting.ledger import Ledger
    from .privacy.accounting.spending import Spending, budget
    from .privacy.planner import PrivacyPlan, plan
    from .privacy.report import PrivacyReport
    from .privacy.sampling.loader import PrivateDataLoader
    from .rules import register_rule
    from .training.optimizer import PrivateOptimizer
    from .training.release import release
    from .training.scope import PrivateTraining, private_training
    from .training.step import dp_step

__version__ = "0.1.0"

__all__ = [
    "Explanation",
    "HookController",
    "Ledger",
    "PrivacyEngineHookBased",
    "PrivacyPlan",
    "PrivacyReport",
    "PrivateDataLoader",
    "PrivateOptimizer",
    "PrivateTraining",
    "Spending",
    "__version__",
    "audit",
    "budget",
    "checking",
    "dp_step",
    "errors",
    "explain",
    "plan",
    "private_training",
    "register_rule",
    "release",
]
