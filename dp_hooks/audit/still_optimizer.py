"""StillOptimizer: stands in for the user's optimizer, and moves nothing."""

from typing import Any

import torch


class StillOptimizer(torch.optim.Optimizer):
    """Has the groups and settings of another optimizer, so that schedulers work on it, and takes no steps."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        """Over the parameters of ``optimizer``, which is left alone."""
        super().__init__([dict(group) for group in optimizer.param_groups], dict(optimizer.defaults))

    def step(self, closure: Any = None) -> Any:
        """Nothing moves."""
        return None if closure is None else closure()
