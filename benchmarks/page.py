"""Results as files for readers: one HTML page that needs nothing else, and a section of a Markdown page."""

from collections.abc import Mapping
from html import escape
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from benchmarks import plots
from benchmarks.operation import operations
from benchmarks.render import all_rows, failures, machine_facts, side_by_side, summary, summary_by_mode, tally_text
from benchmarks.results import Results, contests
from evaclip.atomic import replacing, write_text
from evaclip.errors import UserError
from evaclip.report.theme import document, themed_svg

WHOLE_MODELS = "dropin"
"""The operation with a picture of speedups: models before and after `accelerate`."""
_MARKERS = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
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


def split_markdown(page: Path) -> tuple[str, str]:
    """Return the parts of a Markdown page before and after its section for benchmarks, with the section's markers.

    Raises:
        UserError: the page can't be read, or lacks the two markers.
    """
    try:
        text = page.read_text(encoding="utf-8")
    except OSError as exc:
        raise UserError(f"can't read {page}: {exc}") from exc
    before, begin, rest = text.partition(_MARKERS[0])
    _, end, after = rest.partition(_MARKERS[1])
    if not begin or not end:
        raise UserError(f"{page} has no place for the table, the lines {_MARKERS[0]!r} and {_MARKERS[1]!r}")
    return before + begin, end + after


def write_markdown(results: Results, page: Path) -> Path:
    """Put machine, counts and table between a page's markers, and the pictures next to the page; return the page.

    Raises:
        UserError: as `split_markdown`.
    """
    before, after = split_markdown(page)
    facts = machine_facts(results.machine) | results.machine.versions
    name, command = facts.pop("device"), facts.pop("command", "")
    found = contests(results.rows)
    parts = [f"**{name}**: {', '.join(f'{fact} {text}' for fact, text in facts.items())}."]
    parts += [f"`{command}`"] if command else []
    parts += [*(f"> {note}" for note in results.machine.notes), tally_text(found), summary_by_mode(found).to_markdown()]
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
