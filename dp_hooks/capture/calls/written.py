"""Written: which buffers were written to. What comes from private samples gets no noise there."""

from torch import Tensor, nn

from ..._rerun import same_values


class Written:
    """Floating-point buffers of a module as they were, by the number of times they were written to."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._before = {n: (b, b._version) for n, b in module.named_buffers() if b.is_floating_point()}

    def since(self) -> list[str]:
        """Return the names of those that were written to since."""
        after = dict(self._module.named_buffers()) if self._before else {}
        return [name for name, kept in self._before.items() if self._differs(after.get(name), *kept)]

    def _differs(self, now: Tensor | None, tensor: Tensor, version: int) -> bool:
        if now is tensor:
            return tensor._version != version
        return now is None or not same_values(now, tensor)
