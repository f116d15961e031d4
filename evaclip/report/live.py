"""How a run is going, for a terminal, from its folder alone."""

import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from evaclip.errors import UserError
from evaclip.run_files import CONFIG_FILE, LOG_FILE

_BARS = "▁▂▃▄▅▆▇█"
_COLUMNS = 60
_ROWS = (
    ("loss", "loss", "{:.4f}"),
    ("samples/s", "samples_per_second", "{:,.1f}"),
    ("tokens/s", "tokens_per_second", "{:,.0f}"),
    ("MFU", "mfu", "{:.1%}"),
    ("data wait", "data_wait", "{:.0%}"),
    ("communication", "communication", "{:.0%}"),
    ("communication, nothing beside it", "communication_exposed", "{:.0%}"),
    ("gradient norm", "grad_norm", "{:.3g}"),
    ("gradient norm, image tower", "grad_norm_visual", "{:.3g}"),
    ("gradient norm, text tower", "grad_norm_text", "{:.3g}"),
    ("update / weights, image tower", "update_ratio_visual", "{:.2e}"),
    ("update / weights, text tower", "update_ratio_text", "{:.2e}"),
    ("logit scale", "logit_scale", "{:.2f}"),
    ("learning rate", "lr", "{:.2e}"),
    ("memory, GiB", "memory_gib", "{:.2f}"),
    ("skipped steps", "skipped", "{:,}"),
    ("bad samples", "bad_samples", "{:,}"),
)
_SAMPLED = ("communication", "communication_exposed")


def render(folder: Path) -> Any:
    """The present state of a run, for rich to print.

    Raises:
        UserError: it is no run folder.
    """
    from rich.table import Table

    from evaclip.train.overrides import load_yaml
    from evaclip.train.progress import read_log

    if not (folder / CONFIG_FILE).is_file():
        raise UserError(f"{str(folder)!r} is no run folder: it has no {CONFIG_FILE}; `evaclip train` writes one")
    log = read_log(folder / LOG_FILE)
    records = [record for record in log if "eval" not in record]
    table = Table(title=_title(folder, load_yaml(folder / CONFIG_FILE), records))
    for heading in ("", "now", f"last {_COLUMNS} records"):
        table.add_column(heading, justify="right" if heading == "now" else "left")
    for title, key, form in _ROWS:
        values = [record.get(key) for record in records]
        # What is sampled is missing in most records.
        known = values if key not in _SAMPLED else [value for value in values if value is not None]
        now = known[-1] if known else None
        table.add_row(title, "" if now is None else form.format(now), sparkline(values[-_COLUMNS:]))
    for record in [record for record in log if "eval" in record][-1:]:
        for name, value in record["eval"].items():
            table.add_row(f"{name}, step {record['step']}", f"{value:.4g}", "")
    return table


def sparkline(values: Sequence[float | None]) -> str:
    """One bar for each value, between the smallest and the largest of them; a blank for one that is missing."""
    known = [value for value in values if value is not None]
    low, high = min(known, default=0.0), max(known, default=0.0)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(" " if value is None else _BARS[round((value - low) * scale)] for value in values)


def _title(folder: Path, config: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> str:
    total = config["schedule"]["steps"]
    step, seconds = (records[-1]["step"], records[-1]["seconds"]) if records else (0, 0.0)
    parts = [folder.name, f"step {step:,}" + (f" of {total:,}" if total else "")]
    if records:
        parts.append(f"{timedelta(seconds=round(seconds))} so far")
        age = time.time() - (folder / LOG_FILE).stat().st_mtime
        if total and step < total and step:
            parts.append(f"about {timedelta(seconds=round(seconds / step * (total - step)))} to go")
        parts.append(f"last record {timedelta(seconds=round(age))} ago")
    return ", ".join(parts)
