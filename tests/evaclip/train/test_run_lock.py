"""One process trains into a folder at a time, whatever happens to it."""

import errno
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
from evaclip.run_files import LOCK_FILE
from evaclip.train import run_lock
from evaclip.train.progress import read_log
from evaclip.train.run_lock import Owner, RunLock, RunTaken, read_lock
from evaclip.train.trainer import train
from evaclip.train.watchdog import unwinding_on_sigterm

HOLDING = """
import os, sys, time
from pathlib import Path
from evaclip.train.run_lock import RunLock
RunLock.acquire(Path(sys.argv[1]), say=print)
if os.fork() == 0:  # a worker that outlives a killed trainer
    print("held", flush=True)
    time.sleep(10)
    os._exit(0)
sys.stdin.read()
"""


@pytest.fixture
def sleeps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The lock waits for nothing; how long it would have."""
    found: list[float] = []
    monkeypatch.setattr(run_lock.time, "sleep", found.append)
    return found


def acquire(folder: Path, *, steal: bool = False) -> RunLock:
    return RunLock.acquire(folder, steal=steal, say=lambda message: None)


def write(folder: Path, **changes: Any) -> Owner:
    """Leaves the lock of another process in the folder; without changes it would be this one."""
    holder = replace(Owner.of_this_process(), **changes)
    folder.mkdir(exist_ok=True)
    (folder / LOCK_FILE).write_text(json.dumps(asdict(holder)))
    return holder


def holder_of(folder: Path) -> Owner | None:
    found = read_lock(folder / LOCK_FILE)
    return found and found[0]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_lock_names_its_living_holder(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "run"
    with acquire(folder):
        with pytest.raises(
            UserError, match=rf"process {os.getpid()} on .* \(since .* sign of life was \d+ s .*--steal"
        ):
            acquire(folder)
        assert names(folder) == [LOCK_FILE]
    assert not folder.parent.exists()


def test_lock_of_a_killed_process_is_free(tmp_path: Path, sleeps: list[float]) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLDING, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"process {process.pid} on"):
            acquire(tmp_path)
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        # Nobody has asked for how it ended: its number is still there.
        with acquire(tmp_path) as lock:
            assert lock.taken_from.pid == process.pid
    assert names(tmp_path) == []


@pytest.mark.parametrize(("other", "has_flock"), [({"machine": "elsewhere"}, False), ({"machine": ""}, True)])
def test_another_machine_is_watched_for_a_sign_of_life(other, has_flock, tmp_path, monkeypatch, sleeps):
    def flock(file: int, kind: int) -> None:
        raise OSError(errno.ENOSYS, "not implemented")

    if not has_flock:
        monkeypatch.setattr(run_lock.fcntl, "flock", flock)
    dead = write(tmp_path, **other)
    with acquire(tmp_path) as lock:
        assert lock.taken_from == dead
    assert sum(sleeps) == run_lock.STALE

    write(tmp_path, **other)
    # Its clock may be years off: that the time changes is what counts.
    monkeypatch.setattr(run_lock.time, "sleep", lambda seconds: os.utime(tmp_path / LOCK_FILE, (10, 10)))
    with pytest.raises(UserError, match="trains the run"):
        acquire(tmp_path)


def test_of_many_who_find_it_stale_one_gets_it(tmp_path: Path) -> None:
    write(tmp_path)
    barrier, won, refused = threading.Barrier(12), [], []

    def start() -> None:
        barrier.wait()
        try:
            won.append(acquire(tmp_path))
        except UserError as exc:
            refused.append(exc)

    threads = [threading.Thread(target=start) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(won), len(refused)) == (1, 11)
    won[0].check()
    won[0].release()
    assert names(tmp_path) == []


def test_holder_notices_a_stolen_lock(tmp_path: Path, sleeps: list[float]) -> None:
    lost = acquire(tmp_path)
    with acquire(tmp_path, steal=True) as thief:
        assert sum(sleeps) == 2 * run_lock.HEARTBEAT
        with pytest.raises(RunTaken, match=f"was taken over by process {os.getpid()} on"):
            lost.check()
        lost.release()
        thief.check()
    assert names(tmp_path) == []


def test_a_sign_of_life_comes_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "HEARTBEAT", 0.01)
    beats, utime = threading.Semaphore(0), os.utime

    def count(path: Path) -> None:
        utime(path)
        beats.release()

    monkeypatch.setattr(os, "utime", count)
    with acquire(tmp_path):
        assert all(beats.acquire(timeout=30) for _ in range(3))


def test_deleted_lock_is_made_again(tmp_path, monkeypatch):
    with acquire(tmp_path) as lock:
        (tmp_path / LOCK_FILE).unlink()
        lock.check()
        assert names(tmp_path) == [LOCK_FILE]
        (tmp_path / LOCK_FILE).unlink()
        lock._last_beat -= run_lock.STALE
        with pytest.raises(RunTaken, match="by an unknown process"):
            lock.check()


def test_sigterm_outside_of_the_loop_frees_the_lock(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as caught, unwinding_on_sigterm(), acquire(tmp_path):
        os.kill(os.getpid(), signal.SIGTERM)
    assert caught.value.code == 143
    assert names(tmp_path) == []


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("how", [{"resume": "auto"}, {"overwrite": True}])
def test_a_run_that_goes_on_is_not_touched(how, run_config, trained):
    with acquire(trained):
        before = contents(trained)
        with pytest.raises(UserError, match="trains the run"):
            train(run_config(), **how)
        assert contents(trained) == before
    assert train(run_config(), **how).steps == 6
    assert not (trained / LOCK_FILE).exists()


@pytest.mark.parametrize("is_noticed", [True, False])
def test_a_lost_run_stops_and_writes_no_checkpoint(is_noticed, run_config, tmp_path, monkeypatch, sleeps):
    original, locks = TrainLoader.batches, list[RunLock]()

    def batches(self: TrainLoader, position: int = 0) -> Iterator[Batch]:
        for batch in original(self, position):
            if batch.position == 24:
                while not (tmp_path / "run/checkpoints/step_00000002").exists():
                    threading.Event().wait(0.01)
                acquire(tmp_path / "run", steal=True)
                if is_noticed:
                    locks[0]._beat()
            yield batch

    take = RunLock.acquire

    def acquired(folder: Path, **options: Any) -> RunLock:
        locks.append(take(folder, **options))
        return locks[-1]

    monkeypatch.setattr(run_lock, "HEARTBEAT", 1e6)  # one between the theft and step 4 would stop the run there
    monkeypatch.setattr(run_lock.RunLock, "acquire", acquired)
    monkeypatch.setattr(TrainLoader, "batches", batches)
    with pytest.raises(UserError, match="was taken over by process"):
        train(run_config("checkpoint={every_steps: 2, keep: 1}"))
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("step_*")] == ["step_00000002"]
    # The checkpoint of step 4 finds the lock stolen, while steps go on.
    logged = len(read_log(tmp_path / "run" / "log.jsonl"))
    assert logged == 2 if is_noticed else 4 <= logged < 7
    assert holder_of(tmp_path / "run") == locks[-1]._owner
    locks[-1].release()
