"""Written: which buffers and frozen parameters were written to. What comes from private samples gets no noise there."""

from torch import Tensor, nn

from ..._rerun import same_values


class Written:
    """Floating-point buffers of a module as they were, by the number of times they were written to.

    With ``frozen`` also parameters that are not trained, and all of them by value: writes through ``.data`` are not counted.
    """

    def __init__(self, module: nn.Module, *, frozen: bool = False) -> None:
        self._module = module
        tensors = {n: b for n, b in module.named_buffers() if b.is_floating_point()}
        if frozen:
            params = module.named_parameters()
            tensors |= {n: p for n, p in params if not p.requires_grad and p.is_floating_point()}
        self._before = {n: (t, t._version, t.detach().clone() if frozen else None) for n, t in tensors.items()}

    def since(self) -> list[str]:
        """Return the names of those that were written to since."""
        after: dict[str, Tensor] = {}
        if self._before:
            after = {**dict(self._module.named_parameters()), **dict(self._module.named_buffers())}
        return [name for name, kept in self._before.items() if self._differs(after.get(name), *kept)]

    def _differs(self, now: Tensor | None, tensor: Tensor, version: int, value: Tensor | None) -> bool:
        if now is tensor and value is None:
            return tensor._version != version
        old = tensor if value is None else value
        return now is None or not same_values(now, old)
