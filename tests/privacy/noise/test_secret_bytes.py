"""Random bytes of the operating system: never the same twice, whoever asks."""

import os
import sys
import threading
from collections.abc import Iterator

import pytest

from dp_hooks.privacy.noise import secret_bytes as module
from dp_hooks.privacy.noise.secret_bytes import secret_bytes, source_of_bytes

from ...training.test_lost_scopes import in_child, needs_fork

MANY = 100_000  # more than are taken from the operating system one by one


@pytest.fixture(params=["ChaCha20", "os.urandom"])
def source(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """With the package cryptography, and as if it were not installed."""
    if request.param == "os.urandom":
        monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.ciphers", None)
    module._keystream.cache_clear()
    yield request.param
    module._keystream.cache_clear()


@pytest.mark.parametrize("count", [0, 1, 12, 2048, 2049, MANY])
def test_as_many_bytes_come_as_were_asked_for(source: str, count: int) -> None:
    """Any number of bytes can be had, and can be written to."""
    found = secret_bytes(count)
    assert isinstance(found, bytearray)
    assert len(found) == count


def test_the_source_is_named(source: str) -> None:
    """What the report says is where the bytes are from."""
    assert source in source_of_bytes()
    assert ("ChaCha20" in source_of_bytes()) == (source == "ChaCha20")


def test_bytes_look_random_and_never_come_again(source: str) -> None:
    """All values of a byte are equally frequent, and no 16 bytes of several calls are the same."""
    calls = [bytes(secret_bytes(MANY)) for _ in range(4)]
    counts = [sum(call.count(value) for call in calls) for value in range(256)]
    mean = 4 * MANY / 256
    assert sum((count - mean) ** 2 / mean for count in counts) < 255 + 6 * (2 * 255) ** 0.5
    blocks = [call[k : k + 16] for call in calls for k in range(0, MANY, 16)]
    assert len(set(blocks)) == len(blocks)


def test_the_stream_is_that_of_the_standard(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a key and a nonce of zeros it begins as in RFC 8439, appendix A.1, vectors 1 and 2."""
    module._keystream.cache_clear()
    monkeypatch.setattr(os, "urandom", bytes)
    found = secret_bytes(MANY)
    assert found[:16].hex() == "76b8e0ada0f13d90405d6ae55386bd28"
    assert found[64:80].hex() == "9f07e7be5551387a98ba977c732d080d"


def test_each_call_has_a_key_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call asks the operating system for 32 bytes of a key and 12 of a nonce, and nothing of them stays."""
    module._keystream.cache_clear()
    asked, real = [], os.urandom
    monkeypatch.setattr(os, "urandom", lambda count: (asked.append(count), real(count))[1])
    first, second = secret_bytes(MANY), secret_bytes(MANY)
    assert asked == [32, 12] * 2
    assert first != second


@needs_fork
@pytest.mark.filterwarnings("ignore:This process")
@pytest.mark.parametrize("count", [32, MANY])
def test_a_forked_process_draws_other_bytes(source: str, count: int) -> None:
    """Two processes that were one have nothing in common from then on."""
    secret_bytes(count)
    there, here = in_child(lambda: bytes(secret_bytes(count)))
    assert isinstance(there, bytes)
    assert not {there[k : k + 16] for k in range(0, count, 16)} & {here[k : k + 16] for k in range(0, count, 16)}


def test_threads_draw_different_bytes(source: str) -> None:
    """Threads that draw at the same time share no stream."""
    found: list[bytes] = []
    threads = [threading.Thread(target=lambda: found.extend(bytes(secret_bytes(MANY)) for _ in range(5))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 20
    assert len({call[k : k + 16] for call in found for k in range(0, MANY, 16)}) == 20 * MANY // 16
