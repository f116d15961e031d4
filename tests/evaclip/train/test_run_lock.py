"""One process trains into a folder at a time, whatever happens to it."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from evaclip.data import Batch, TrainLoader
from evaclip.errors import UserError
from evaclip.runs.files import LOCK_FILE
from evaclip.runs.lock import Owner, RunLock, is_held, read_lock
from evaclip.runs.log import read_log
from evaclip.train.trainer import train
from evaclip.train.watchdog import unwinding_on_sigterm

HOLDING = """
import os, sys, time
from pathlib import Path
from evaclip.runs.lock import RunLock
lock = RunLock(Path(sys.argv[1]))
if os.fork() == 0:  # a worker that outlives a killed trainer
    print("held", flush=True)
    time.sleep(10)
    os._exit(0)
sys.stdin.read()
"""
ELSEWHERE = {"machine": "elsewhere"}


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evaclip.runs.lock.RETRIES", 3)
    monkeypatch.setattr("evaclip.runs.lock.SETTLE", 0.3)


@pytest.fixture(params=["flock", "no flock"])
def has_flock(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the file system has flocks."""
    if request.param == "no flock":
        remove_flock(monkeypatch)
    return request.param == "flock"


def remove_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(file: int, kind: int) -> None:
        raise OSError(errno.ENOSYS, "not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)


def write(folder: Path, **changes: Any) -> Owner:
    """Leaves the lock of another process in the folder; without changes it would be this one."""
    owner = replace(Owner.of_this_process(), **changes)
    folder.mkdir(exist_ok=True)
    (folder / LOCK_FILE).write_text(json.dumps(asdict(owner)))
    return owner


def dead_pid() -> int:
    with subprocess.Popen(["true"]) as process:
        return process.pid


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_lock_names_its_living_holder(has_flock: bool, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "run"
    with RunLock(folder):
        assert is_held(folder / LOCK_FILE)
        for overwrite in (False, True):
            with pytest.raises(UserError, match=rf"process {os.getpid()} on .* \(since .* UTC\) trains") as refused:
                RunLock(folder, overwrite=overwrite)
            assert "--overwrite-lock" not in str(refused.value)
        assert names(folder) == [LOCK_FILE]
    assert not folder.parent.exists()


def test_lock_of_a_killed_process_is_free(has_flock: bool, tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLDING, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"process {process.pid} on"):
            RunLock(tmp_path)
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert not is_held(tmp_path / LOCK_FILE)
        # Nobody has asked for how it ended: its number is still there.
        with RunLock(tmp_path) as lock:
            assert lock.taken_from.pid == process.pid
    assert names(tmp_path) == []


def test_reused_process_number_is_no_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remove_flock(monkeypatch)
    dead = write(tmp_path, ticks="1")
    with RunLock(tmp_path) as lock:
        assert lock.taken_from == dead


@pytest.mark.parametrize("changes", [ELSEWHERE, {"machine": "", "pid": 1}])
def test_overwrite_lock_of_another_machine(changes, tmp_path, monkeypatch):
    remove_flock(monkeypatch)
    dead = write(tmp_path, **changes)
    assert is_held(tmp_path / LOCK_FILE)
    with pytest.raises(UserError, match="if that process is gone, --overwrite-lock"):
        RunLock(tmp_path)
    with RunLock(tmp_path, overwrite=True) as lock:
        assert lock.taken_from == dead
    assert names(tmp_path) == []


def test_overwrite_lock_that_a_file_system_still_holds(tmp_path: Path) -> None:
    """A server keeps the flocks of a crashed client for a while."""
    dead = write(tmp_path, **ELSEWHERE)
    with (tmp_path / LOCK_FILE).open("rb+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="--overwrite-lock"):
            RunLock(tmp_path)
        with RunLock(tmp_path, overwrite=True) as lock:
            assert lock.taken_from == dead


@pytest.mark.parametrize("left", ["nothing", "a dead process", "an empty file"])
def test_one_of_many_launches_gets_the_lock(left: str, has_flock: bool, tmp_path: Path) -> None:
    if left == "a dead process":
        write(tmp_path, pid=dead_pid())
    elif left == "an empty file":
        (tmp_path / LOCK_FILE).touch()
    barrier, won, refused = threading.Barrier(12), [], []

    def start() -> None:
        barrier.wait()
        try:
            won.append(RunLock(tmp_path))
        except UserError as exc:
            refused.append(exc)

    threads = [threading.Thread(target=start) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winners = 0 if left == "an empty file" and not has_flock else 1
    assert (len(won), len(refused)) == (winners, 12 - winners)
    for lock in won:
        lock.check()
        lock.release()
        assert names(tmp_path) == []


def test_lock_deleted_before_flock_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its owner deletes the file between another process's open and flock: that flock excludes nobody."""
    first, original, others = RunLock(tmp_path), fcntl.flock, list[RunLock]()

    def flock(file: int, kind: int) -> None:
        monkeypatch.setattr(fcntl, "flock", original)
        first.release()
        others.append(RunLock(tmp_path))
        original(file, kind)

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(UserError, match="trains the run"):
        RunLock(tmp_path)
    others[0].check()
    others[0].release()


@pytest.mark.parametrize("other", [None, ELSEWHERE])
def test_deleted_or_replaced_lock_stops_its_owner(other, has_flock, tmp_path):
    lock = RunLock(tmp_path)
    lock.check()
    (tmp_path / LOCK_FILE).unlink()
    expected = "no file" if other is None else str(write(tmp_path, **other)).replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(UserError, match=f"got {expected} in its place"):
        lock.check()
    lock.release()
    assert names(tmp_path) == ([] if other is None else [LOCK_FILE])


def test_sigterm_outside_of_the_loop_frees_the_lock(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as caught, unwinding_on_sigterm(), RunLock(tmp_path):
        os.kill(os.getpid(), signal.SIGTERM)
    assert caught.value.code == 143
    assert names(tmp_path) == []


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("how", [{"resume": "auto"}, {"overwrite": True}])
def test_a_run_that_goes_on_is_not_touched(how, run_config, trained):
    with RunLock(trained):
        before = contents(trained)
        with pytest.raises(UserError, match="trains the run"):
            train(run_config(), **how)
        assert contents(trained) == before
    assert train(run_config(), **how).steps == 6
    assert not (trained / LOCK_FILE).exists()


def test_run_with_a_replaced_lock_stops(run_config, tmp_path, monkeypatch):
    original = TrainLoader.batches

    def batches(self: TrainLoader, position: int = 0) -> Iterator[Batch]:
        for batch in original(self, position):
            if batch.position == 24:
                write(tmp_path / "run", **ELSEWHERE)
            yield batch

    monkeypatch.setattr(TrainLoader, "batches", batches)
    with pytest.raises(UserError, match="this process stops"):
        train(run_config("checkpoint={every_steps: 2, keep: 1}"))
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("step_*")] == ["step_00000002"]
    assert len(read_log(tmp_path / "run" / "log.jsonl")) == 2
    assert read_lock(tmp_path / "run" / LOCK_FILE).machine == "elsewhere"
