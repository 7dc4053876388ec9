"""The processes that train together."""

import torch


def processes() -> int:
    """Return the number of processes in the default group of ``torch.distributed``; 1 if there is none."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size()
    return 1
