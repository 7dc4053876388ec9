"""How much freed memory the C library keeps for the next step."""

import torch

# glibc keeps blocks up to the size of the largest one that was ever freed, below 32 MiB, and twice as much at the end of the heap
# (mallopt(3), M_MMAP_THRESHOLD: "dynamic"). Less, and every step gets its pages from the system anew.
_LARGEST = (1 << 25) - (1 << 14)


def keep_freed_memory() -> None:
    """Have memory of up to 64 MiB that a step frees kept for the next one, as a large model has it by itself.

    A block is allocated, not touched, and freed. Without effect where the C library is another one or its limits are set
    (``MALLOC_TRIM_THRESHOLD_``).
    """
    torch.empty(_LARGEST, dtype=torch.uint8, device="cpu")
