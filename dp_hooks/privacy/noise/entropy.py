"""Random generators filled from the operating system's entropy."""

import os
import weakref

import torch

from ...errors import DPHooksError

# The state of PyTorch's CPU generator: where the 624 words of the Mersenne twister are, 8 bytes for each 4 used.
_STATE_BYTES, _WORDS_AT, _WORDS = 5056, 24, 624


class _Generator(torch.Generator):
    """A generator that weak references can be made to, in every version of PyTorch."""


_made: "weakref.WeakSet[_Generator]" = weakref.WeakSet()


def fresh_generator(device: torch.device) -> torch.Generator:
    """Return a generator on ``device`` whose whole state comes from the operating system's entropy source.

    On CPU ``manual_seed`` uses 32 bits of a seed only: all noise of a run could be found by trying every seed. The
    2496 bytes of the generator's state are filled instead. Generators of other devices take seeds of 64 bits. After a fork the
    child's generators are filled anew: else both processes would draw the same batches and the same noise.

    Raises:
        DPHooksError: the state of this PyTorch's generator has another layout; nothing weaker is used silently.
    """
    generator = _Generator(device=device)
    _fill(generator)
    _made.add(generator)
    return generator


def _fill(generator: torch.Generator) -> None:
    generator.manual_seed(int.from_bytes(os.urandom(8), "little") >> 1)
    if generator.device.type == "cpu":
        state = generator.get_state()
        if state.numel() != _STATE_BYTES:
            raise DPHooksError(
                f"PyTorch {torch.__version__} keeps its random state in {state.numel()} bytes, not {_STATE_BYTES}: it cannot be "
                "filled with fresh entropy. Pass noise_generator= for experiments, or use another version of PyTorch."
            )
        words = state[_WORDS_AT : _WORDS_AT + 8 * _WORDS].view(_WORDS, 8)
        words[:, :4] = torch.frombuffer(bytearray(os.urandom(4 * _WORDS)), dtype=torch.uint8).view(_WORDS, 4)
        generator.set_state(state)


def _after_fork() -> None:
    for generator in _made:
        if generator.device.type == "cpu":  # no other works in a forked process
            _fill(generator)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
