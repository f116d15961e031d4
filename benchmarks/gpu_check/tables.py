"""The tables of docs/gpu-check.md, from the records of journals: proofs, whole steps, what ncu counted, predictions."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from benchmarks.columns import NOTHING
from benchmarks.gpu_check.records import Record
from benchmarks.gpu_check.summary import KINDS, beside, lines, table_of, title

_GIB = 2**30


def sections(summary: dict[str, Any], ends: Sequence[Record]) -> list[str]:
    """Paragraphs of Markdown."""
    proofs = [[name, *(counts[kind] for kind in KINDS)] for name, counts in summary["stages"].items()]
    failures = "\n".join(f"- {line}" for line in lines(summary, refused=False))
    parts = [f"**{title(summary['header'])}**.", table_of(["stage", *KINDS], proofs), failures]
    if steps := list(_steps(ends)):
        heading = ["training step", "ms", "samples a second", "MFU", "peak, GiB", "planned, GiB"]
        parts += ["Whole training steps, LAMB included, in bfloat16 by autocast:", table_of(heading, steps)]
    if counted := list(_counted(ends)):
        heading = ["slowest kernel of", "kernel", "µs", "memory", "compute", "tensor cores", "occupancy", "registers"]
        parts += ["What ncu counted, in percent of what the card can do:", table_of(heading, counted)]
    return [part for part in [*parts, *beside(summary)] if part]


def _passed(stage: str, ends: Iterable[Record]) -> Iterator[tuple[str, dict[str, Any]]]:
    for record in ends:
        if record["stage"] == stage and record.get("status") == "passed":
            yield record["case"], record["data"]


def _steps(ends: Iterable[Record]) -> Iterator[list[Any]]:
    for name, data in _passed("timing", ends):
        if "samples_per_second" in data:
            times = [f"{1e3 * data['seconds']:.1f}", f"{data['samples_per_second']:,.0f}", f"{data['mfu']:.1%}"]
            yield [name, *times, *(f"{data[kind] / _GIB:.1f}" for kind in ("peak_bytes", "planned_bytes"))]


def _counted(ends: Iterable[Record]) -> Iterator[list[Any]]:
    names = ("memory_percent", "compute_percent", "tensor_percent", "occupancy_percent", "registers")
    for name, data in _passed("why", ends):
        numbers = [data.get(what) for what in names]
        shown = [NOTHING if number is None else f"{number:.0f}" for number in numbers]
        kernel = data["kernel"].partition("(")[0].replace("|", "\\|")
        yield [name, f"`{kernel}`", f"{data.get('nanoseconds', 0) / 1e3:.1f}", *shown]
