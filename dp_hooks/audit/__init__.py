"""Audits: measure, with one's own loop on one's own data, whether a run can be as private as it says.

:func:`sensitivity` looks at what one example can do to the clipped sum, :func:`one_run` at what a whole run lets through. Both run
the loop aside, and put everything back. What they say was computed from private data without noise: it is not private.
"""

from .one_run import OneRun, one_run
from .sensitivity import Sensitivity, sensitivity

__all__ = ["OneRun", "Sensitivity", "one_run", "sensitivity"]
