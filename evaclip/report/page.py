"""`report.html` of a run and `comparison.html` of several: one file with everything inside, light or dark."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from statistics import mean, median
from typing import Any

from markupsafe import Markup

from evaclip.errors import UserError
from evaclip.report import render_template
from evaclip.report.charts import (
    RUN_COLOURS,
    accuracy_svg,
    compared,
    draw_panel,
    loss_svg,
    panels,
    percent,
    times_chance,
)
from evaclip.report.run_data import duration, read_run
from evaclip.report.theme import document
from evaclip.runs.log import read_config_and_log

_MISSING = "–"  # noqa: RUF001
_STANDING: dict[str, Callable[[Any, Any], str]] = {
    "model": lambda config, log: config["model"]["name"],
    "step": lambda config, log: f"{log[-1]['step']:,}",
    "samples seen": lambda config, log: f"{log[-1]['samples']:,}",
    "time": lambda config, log: duration(log[-1]["seconds"]),
    "loss, mean of the last tenth": lambda config, log: f"{mean(_values(log[-max(1, len(log) // 10) :], 'loss')):.4f}",
    "samples a second, median": lambda config, log: f"{median(_values(log, 'samples_per_second')):,.1f}",
    "MFU, median": lambda config, log: f"{median(values):.1%}" if (values := _values(log, "mfu")) else _MISSING,
    "steps left out": lambda config, log: f"{log[-1]['skipped']:,}",
}
"""Rows of the comparison's first table: title, and value by a run's configuration and records with a loss."""


def render_page(folder: Path) -> str:
    """The whole page as text.

    Raises:
        UserError: it is not a run folder, or nothing was logged yet.
    """
    run = read_run(folder)
    tiles = [(group, bar) for group in run["groups"] for bar in group.bars if bar.main]
    body = render_template(
        "run.html",
        **run,
        tiles=tiles[:4],
        loss=Markup(loss_svg(run["curve"])),
        accuracy=Markup(accuracy_svg(run["groups"]) if run["groups"] else ""),
        charts=[draw_panel(panel) for panel in panels(run["log"])],
        percent=percent,
        times_chance=times_chance,
    )
    return _document(f"{folder.name}: report of a training run", body)


def render_comparison(folders: Sequence[Path]) -> str:
    """The whole page as text.

    Raises:
        UserError: one is not a run folder or logged nothing yet, or there are more folders than colours.
    """
    if len(folders) > len(RUN_COLOURS):
        raise UserError(f"{len(folders)} runs are too many for one chart; accepted: up to {len(RUN_COLOURS)}")
    names = _names(folders)
    runs = {name: read_config_and_log(folder) for name, folder in zip(names, folders, strict=True)}
    records = [(config, [record for record in log if record.get("loss") is not None]) for config, log in runs.values()]
    flat = [dict(_leaves(config)) for config, _ in runs.values()]
    keys = sorted({key for leaves in flat for key in leaves} - {"name", "output"})
    standing = [[title, *(value(*each) for each in records)] for title, value in _STANDING.items()]
    settings = [[key, *(str(leaves.get(key, _MISSING)) for leaves in flat)] for key in keys]
    body = render_template(
        "comparison.html",
        names=names,
        standing=[row for row in standing if set(row[1:]) != {_MISSING}],
        charts=[draw_panel(panel, names) for panel in compared({name: log for name, (_, log) in runs.items()})],
        differences=[row for row in settings if len(set(row[1:])) > 1],
    )
    return _document(f"{', '.join(names)}: comparison of training runs", body)


def _document(title: str, body: str) -> str:
    return document(title, body, (files("evaclip.report") / "style.css").read_text(encoding="utf-8"))


def _names(folders: Sequence[Path]) -> list[str]:
    """The folders' names, with as many of their parents as it takes to tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    if len(set(parts)) < len(parts):
        raise UserError("the same run is given twice; accepted: different run folders")
    depth = 1
    while len({part[-depth:] for part in parts}) < len(parts):
        depth += 1
    return ["/".join(part[-depth:]) for part in parts]


def _values(log: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    return [float(record[key]) for record in log if key in record]


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
