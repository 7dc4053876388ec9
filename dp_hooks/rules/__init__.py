"""Layer rules: pure functions that turn captured inputs and output gradients into per-sample gradients."""

from . import ghost_norms
from .embedding import refusal as embedding_refusal
from .generic import GENERIC
from .linear import wide
from .outer import CHUNK, OuterProducts, sum_of_squares
from .registry import RuleTable, register_rule
from .rule import Call, Rule, check_samples, weighted_sum

__all__ = [
    "CHUNK",
    "GENERIC",
    "Call",
    "OuterProducts",
    "Rule",
    "RuleTable",
    "check_samples",
    "embedding_refusal",
    "ghost_norms",
    "register_rule",
    "sum_of_squares",
    "weighted_sum",
    "wide",
]
