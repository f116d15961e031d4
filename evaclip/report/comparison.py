"""`comparison.html`: several runs beside each other, in the same charts."""

from collections.abc import Callable, Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from statistics import mean, median
from typing import Any

from evaclip.errors import UserError
from evaclip.report.curves import RUN_COLOURS, compared, panel_html
from evaclip.report.run_data import read_log_of
from evaclip.report.state import duration
from evaclip.report.theme import document, table

KIND = "Comparison of training runs"
_MISSING = "–"  # noqa: RUF001


def render_comparison(folders: Sequence[Path]) -> str:
    """The whole page as text.

    Raises:
        UserError: one is no run folder or logged nothing yet, or there are more than lines can be told apart.
    """
    if len(folders) > len(RUN_COLOURS):
        raise UserError(f"{len(folders)} runs are too many for one chart; accepted: up to {len(RUN_COLOURS)}")
    names = _names(folders)
    configs, logs = {}, {}
    for name, folder in zip(names, folders, strict=True):
        configs[name], logs[name] = read_log_of(folder)
    css = (files("evaclip.report") / "style.css").read_text(encoding="utf-8")
    body = [
        f'<p class="kind">{KIND}</p><h1>{escape(", ".join(names))}</h1>',
        '<p class="summary">Every chart is over the samples seen.</p>',
        "<h2>Where they stand</h2>",
        table(["", *names], [[title, *values] for title, values in _standing(configs, logs)]),
        "<h2>Curves</h2>",
        f'<div class="curves">{"".join(panel_html(panel, names) for panel in compared(logs))}</div>',
        "<h2>What they were told differently</h2>",
        _differences(configs),
    ]
    return document(f"{', '.join(names)}: {KIND.lower()}", "\n".join(body), css)


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
