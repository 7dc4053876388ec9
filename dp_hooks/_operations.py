"""The table of torch functions: which names matter to whom, and why. A function that is missing somewhere is added here.

Names are those of ``torch.overrides``, without underscores around them where that is said.
"""

import math
import statistics
from typing import Any

import torch
from torch import Tensor

DROPOUT_BY_NAME = frozenset("dropout1d dropout2d dropout3d".split())
# Replaced by a constant, or by a row of the batch's own draw.
NOISE = frozenset("rand rand_like randn randn_like uniform_ normal_ exponential_ log_normal_ cauchy_".split())
# Kept for all samples: their argument decides.
BERNOULLI = frozenset("bernoulli bernoulli_".split())
# Whole numbers, or choices.
COUNTS = frozenset("randint randint_like random_ multinomial poisson binomial geometric_".split())
# All that draw numbers, dropout aside.
DRAWS = NOISE | BERNOULLI | COUNTS | frozenset("randperm normal _standard_gamma _sample_dirichlet".split())
# Functions with dropout among their arguments: recurrent ones, and the keywords it goes by.
RECURRENT = frozenset("lstm gru rnn_tanh rnn_relu".split())
DROPOUT_ARGUMENTS = ("dropout_p", "dropout")

# What is known of a tensor without running anything on it.
METADATA = frozenset(
    "size dim ndimension numel nelement stride is_floating_point is_complex is_contiguous element_size storage_offset data_ptr "
    "get_device is_inference is_pinned untyped_storage is_same_size is_nonzero item tolist numpy equal allclose __bool__ __int__ "
    "__float__ __index__ __len__ __format__ __hash__ __array__ __contains__ __set__ requires_grad_ register_hook retain_grad "
    "__deepcopy__ __reduce_ex__ __repr__ __dlpack__".split()
)
# Looks like a question about a tensor, but changes its gradient.
CHANGES_GRADIENT = frozenset({"register_hook"})
# Attributes that are operations.
VIEWS_BY_NAME = frozenset("T mT H mH real imag".split())
# Take values where gradients do not follow (names without underscores).
LEAVES_AUTOGRAD = frozenset("detach numpy tolist item data_ptr untyped_storage array dlpack".split())
# Read into Python, where sizes and branches may depend on them.
TO_PYTHON = frozenset("tolist item numpy __int__ __index__ __array__".split())
# Of the arguments after the first only the type counts; or the shape.
ASKS_FOR_TYPE = frozenset("type_as to".split())
ASKS_ONLY = ASKS_FOR_TYPE | frozenset("expand_as view_as reshape_as".split())

# Broadcast their operands against each other: a shared one may be expanded to one row per sample first (without underscores).
BROADCASTS = frozenset(
    "add sub subtract rsub mul multiply div divide true_divide where addcmul addcdiv lerp pow float_power maximum minimum fmax "
    "fmin masked_fill copy hypot atan2 logaddexp logaddexp2 xlogy copysign clamp clip iadd isub imul idiv itruediv radd rsub rmul "
    "rtruediv rdiv truediv".split()
)
MATRIX_PRODUCTS = frozenset("matmul rmatmul".split())
# The adjoint is a sum.
EXPANSIONS = frozenset("expand broadcast_to repeat tile".split())
# The same numbers in other places.
REARRANGEMENTS = frozenset(
    "T mT view reshape permute transpose t unsqueeze squeeze flatten unflatten contiguous movedim swapaxes select narrow".split()
)
RESHAPES = frozenset("view reshape unflatten _unsafe_view".split())
# Take a list of tensors.
JOINS = frozenset("cat concat concatenate stack hstack vstack".split())
# The arguments are sizes, which change from batch to batch.
TAKES_SIZES = frozenset(
    "view reshape expand repeat tile unflatten broadcast_to split chunk arange linspace zeros ones full empty new_zeros "
    "new_ones new_full new_empty interpolate pad".split()
)

# Made without looking at the numbers in anything.
CONSTANTS = frozenset("zeros ones full new_zeros new_ones new_full zeros_like ones_like full_like".split())

# As many rows as the data says (names without underscores at their ends).
DATA_SHAPED = frozenset("nonzero masked_select unique unique_consecutive argwhere unique2 pack_padded_sequence".split())
SORTS = frozenset("sort argsort topk msort".split())
# The largest value over the batch is what samples are padded to: as many rows for each of them.
PADDED_TO = frozenset("max amax min amin __get__".split())
# Write into rows of their first argument, whose order stays (beginnings of names).
KEEPS_TARGET = ("index_add", "index_copy", "index_put", "scatter", "masked_scatter", "index_fill")


def is_dropout(name: str) -> bool:
    """Whether a function of this name is some kind of dropout."""
    return name.rstrip("_").endswith("dropout") or name in DROPOUT_BY_NAME


def randint_bounds(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, int] | None:
    """The least number that ``randint`` draws, and the one above the largest; None where they are not plain."""
    given = [arg for arg in args if type(arg) is int]
    low, high = (0, *given)[-2:] if given else (kwargs.get("low", 0), kwargs.get("high"))
    high = kwargs.get("high", high)
    return (low, high) if isinstance(low, int) and isinstance(high, int) and high > low else None


_OWN = {  # what noise is drawn with, in this order, and its defaults
    "uniform_": (("from", 0.0), ("to", 1.0)),
    "normal_": (("mean", 0.0), ("std", 1.0)),
    "log_normal_": (("mean", 1.0), ("std", 2.0)),
    "exponential_": (("lambd", 1.0),),
    "cauchy_": (("median", 0.0), ("sigma", 1.0)),
}


def noise_quantile(name: str, level: float, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    """The number below which what ``name`` draws lies with probability ``level``; ``args`` and ``kwargs`` but the tensor."""
    own = _OWN.get(name, ())
    given = [args[i] if i < len(args) else kwargs.get(key, default) for i, (key, default) in enumerate(own)]
    normal = statistics.NormalDist().inv_cdf(level)
    if name == "uniform_":
        return float(given[0] + (given[1] - given[0]) * level)
    if name == "exponential_":
        return -math.log1p(-level) / float(given[0])
    if name == "cauchy_":
        return float(given[0] + given[1] * math.tan(math.pi * (level - 0.5)))
    if name in ("normal_", "log_normal_"):
        value = float(given[0] + given[1] * normal)
        return math.exp(value) if name == "log_normal_" else value
    return normal if name.startswith("randn") else level


def alpha_dropped(x: Tensor, kept: Tensor, p: float) -> Tensor:
    """Alpha dropout with this mask (Klambauer et al., "Self-normalizing neural networks", NeurIPS 2017, section 2)."""
    low = -1.7580993408473766
    a = math.sqrt(1 / ((1 - p) * (1 + p * low**2)))
    return a * torch.where(kept, x, torch.full_like(x, low)) - a * low * p


def probabilities_of(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """What ``bernoulli`` draws with, in place where that is."""
    x = args[0] if args else kwargs["input"]
    p = args[1] if len(args) > 1 else kwargs.get("p", 0.5 if name == "bernoulli_" else None)
    with torch.no_grad():
        out: Tensor = x if name == "bernoulli_" else x.detach().clone()
        return out if p is None else out.copy_(torch.as_tensor(p, device=out.device))
