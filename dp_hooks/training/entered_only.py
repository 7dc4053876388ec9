"""EnteredOnly: what is done with a context manager by those who think that it is something else."""

from typing import Any, NoReturn

from ..errors import ScopeError


class EnteredOnly:
    """Can be entered by ``with``, and is neither a pair nor a decorator."""

    def __iter__(self) -> NoReturn:
        """Refused with a ``ScopeError``: ``opt, loader = private_training(...)`` would be a scope that nothing ends."""
        raise ScopeError(
            "a private scope has to be entered: write `with private_training(...) as (opt, loader):` and train inside that "
            "block, at the end of which everything is taken off the model again."
        )

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused with a ``ScopeError``: a scope decorates nothing."""
        raise ScopeError(
            "a private scope cannot be called or decorate: write `with private_training(...) as (opt, loader):`, and call a "
            "function decorated with @dp_step inside that block."
        )
