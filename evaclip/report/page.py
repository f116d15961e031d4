"""`report.html` of a run and `comparison.html` of several: one file with everything inside, light or dark."""

from collections.abc import Callable, Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from statistics import mean, median
from typing import Any

from evaclip.errors import UserError
from evaclip.eval.results import Found, Gallery, Query, Section
from evaclip.report.charts import (
    RUN_COLOURS,
    accuracy_svg,
    compared,
    loss_svg,
    panel_html,
    panels,
    percent,
    times_chance,
)
from evaclip.report.run_data import BarGroup, LossCurve, RunData, duration, read_log_of
from evaclip.report.theme import document, table

KIND = "Report of a training run"
COMPARISON_KIND = "Comparison of training runs"
_MISSING = "–"  # noqa: RUF001
NO_EVALUATIONS = "Nothing has been evaluated yet: `evaclip eval` adds results."
LOSS_NOTE = "The loss of each logged step (pale) and its running mean."
GUESSING_NOTE = " The dashed line is the loss of guessing which of the batch's texts belongs to a picture."
RETURNS_NOTE = " Vertical lines: the run went back to a checkpoint and left data out."
CURVES_NOTE = "What else was logged, over the samples seen."
EVENTS_NOTE = "Starts, messages and ends of the run, in UTC."
ACCURACY_NOTE = "Every number is shown next to the chance level on the same data."
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
        *(_classes(title, rows) for title, rows in run.classes.items()),
        _validation(run),
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


def _classes(title: str, rows: Sequence[Sequence[str]]) -> str:
    header = ("class", "pictures", "top-1", "most often taken for")
    return f"<details><summary>{escape(title)}: best and worst classes</summary>{table(header, rows)}</details>"


def _validation(run: RunData) -> str:
    if not run.validation:
        return ""
    return f"<h2>Validation while training</h2>{table(('set and metric', 'last value', 'step'), run.validation)}"


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


def render_comparison(folders: Sequence[Path]) -> str:
    """The whole page as text.

    Raises:
        UserError: one is no run folder or logged nothing yet, or there are more folders than colours.
    """
    if len(folders) > len(RUN_COLOURS):
        raise UserError(f"{len(folders)} runs are too many for one chart; accepted: up to {len(RUN_COLOURS)}")
    names = _names(folders)
    configs, logs = {}, {}
    for name, folder in zip(names, folders, strict=True):
        configs[name], logs[name] = read_log_of(folder)
    css = (files("evaclip.report") / "style.css").read_text(encoding="utf-8")
    body = [
        f'<p class="kind">{COMPARISON_KIND}</p><h1>{escape(", ".join(names))}</h1>',
        '<p class="summary">Every chart is over the samples seen.</p>',
        "<h2>Where they stand</h2>",
        table(["", *names], [[title, *values] for title, values in _standing(configs, logs)]),
        "<h2>Curves</h2>",
        f'<div class="curves">{"".join(panel_html(panel, names) for panel in compared(logs))}</div>',
        "<h2>Differences of the configurations</h2>",
        _differences(configs),
    ]
    return document(f"{', '.join(names)}: {COMPARISON_KIND.lower()}", "\n".join(body), css)


def _names(folders: Sequence[Path]) -> list[str]:
    """The folders' names, with as many of their parents as it takes to tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    if len(set(parts)) < len(parts):
        raise UserError("the same run is given twice; accepted: different run folders")
    depth = 1
    while len({part[-depth:] for part in parts}) < len(parts):
        depth += 1
    return ["/".join(part[-depth:]) for part in parts]


def _standing(configs: Mapping[str, Any], logs: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    losses = {name: [record for record in log if record.get("loss") is not None] for name, log in logs.items()}

    def each(value: Callable[[Any, Any], str]) -> list[str]:
        return [value(configs[name], log) for name, log in losses.items()]

    return [
        ("model", each(lambda config, log: config["model"]["name"])),
        ("step", each(lambda config, log: f"{log[-1]['step']:,}")),
        ("samples seen", each(lambda config, log: f"{log[-1]['samples']:,}")),
        ("time", each(lambda config, log: duration(log[-1]["seconds"]))),
        ("loss, mean of the last tenth", each(lambda config, log: f"{_mean_of_end(log):.4f}")),
        ("samples a second, median", each(lambda config, log: f"{_median(log, 'samples_per_second'):,.1f}")),
        ("MFU, median", each(lambda config, log: f"{_median(log, 'mfu'):.1%}")),
        ("steps left out", each(lambda config, log: f"{log[-1]['skipped']:,}")),
    ]


def _mean_of_end(log: Sequence[Mapping[str, Any]]) -> float:
    return float(mean(record["loss"] for record in log[-max(1, len(log) // 10) :]))


def _median(log: Sequence[Mapping[str, Any]], key: str) -> float:
    return float(median(record[key] for record in log))


def _differences(configs: Mapping[str, Mapping[str, Any]]) -> str:
    flat = {name: dict(_leaves(config)) for name, config in configs.items()}
    keys = sorted({key for leaves in flat.values() for key in leaves} - {"name", "output"})
    rows = [[key, *(str(leaves.get(key, _MISSING)) for leaves in flat.values())] for key in keys]
    different = [row for row in rows if len(set(row[1:])) > 1]
    return table(["", *flat], different) if different else "<p>Nothing: their configurations are the same.</p>"


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    leaves = []
    for key, value in tree.items():
        nested = isinstance(value, Mapping) and value
        leaves += _leaves(value, f"{prefix}{key}.") if nested else [(f"{prefix}{key}", value)]
    return leaves
