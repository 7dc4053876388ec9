"""Random small programs: none that mixes samples takes a wrong step, and sound ones are not refused."""

import pytest

from ..programs import tried

CHUNK, CHUNKS = 40, 25
MOST_REFUSED = 0.01  # of the sound ones


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_random_programs_are_right_or_refused(chunk):
    """Faulty programs are refused or right all the same; sound ones are right, and at most one in a hundred is refused.

    Steps are compared with clipped single-sample gradients by plain autograd. Of 40 programs every second one has a fault: in the
    model, in what it keeps between batches, in the loss, in the loop or in the collate function.
    """
    found = tried(range(CHUNK * chunk, CHUNK * (chunk + 1)))
    assert {seed: (program, verdict) for seed, (program, verdict) in found.items() if verdict.startswith("wrong")} == {}
    sound = [verdict for program, verdict in found.values() if not program.fault]
    refused = [verdict for verdict in sound if verdict != "right"]
    assert len(refused) <= MOST_REFUSED * len(sound), refused
    faulty = [verdict for program, verdict in found.values() if program.fault]
    assert len(faulty) == CHUNK // 2
    assert sum(verdict.startswith("refused") for verdict in faulty) > 0.8 * len(faulty)  # the faults are there
