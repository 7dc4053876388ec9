"""Ways in for users of other libraries."""

from typing import TYPE_CHECKING, Any

from .private_trainer import private_trainer as private_trainer
from .trainer_mixin import PrivateTrainerMixin as PrivateTrainerMixin

if TYPE_CHECKING:
    from .lightning_callback import PrivacyCallback as PrivacyCallback


def __getattr__(name: str) -> Any:
    """Lightning is imported when its callback is asked for, and not before."""
    if name == "PrivacyCallback":
        from .lightning_callback import PrivacyCallback

        return PrivacyCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
