"""Files and states that somebody changed: at random, from a seed."""

import copy
import os
import random
from collections.abc import Sequence
from typing import Any

import torch

MUTATIONS = int(os.environ.get("DP_HOOKS_MUTATIONS", "300"))

_BYTES = [b"1e999", b"NaN", b"\n", b"null", b"\xff\xfe", b"[[", b"}"]
# What JSON and torch.load(weights_only=True) can bring.
ODD: list[Any] = [
    None,
    True,
    0,
    1,
    -1,
    2.5,
    float("nan"),
    float("inf"),
    10**400,
    5e-324,
    "",
    "rdp",
    "adaptive",
    b"x",
    [],
    {},
    [[]],
    [None],
    [[1.0, 0.5]],
    [[1.0, 0.5, 10**30]],
    [["a", 1, 1]],
    [5.0, 1e-5],
    (1, 2, 3),
    {"a": {}},
]


def mutated_bytes(data: bytes, draw: random.Random, more: Sequence[bytes] = ()) -> bytes:
    """Return ``data`` with some bytes changed, left out or put in, some of them such as mean something, or ``more``."""
    changed = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        at, kind = draw.randrange(len(changed)), draw.randrange(4)
        if kind == 0:
            changed[at] = draw.randrange(256)
        elif kind == 1:
            del changed[at : at + draw.randint(1, 200)]
        elif kind == 2:
            changed[at:at] = bytes(draw.randrange(256) for _ in range(draw.randint(1, 50)))
        else:
            changed[at:at] = draw.choice([*_BYTES, *more])
        changed = changed or bytearray(b"x")
    return bytes(changed)


def mutated_tree(tree: Any, draw: random.Random) -> Any:
    """Return a copy of nested dictionaries and lists in which some items are gone, others or new."""
    whole = copy.deepcopy(tree)
    for _ in range(draw.randint(1, 3)):
        place, inner = whole, whole
        while isinstance(inner, (dict, list)) and inner and (inner is whole or draw.random() < 0.6):
            place, inner = inner, draw.choice([*(inner.values() if isinstance(inner, dict) else inner)])
        if not isinstance(place, (dict, list)) or not place:
            return draw.choice(ODD)
        key = draw.choice([*place] if isinstance(place, dict) else range(len(place)))
        if draw.random() < 0.25:
            del place[key]
        elif draw.random() < 0.2 and isinstance(place[key], (int, float)):
            place[key] *= draw.choice([-1, 0, 2, 10**300] if isinstance(place[key], int) else [-1, 0, 2, 0.5, 1e300])
        else:
            place[key] = draw.choice([*ODD, torch.ones(2)])
    return whole
