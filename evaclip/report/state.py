"""What a run is doing, and what happened to it, as far as its files tell."""

import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from statistics import median
from textwrap import shorten
from typing import Any

from evaclip.run_files import EVENTS_FILE, LOCK_FILE, LOG_FILE, STOPPED
from evaclip.train.run_lock import STALE, read_lock

_USUAL = 20
"""Records that tell how long it usually takes from one to the next."""
_PATIENCE = 5.0
"""Times the usual interval after which it is said that nothing was written."""

Objects = Sequence[Mapping[str, Any]]


def what_stands_still(folder: Path, records: Objects, events: Objects) -> str | None:
    """How a run ended, or for how long it has been silent; None for one that goes on as usual."""
    now = time.time()
    written = max((_changed(folder / name) for name in (LOG_FILE, EVENTS_FILE)), default=0.0)
    silence = duration(max(0.0, now - max(written, _changed(folder / LOCK_FILE))))
    usual = _usual_interval(records)
    is_late = usual is not None and now - written > max(STALE, _PATIENCE * usual)
    if _is_held(folder / LOCK_FILE, now):
        if events and "end" in events[-1]:
            return "starting again"
        return f"its process lives, but has written nothing for {duration(now - written)}" if is_late else None
    if events and "end" in events[-1]:
        return ended(events)
    # Where no events were written, no lock was held either.
    return f"no sign of life for {silence}" if events or is_late else None


def ended(events: Objects) -> str:
    """How a run ended whose last event is its end."""
    if error := events[-1]["end"]:
        return f"ended by an error: {shorten(error, 200)}"
    is_stopped = len(events) > 1 and STOPPED in events[-2].get("message", "")
    return "ended: stopped by a signal" if is_stopped else "ended: done"


def told(event: Mapping[str, Any]) -> tuple[datetime, int, str]:
    """When something happened (UTC), at what step, and what."""
    moment = datetime.fromisoformat(event["time"])
    if "start" in event:
        count = event["start"]["processes"]
        return moment, event["step"], f"start of {count} process{'es' if count > 1 else ''}"
    if "end" in event:
        return moment, event["step"], event["end"] or "end"
    return moment, event["step"], event["message"]


def duration(seconds: float) -> str:
    """'42 s', '6 min 10 s' or '3 h 5 min'."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _is_held(path: Path, now: float) -> bool:
    found = read_lock(path)
    if found is None:
        return False
    holder, beat = found
    dead = holder.is_dead()
    return now - beat / 1e9 < STALE if dead is None else not dead


def _usual_interval(records: Objects) -> float | None:
    seconds = [record["seconds"] for record in records[-_USUAL:]]
    return median(later - earlier for earlier, later in pairwise(seconds)) if len(seconds) > 1 else None


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
