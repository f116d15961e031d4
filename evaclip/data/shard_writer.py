"""Writes WebDataset tar shards, of given samples or of any source: members `KEY.EXTENSION`, side by side."""

import io
import json
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from evaclip.atomic import replacing, write_text
from evaclip.data.samples import BadSample, FaultLog, RawSample, image_suffix
from evaclip.data.source import Source
from evaclip.errors import UserError

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


def convert(
    source: Source, folder: Path, per_shard: int, console: Console | None = None
) -> tuple[int, Counter[str], FaultLog]:
    """Writes the samples of a source, in order, as `folder/00000.tar`, ...: each file appears complete or not at all.

    A sample's members are its image, as it is; `txt`, its caption, or several as `caption` in `json`; `json` with its
    `key` in the source; and, where the source has classes, `cls`, its label. `classes.txt` lists the classes. Equal
    samples give equal bytes.

    Args:
        source: bad samples of it are left out.
        per_shard: samples a shard, bad ones counted.
        console: where a progress bar is shown; None shows none.

    Returns:
        the number of shards, the number of images by their suffix, and the faults of samples that were left out.

    Raises:
        UserError: `per_shard` is below 1, or the folder holds shards.
        OSError: a file can't be written.
    """
    if per_shard < 1:
        raise UserError(f"samples_per_shard must be 1 or more, got {per_shard}")
    if any(folder.glob("*.tar")):
        raise UserError(f"OUT must be a folder without .tar files, got {folder}; delete them or name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    faults, suffixes = FaultLog(), Counter[str]()
    indices: Iterable[int] = range(len(source))
    if console:
        indices = track(indices, "writing", console=console, transient=True)

    def written() -> Iterator[WritableSample | None]:
        for index in indices:
            try:
                raw = source[index]
                suffix = image_suffix(raw.image, source.name(index))
            except BadSample as exc:
                faults.add([exc.fault])
                yield None
            else:
                suffixes[suffix] += 1
                yield f"{index:09d}", _members(raw, suffix, source.label(index))

    samples = written()
    shards = -(-len(source) // per_shard)
    for shard in range(shards):
        write_shard(folder / f"{shard:05d}.tar", filter(None, islice(samples, per_shard)))
    if source.classes:
        write_text(folder / "classes.txt", "".join(f"{name}\n" for name in source.classes))
    return shards, suffixes, faults


def _members(raw: RawSample, suffix: str, label: int | None) -> dict[str, bytes]:
    facts: dict[str, Any] = {"key": raw.key}
    members = {suffix: raw.image}
    if len(raw.captions) == 1:
        members["txt"] = raw.caption.encode()
    elif raw.captions:
        facts["caption"] = raw.captions
    if label is not None:
        members["cls"] = str(label).encode()
    return {**members, "json": json.dumps(facts).encode()}
