"""Sources of bytes in the place of the operating system's, for tests that have to give the same twice."""

import random


class SeededBytes:
    """Bytes that a seed fixes; remembers how many were asked for."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self.asked: list[int] = []

    def __call__(self, count: int) -> bytearray:
        self.asked.append(count)
        return bytearray(self._random.randbytes(count))


class Then:
    """Some bytes at first, and the byte ``rest`` from then on."""

    def __init__(self, first: bytes, rest: int) -> None:
        self._first, self._rest = first, rest

    def __call__(self, count: int) -> bytearray:
        first, self._first = self._first[:count], self._first[count:]
        return bytearray(first + bytes([self._rest]) * (count - len(first)))


def no_noise(count: int) -> bytearray:
    """Bits for which every number that is drawn is 0."""
    return bytearray(count)
