"""Random bytes that nobody can predict, from the operating system: for noise and sampling that must stay secret."""

import os
from collections.abc import Callable
from functools import cache
from typing import Any

ReadBytes = Callable[[int], bytearray]  # so many random bytes, never the same ones twice
_DIRECTLY = 2048  # of so few bytes the operating system makes itself, faster than a cipher can be set up


def secret_bytes(count: int) -> bytearray:
    """Return ``count`` bytes that nobody without this process's memory can tell from uniform ones.

    With the package ``cryptography`` (``pip install dp_hooks[secure]``) they are the stream of ChaCha20 (RFC 8439) under a key
    from ``os.urandom``; without it, or if they are few, they come from ``os.urandom`` itself: slower, the same promise.

    Guarantee: no key is used twice. A key is made in this function, used in it once, and let go of: there is no state that a
    fork, another thread, a dataloader worker, a copy, a pickle or a checkpoint could go on with. Neither ``torch.manual_seed``
    nor a saved run can bring bytes back. A call yields less than the 256 GB after which ChaCha20's counter starts again.
    """
    keystream = _keystream()
    if keystream is None or count <= _DIRECTLY:
        return bytearray(os.urandom(count))
    return keystream(count)


def source_of_bytes() -> str:
    """Return in words where :func:`secret_bytes` has its bytes from on this machine."""
    return "os.urandom" if _keystream() is None else "ChaCha20 with keys from os.urandom"


@cache
def _keystream() -> ReadBytes | None:
    try:
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
    except ImportError:
        return None

    def read(count: int) -> bytearray:
        cipher: Any = Cipher(algorithms.ChaCha20(os.urandom(32), bytes(4) + os.urandom(12)), mode=None)
        made = bytearray(count)
        if cipher.encryptor().update_into(bytes(count), made) != count:
            raise RuntimeError("ChaCha20 made fewer bytes than were asked for")  # zeros would be left, which are no noise
        return made

    return read
