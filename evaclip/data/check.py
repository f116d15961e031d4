"""Reads every sample once and lists the faults."""

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from torch.utils.data import Dataset

from evaclip.atomic import write_json
from evaclip.data.samples import BadSample, Fault, FaultKind, decode_image
from evaclip.data.source import Source
from evaclip.data.workers import WorkerLoader
from evaclip.errors import UserError
from evaclip.pixels import open_image, pixel_kind

_CHUNK = 64
_Chunk = tuple[int, Counter[str], list[Fault]]
"""Bytes of the image files, conversions and faults of up to 64 samples."""


@dataclass
class CheckReport:
    """The result of a check.

    Attributes:
        data: the source's description, fingerprint and notes.
        samples: samples that were read, good and bad.
        image_bytes: size of the image files that could be read.
        converted: images with pixels converted to bytes, by pixel type; no faults.
        faults: the faults by kind, in the order of the source.
    """

    data: str
    fingerprint: str
    notes: list[str]
    samples: int = 0
    image_bytes: int = 0
    converted: Counter[str] = field(default_factory=Counter)
    faults: dict[FaultKind, list[Fault]] = field(default_factory=lambda: defaultdict(list))

    def save(self, path: Path) -> None:
        """Writes everything as JSON: counts by kind, and each fault with its file, key and index."""
        counts = {kind: len(faults) for kind, faults in self.faults.items()}
        faults = [asdict(fault) for of_kind in self.faults.values() for fault in of_kind]
        write_json(path, {**vars(self), "counts": counts, "faults": faults})


def check(source: Source, workers: int = 0, console: Console | None = None) -> CheckReport:
    """Reads and decodes every sample, with a progress bar on `console` if there is one."""
    report = CheckReport(source.description, source.fingerprint, list(source.notes), len(source))
    for fault in source.faults:
        report.faults[fault.kind].append(fault)
    indices = range(len(source))
    starts = indices[::_CHUNK]
    chunks = (indices[start : start + _CHUNK] for start in starts)
    results: Iterable[_Chunk] = WorkerLoader(_Chunks(source), chunks, workers)
    if console:
        results = track(results, "reading", total=len(starts), console=console, transient=True)
    for image_bytes, converted, faults in results:
        report.image_bytes += image_bytes
        report.converted += converted
        for fault in faults:
            report.faults[fault.kind].append(fault)
    return report


@dataclass(frozen=True, eq=False)
class _Chunks(Dataset[Any]):
    """Samples of a source by ranges of indices, read and decoded."""

    source: Source

    def __getitem__(self, indices: range) -> _Chunk | UserError:
        source, image_bytes, converted, faults = self.source, 0, Counter[str](), list[Fault]()
        for index in indices:
            try:
                raw = source[index]
                image_bytes += len(raw.image)
                decode_image(raw.image, source.name(index), source.decoding)
            except BadSample as exc:
                file, key = source.place(index)
                faults.append(replace(exc.fault, file=file, key=key, index=index))
            except UserError as exc:
                return exc
            else:
                converted.update(filter(None, [pixel_kind(open_image(raw.image, source.decoding.max_pixels))]))
        return image_bytes, converted, faults
