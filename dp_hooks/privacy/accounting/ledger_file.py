"""The file of a ledger: lines that are on the disk when they are written, each bound to all lines before it."""

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from ...errors import AccountingError, ScopeError

try:
    import fcntl
except ImportError:  # Windows; not tried
    fcntl = None  # type: ignore[assignment]

Record = dict[str, Any]
_LONGEST = 1 << 20  # bytes of a line: none that was written here is longer


def read_records(path: Path) -> tuple[list[Record], bool]:
    """Return what is in the file, and whether an unfinished line at its end was left out.

    Of a line that was being written when its process ended, nothing has been released: the charge comes first.

    Raises:
        AccountingError: a line is damaged, left out or changed, or the file cannot be read.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise AccountingError(f"the ledger {path} cannot be read ({error}).") from error
    records, good = _parsed(path, content)
    return records, good < len(content)


class LedgerFile:
    """The file, open to be added to by this process alone, until :meth:`close`.

    Attributes:
        records: all that is in it.
    """

    def __init__(self, path: Path) -> None:
        """Open the file, or make it; an unfinished line at its end is taken off.

        Raises:
            ScopeError: another scope, of this process or another one, has it open.
            AccountingError: it is damaged, or cannot be read and written.
        """
        self.path = path
        self._process = os.getpid()
        try:
            made = not path.exists()
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0), 0o600)
        except OSError as error:
            raise AccountingError(f"the ledger {path} cannot be opened to be written to ({error}).") from error
        try:
            _lock(self._descriptor, path)
            content = path.read_bytes()
            self.records, self._size = _parsed(path, content)
            self._last = self.records[-1]["check"] if self.records else ""
            os.ftruncate(self._descriptor, self._size)
            if content[: self._size] and not content[: self._size].endswith(b"\n"):
                self._write(b"\n")  # the line was whole, but for its end
            if made:
                _sync_folder(path.parent)
        except BaseException:
            os.close(self._descriptor)
            raise

    def append(self, *records: Record) -> None:
        """Write ``records``, a line each; they are on the disk when this returns.

        Raises:
            ScopeError: this process was forked from the one that opened the file.
            AccountingError: they could not be written; the file is as it was before.
        """
        if os.getpid() != self._process:
            raise ScopeError(
                f"the ledger {self.path} was opened before this process was forked: both would write to it. Enter a scope in one "
                "process, with a ledger of its own for another."
            )
        lines, last = [], self._last
        for record in records:
            last = _check_of(last, record)
            lines.append(json.dumps({**record, "check": last}) + "\n")
        self._write("".join(lines).encode())
        self._last = last

    def close(self) -> None:
        """Let others have the file. May be called again."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)  # which lets go of the lock

    def _write(self, data: bytes) -> None:
        try:
            left = memoryview(data)
            while left:
                left = left[os.write(self._descriptor, left) :]
            os.fsync(self._descriptor)
        except OSError as error:
            with suppress(OSError):  # what is left of a line is taken for an unfinished one by whoever reads it
                os.ftruncate(self._descriptor, self._size)
            raise AccountingError(f"the ledger {self.path} could not be written to ({error}); nothing was released.") from error
        self._size += len(data)


def _parsed(path: Path, content: bytes) -> tuple[list[Record], int]:
    """What is in ``content``, and how many bytes of it that is: all, but for an unfinished line at the end."""
    *whole, rest = content.split(b"\n")
    records: list[Record] = []
    size, last = 0, ""
    for number, line in enumerate([*whole, rest], start=1):
        finished = number <= len(whole)
        record = _record(line, last)
        if record is None:
            if not finished:
                break
            raise AccountingError(
                f"line {number} of the ledger {path} is damaged, or one before it was left out or changed: what was spent is not "
                "known. Bring the file back from a copy."
            )
        records.append(record)
        last = record["check"]
        size += len(line) + finished
    return records, size


def _record(line: bytes, last: str) -> Record | None:
    """What a line holds, if it is whole and comes after the one with the check ``last``."""
    if len(line) > _LONGEST:
        return None
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or record.get("check") != _check_of(last, record):
        return None
    return record


def _check_of(last: str, record: Record) -> str:
    """A digest of a record and of all before it."""
    own = json.dumps({name: value for name, value in record.items() if name != "check"}, sort_keys=True)
    return hashlib.sha256(f"{last}\n{own}".encode()).hexdigest()[:16]


def _lock(descriptor: int, path: Path) -> None:
    try:
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            import msvcrt

            os.lseek(descriptor, 1 << 40, os.SEEK_SET)  # a byte that is not there: others may read the file
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
    except OSError as error:
        raise ScopeError(
            f"the ledger {path} is in use by another open scope, in this process or in another one: two runs at a time could "
            "spend more than both know of. Wait until it has ended, or leave that scope."
        ) from error


def _sync_folder(folder: Path) -> None:
    """The name of a new file is on the disk as well."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
