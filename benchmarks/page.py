"""Results as files for readers: one HTML page that needs nothing else, and a section of a Markdown page."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from benchmarks import plots
from benchmarks.candidates import OURS
from benchmarks.operation import EMBED, operations
from benchmarks.render import (
    NOTHING,
    Cell,
    Table,
    all_rows,
    failures,
    machine_facts,
    side_by_side,
    significant,
    summary,
    summary_by_mode,
    tally_text,
)
from benchmarks.results import Results, Row, contests, grouped
from evaclip.atomic import replacing, write_text
from evaclip.errors import UserError
from evaclip.report.theme import document, themed_svg

WHOLE_MODELS = "dropin"
"""The operation with a picture of speedups: models before and after `accelerate`."""
_PRECISIONS = ("fp32", "bf16", "int8")
_KIND = "Benchmark of evakernels"
_VERDICT_NOTE = (
    "The verdict is the time of the best peer over the one of this library's fastest backend. The best peer is the "
    "fastest of all others with right results, torch eager and torch.compile among them. Both are measured in the "
    "same rounds; a difference is noise where the ratios of the rounds lie on both sides of 1. A click on a heading "
    "sorts."
)
_ROOFLINE_NOTE = (
    "Above, operations with matmuls under this machine's roofs: left of the bend memory limits, right of it matmuls; a "
    "line joins the candidates of a case. Below, each dot is a shape and dtype: this library's fastest backend, torch "
    "eager, and the fastest peer. The roofline is the least time for the bytes and FLOPs of the operation, by the "
    "machine's copy and matmul rates, measured in this run; data in a cache allows more than 100 %."
)
_SPEEDUPS_NOTE = "Speedup over the baseline, the line at 1."
_ROWS_NOTE = "A click on a heading sorts. Errors are against float64, next to torch eager's in the same dtype."
_SEVERAL_NOTE = (
    "This library's fastest backend in each result, against the best peer there. Ratios are over the first result: the "
    "time there over the time here, above 1 is faster."
)


def write_page(several: Mapping[str, Results], file: Path) -> Path:
    """Write one HTML page with everything about one result, or with several results next to each other.

    Args:
        several: results by name; several are compared with the first.
        file: the page; it needs no other file.

    Returns:
        `file`.
    """
    results, *others = several.values()
    title = " and ".join(several) if others else f"{_KIND}: {results.machine.name}"
    body = _compare_results(several) if others else _describe_result(results)
    here = Path(__file__).parent
    styles, script = ((here / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, document(title, "\n".join(filter(None, body)), styles, script))
    return file


def _describe_result(results: Results) -> list[str]:
    found, known = contests(results.rows), operations()
    summaries = {op: known[op].summary for op in dict.fromkeys(one.op for one in found) if op in known}
    roofline = _figure(_ROOFLINE_NOTE, "Roofline, speedups and shares of the roofline", plots.draw_roofline(results))
    return [
        f'<p class="kind">{_KIND}</p><h1>{escape(results.machine.name)}</h1>',
        _notes(results),
        f"<h2>Ours against the best peer</h2><p>{tally_text(found)}</p><p>{_VERDICT_NOTE}</p>",
        summary(found).to_html(),
        _pairs("Failed or wrong", failures(found)),
        "<h2>Against torch eager and against the machine</h2>",
        roofline or "<p>Nothing could be measured.</p>",
        *(
            _figure(f"{escape(text)}. {_SPEEDUPS_NOTE}", f"Speedups of {op}", plots.draw_speedups(results, op))
            for op, text in summaries.items()
        ),
        f"<h2>All rows</h2><p>{_ROWS_NOTE}</p>",
        all_rows(found, case=("op", "mode", "shape", "dtype")).to_html(),
        _pairs("Absent", results.absent),
        _facts(results),
    ]


def _compare_results(several: Mapping[str, Results]) -> list[str]:
    return [
        f"<h1>{' and '.join(map(escape, several))}</h1>",
        *(f"<p>{escape(name)}: {escape(one.machine.name)}</p>{_notes(one)}" for name, one in several.items()),
        f"<h2>Ours against the best peer</h2><p>{_SEVERAL_NOTE}</p>{side_by_side(several).to_html()}",
        *(_facts(one, f"The run of {escape(name)}") for name, one in several.items()),
    ]


def _figure(note: str, label: str, figure: Figure | None) -> str:
    if figure is None:
        return ""
    with mpl.rc_context(plots.LOOK):
        return f"<p>{note}</p><figure>{themed_svg(figure, label)}</figure>"


def _notes(results: Results) -> str:
    if not results.machine.notes:
        return ""
    items = "".join(f"<li>{escape(note)}</li>" for note in results.machine.notes)
    return f'<div class="notes" role="note"><strong>These numbers are doubtful.</strong><ul>{items}</ul></div>'


def _facts(results: Results, title: str = "The machine and the run") -> str:
    return _pairs(title, machine_facts(results.machine) | results.machine.versions)


def _pairs(title: str, pairs: Mapping[str, str]) -> str:
    if not pairs:
        return ""
    lines = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(text)}</dd></div>" for name, text in pairs.items())
    return f'<h2>{title}</h2><dl class="wide">{lines}</dl>'


# --- the section of a Markdown page ---------------------------------------------------------------------------------


def section(operations: Sequence[str], busy: bool) -> str:
    """Return the name of the section of a Markdown page for results of these operations.

    Raises:
        UserError: the engines' operation is among others.
    """
    if EMBED in operations and len(set(operations)) > 1:
        raise UserError(f"--page must get {EMBED} alone, or other operations, got {', '.join(operations)}")
    return ("engines" if EMBED in operations else "benchmarks") + (", busy" if busy else "")


def split_markdown(page: Path, section: str) -> tuple[str, str]:
    """Return the parts of a Markdown page before and after a section, with the section's markers.

    Raises:
        UserError: the page can't be read, or lacks the two markers.
    """
    markers = f"<!-- {section}: begin -->", f"<!-- {section}: end -->"
    try:
        text = page.read_text(encoding="utf-8")
    except OSError as exc:
        raise UserError(f"can't read {page}: {exc}") from exc
    before, begin, rest = text.partition(markers[0])
    _, end, after = rest.partition(markers[1])
    if not begin or not end:
        raise UserError(f"{page} has no place for the table, the lines {markers[0]!r} and {markers[1]!r}")
    return before + begin, end + after


def write_markdown(results: Results, page: Path) -> Path:
    """Put machine, counts and table between a page's markers, and the pictures next to the page; return the page.

    Raises:
        UserError: as `split_markdown`.
    """
    before, after = split_markdown(page, section([row.op for row in results.rows], results.machine.busy))
    facts = machine_facts(results.machine) | results.machine.versions
    name, command = facts.pop("device"), facts.pop("command", "")
    found = contests(results.rows)
    parts = [f"**{name}**: {', '.join(f'{fact} {text}' for fact, text in facts.items())}."]
    parts += [f"`{command}`"] if command else []
    parts += [f"> {note}" for note in results.machine.notes]
    if results.rows[0].op == EMBED:
        return _write_engines(results, page, before, parts, after)
    parts += [tally_text(found), summary_by_mode(found).to_markdown()]
    for file, label, figure in (
        ("roofline.png", "Speed and share of the roofline of each op", plots.draw_roofline(results)),
        ("speedups.png", "Speedups of whole models", plots.draw_speedups(results, WHOLE_MODELS)),
    ):
        if figure is not None:
            with replacing(page.parent / file) as temporary:
                figure.savefig(temporary, format="png")
            parts.append(f"![{label}]({file})")
    write_text(page, "\n\n".join([before, *parts, after]))
    return page


def _write_engines(results: Results, page: Path, before: str, parts: Sequence[str], after: str) -> Path:
    failed = {f"{row.candidate}: {row.failure}": None for row in results.rows if row.failure}
    absent = {f"{name.removeprefix(f'{EMBED}: ')}: {why}": None for name, why in results.absent.items()}
    reasons = [f"- {reason}" for reason in (*failed, *absent)]
    table = engine_table(results.rows).to_markdown()
    write_text(page, "\n\n".join([before, *parts, table, *(["\n".join(reasons)] if reasons else []), after]))
    return page


def engine_table(rows: Sequence[Row]) -> Table:
    """A row for each engine and precision, the fastest first in each precision; the best of each column is bold.

    The cosine is the mean to float64's embeddings, over the largest batch.
    """
    shapes = {row.shape: "text" if ":text" in row.shape else "image" for row in rows}
    towers = list(dict.fromkeys(shapes.values()))
    titles = [*(f"cosine, {tower}" for tower in towers), *(f"{shape}, ms" for shape in shapes)]
    table = Table("engines", [(title, "") for title in ("engine", "precision", *titles)], texts=2)
    found = {
        name: {row.shape: row for row in group} for name, group in grouped(rows, lambda row: row.candidate).items()
    }
    for precision in _PRECISIONS:
        engines = {name: by_shape for name, by_shape in found.items() if _precision(name) == precision}
        best = {shape: min(_time(by_shape.get(shape)) for by_shape in engines.values()) for shape in shapes if engines}
        for name, by_shape in sorted(
            engines.items(), key=lambda one: sum(math.log(_time(one[1].get(s))) for s in shapes)
        ):
            cells = [Cell(name.removesuffix(f" {precision}").replace(OURS, "`Encoder`")), Cell(precision)]
            cells += [_cosine([row for row in by_shape.values() if shapes[row.shape] == tower]) for tower in towers]
            table.rows.append(cells + [_time_cell(by_shape.get(shape), best[shape]) for shape in shapes])
    return table


def _precision(candidate: str) -> str:
    """The precision in a candidate's name; float32 isn't named."""
    last = candidate.rpartition(" ")[2]
    return last if last in _PRECISIONS else _PRECISIONS[0]


def _time(row: Row | None) -> float:
    return math.inf if row is None or row.failure or not row.median_ms else row.median_ms


def _time_cell(row: Row | None, best: float) -> Cell:
    if (ms := _time(row)) == math.inf:
        return Cell((row.mark if row else "") or NOTHING)
    return Cell(f"**{significant(ms)}**" if ms == best else significant(ms), ms)


def _cosine(rows: Sequence[Row]) -> Cell:
    """The mean cosine that follows from the error of embeddings of length 1: their squared distance is 2 - 2 cosine."""
    judged = [(row.sizes["batch"], 1 - row.error**2 / 2) for row in rows if row.error is not None]
    if not judged:
        return Cell(NOTHING)
    cosine = max(judged)[1]
    return Cell(f"{cosine:.4f}".removesuffix(".0000"), cosine)
