"""What can go wrong, as exceptions. Every one of them is raised before a parameter moves or budget is spent."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING


def is_command(arguments: Sequence[str], whole: Sequence[str]) -> bool:
    """Whether ``sys.argv`` and ``sys.orig_argv`` are those of ``python -m dp_hooks ...``, while Python looks for its commands."""
    return arguments[:1] == ["-m"] and whole[-len(arguments) :][:1] == [__package__]


# Commands take a tenth of the time that PyTorch and Opacus take to import, and have no models.
RUN_AS_COMMAND = is_command(sys.argv, sys.orig_argv)
if TYPE_CHECKING or not RUN_AS_COMMAND:
    from opacus.validators.errors import UnsupportedModuleError
else:

    class UnsupportedModuleError(Exception):
        """In the place of Opacus's."""


_SHOWN = 3  # of a list: more of them say no more, and hide the remedy


def some_of(items: Sequence[str]) -> str:
    """The first three of ``items`` in a row, and how many more there are."""
    more = [f"{len(items) - _SHOWN} more"] if len(items) > _SHOWN else []
    return ", ".join([*items[:_SHOWN], *more])


def bullets(lines: Sequence[str]) -> str:
    """The first three of ``lines`` below each other, and how many more there are."""
    more = [f"  ... and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
    return "\n".join([*(f"  - {line}" for line in lines[:_SHOWN]), *more])


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

    The message lists the first three offending modules and parameters, with reason and remedy, and says how many more there are
    (:func:`~dp_hooks.explain` shows all). It is a subclass of Opacus's
    ``UnsupportedModuleError`` and of ``NotImplementedError``, the two exceptions Opacus raises in such cases, so that
    existing ``except`` clauses go on working.
    """


class SelfCheckError(UnsupportedModelError):
    """The library's per-sample gradients disagree with plain autograd on single samples; nothing was released."""
