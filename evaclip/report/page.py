"""`report.html`: one file with everything inside, in the reader's light or dark theme."""

from html import escape
from importlib.resources import files

from evaclip.eval.results import Found, Gallery, Query, Section
from evaclip.report.charts import accuracy_svg, loss_svg, percent, times_chance
from evaclip.report.curves import panel_html, panels
from evaclip.report.run_data import BarGroup, LossCurve, RunData
from evaclip.report.theme import document, table

KIND = "Report of a training run"
NO_EVALUATIONS = "Nothing has been evaluated yet: `evaclip eval` adds results."
LOSS_NOTE = "The loss of each logged step (pale) and its running mean."
GUESSING_NOTE = " The dashed line is the loss of guessing which of the batch's texts belongs to a picture."
RETURNS_NOTE = " Vertical lines: the run went back to a checkpoint and left data out."
CURVES_NOTE = "What else was logged, over the samples seen."
EVENTS_NOTE = "Starts, messages and ends of the run, in UTC."
ACCURACY_NOTE = "Every number stands beside what guessing would reach on the same data."
GALLERY_NOTE = "Each row is a text and the pictures nearest to it, best first."


def render_page(run: RunData) -> str:
    """The whole page as text."""
    css = (files("evaclip.report") / "style.css").read_text(encoding="utf-8")
    body = [
        f'<p class="kind">{KIND}</p><h1>{escape(run.name)}</h1>',
        f'<p class="summary">{escape(run.summary)}</p>',
        _tiles(run.groups),
        f"<h2>Training</h2><p>{escape(_loss_note(run.curve))}</p>",
        loss_svg(run.curve),
        "<h2>Accuracy against chance</h2>",
        _accuracy(run.groups),
        *(_gallery(gallery) for gallery in run.galleries),
        f"<h2>How the training went</h2><p>{CURVES_NOTE}</p>",
        f'<div class="curves">{"".join(map(panel_html, panels(run.log)))}</div>',
        _events(run),
        "<h2>Facts of the run</h2>",
        _facts(run),
    ]
    return document(f"{run.name}: {KIND.lower()}", "\n".join(body), css)


def _loss_note(curve: LossCurve) -> str:
    guessing = "" if curve.guessing is None else GUESSING_NOTE
    return LOSS_NOTE + guessing + (RETURNS_NOTE if curve.returns else "")


def _tiles(groups: tuple[BarGroup, ...]) -> str:
    """The main bar of each of the first four evaluations."""
    main = [(group, bar) for group in groups for bar in group.bars if bar.main]
    tiles = [
        f'<div class="tile"><div class="label">{escape(group.title)}, {escape(bar.label)}</div>'
        f'<div class="value">{percent(bar.value)}</div>'
        f'<div class="note">{times_chance(bar)} chance</div></div>'
        for group, bar in main[:4]
    ]
    return f'<div class="tiles">{"".join(tiles)}</div>' if tiles else ""


def _accuracy(groups: tuple[BarGroup, ...]) -> str:
    if not groups:
        return f"<p>{escape(NO_EVALUATIONS)}</p>"
    keys = '<span><i class="bar"></i>accuracy</span><span><i class="tick"></i>chance</span>'
    return f'<p>{escape(ACCURACY_NOTE)}</p><div class="legend">{keys}</div>{accuracy_svg(groups)}'


def _gallery(gallery: Gallery) -> str:
    legend = (
        '<div class="legend"><span><i class="frame"></i>the picture that this text belongs to</span>'
        f"<span>{gallery.pictures:,} pictures searched</span></div>"
    )
    sections = "".join(_section(section, gallery.pictures) for section in gallery.sections)
    return f"<h2>{escape(gallery.title)}</h2><p>{escape(GALLERY_NOTE)}</p>{legend}{sections}"


def _section(section: Section, pictures: int) -> str:
    rows = "".join(_query(query, pictures) for query in section.queries)
    return f"<h3>{escape(section.title)}</h3><p>{escape(section.note)}</p>{rows}"


def _query(query: Query, pictures: int) -> str:
    place = "first" if query.rank == 1 else f"place {query.rank:,} of {pictures:,}"
    kind = "rank first" if query.rank == 1 else "rank"
    found = "".join(_picture(item) for item in query.found)
    return (
        f'<div class="query"><div><div class="text">{escape(query.text)}</div>'
        f'<div class="{kind}">{place}</div></div><div class="found">{found}</div></div>'
    )


def _picture(found: Found) -> str:
    kind = ' class="correct"' if found.correct else ""
    what = "the right picture" if found.correct else "another picture"
    return f'<img{kind} src="{escape(found.image)}" alt="{what}" title="{escape(found.key)}">'


def _events(run: RunData) -> str:
    rows = [(time, f"{step:,}", text) for time, step, text in run.events]
    return f"<h2>What happened</h2><p>{EVENTS_NOTE}</p>{table(['time', 'step', 'what'], rows)}" if rows else ""


def _facts(run: RunData) -> str:
    lists = "".join(
        f"<section><h3>{escape(heading)}</h3><dl>"
        + "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in pairs)
        + "</dl></section>"
        for heading, pairs in run.facts.items()
    )
    config = f"<details><summary>The whole configuration</summary><pre>{escape(run.config)}</pre></details>"
    return f'<div class="facts">{lists}</div>{config}'
