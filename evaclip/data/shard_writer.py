"""Writes WebDataset tar shards: one group of members `KEY.EXTENSION` per sample."""

import io
import tarfile
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path

from evaclip.atomic import replacing

WritableSample = tuple[str, Mapping[str, bytes]]
"""(key, {extension: content})."""


def write_shard(path: Path, samples: Iterable[WritableSample]) -> None:
    """Writes one tar shard atomically. Owners and times are zero, so that equal content gives equal bytes."""
    with replacing(path) as temporary, tarfile.open(temporary, "w") as tar:
        for key, members in samples:
            for extension, content in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def write_shards(folder: Path, prefix: str, samples: Iterable[WritableSample], per_shard: int) -> list[Path]:
    """Writes `folder/PREFIX-00000.tar`, ... and removes shards of that prefix left from before."""
    paths: list[Path] = []
    stream = iter(samples)
    while group := list(islice(stream, per_shard)):
        path = folder / f"{prefix}-{len(paths):05d}.tar"
        write_shard(path, group)
        paths.append(path)
    for stale in set(folder.glob(f"{prefix}-[0-9][0-9][0-9][0-9][0-9].tar")) - set(paths):
        stale.unlink()
    return paths
