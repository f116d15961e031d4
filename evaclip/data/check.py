"""Reads everything once and lists what is wrong."""

from collections import defaultdict
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import track

from evaclip.data.samples import BadSample, Fault, FaultKind, decode_image
from evaclip.data.source import Source
from evaclip.data.workers import WorkerOptions, run_batches

_CHUNK = 64


@dataclass
class CheckReport:
    """What a check found.

    Attributes:
        samples: samples that were looked at, good and bad.
        image_bytes: size of the image files that could be read.
        faults: the faults by kind, in the order of the source.
    """

    samples: int = 0
    image_bytes: int = 0
    faults: dict[FaultKind, list[Fault]] = field(default_factory=lambda: defaultdict(list))

    @property
    def bad(self) -> int:
        """The number of faults of all kinds."""
        return sum(map(len, self.faults.values()))


def check(source: Source, workers: int = 0, console: Console | None = None) -> CheckReport:
    """Reads and decodes every sample, with a progress bar on `console` if there is one."""
    report = CheckReport()
    for fault in source.faults:
        report.faults[fault.kind].append(fault)
    chunks = range(0, len(source), _CHUNK)
    results = run_batches(_ChunkReader(source), chunks, WorkerOptions(workers))
    if console:
        results = iter(track(results, "reading", total=len(chunks), console=console, transient=True))
    for samples, image_bytes, faults in results:
        report.samples += samples
        report.image_bytes += image_bytes
        for fault in faults:
            report.faults[fault.kind].append(fault)
    return report


@dataclass(frozen=True)
class _ChunkReader:
    source: Source

    def __call__(self, first: int) -> tuple[int, int, list[Fault]]:
        faults = list[Fault]()
        image_bytes = 0
        indices = range(first, min(first + _CHUNK, len(self.source)))
        for index in indices:
            try:
                raw = self.source[index]
                image_bytes += len(raw.image)
                decode_image(raw.image, self.source.name(index))
            except BadSample as exc:
                faults.append(exc.fault)
        return len(indices), image_bytes, faults
