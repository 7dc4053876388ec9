"""release: the end of scopes that were lost."""

from torch import nn

from ..capture.validate import check_is_module
from .processes import replicated
from .scope import open_scopes


def release(model: nn.Module) -> bool:
    """End every open private scope over ``model`` or a part of it, whoever holds it; return whether there was one.

    For scopes that were lost: of an engine that nobody refers to any more, after an interrupted notebook cell. The model is
    as it was before, trained; the optimizer and the loader of such a scope refuse to work from then on.
    """
    scopes = open_scopes.over(check_is_module(replicated(model)))
    for scope in scopes:
        scope.__exit__(None, None, None)
    return bool(scopes)
