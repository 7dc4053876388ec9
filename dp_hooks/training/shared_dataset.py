"""Whether the datasets of several processes hold the same examples in the same places, as far as a few of them tell."""

import zlib
from typing import Any

from torch import Tensor

from .._no_randomness import generators_kept, set_seeds
from .._tree import is_array, tree_map

_READ = 16  # examples that are looked at


def some_examples(dataset: Any) -> list[str] | None:
    """Return a digest of each of some examples; None where they cannot be read here, or are others every time they are read.

    Draws of PyTorch, Python and NumPy are repeated for it. Where each process has sorted, shuffled or split the data by itself, an
    index is another example in each: some would be in no batch, and others in the parts of several processes, and clipped twice.
    """
    count = len(dataset)
    wanted = sorted({round(i * (count - 1) / (_READ - 1)) for i in range(_READ)})
    with generators_kept():
        try:
            first, second = ([_digest(dataset, i) for i in wanted] for _ in range(2))
        except Exception:  # noqa: BLE001 - whatever a dataset that opens its files in loader workers does here
            return None
    return first if first == second else None


def _digest(dataset: Any, index: int) -> str:
    set_seeds(index)
    found: list[str] = []

    def visit(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            leaf = leaf.tolist()
        kind = type(leaf).__name__
        if is_array(leaf):
            found.append(f"{kind}{leaf.shape}{leaf.dtype}{zlib.crc32(leaf.tobytes())}")
        elif isinstance(leaf, (bool, int, float, complex, str, bytes, list, type(None))):
            found.append(f"{kind}{zlib.crc32(repr(leaf).encode())}")
        else:
            found.append(kind)
        return leaf

    tree_map(visit, dataset[index])
    return ",".join(found)
