"""What a journal comes to: a table, small files beside it, and the exit status."""

import json
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.gpu_check.records import Record
from benchmarks.gpu_check.stage import Unit, key_of
from benchmarks.results import Row
from evaclip.atomic import write_text

PASSED, FAILED, INCOMPLETE, NO_GPU, DISK_FULL = 0, 1, 3, 4, 5
"""Exit statuses; 2 is wrong input."""
KINDS = ("passed", "failed", "died", "refused")
_NAMED = 8
"""Of the units that are open."""
_HEADING = ("CUDA kernels", "measured, ms", "predicted, ms", "measured / predicted", "limiter", "predicted for")
_MEANING = "A prediction, of instructions and bytes that were counted without a GPU and published rates:"


def summarize(records: Sequence[Record], units: Sequence[Unit], errors: dict[str, str]) -> dict[str, Any]:
    """The counts of each stage, what failed, what was refused and what is open."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    seconds: Counter[str] = Counter()
    failures = [{"stage": stage, "unit": "", "case": "", "error": error} for stage, error in errors.items()]
    refusals: list[dict[str, Any]] = []
    finished: set[tuple[str, str]] = set()
    for record in records:
        kind, stage = record["record"], record.get("stage", "")
        if kind in ("end", "died"):
            status = record["status"] if kind == "end" else "died"
            counts[stage][status] += 1
            told = {name: record[name] for name in ("stage", "unit", "case", "error")}
            if status in ("failed", "died"):
                failures.append(told)
            elif status == "refused":
                refusals.append(told)
        elif kind == "unit":
            seconds[stage] += record["seconds"]
            if record["status"] != "incomplete":
                finished.add((stage, record["unit"]))
    ends = {key_of(record): record for record in records if record["record"] in ("end", "died")}
    open_units = [f"{unit.stage}: {unit.name}" for unit in units if (unit.stage, unit.name) not in finished]
    stages = dict.fromkeys([*(unit.stage for unit in units), *counts])
    return {
        "header": records[0],
        "stages": {
            name: {kind: counts[name][kind] for kind in KINDS} | {"seconds": round(seconds[name], 1)} for name in stages
        },
        "failures": failures,
        "refusals": refusals,
        "open": open_units,
        "predicted": predictions(list(ends.values())),
        "status": FAILED if failures else INCOMPLETE if open_units else PASSED,
    }


def predictions(ends: Sequence[Record]) -> list[list[str]]:
    """The lines of a table, of which the last one is the model's error; none without predictions."""
    found, ratios = [], []
    for record in ends:
        told = record["data"].get("predicted") if record.get("status") == "passed" else None
        if not told:
            continue
        for row in (Row(**values) for values in record["data"]["rows"]):
            if row.candidate == "evakernels cuda" and row.median_ms:
                ratios.append(row.median_ms / told["ms"])
                numbers = [f"{row.median_ms:.3f}", f"{told['ms']:.3f}", f"{ratios[-1]:.2f}"]
                found.append([record["case"], *numbers, told["limiter"], told["gpu"]])
    if ratios:
        worst = max(ratios, key=lambda ratio: max(ratio, 1 / ratio))
        found.append(
            [f"all {len(ratios)}: median; worst", "", "", f"{statistics.median(ratios):.2f}; {worst:.2f}", "", ""]
        )
    return found


def show(summary: dict[str, Any], console: Console) -> None:
    """Prints the table, and below it what failed and what is open."""
    console.print(title(summary["header"]), markup=False, highlight=False, soft_wrap=True)
    table = Table("stage", *KINDS, "seconds")
    for name, counts in summary["stages"].items():
        table.add_row(name, *(str(counts[kind] or "") for kind in KINDS), f"{counts['seconds']:.0f}")
    console.print(table)
    for line in [*beside(summary), *lines(summary)]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def write(summary: dict[str, Any], journal: Path) -> None:
    """Leaves the summary beside the journal, as JSON and in Markdown."""
    write_text(journal.with_suffix(".summary.json"), json.dumps(summary, indent=1))
    rows = [
        [name, *(counts[kind] for kind in KINDS), f"{counts['seconds']:.0f}"]
        for name, counts in summary["stages"].items()
    ]
    told = "\n".join(f"- {line}" for line in lines(summary))
    text = [title(summary["header"]), table_of(["stage", *KINDS, "seconds"], rows), *beside(summary), told]
    write_text(journal.with_suffix(".summary.md"), "\n\n".join(filter(None, text)) + "\n")


def beside(summary: dict[str, Any]) -> list[str]:
    """Measured and predicted times in Markdown; nothing without predictions."""
    rows = summary["predicted"]
    return [_MEANING, table_of(_HEADING, rows)] if rows else []


def table_of(heading: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table in Markdown, whose columns but for the first are numbers."""
    lines = [heading, ["---"] + ["---:"] * (len(heading) - 1), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)


def title(header: Record) -> str:
    """The card, its driver, torch and the commit in one line."""
    machine = header["machine"]
    rehearsal = "REHEARSAL, no measurement: " if header["rehearsal"] else ""
    parts = (machine["name"], f"driver {machine['driver'] or '?'}", f"torch {machine['evakernels']['torch']}")
    return f"{rehearsal}{', '.join(parts)}, commit {header['commit'] or '?'}"


def lines(summary: dict[str, Any], refused: bool = True) -> list[str]:
    """What failed, what was refused for which reason, and what is open."""
    found = [f"FAILED {_line(entry)}" for entry in summary["failures"]]
    alike: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for entry in summary["refusals"] if refused else ():
        alike[entry["stage"], entry["error"]].append(entry)
    for first, *others in alike.values():
        found.append(f"refused {_line(first)}" + (f" (and {len(others)} more)" if others else ""))
    if summary["open"]:
        named, more = summary["open"][:_NAMED], len(summary["open"]) - _NAMED
        found.append(f"open, for --resume: {', '.join(named)}" + (f" and {more} more" if more > 0 else ""))
    return found


def _line(entry: Record) -> str:
    where = ": ".join(str(entry[name]) for name in ("stage", "unit", "case") if entry[name])
    return f"{where}: {' '.join(entry['error'].split())[:300]}"
