"""What can go wrong, as exceptions. Every one of them is raised before a parameter moves or budget is spent."""

from opacus.validators.errors import UnsupportedModuleError


class DPHooksError(Exception):
    """Base class of every error that ``dp_hooks`` raises on purpose."""


class InvalidArgumentError(DPHooksError, ValueError):
    """An argument that cannot be used: the message names the argument, its value and the remedy."""


class ScopeError(DPHooksError, RuntimeError):
    """A private scope, its optimizer or its loader was used outside its lifetime or out of order."""


class BudgetExhaustedError(ScopeError):
    """The next step would spend more than ``target_epsilon``. Nothing was touched: no noise, no charge, no update."""


class AccountingError(DPHooksError, ValueError):
    """An accountant could not work out epsilon for the steps it was charged with."""


class UnsupportedModelError(DPHooksError, UnsupportedModuleError, NotImplementedError):  # type: ignore[misc]
    """The per-sample gradients of a model cannot be separated, or cannot be computed correctly.

    The message lists every offending module and parameter, the reason and the remedy. It is a subclass of Opacus's
    ``UnsupportedModuleError`` and of ``NotImplementedError``, the two exceptions Opacus raises in such cases, so that
    existing ``except`` clauses go on working.
    """


class SelfCheckError(UnsupportedModelError):
    """The library's per-sample gradients disagree with plain autograd on single samples; nothing was released."""
