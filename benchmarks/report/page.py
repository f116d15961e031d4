"""The pages: an overview of everything, and one for each operation."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from benchmarks.columns import machine_facts, tally_text
from benchmarks.contests import Contest, contests, panels
from benchmarks.operation import operations
from benchmarks.report.charts import bars
from benchmarks.report.drawing import save, svg
from benchmarks.report.overview import ROOFLINE_FILE, overview
from benchmarks.report.speedups import speedups
from benchmarks.report.tables import page_name, rows_table, summary_table
from benchmarks.results import Results
from evaclip.atomic import write_text
from evaclip.report.theme import document

INDEX, _WHOLE_MODELS = "index.html", "dropin"
_KIND = "Benchmark of evakernels"
_OVERVIEW_NOTE = (
    "Above, operations with matrix products under this machine's roofs: left of the bend the limit is its memory, "
    "right of it its matrix products; a line joins the candidates of a case. Below, each dot is a shape and dtype: "
    "this library's fastest backend above, then torch eager, then the fastest peer. The roofline is the least time "
    "that the machine's copy rate and matrix rate, measured in this run, allow for the bytes and FLOPs that the "
    "operation needs at least; where data stays in the cache, more than 100 % is possible."
)
_BARS_NOTE = (
    "Length is time relative to torch eager, the dashed line: shorter is faster. Behind the time stands how many times "
    "as fast as torch eager that is. A thin line spans p20 to p80. Bars above three times torch eager's time are cut."
)
_VERDICT_NOTE = (
    "The verdict is the time of the best peer over that of this library's fastest backend. The best peer is the "
    "fastest of all others whose results are right, torch eager and torch.compile among them. Both are measured in the "
    "same rounds; where the ratios of the rounds lie on both sides of 1, nobody can tell. A click on a heading sorts."
)
_TABLE_NOTE = "A click on a heading sorts. Errors are against float64, beside that of torch eager in the same dtype."


def write_report(results: Results, folder: Path) -> Path:
    """Writes the report of a result into `folder`; returns the path of its first page.

    It leaves `index.html` and a page for each operation, each complete in itself, and `roofline.png`, without anything
    measured none; of whole models before and after `accelerate` there is `speedups.png` too.
    """
    for op in dict.fromkeys(row.op for row in results.rows):
        _write_op_page(results, op, folder / page_name(op))
    save(overview(results), folder / ROOFLINE_FILE)
    save(speedups(results, _WHOLE_MODELS), folder / "speedups.png")
    return _write_index(results, folder / INDEX)


def _write_index(results: Results, path: Path) -> Path:
    found = contests(results.rows)
    body = [
        f'<p class="kind">{_KIND}</p><h1>{escape(results.machine.name)}</h1>',
        _navigation(results, "overview"),
        notes_box(results),
        f"<h2>Ours against the best peer</h2><p>{tally_text(found)}</p><p>{_VERDICT_NOTE}</p>",
        summary_table(found),
        _failures(found),
        f"<h2>Against torch eager and against the machine</h2>{_overview(results)}",
        _pairs("Absent", results.absent),
        facts_list(results),
    ]
    return write_page(path, f"{_KIND}: {results.machine.name}", body)


def _write_op_page(results: Results, op: str, path: Path) -> Path:
    found = contests(row for row in results.rows if row.op == op)
    known = operations().get(op)
    body = [
        f'<p class="kind"><a href="{INDEX}">{_KIND}</a></p><h1>{escape(op)}</h1>',
        f'<p class="summary">{escape(known.summary)}</p>' if known else "",
        f'<p class="summary">{escape(results.machine.name)}, {results.machine.date[:10]}</p>',
        _navigation(results, op),
        notes_box(results),
        f"<h2>Time</h2><p>{_BARS_NOTE}</p>{_bars(found)}",
        f"<h2>All rows</h2><p>{_TABLE_NOTE}</p>{rows_table(found)}",
        _failures(found),
    ]
    return write_page(path, f"{op}: {_KIND}", body)


def write_page(path: Path, title: str, body: Sequence[str]) -> Path:
    """Writes a whole page, with styles and scripts inside; returns its path."""
    here = Path(__file__).parent
    styles, script = ((here / name).read_text(encoding="utf-8") for name in ("style.css", "sort.js"))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, document(title, "\n".join(part for part in body if part), styles, script))
    return path


def _navigation(results: Results, here: str) -> str:
    pages = {"overview": INDEX} | {row.op: page_name(row.op) for row in results.rows}
    links = [
        f'<span aria-current="page">{escape(text)}</span>' if text == here else f'<a href="{page}">{escape(text)}</a>'
        for text, page in pages.items()
    ]
    return f'<nav aria-label="Pages">{"".join(links)}</nav>'


def notes_box(results: Results) -> str:
    """Why the numbers are doubtful; empty if nothing says so."""
    if not results.machine.notes:
        return ""
    items = "".join(f"<li>{escape(note)}</li>" for note in results.machine.notes)
    return f'<div class="notes" role="note"><strong>These numbers are doubtful.</strong><ul>{items}</ul></div>'


def _overview(results: Results) -> str:
    figure = overview(results)
    if figure is None:
        return "<p>Nothing could be measured.</p>"
    label = "Roofline, and dots for every operation and mode: times as fast as torch eager, share of the roofline"
    return f"<p>{_OVERVIEW_NOTE}</p><figure>{svg(label, figure)}</figure>"


def _bars(found: Sequence[Contest]) -> str:
    plots = []
    for (_, mode, dtype), panel in panels(found).items():
        plot = svg(f"Bars: time of all candidates, {mode}, {dtype}", bars(panel))
        plots.append(f"<figure><figcaption>{mode.capitalize()}, {dtype}</figcaption>{plot}</figure>")
    return f'<div class="plots">{"".join(plots)}</div>'


def _failures(found: Sequence[Contest]) -> str:
    failures = {
        f"{contest.title}: {row.candidate}": row.failure for contest in found for row in contest.rows if row.failure
    }
    return _pairs("Failed or wrong", failures)


def facts_list(results: Results, title: str = "The machine and the run") -> str:
    """What there is to know about machine and run."""
    return _pairs(title, {**machine_facts(results.machine), **results.machine.versions})


def _pairs(title: str, pairs: Mapping[str, str]) -> str:
    if not pairs:
        return ""
    lines = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(text)}</dd></div>" for name, text in pairs.items())
    return f'<h2>{title}</h2><dl class="wide">{lines}</dl>'
