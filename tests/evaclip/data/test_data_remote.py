"""Shards over HTTP, from S3 and from commands, and what goes wrong with them."""

import itertools
import logging
import multiprocessing
import os
import shutil
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path

import fsspec
import numpy as np
import psutil
import pytest
import torch
from data_samples import make_loader, numbers, sample, take
from shard_server import ShardServer

from evaclip.data import BadSample, FaultKind, open_source
from evaclip.data import remote as data_remote
from evaclip.data.config import RemoteConfig
from evaclip.data.shard_writer import write_shard
from evaclip.errors import UserError

QUICK = RemoteConfig(timeout=20, attempts=3, patience=0)
IMPATIENT = RemoteConfig(timeout=1, attempts=3, patience=0)


pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(data_remote, "_PAUSE", 0.01)


@pytest.fixture
def copies(cache_folder) -> Path:
    return cache_folder.parent / "shards"


def forget_copies(copies: Path) -> None:
    for path in copies.glob("*.tar"):
        path.unlink()


def write_twenties(folder: Path, shards: int) -> None:
    for number in range(shards):
        write_shard(folder / f"n{number}.tar", map(sample, range(20 * number, 20 * number + 20)))


def fault_of(source, index: int):
    with pytest.raises(BadSample) as caught:
        source[index]
    return caught.value.fault


@pytest.mark.parametrize("how", ["http", "command", "s3"])
def test_remote_shards_equal_local_ones(how, shards, server, tmp_path, copies, monkeypatch):
    path = {
        "http": server.url("{00..02}.tar"),
        "command": f"pipe:cat {tmp_path}/{{00..02}}.tar",
        "s3": "s3://bucket/{00..02}.tar",
    }[how]
    if how == "s3":
        shutil.copytree(tmp_path, tmp_path / "bucket", ignore=lambda *_: ["bucket", "cache"])
        monkeypatch.setitem(fsspec.config.conf, "s3", {"anon": True, "endpoint_url": server.address})
    local, remote = open_source(shards), open_source(path)
    assert remote.fingerprint == local.fingerprint
    assert [remote[i] for i in (0, 19, 20, 63)] == [local[i] for i in (0, 19, 20, 63)]
    expected = take(make_loader(local), 10)
    # Workers fetch too, and clients with threads of their own must outlive the fork.
    forget_copies(copies)
    found = take(make_loader(remote, workers=2), 10)
    for one, other in zip(expected, found, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.targets, other.targets)


def test_shard_is_fetched_once_by_all_workers(server, copies):
    path = server.url("{00..02}.tar")
    take(make_loader(open_source(path), workers=3), 30)
    # Once for its version, once for its bytes.
    assert [server.gets(f"{i:02d}.tar") for i in range(3)] == [2, 2, 2]
    take(make_loader(open_source(path), workers=2), 10)
    assert [server.gets(f"{i:02d}.tar") for i in range(3)] == [3, 3, 3]
    forget_copies(copies)
    take(make_loader(open_source(path), workers=3), 30)
    assert [server.gets(f"{i:02d}.tar") for i in range(3)] == [5, 5, 5]
    assert not list(copies.glob("*.part"))


@pytest.mark.parametrize("fault", [503, "cut", "stall"])
def test_passing_error_is_retried(fault, server, copies, caplog):
    source = open_source(server.url("{00..02}.tar"), remote=IMPATIENT if fault == "stall" else QUICK)
    forget_copies(copies)
    server.faults["01.tar"] = [fault, fault]
    with caplog.at_level(logging.WARNING, "evaclip.data"):
        assert source[20].caption == "caption 20"
    reason = {503: "HTTP 503", "cut": "bytes came", "stall": "timed out"}[fault]
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    assert all(server.url("01.tar") in message and reason in message for message in messages)
    assert "try 1: " in messages[0]


@pytest.mark.parametrize(("fault", "reason", "requests"), [(404, "HTTP 404", 1), (500, "HTTP 500", 3)])
def test_permanent_error_is_not_retried(fault, reason, requests, server, copies):
    source = open_source(server.url("{00..02}.tar"), remote=QUICK)
    forget_copies(copies)
    server.faults["01.tar"] = [fault, "always"]
    before = server.gets("01.tar")
    for index in (20, 21, 49):
        found = fault_of(source, index)
        assert found.kind is FaultKind.UNREACHABLE
        assert found.name == server.url("01.tar")
        assert f"sample {index - 20}: " in found.detail
        assert reason in found.detail
    assert server.gets("01.tar") - before == requests
    assert source[50].caption == "caption 50"


def test_samples_of_missing_shard_are_replaced(server, copies, caplog):
    path = server.url("{00..02}.tar")
    source = open_source(path, remote=QUICK)
    forget_copies(copies)
    server.faults["00.tar"] = [404, "always"]
    loader = make_loader(source, window=0, workers=2)
    with caplog.at_level(logging.WARNING, "evaclip.data"):
        batches = take(loader, 8)
    assert [len(batch.images) for batch in batches] == [8] * 8
    assert not set(range(20)) & set(numbers(batches))
    assert loader.faults.counts["unreachable shard"] >= sum(batch.skipped for batch in batches) >= 20
    assert f"unreachable shard: {server.url('00.tar')} (sample " in caplog.text


@pytest.mark.parametrize("workers", [0, 2])
def test_outage_changes_no_batch(workers, server, copies, monkeypatch):
    monkeypatch.setattr(data_remote, "_LONGEST_PAUSE", 0.05)
    source = open_source(server.url("{00..02}.tar"), remote=RemoteConfig(attempts=1, patience=60))
    expected = take(make_loader(source), 12)
    forget_copies(copies)
    for number in range(3):
        server.faults[f"{number:02d}.tar"] = [503] * 8
    loader = make_loader(source, workers=workers)
    found = take(loader, 12)
    assert not any(server.faults.values())
    assert not loader.faults.counts
    assert [batch.skipped for batch in found] == [0] * 12
    for one, other in zip(expected, found, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.targets, other.targets)


def test_shard_that_outlasts_patience_is_replaced(server, copies, monkeypatch):
    monkeypatch.setattr(data_remote, "_LONGEST_PAUSE", 0.05)
    source = open_source(server.url("{00..02}.tar"), remote=RemoteConfig(attempts=1, patience=0.5))
    forget_copies(copies)
    server.faults["01.tar"] = [503, "always"]
    began = time.monotonic()
    assert fault_of(source, 20).kind is FaultKind.UNREACHABLE
    assert time.monotonic() - began >= 0.3
    tries = server.gets("01.tar")
    assert fault_of(source, 21).kind is FaultKind.UNREACHABLE
    monkeypatch.setattr(data_remote, "_FAILURES_LAST", 0)
    assert fault_of(source, 21).kind is FaultKind.UNREACHABLE
    assert server.gets("01.tar") == tries + 1
    server.faults.clear()
    assert source[21].caption == "caption 21"


def test_replacements_fetch_no_shard_of_another_window(tmp_path, copies):
    write_twenties(tmp_path, 6)
    with ShardServer(tmp_path).running() as server:
        source = open_source(server.url("n{0..5}.tar"), remote=QUICK)
        forget_copies(copies)
        loader = make_loader(source, batch_size=4, window=20)
        now, after = ({f"n{shard}.tar" for shard in shards} for shards in loader._samples.order.shards(np.arange(4)))
        for name in now:
            server.faults[name] = [404, "always"]
        server.requests.clear()
        with pytest.raises(UserError, match="samples in a row"):
            next(loader.batches())
        assert {request.removeprefix("GET /") for request in server.requests} <= now | after


def test_missing_shards_on_opening(server):
    with pytest.raises(UserError, match=r"cannot read the shard http://\S+/07\.tar: HTTP 404 "):
        open_source(server.url("{00,07}.tar"), remote=QUICK)
    server.faults["00.tar"] = [500, "always"]
    with pytest.raises(UserError, match=r"cannot read the shard http://\S+/00\.tar: HTTP 500 "):
        open_source(server.url("{00,01}.tar"), remote=QUICK)
    with pytest.raises(UserError, match=r"cannot read the shard http://127\.0\.0\.1:1/x\.tar: URLError: .*refused"):
        open_source("http://127.0.0.1:1/x.tar", remote=QUICK)
    with pytest.raises(UserError, match=r"wombat://x/y\.tar cannot be read: Protocol not known: wombat"):
        open_source("wombat://x/y.tar")


@pytest.mark.parametrize("how", ["http", "command"])
def test_changed_remote_shard_is_a_fault(how, server, copies, tmp_path):
    path = server.url("{00..02}.tar") if how == "http" else f"pipe:cat {tmp_path}/{{00..02}}.tar"
    source = open_source(path, remote=QUICK)
    forget_copies(copies)
    write_shard(tmp_path / "00.tar", map(sample, range(100, 118)))
    found = fault_of(source, 3)
    assert found.kind is FaultKind.UNREACHABLE
    assert "the shard changed after it was indexed: it" in found.detail
    assert source[20].caption == "caption 20"
    forget_copies(copies)
    assert open_source(path)[3].caption == "caption 103"


def test_shard_cache_evicts_the_oldest_copies(server, copies, tmp_path):
    size = (tmp_path / "00.tar").stat().st_size
    write_twenties(tmp_path, 6)
    config = RemoteConfig(cache_gb=2.5 * size / 1e9)
    source = open_source(server.url("n{0..5}.tar"), remote=config)
    for index in range(0, 120, 10):
        assert source[index].caption == f"caption {index}"
        assert sum(path.stat().st_size for path in copies.iterdir()) <= 2.5 * size
    assert len(list(copies.glob("*.tar"))) == 2
    # n4 was read after n5, long enough ago to be seen.
    for path in copies.glob("*.tar"):
        os.utime(path, (time.time() - 100, time.time() - 100))
    assert source[80].caption == "caption 80"
    gets = server.gets("n4.tar")
    assert source[0].caption == "caption 0"
    assert source[85].caption == "caption 85"
    assert server.gets("n4.tar") == gets
    before = server.gets("n5.tar")
    assert source[100].caption == "caption 100"
    assert server.gets("n5.tar") == before + 1


def test_window_larger_than_the_cache_is_refused(tmp_path, copies):
    write_twenties(tmp_path, 4)
    size = (tmp_path / "n0.tar").stat().st_size
    with ShardServer(tmp_path).running() as server:
        source = open_source(server.url("n{0..3}.tar"), remote=RemoteConfig(cache_gb=1.5 * size / 1e9))
        with pytest.raises(UserError, match=r"window of 0 samples .* takes 4 remote shards"):
            make_loader(source, window=0)
        options = {"nodes": 2, "window": 20, "world_size": 2}
        for rank in range(2):
            make_loader(source, rank=rank, machine=range(rank, rank + 1), **options)
            with pytest.raises(UserError, match="which 2 processes of this machine read, takes 2 remote shards"):
                make_loader(source, rank=rank, machine=range(2), **options)


def test_next_window_is_prefetched(tmp_path, copies):
    write_twenties(tmp_path, 6)
    with ShardServer(tmp_path).running() as server:
        source = open_source(server.url("n{0..5}.tar"))
        forget_copies(copies)
        stream = make_loader(source, batch_size=4).batches()
        next(stream)
        deadline = time.monotonic() + 10
        while len(list(copies.glob("*.tar"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        # One window is one shard here; not more is fetched than the next.
        time.sleep(0.1)
        assert len(list(copies.glob("*.tar"))) == 2
        before = len(server.requests)
        list(itertools.islice(stream, 4))
        assert len(server.requests) == before
        stream.close()


def test_killed_worker_leaves_no_lock(server, copies):
    source = open_source(server.url("{00..02}.tar"))
    forget_copies(copies)
    server.faults["00.tar"] = server.faults["01.tar"] = server.faults["02.tar"] = ["stall", "always"]
    stream = make_loader(source, workers=1).batches()

    def kill() -> None:
        server.stalled.wait(20)
        (worker,) = multiprocessing.active_children()
        os.kill(worker.pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(RuntimeError, match=r"data worker 0 \(pid \d+\) was killed by SIGKILL"):
        next(stream)
    killer.join()
    server.faults.clear()
    expected = list(range(64))
    assert sorted(numbers(take(make_loader(source, workers=1), 8))) == expected
    assert not list(copies.glob("*.part"))


def test_failing_command_is_an_error(tmp_path, copies, caplog):
    with pytest.raises(UserError, match="exit code 3: no such bucket"):
        open_source("pipe:echo first >&2; echo no such bucket >&2; exit 3 #.tar", remote=QUICK)
    caplog.clear()
    with pytest.raises(UserError, match=r"exit code 127: .*no-such-program"):
        open_source("pipe:no-such-program", remote=QUICK)
    assert not caplog.records
    with pytest.raises(UserError, match="no byte for 1 s"):
        open_source(f"pipe:sleep 30 & echo $! > {tmp_path}/pid; wait", remote=RemoteConfig(timeout=1, attempts=1))
    with suppress(psutil.NoSuchProcess):
        child = psutil.Process(int((tmp_path / "pid").read_text()))
        deadline = time.monotonic() + 10
        while child.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_unwritable_cache_folder_is_named(server, tmp_path):
    (tmp_path / "file").touch()
    config = RemoteConfig(cache_folder=str(tmp_path / "file" / "copies"))
    with pytest.raises(UserError, match=r"cannot be written to \S+/file/copies: Not a directory; data.remote.cache_fo"):
        open_source(server.url("00.tar"), remote=config)
