"""How a run is going, for a terminal, from its folder alone."""

import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from textwrap import wrap
from typing import Any, NamedTuple

from rich.console import Group
from rich.table import Table
from rich.text import Text

from evaclip.errors import UserError
from evaclip.report.run_data import Objects, describe_event, describe_state
from evaclip.runs.files import CONFIG_FILE, EVENTS_FILE, LOG_FILE
from evaclip.runs.log import is_share, load_yaml, read_log

_BARS = "▁▂▃▄▅▆▇█"
# Less important rows come last and are cut first on a low terminal.
_ROWS = (
    ("loss", "loss", "{:.4f}"),
    ("accuracy in the batch", "accuracy", "{:.1%}"),
    ("samples/s", "samples_per_second", "{:,.1f}"),
    ("data wait", "data_wait", "{:.0%}"),
    ("gradient norm", "grad_norm", "{:.3g}"),
    ("learning rate, image tower", "lr_visual", "{:.2e}"),
    ("learning rate, text tower", "lr_text", "{:.2e}"),
    ("skipped steps", "skipped", "{:,}"),
    ("bad samples", "bad_samples", "{:,}"),
    ("MFU", "mfu", "{:.1%}"),
    ("memory, GiB", "memory_gib", "{:.2f}"),
    ("logit scale", "logit_scale", "{:.2f}"),
    ("loss scale", "loss_scale", "{:g}"),
    ("update / weights, image tower", "update_ratio_visual", "{:.2e}"),
    ("update / weights, text tower", "update_ratio_text", "{:.2e}"),
    ("gradient norm, image tower", "grad_norm_visual", "{:.3g}"),
    ("gradient norm, text tower", "grad_norm_text", "{:.3g}"),
    ("tokens/s", "tokens_per_second", "{:,.0f}"),
)
_LAST_EVENTS = 3
_FRAME = 10  # columns that a table of three columns takes for borders and padding
_HEADING = 4  # lines besides the rows
_FEWEST_BARS = 8


class _Row(NamedTuple):
    title: str
    now: str
    values: Sequence[float | None]


def render(folder: Path, width: int, height: int | None = None) -> Group:
    """The present state of a run, for rich to print.

    Args:
        width: columns of the terminal; as many of the newest values are drawn as it has room for.
        height: lines of the terminal, for the most important numbers alone; None shows all.

    Raises:
        UserError: it is not a run folder.
    """
    if not (folder / CONFIG_FILE).is_file():
        raise UserError(f"{str(folder)!r} is not a run folder: it has no {CONFIG_FILE}; `evaclip train` writes one")
    log, events = read_log(folder / LOG_FILE), read_log(folder / EVENTS_FILE)
    records, last_events = [record for record in log if "eval" not in record], events[-_LAST_EVENTS:]
    title = _title(folder, load_yaml(folder / CONFIG_FILE), records, events)
    lines = (f"{time:%d %b %H:%M:%S}  step {step:,}  {what}" for time, step, what in map(describe_event, last_events))
    last = [Text(line, no_wrap=height is not None, overflow="ellipsis") for line in lines]
    rows = _rows(records, [record for record in log if "eval" in record])
    if height is not None:
        # Rich leaves the last line of a terminal to the cursor.
        rows = rows[: max(1, height - 1 - _HEADING - len(wrap(title, width)) - len(last))]
    return Group(Text(title, style="bold"), _table(rows, width), *last)


def _rows(records: Objects, evaluations: Objects) -> list[_Row]:
    rows = []
    for title, key, form in _ROWS:
        values = [record.get(key) for record in records]
        now = values[-1] if values else None
        if not values or any(value is not None for value in values):
            rows.append(_Row(title, "" if now is None else form.format(now), values))
    if evaluations:
        last = evaluations[-1]
        rows[1:1] = [
            _Row(
                f"{'evaluation, seconds' if name == 'seconds' else name}, step {last['step']:,}",
                "" if value is None else f"{value:.2%}" if is_share(name) else f"{value:.4g}",
                [other["eval"].get(name) for other in evaluations],
            )
            for name, value in last["eval"].items()
            if not isinstance(value, int)  # counts don't change
        ]
    return rows


def _table(rows: Sequence[_Row], width: int) -> Table:
    now = max(len("now"), *(len(row.now) for row in rows))
    titles = min(max(len(row.title) for row in rows), width - _FRAME - now - _FEWEST_BARS)
    bars = max(_FEWEST_BARS, width - _FRAME - now - titles)
    table = Table()
    table.add_column("", width=titles, no_wrap=True)
    table.add_column("now", width=now, no_wrap=True, justify="right")
    table.add_column(f"last {bars}", width=bars, no_wrap=True)
    for row in rows:
        table.add_row(row.title, row.now, _sparkline(row.values[-bars:]))
    return table


def _sparkline(values: Sequence[float | None]) -> str:
    """One bar for each value, between the smallest and the largest of them; a blank for one that is missing."""
    numbers = [value for value in values if value is not None]
    low, high = min(numbers, default=0.0), max(numbers, default=0.0)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(" " if value is None else _BARS[round((value - low) * scale)] for value in values)


def _title(folder: Path, config: Mapping[str, Any], records: Objects, events: Objects) -> str:
    total = (config.get("schedule") or {}).get("steps")
    step, seconds = (records[-1]["step"], records[-1]["seconds"]) if records else (0, 0.0)
    parts = [folder.name, f"step {step:,}" + (f" of {total:,}" if total else "")]
    if records:
        parts.append(f"{timedelta(seconds=round(seconds))} so far")
    state = describe_state(folder, records, events)
    if state is not None:
        parts.append(state)
    elif total and 0 < step < total:
        parts.append(f"about {timedelta(seconds=round(seconds / step * (total - step)))} to go")
    if records:
        age = time.time() - (folder / LOG_FILE).stat().st_mtime
        parts.append(f"last record {timedelta(seconds=round(age))} ago")
    return ", ".join(parts)
