"""The journal of `make gpu-check`: whole after a crash, a full disk and several writers."""

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from benchmarks.gpu_check.records import Journal, JournalFull
from evaclip.errors import UserError


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    journal = Journal(tmp_path / "journal.jsonl")
    journal.append("header", schema=1)
    journal.append("begin", case="a")
    return journal


def kinds(journal: Journal) -> list[str]:
    return [record["record"] for record in journal.read()]


def test_a_last_line_that_was_cut_off_is_left_out_and_then_replaced(journal: Journal) -> None:
    with journal.path.open("ab") as file:
        file.write(b'{"record": "end", "ca')
    assert kinds(journal) == ["header", "begin"]
    journal.append("end", case="a")
    assert kinds(journal) == ["header", "begin", "end"]
    assert journal.path.read_text().count("\n") == 3


@pytest.mark.parametrize("damage", ['{"record": "end", "ca\n', "[1]\n", "\n"])
def test_damage_elsewhere_is_one_line(journal: Journal, damage: str) -> None:
    with journal.path.open("a") as file:
        file.write(damage)
    journal.append("end", case="a")
    with pytest.raises(UserError, match=r"journal\.jsonl, line 3, is damaged"):
        journal.read()


@pytest.mark.parametrize("text", ["", '{"record": "begin"}\n', '{"record": "header", "schema": 9}\n'])
def test_another_file_is_no_journal(tmp_path: Path, text: str) -> None:
    path = tmp_path / "other.jsonl"
    with pytest.raises(UserError, match="cannot read"):
        Journal(path).read()
    path.write_text(text)
    with pytest.raises(UserError, match="isn't a journal of schema 1"):
        Journal(path).read()


def test_a_full_disk_leaves_what_is_whole(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.pwrite

    def full(file: int, line: bytes, offset: int) -> int:
        if len(line) > 10:
            return write(file, line[:10], offset)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = journal.path.read_bytes()
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(JournalFull, match=r"cannot write .*: No space left on device; what it holds is whole"):
        journal.append("end", case="a")
    assert journal.path.read_bytes() == before


def test_several_may_write_at_once(journal: Journal) -> None:
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda number: journal.append("end", case=number, data="x" * 5000), range(64)))
    assert {record.get("case") for record in journal.read()} == {None, "a", *range(64)}
