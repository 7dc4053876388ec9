"""Written: which buffers were written to. What comes from private samples gets no noise there."""

from torch import Tensor, nn

from ..._rerun import same_values
from ..._tree import modules_of


class Written:
    """Floating-point buffers of a module as they were, by the number of times they were written to."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._before = [
            (owner, key, buffer, 0 if buffer.is_inference() else buffer._version)
            for owner in modules_of(module)
            for key, buffer in owner._buffers.items()
            if buffer is not None and buffer.is_floating_point()
        ]

    def since(self) -> list[str]:
        """Return the names of those that were written to since."""
        changed = {
            (id(owner), key) for owner, key, tensor, version in self._before if _differs(owner._buffers.get(key), tensor, version)
        }
        modules = self._module.named_modules() if changed else ()
        return [f"{name}.{key}" if name else key for name, m in modules for key in m._buffers if (id(m), key) in changed]


def _differs(now: Tensor | None, tensor: Tensor, version: int) -> bool:
    if now is tensor:
        return not tensor.is_inference() and tensor._version != version
    return now is None or not same_values(now, tensor)
