"""Where the noise's random numbers come from."""

import pytest
import torch

from dp_hooks.errors import DPHooksError
from dp_hooks.privacy.noise import entropy
from dp_hooks.privacy.noise.entropy import fresh_generator

CPU = torch.device("cpu")


def test_fresh_generators_are_seeded_with_all_their_state() -> None:
    """The state has the entropy of all its words: neither equal in part between two, nor that of any 32-bit seed."""
    one, two = (fresh_generator(CPU).get_state()[24 : 24 + 8 * 624].view(torch.int64) for _ in range(2))
    assert (one != two).all()
    seeded = torch.Generator().manual_seed(int(one[0])).get_state()[24 : 24 + 8 * 624].view(torch.int64)
    assert seeded[0] == one[0]
    assert (seeded[1:] != one[1:]).all()


def test_a_random_state_of_unknown_layout_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the state cannot be filled with entropy, nothing weaker is used in its place."""
    monkeypatch.setattr(entropy, "_STATE_BYTES", 1234)
    with pytest.raises(DPHooksError, match="not 1234"):
        fresh_generator(CPU)
