"""Ways in for users of other libraries."""

from .private_trainer import private_trainer as private_trainer
