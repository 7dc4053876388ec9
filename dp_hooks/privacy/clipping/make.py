"""Clipping functions from the arguments ``clipping``, ``max_grad_norm`` and ``clipping_options``."""

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn

from ..._validate import bad, clipping_bounds, fraction, one_of, positive
from .adaptive import AdaptiveClipping
from .base import ClippingFunction
from .fixed import AutomaticClipping, FlatClipping, GroupClipping

CLIPPING_MODES = ("flat", "per_layer", "per_group", "automatic", "adaptive")


def _quantile(name: str, value: object) -> float:
    return fraction(name, value, "pass the share of samples to leave unclipped, between 0 and 1 (0.5 is the median).")


_OPTIONS: dict[str, dict[str, Callable[[str, object], float]]] = {
    "automatic": {"gamma": positive},
    "adaptive": {
        "target_unclipped_quantile": _quantile,
        "clipbound_learning_rate": positive,
        "unclipped_num_std": positive,
        "min_clipbound": positive,
        "max_clipbound": positive,
    },
}
ADAPTIVE_OPTIONS = tuple(_OPTIONS["adaptive"])


def make_clipping(
    clipping: str,
    max_grad_norm: object,
    params: Sequence[nn.Parameter],
    *,
    names: Mapping[nn.Parameter, Sequence[str]],
    expected_batch_size: float,
    options: object = None,
) -> ClippingFunction:
    """Build the clipping function ``clipping``.

    Args:
        clipping: one of ``CLIPPING_MODES``.
        max_grad_norm: the bound; a list of bounds or a mapping from name patterns to bounds for "per_layer", the latter for
            "per_group".
        params: the trainable parameters in optimizer order.
        names: the qualified names of every parameter in the model (several if it is shared).
        expected_batch_size: expected number of samples in a logical batch.
        options: a mapping of further settings of "automatic" (``gamma``) or "adaptive", or None.

    Raises:
        InvalidArgumentError: unknown name or option, a bound that is not positive, a list of the wrong length, patterns that
            leave a parameter out or match none.
    """
    one_of("clipping", clipping, CLIPPING_MODES)
    settings = _checked_options(clipping, options)
    if clipping == "per_group" or (clipping == "per_layer" and isinstance(max_grad_norm, Mapping)):
        return _by_pattern(clipping, max_grad_norm, params, names)
    bounds = clipping_bounds("max_grad_norm", max_grad_norm, clipping, len(params))
    if clipping == "per_layer":
        return GroupClipping(bounds, {p: i for i, p in enumerate(params)}, list(bounds))
    if clipping == "automatic":
        return AutomaticClipping(bounds[0], **settings)
    if clipping == "adaptive":
        function = AdaptiveClipping(bounds[0], expected_batch_size=expected_batch_size, device=params[0].device, **settings)
        _check_range(function)
        return function
    return FlatClipping(bounds[0])


def _checked_options(clipping: str, options: object) -> dict[str, float]:
    if options is None:
        return {}
    if not isinstance(options, Mapping):
        raise bad("clipping_options", options, 'pass a dictionary, such as {"gamma": 0.01} for clipping="automatic".')
    known = _OPTIONS.get(clipping, {})
    for key in options:
        if key not in known:
            listing = f"the options of clipping={clipping!r} are {', '.join(map(repr, known))}."
            remedy = listing if known else f"clipping={clipping!r} has no options; leave it out."
            raise bad("clipping_options", options, f"there is no {key!r}: {remedy}")
    return {
        key: known[key](f"clipping_options[{key!r}]", value)
        for key, value in options.items()
        if not (key == "unclipped_num_std" and value is None)  # None: the default, in proportion to the batch
    }


def _check_range(function: AdaptiveClipping) -> None:
    low, high = function.min_clipbound, function.max_clipbound
    if low >= high:
        raise bad("clipping_options['min_clipbound']", low, f"it must be smaller than max_clipbound={high:g}.")
    if not low <= function.max_grad_norm <= high:
        remedy = f"the bound starts outside [min_clipbound, max_clipbound] = [{low:g}, {high:g}]. Start within, or pass other "
        raise bad("max_grad_norm", function.max_grad_norm, remedy + "limits in clipping_options.")


def _by_pattern(
    clipping: str, max_grad_norm: object, params: Sequence[nn.Parameter], names: Mapping[nn.Parameter, Sequence[str]]
) -> GroupClipping:
    """Put every parameter into the group of the first pattern that matches one of its names."""
    if not isinstance(max_grad_norm, Mapping) or not all(isinstance(pattern, str) for pattern in max_grad_norm):
        example = '{"encoder.*": 0.5, "*": 1.0}'
        remedy = f"with clipping={clipping!r} pass a mapping from name patterns to positive bounds, such as {example}."
        raise bad("max_grad_norm", max_grad_norm, remedy)
    patterns, remedy = list(max_grad_norm), "every bound must be a number greater than 0."
    bounds = [positive(f"max_grad_norm[{pattern!r}]", max_grad_norm[pattern], remedy) for pattern in patterns]
    matches = {p: [k for k, pattern in enumerate(patterns) if any(fnmatchcase(name, pattern) for name in names[p])] for p in params}
    missing = [names[p][0] for p in params if not matches[p]]
    if missing:
        remedy = f"no pattern matches the trainable parameters {', '.join(missing)}. Add patterns for them, or "
        raise bad("max_grad_norm", max_grad_norm, remedy + '"*" at the end for all that are left.')
    group_of = {p: found[0] for p, found in matches.items()}
    for k, pattern in enumerate(patterns):
        if k not in group_of.values():
            why = f"matches no trainable parameter. Correct or remove it; there are {_some(params, names)}."
            if any(k in found for found in matches.values()):
                why = "comes too late: patterns before it match all its parameters, and the first match counts. Move it up."
            raise bad("max_grad_norm", max_grad_norm, f"the pattern {pattern!r} {why}")
    return GroupClipping(bounds, group_of, dict(zip(patterns, bounds, strict=True)))


def _some(params: Sequence[nn.Parameter], names: Mapping[nn.Parameter, Sequence[str]], most: int = 8) -> str:
    return ", ".join(names[p][0] for p in params[:most]) + (", ..." if len(params) > most else "")
