"""The pages: an overview of everything, and one for each operation."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from html import escape
from pathlib import Path

from matplotlib.axes import Axes

from benchmarks.columns import LEVEL, machine_facts, significant
from benchmarks.contests import Contest, contests, panels, tally
from benchmarks.operation import operations
from benchmarks.report.charts import LINE, bar_lines, draw_bars
from benchmarks.report.drawing import MARKERS, Paint, svg
from benchmarks.report.roofline import STRIP, draw_roofline, draw_shares, draw_speedups, page_name, strip_lines
from benchmarks.report.tables import rows_table, summary_table
from benchmarks.results import Results, Row
from evaclip.report.theme import document

INDEX = "index.html"
_KIND = "Benchmark of evakernels"
_ROOFLINE_NOTE = (
    "Each point is a candidate on one shape, dtype and mode; a line joins those of the same case. Left of the bend the "
    "limit is the machine's memory, right of it its matrix products; both rates were measured in this run."
)
_STRIP_NOTE = (
    "Each line is an operation, each dot a shape and dtype: this library's fastest backend above, then torch eager, "
    "then the fastest peer. The roofline is the least time that the machine's copy rate and matrix rate allow for the "
    "bytes and FLOPs that the operation needs at least; where data stays in the cache, more than 100 % is possible."
)
_BARS_NOTE = (
    "Length is time relative to torch eager, the dashed line: shorter is faster. The pale number is how many times as "
    "fast as torch eager it is. A thin line spans p20 to p80. Bars above three times torch eager's time are cut."
)
_VERDICT_NOTE = (
    "The verdict is the time of the best peer over that of this library's fastest backend. The best peer is the "
    "fastest of all others whose results are right, torch eager and torch.compile among them. Both are measured in the "
    "same rounds; where the ratios of the rounds lie on both sides of 1, nobody can tell. A click on a heading sorts."
)
_TABLE_NOTE = "A click on a heading sorts. Errors are against float64, beside that of torch eager in the same dtype."


@dataclass(frozen=True)
class Book:
    """What all pages of a report share."""

    results: Results
    paint: Paint
    ops: tuple[str, ...]


def index_page(book: Book) -> str:
    """The overview, as HTML."""
    results = book.results
    found = contests(results.rows)
    body = [
        f'<p class="kind">{_KIND}</p><h1>{escape(results.machine.name)}</h1>',
        f'<p class="summary">{escape(_subtitle(results))}</p>',
        _navigation(book, here=None),
        notes_box(results),
        _tiles(results, found),
        f"<h2>Ours against the best peer</h2><p>{_VERDICT_NOTE}</p>",
        summary_table(found, book.paint),
        _failures(found),
        _roofline(book, found),
        "<h2>Against torch eager and against the machine</h2>",
        f"<p>{_STRIP_NOTE}</p>{_strips(book, found)}",
        _pairs("Absent", results.absent),
        facts_list(results),
    ]
    return page_document(f"{_KIND}: {results.machine.name}", body)


def op_page(book: Book, op: str) -> str:
    """The page of one operation, as HTML."""
    rows = [row for row in book.results.rows if row.op == op]
    found = contests(rows)
    known = operations().get(op)
    body = [
        f'<p class="kind"><a href="{INDEX}">{_KIND}</a></p><h1>{escape(op)}</h1>',
        f'<p class="summary">{escape(known.summary)}</p>' if known else "",
        f'<p class="summary">{escape(_subtitle(book.results, named=True))}</p>',
        _navigation(book, here=op),
        notes_box(book.results),
        f"<h2>Time</h2><p>{_BARS_NOTE}</p>{_bars(found, book.paint)}",
        f"<h2>All rows</h2><p>{_TABLE_NOTE}</p>{rows_table(found, book.paint)}",
        _failures(found),
    ]
    return page_document(f"{op}: {_KIND}", body)


def page_document(title: str, body: Sequence[str]) -> str:
    """A whole page, with styles and scripts inside."""
    here = Path(__file__).parent
    styles, script = ((here / name).read_text(encoding="utf-8") for name in ("style.css", "sort.js"))
    return document(title, "\n".join(part for part in body if part), styles, script)


def _subtitle(results: Results, named: bool = False) -> str:
    machine = results.machine
    parts = [machine.name] if named else []
    parts.append(f"{machine.threads} CPU threads")
    parts += [f"torch {machine.versions['torch']}"] if "torch" in machine.versions else []
    parts += [f"commit {machine.commit}"] if machine.commit else []
    parts += [machine.date[:10]] if machine.date else []
    return " · ".join(parts)


def _navigation(book: Book, here: str | None) -> str:
    links = [_link(INDEX, "overview", here is None), *(_link(page_name(op), op, op == here) for op in book.ops)]
    return f'<nav aria-label="Pages">{"".join(links)}</nav>'


def _link(address: str, text: str, here: bool) -> str:
    if here:
        return f'<span aria-current="page">{escape(text)}</span>'
    return f'<a href="{address}">{escape(text)}</a>'


def notes_box(results: Results) -> str:
    """Why the numbers are doubtful; empty if nothing says so."""
    if not results.machine.notes:
        return ""
    items = "".join(f"<li>{escape(note)}</li>" for note in results.machine.notes)
    return f'<div class="notes" role="note"><strong>These numbers are doubtful.</strong><ul>{items}</ul></div>'


def _tiles(results: Results, found: Sequence[Contest]) -> str:
    rates = {"copy, read and write": (results.machine.copy_gbps, "GB/s")}
    rates |= {f"matrix product, {dtype}": (rate, "TFLOP/s") for dtype, rate in results.machine.matmul_tflops.items()}
    tiles = [
        _tile(label, f"{significant(rate)} <small>{unit}</small>", "what this machine can do")
        for label, (rate, unit) in rates.items()
    ]
    counts = tally(found)
    value = f"{counts['faster']} <small>of {counts.total()} cases</small>"
    note = f"slower in {counts['slower']}, {LEVEL} in {counts['level']}"
    tiles.append(_tile("faster than the best peer", value, note))
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _tile(label: str, value: str, note: str) -> str:
    return (
        f'<div class="tile"><div class="label">{escape(label)}</div><div class="value">{value}</div>'
        f'<div class="note">{escape(note)}</div></div>'
    )


def _roofline(book: Book, found: Sequence[Contest]) -> str:
    title = "<h2>Roofline</h2>"
    shown = [contest for contest in found if contest.intensity and contest.measured]
    if not shown:
        return f"{title}<p>No operation with matrix products was measured.</p>"
    ops = ", ".join(dict.fromkeys(contest.op for contest in shown))
    plot = svg(
        f"Roofline: achieved TFLOP/s over FLOPs a byte for {ops}",
        (5.4, 4.3),
        lambda axes: draw_roofline(axes, found, book.results.machine, book.paint),
    )
    others = [op for op in book.ops if op not in {contest.op for contest in shown}]
    without = f"<p>Without matrix products, so only below: {escape(', '.join(others))}.</p>" if others else ""
    legend = _legend(book.results.rows, book.paint) + _dtype_legend(book.results)
    return (
        f'{title}<p>Every operation that multiplies matrices, against what this machine can do.</p><div class="hero">'
        f'<figure>{plot}</figure><div class="aside">{legend}<p>{_ROOFLINE_NOTE}</p>{without}</div></div>'
    )


def _legend(rows: Sequence[Row], paint: Paint) -> str:
    shown = {row.candidate for row in rows}
    items = (
        f'<span><i style="--colour: var(--{colour})"></i>{escape(name)}</span>'
        for name, colour in paint.names.items()
        if name in shown
    )
    return f'<div class="legend">{"".join(items)}</div>'


_SHAPES = {
    "o": '<circle cx="6.5" cy="6.5" r="5"/>',
    "s": '<rect x="2" y="2" width="9" height="9"/>',
    "^": '<path d="M6.5 1.5 12 11.5 1 11.5z"/>',
}


def _dtype_legend(results: Results) -> str:
    dtypes = dict.fromkeys(row.dtype for row in results.rows)
    items = (
        f'<span><svg viewBox="0 0 13 13" aria-hidden="true">{_SHAPES[MARKERS[dtype]]}</svg>{dtype}</span>'
        for dtype in dtypes
        if dtype in MARKERS
    )
    return f'<div class="legend">{"".join(items)}</div>'


def _strips(book: Book, found: Sequence[Contest]) -> str:
    lines = len(strip_lines(found))
    if not lines:
        return "<p>Nothing could be measured.</p>"
    size = (4.7, 0.7 + STRIP * lines)
    drawers: Mapping[str, Callable[[Axes], None]] = {
        "times as fast as torch eager": partial(draw_speedups, found=found, paint=book.paint),
        "share of the roofline": partial(draw_shares, found=found, paint=book.paint),
    }
    plots = (
        f"<figure><figcaption>{title.capitalize()}</figcaption>"
        f"{svg(f'Dots for every operation and mode: {title}', size, draw)}</figure>"
        for title, draw in drawers.items()
    )
    return f'<div class="plots">{"".join(plots)}</div>'


def _bars(found: Sequence[Contest], paint: Paint) -> str:
    plots = []
    for (_, mode, dtype), panel in panels(found).items():
        label = f"Bars: time of all candidates, {mode}, {dtype}"
        plot = svg(label, (4.7, 0.2 + LINE * bar_lines(panel)), partial(draw_bars, panel=panel, paint=paint))
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
