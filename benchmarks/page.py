"""Results as files for readers: one HTML page that needs nothing else, and a section of a Markdown page."""

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
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


def write_page(results: Results, file: Path) -> Path:
    """Write one HTML page with everything about a result, and return its path.

    Args:
        results: the result.
        file: the page; it needs no other file.
    """
    found, known = contests(results.rows), operations()
    speedups = {op: plots.draw_speedups(results, op) for op in dict.fromkeys(one.op for one in found) if op in known}
    here = Path(__file__).parent
    template, styles, script = (here.joinpath(f"page.{kind}").read_text("utf-8") for kind in ("html", "css", "js"))
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    body = environment.from_string(template).render(
        machine=results.machine,
        tally=tally_text(found),
        cases=summary(found),
        failures=failures(found),
        roofline=_svg(plots.draw_roofline(results), "Roofline, speedups and shares of the roofline"),
        speedups=[(known[op].summary, _svg(plot, f"Speedups of {op}")) for op, plot in speedups.items() if plot],
        rows=all_rows(found, case=("op", "mode", "shape", "dtype")),
        absent=results.absent,
        facts=_facts(results),
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, document(f"Benchmark of evakernels: {results.machine.name}", body, styles, script))
    return file


def _svg(figure: Figure | None, label: str) -> Markup:
    if figure is None:
        return Markup()
    with mpl.rc_context(plots.LOOK):
        return Markup(themed_svg(figure, label))


def _facts(results: Results) -> dict[str, str]:
    return machine_facts(results.machine) | results.machine.versions


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
    facts = _facts(results)
    name, command = facts.pop("device"), facts.pop("command", "")
    parts = [f"**{name}**: {', '.join(f'{fact} {text}' for fact, text in facts.items())}."]
    parts += [f"`{command}`"] if command else []
    parts += [f"> {note}" for note in results.machine.notes]
    if results.rows[0].op == EMBED:
        reasons = [f"{row.candidate}: {row.failure}" for row in results.rows if row.failure]
        reasons += [f"{name.removeprefix(f'{EMBED}: ')}: {why}" for name, why in results.absent.items()]
        parts.append(engine_table(results.rows).to_markdown())
        parts += ["\n".join(f"- {reason}" for reason in dict.fromkeys(reasons))] if reasons else []
    else:
        found = contests(results.rows)
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
