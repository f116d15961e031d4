"""Reads every sample once and lists the faults."""

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from rich.console import Console
from rich.progress import track

from evaclip.atomic import write_json
from evaclip.data.samples import BadSample, Fault, FaultKind, as_bytes, load_image
from evaclip.data.source import Source
from evaclip.data.workers import BatchReader, WorkerLoader, WorkerOptions
from evaclip.pixels import pixel_kind

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

    @property
    def bad(self) -> int:
        """The number of faults of all kinds."""
        return sum(map(len, self.faults.values()))

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
    chunks = range(0, len(source), _CHUNK)
    results: Iterable[_Chunk] = WorkerLoader(_ChunkReader(source), chunks, WorkerOptions(workers))
    if console:
        results = track(results, "reading", total=len(chunks), console=console, transient=True)
    for image_bytes, converted, faults in results:
        report.image_bytes += image_bytes
        report.converted += converted
        for fault in faults:
            report.faults[fault.kind].append(fault)
    return report


@dataclass(frozen=True)
class _ChunkReader(BatchReader[int, _Chunk]):
    source: Source

    def read(self, first: int) -> _Chunk:
        image_bytes, converted, faults = 0, Counter[str](), list[Fault]()
        for index in range(first, min(first + _CHUNK, len(self.source))):
            name = self.source.name(index)
            try:
                raw = self.source[index]
                image_bytes += len(raw.image)
                image = load_image(raw.image, name, self.source.decoding)
                as_bytes(image, name)
            except BadSample as exc:
                file, key = self.source.place(index)
                faults.append(replace(exc.fault, file=file, key=key, index=index))
            else:
                converted.update(filter(None, [pixel_kind(image)]))
        return image_bytes, converted, faults
