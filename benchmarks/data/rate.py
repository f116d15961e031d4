"""Reading rate of undecoded samples in one process, from files and over HTTP on the loopback."""

import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np

from benchmarks.data.plans import RatePlan
from evaclip.data import Source, open_source, sample_order
from evaclip.data.config import RemoteConfig
from evaclip.data.shard_writer import write_shards

_SEED = 0


@dataclass(frozen=True)
class Rate:
    """One reader. `megabytes` of images; of 10^6 bytes."""

    reader: str
    samples_per_second: float
    megabytes_per_second: float


Reader = Callable[[], Iterable[int]]
"""Reads all samples once and gives the size of each one's image."""


def measure(plan: RatePlan, folder: Path, tell: Callable[[str], None]) -> list[Rate]:
    """Writes shards into `folder` and measures all readers, one after the other in each pass."""
    (folder / "shards").mkdir()
    write_shards(folder / "shards", "s", _samples(plan), plan.per_shard)
    with _http_server(folder / "shards") as address:
        readers = _readers(plan, folder, address)
        seconds: dict[str, list[float]] = {name: [] for name in readers}
        # What the first pass finds on the disk the others find in memory; it doesn't count.
        for number in range(plan.passes + 1):
            for name, read in readers.items():
                tell(f"pass {number} of {plan.passes}: {name}")
                began = time.perf_counter()
                sizes = sum(read())
                if sizes != plan.shards * plan.per_shard * plan.image_bytes:
                    raise RuntimeError(f"{name} gave {sizes} bytes of images")
                if number:
                    seconds[name].append(time.perf_counter() - began)
    samples = plan.shards * plan.per_shard
    rates = {name: samples / median(times) for name, times in seconds.items()}
    return [Rate(name, rate, rate * plan.image_bytes / 1e6) for name, rate in rates.items()]


def _samples(plan: RatePlan) -> Iterator[tuple[str, dict[str, bytes]]]:
    rng = random.Random(_SEED)
    for number in range(plan.shards * plan.per_shard):
        yield (
            f"{number:08d}",
            {"jpg": rng.randbytes(plan.image_bytes), "txt": b"a caption of some forty characters %d" % number},
        )


def _readers(plan: RatePlan, folder: Path, address: str) -> dict[str, Reader]:
    names = f"s-{{00000..{plan.shards - 1:05d}}}.tar"
    copies = folder / "copies"
    config = RemoteConfig(cache_folder=str(copies))
    local, remote = open_source(f"{folder}/shards/{names}"), open_source(f"{address}/{names}", remote=config)

    def anew() -> Iterator[int]:
        shutil.rmtree(copies)
        return _in_order(remote)

    readers: dict[str, Reader] = {
        "files, in order": lambda: _in_order(local),
        f"files, window of {plan.window:,}": lambda: _mixed(local, plan.window),
        "HTTP, each shard fetched": anew,
        "HTTP, copies there, in order": lambda: _in_order(remote),
        f"HTTP, copies there, window of {plan.window:,}": lambda: _mixed(remote, plan.window),
    }
    return readers | _webdataset_readers(plan, [f"{folder}/shards/{names}", f"{address}/{names}"])


def _in_order(source: Source) -> Iterator[int]:
    return (len(source[index].image) for index in range(len(source)))


def _mixed(source: Source, window: int) -> Iterator[int]:
    order = sample_order(len(source), _SEED, window, source.shard_sizes)
    return (len(source[index].image) for index in order.indices(np.arange(len(source))).tolist())


def _webdataset_readers(plan: RatePlan, paths: list[str]) -> dict[str, Reader]:
    try:
        import webdataset
    except ImportError:
        return {}

    def read(path: str, buffer: int) -> Iterator[int]:
        data = webdataset.WebDataset(path, shardshuffle=False)
        return (len(sample["jpg"]) for sample in (data.shuffle(buffer) if buffer else data))

    local, remote = paths
    return {
        "webdataset: files, in order": lambda: read(local, 0),
        f"webdataset: files, buffer of {plan.window:,}": lambda: read(local, plan.window),
        "webdataset: HTTP by curl, in order": lambda: read(remote, 0),
    }


@contextmanager
def _http_server(folder: Path) -> Iterator[str]:
    """Python's own server in a process of its own, as one in this process would share its interpreter lock."""
    command = [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1", "--directory", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        # "Serving HTTP on 127.0.0.1 port 43557 (http://127.0.0.1:43557/) ..."
        address = process.stdout.readline().partition("(")[2].partition("/)")[0]
        try:
            yield address
        finally:
            process.terminate()
