"""Journals become what is committed: a result for `report`, launch configurations, and the tables of docs/gpu-check.md.

No number is typed by hand: what is there is written anew from the journals.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import plugins
from benchmarks.gpu_check import summary, tables
from benchmarks.gpu_check.records import Journal, Record
from benchmarks.gpu_check.stage import key_of
from benchmarks.operation import operations
from benchmarks.origin import ROOT
from benchmarks.report.markdown import split_page, write_section
from benchmarks.report.page import write_report
from benchmarks.results import Machine, Results, Row
from evaclip.atomic import write_text, writing
from evaclip.errors import UserError

SECTION, PICTURE = "gpu-check", "gpu-roofline.png"


def merge(journals: Sequence[Path], *, mixed: bool = False, root: Path = ROOT) -> list[Path]:
    """Merges journals; of a case that several have, the last one's counts. Returns what was written.

    Args:
        journals: of one card and commit, unless they may be `mixed`.
        root: the repository.

    Raises:
        UserError: a journal is of a rehearsal, or damaged; cards or commits differ; the page has no place for tables.
    """
    folder, page = root / "benchmarks/results", root / "docs/gpu-check.md"
    read = [Journal(path).read() for path in journals]
    _check(journals, [records[0] for records in read], mixed)
    records = [*read[0], *(record for more in read[1:] for record in more[1:])]
    ends = {key_of(record): record for record in records if record["record"] in ("end", "died")}
    plugins.load()
    before, after = split_page(page, SECTION)
    with writing(folder):
        results = _results(ends)
        written = []
        if results is not None:
            target = folder / results.file_name
            results.write_json(target)
            written.append(target)
        counts = summary.summarize([records[0], *ends.values()], [], {})
        write_text(page, "\n\n".join([before, *tables.sections(counts, list(ends.values())), after]))
        if results is not None and any(row.failure is None for row in results.rows):
            written += [write_section(results, page, PICTURE), write_report(results, root / "build/gpu-check/report")]
        else:
            written.append(page)
        written += _write_tuning(ends, root / "evakernels/tuning")
    return written


def _check(journals: Sequence[Path], headers: Sequence[Record], mixed: bool) -> None:
    for path, header in zip(journals, headers, strict=True):
        if header["rehearsal"]:
            raise UserError(f"{path} is a rehearsal: its kernels were interpreted, and its times mean nothing")
    commits, cards = [header["commit"] for header in headers], [header["machine"]["name"] for header in headers]
    for what, names in (("commit", commits), ("card", cards)):
        found = dict.fromkeys(names)
        if len(found) > 1 and not mixed:
            raise UserError(f"the journals are of more than one {what}: {', '.join(found)}; --mixed merges them anyway")


def _results(ends: dict[tuple[str, str, str], Record]) -> Results | None:
    """All rows, in the order of the operations; None where nothing was timed."""
    rows: dict[tuple[str, ...], Row] = {}
    absent: dict[str, str] = {}
    found = ends.get(("timing", "machine", "ceilings"), {}).get("data")
    machine = Machine(**found) if found else None
    for data in (record.get("data") or {} for (stage, _, _), record in ends.items() if stage == "timing"):
        for values in data.get("rows", ()):
            row = Row(**values)
            rows[row.key] = row
        absent |= data.get("absent", {})
        if machine is not None:
            machine.notes += [note for note in data.get("notes", ()) if note not in machine.notes]
            machine.clocks = data.get("clocks") or machine.clocks
    if machine is None or not rows:
        return None
    machine.command = "make gpu-check"
    order = list(operations())
    return Results(machine, sorted(rows.values(), key=lambda row: (order.index(row.op), row.case)), absent)


def _write_tuning(ends: dict[tuple[str, str, str], Record], folder: Path) -> list[Path]:
    """The file of the GPU that launch configurations were searched on, with those that it found."""
    found: dict[str, list[dict[str, Any]]] = {}
    data: dict[str, Any] = {}
    for (stage, op, _), record in ends.items():
        if stage == "tuning" and record.get("status") == "passed":
            data = record["data"]
            found.setdefault(op, []).append(data["entry"])
    if not found:
        return []
    from evakernels import tuning
    from evakernels.tuning import search

    shipped = tuning.table(data["gpu"], data["capability"])
    for op, entries in found.items():
        shapes = [entry["shape"] for entry in entries]
        found[op] = entries + [entry for entry in shipped[op] if entry["shape"] not in shapes]
    return [search.write(data["gpu"], found, data["capability"], folder)]
