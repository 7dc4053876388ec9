"""Layer rules: pure functions that turn captured inputs and output gradients into per-sample gradients."""

from .embedding import refusal as embedding_refusal
from .generic import GENERIC
from .registry import RuleTable, register_rule
from .rule import Call, Rule, check_samples, expands_shared_ids, squared_norms, weighted_sum

__all__ = [
    "GENERIC",
    "Call",
    "Rule",
    "RuleTable",
    "check_samples",
    "embedding_refusal",
    "expands_shared_ids",
    "register_rule",
    "squared_norms",
    "weighted_sum",
]
