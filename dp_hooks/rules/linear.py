"""Linear layers with inputs of any rank: ``y[n, t, o] = sum_i x[n, t, i] W[o, i] + b[o]``, also with ``W`` transposed."""

from torch import Tensor, nn

from .._precision import wide_dtype
from .outer import OuterProducts
from .rule import Call, Rule, always_alike


def wide(tensor: Tensor, *others: Tensor) -> Tensor:
    """Return ``tensor`` in at least float32, and in no less than the dtypes of ``others``: sums are rounded after the noise."""
    return tensor.to(wide_dtype(tensor.dtype, *(other.dtype for other in others)))


def _as_tokens(tensor: Tensor, tokens: int) -> Tensor:
    return tensor.reshape(tensor.shape[0], tokens, tensor.shape[-1])


def _tokens(call: Call) -> int:
    return call.grad.shape[1:-1].numel()


def _factors(call: Call) -> tuple[Tensor, Tensor]:
    """Return ``x [n, t, i]`` and ``g [n, t, o]`` in one dtype of at least float32."""
    x, g, tokens = call.input, call.grad, _tokens(call)
    return _as_tokens(wide(x, g), tokens), _as_tokens(wide(g, x), tokens)


def _is_transposed(call: Call) -> bool:
    return not isinstance(call.module, nn.Linear)


def outer_products(call: Call) -> dict[str, OuterProducts]:
    """``dW[n, o, i] = sum_t g[n, t, o] x[n, t, i]``; the other way round for the transposed weight of ``Conv1D``."""
    if "weight" not in call.names:
        return {}
    x, g = _factors(call)
    left, right = (x, g) if _is_transposed(call) else (g, x)
    return {"weight": OuterProducts(left, right, call.parameter("weight").shape)}


def grad_samples(call: Call) -> dict[str, Tensor]:
    """Outer products summed over ``t``, and for the bias ``db[n, o] = sum_t g[n, t, o]``."""
    out = {name: use.grads() for name, use in outer_products(call).items()}
    if "bias" in call.names:
        out["bias"] = _as_tokens(wide(call.grad), _tokens(call)).sum(1)
    return out


LINEAR = Rule("Linear", grad_samples, outer_products=outer_products, subclasses=True, any_rank=True, alike=always_alike)
# transformers' Conv1D (GPT-2): a linear layer whose weight is stored as [i, o].
CONV1D = Rule("Conv1D", grad_samples, outer_products=outer_products, any_rank=True, alike=always_alike)
