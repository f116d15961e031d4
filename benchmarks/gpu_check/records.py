"""The journal: one JSON line a record, on the disk as soon as it is made, whatever becomes of the process.

header  schema, rehearsal, commit, bundle, machine: always the first
start   stage, unit: its process has imported what it needs
begin   stage, unit, case
end     stage, unit, case, status (passed, failed, refused), seconds, data, error
died    stage, unit, case (null outside of one), signal, exit, error, stderr: counts as an end of that case
unit    stage, unit, status (done, incomplete, died), seconds
"""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from evaclip.errors import UserError

SCHEMA = 1

Record = dict[str, Any]


class JournalFull(UserError):
    """The disk doesn't take another record; those before it are whole."""


class Journal:
    """A file of records that several processes append to.

    A last line that was cut off is left out in reading, and cut off before the next record.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, kind: str, **values: Any) -> None:
        """Adds a record, durably. Raises `JournalFull` where the file can't grow; it is then as it was."""
        line = json.dumps({"record": kind, **values}, default=str) + "\n"
        try:
            with _locked(self.path) as file:
                _write(file, line.encode())
        except OSError as exc:
            raise JournalFull(f"cannot write {self.path}: {exc.strerror}; what it holds is whole: --resume") from exc

    def read(self) -> list[Record]:
        """All records, the header first.

        Raises:
            UserError: the file can't be read, a line before the last is damaged, or it is of another schema.
        """
        records, _ = self.read_from(0)
        head = records[0] if records else {}
        if head.get("record") != "header" or head.get("schema") != SCHEMA:
            raise UserError(f"{self.path} isn't a journal of schema {SCHEMA}: its first line is no such header")
        return records

    def read_from(self, offset: int) -> tuple[list[Record], int]:
        """The records behind so many bytes, and where the last of them ends. Raises `UserError` as `read`."""
        try:
            with self.path.open("rb") as file:
                file.seek(offset)
                text = file.read()
        except OSError as exc:
            raise UserError(f"cannot read {self.path}: {exc.strerror}") from exc
        whole = text[: text.rfind(b"\n") + 1]
        return [self._parse(number, line) for number, line in enumerate(whole.splitlines(), 1)], offset + len(whole)

    def _parse(self, number: int, line: bytes) -> Record:
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict) or "record" not in record:
            raise UserError(f"{self.path}, line {number}, is damaged; nothing behind it can be trusted")
        return record


@contextmanager
def _locked(path: Path) -> Iterator[int]:
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file
    finally:
        os.close(file)


def _write(file: int, line: bytes) -> None:
    end = _end_of_lines(file)
    os.ftruncate(file, end)
    try:
        written = os.pwrite(file, line, end)
        while written < len(line):  # what fits into the last block; another write tells why no more does
            written += os.pwrite(file, line[written:], end + written)
        os.fsync(file)
    except OSError:
        os.ftruncate(file, end)
        raise


def _end_of_lines(file: int, block: int = 1 << 16) -> int:
    """Where the last whole line ends."""
    end = os.fstat(file).st_size
    while end:
        start = max(0, end - block)
        found = os.pread(file, end - start, start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0
