"""Clipping functions made on their own, and what each of them promises."""

import math
from typing import Any

from torch import Tensor, nn

from dp_hooks.gradients.sample_gradients import added
from dp_hooks.privacy.clipping import ClippingFunction, SampleNorms, make_clipping


def names_of(model: nn.Module) -> dict[nn.Parameter, list[str]]:
    """Return the names of every parameter."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(p, []).append(name)
    return names


def made(clipping: str, bound: Any, model: nn.Module, **options: float) -> Any:
    """Build a clipping function for ``model``."""
    names, params = names_of(model), list(model.parameters())
    return make_clipping(clipping, bound, params, names=names, expected_batch_size=20.0, options=options or None)


def factors_of(function: ClippingFunction, squares: dict[nn.Parameter, Tensor]) -> dict[nn.Parameter, Tensor]:
    """Return the factors ``[n]`` of every parameter for samples whose gradients have these squared norms in each."""
    groups = function.groups(list(squares))
    norms = SampleNorms([added([squares[p] for p in group]) for group in groups])
    return {p: found for group, found in zip(groups, function.factors(norms, groups), strict=True) for p in group}


# Options of a scope, and the sensitivity that they mean.
KINDS: dict[str, tuple[dict[str, Any], float]] = {
    "flat": ({"clipping": "flat", "max_grad_norm": 0.5}, 0.5),
    "per_layer": ({"clipping": "per_layer", "max_grad_norm": [0.3, 0.4, 1.2, 0.84]}, math.sqrt(2.3956)),
    "per_group": ({"clipping": "per_group", "max_grad_norm": {"0.*": 0.3, "*": 0.4}}, 0.5),
    "automatic": ({"clipping": "automatic", "max_grad_norm": 0.5}, 0.5),
    "adaptive": ({"clipping": "adaptive", "max_grad_norm": 0.5}, 0.5),
}
