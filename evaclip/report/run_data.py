"""The contents of a report, read from a run folder, and the state of a run."""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from statistics import median
from textwrap import shorten
from typing import Any

import yaml

from evaclip.errors import counted
from evaclip.eval.results import Evaluation, Gallery
from evaclip.redact import redacted
from evaclip.runs.files import (
    EVALUATIONS_FOLDER,
    EVENTS_FILE,
    GALLERIES_FOLDER,
    LOCK_FILE,
    LOG_FILE,
    STOPPED,
)
from evaclip.runs.lock import is_held
from evaclip.runs.log import is_share, read_config_and_log, read_log

_SMOOTHING = 0.02
_CLASSES = 5
_USUAL = 20
"""Records that tell how long it usually takes from one to the next."""
_PATIENCE = 5.0
"""Times the usual interval after which it is said that nothing was written."""

_LEAST_SILENCE = 60.0
"""Seconds without a record that are never reported."""

Objects = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class LossCurve:
    """Logged losses over the samples seen.

    Attributes:
        smooth: the running mean of `loss`, over a window of 2 % of the run.
        guessing: the loss of a model that knows nothing, or None if that is not a single number.
        returns: where the run went back to a checkpoint, in samples seen.
    """

    samples: list[int]
    loss: list[float]
    smooth: list[float]
    batch_size: int
    guessing: float | None
    returns: tuple[int, ...] = ()


@dataclass(frozen=True)
class Bar:
    """One accuracy in [0, 1] next to its chance level; the `main` one of a group stands out."""

    label: str
    value: float
    chance: float
    main: bool = False


@dataclass(frozen=True)
class BarGroup:
    """The accuracies of one evaluation."""

    title: str
    detail: str
    bars: tuple[Bar, ...]


def read_run(folder: Path) -> dict[str, Any]:
    """Read a run folder as the values of `run.html`.

    Returns:
        classes: (class, samples, top-1, most often taken for) by evaluation, the best and the worst classes.
        validation: (set and metric, value, step) of the last evaluation while training.
        events: (time, step, what happened), from the first start on.
        facts: (name, value) pairs by heading.
        config: the whole configuration as YAML text, without credentials.
        And `name`, `summary`, `curve`, `groups` (`BarGroup`), `galleries`, `log`.

    Raises:
        UserError: it is not a run folder, or nothing was logged yet.
    """
    config, log = read_config_and_log(folder)
    records = [record for record in log if record.get("loss") is not None]
    events: list[dict[str, Any]] = redacted(read_log(folder / EVENTS_FILE))
    evaluations = [Evaluation.load(path) for path in sorted((folder / EVALUATIONS_FOLDER).glob("*.json"))]
    evaluations.sort(key=lambda evaluation: (list(_TASKS).index(evaluation.task), evaluation.date))
    state = describe_state(folder, records, events) or "goes on"
    loss_name = config["loss"]["name"] if config["task"]["name"] == "contrastive" else None
    return {
        "name": folder.name,
        "summary": _summary(config, records, evaluations),
        "curve": _loss_curve(records, config["batch_size"], loss_name),
        "groups": [group for evaluation in evaluations for group in _bar_groups(evaluation)],
        "classes": {
            ", ".join(filter(None, (evaluation.title, evaluation.setting))): rows
            for evaluation in evaluations
            if (rows := _class_rows(evaluation))
        },
        "validation": _validation_rows(log),
        "galleries": [Gallery.load(path) for path in sorted((folder / GALLERIES_FOLDER).glob("*.json"))],
        "log": log,
        "events": [(f"{at:%d %B %Y, %H:%M:%S}", f"{step:,}", what) for at, step, what in map(describe_event, events)],
        "facts": _facts(config, records, evaluations, events, state),
        "config": yaml.safe_dump(config, sort_keys=False),
    }


_TASKS = {
    "zero-shot": "zero-shot",
    "classify": "classification",
    "retrieval": "retrieval",
    "linear-probe": "linear probe",
    "knn": "k-NN",
}
"""Titles, in the order of the report."""


def _loss_curve(records: Sequence[dict[str, Any]], batch_size: int, loss_name: str | None) -> LossCurve:
    """The losses of a log's records, with their running mean.

    Args:
        loss_name: of a contrastive loss; None for any other.
    """
    losses = [record["loss"] for record in records]
    window = max(1, round(len(losses) * _SMOOTHING))
    trailing = (losses[max(0, end - window) : end] for end in range(1, len(losses) + 1))
    smooth = [sum(part) / len(part) for part in trailing]
    guessing = math.log(batch_size) if loss_name == "clip" else None
    returns = tuple(new["samples"] for old, new in pairwise(records) if new["step"] <= old["step"])
    return LossCurve([record["samples"] for record in records], losses, smooth, batch_size, guessing, returns)


def _bar_groups(evaluation: Evaluation) -> Iterator[BarGroup]:
    metrics = evaluation.metrics
    if evaluation.task == "retrieval":
        images = f"{metrics['images']:,} images, {metrics['captions']:,} captions"
        for name, title in (("text_to_image", "caption to image"), ("image_to_text", "image to caption")):
            direction = metrics[name]
            bars = [Bar(f"within {k}", direction["recall"][k], direction["chance"][k]) for k in direction["recall"]]
            first = Bar("first", bars[0].value, bars[0].chance, main=True)
            detail = ", ".join(filter(None, (images, evaluation.setting)))
            yield BarGroup(f"{evaluation.title}: {title}", detail, (first, *bars[1:]))
        return
    counts = f"{metrics['samples']:,} images, {metrics['classes']:,} classes"
    detail = ", ".join(filter(None, (counts, evaluation.setting)))
    chance = metrics["chance_top1"]
    top = Bar("top-1", metrics["top1"], chance, main=True), Bar("top-5", metrics["top5"], min(1.0, 5 * chance))
    yield BarGroup(f"{evaluation.title}: {_TASKS[evaluation.task]}", detail, top)


def _class_rows(evaluation: Evaluation) -> list[tuple[str, ...]]:
    """Return the `_CLASSES` best and the `_CLASSES` worst classes of a classification, best first."""
    classes = sorted(evaluation.metrics.get("per_class", ()), key=lambda entry: (-entry["top1"], entry["name"]))
    chosen = classes if len(classes) <= 2 * _CLASSES else [*classes[:_CLASSES], *classes[-_CLASSES:]]
    return [
        (entry["name"], f"{entry['samples']:,}", f"{entry['top1']:.0%}", entry["mistaken_for"] or "")
        for entry in chosen
    ]


def _validation_rows(log: Sequence[dict[str, Any]]) -> list[tuple[str, str, str]]:
    last: dict[str, tuple[str, str, str]] = {}
    for record in log:
        for name, value in record.get("eval", {}).items():
            if isinstance(value, float) and name != "seconds":
                last[name] = (name, f"{value:.2%}" if is_share(name) else f"{value:.4g}", f"{record['step']:,}")
    return list(last.values())


def _summary(config: dict[str, Any], records: Sequence[dict[str, Any]], evaluations: Sequence[Evaluation]) -> str:
    last = records[-1]
    parts = [config["model"]["name"]]
    if evaluations:
        parts.append(f"{evaluations[-1].model.parameters / 1e6:.1f} M parameters")
    samples = "image-text pairs" if config["task"]["name"] == "contrastive" else "images"
    parts.append(f"{last['samples']:,} {samples} in {duration(last['seconds'])}")
    if evaluations:
        machine = evaluations[-1].machine
        parts.append(", ".join(machine["gpus"]) or f"{machine['cores']} CPU cores, no GPU")
    return " · ".join(parts)


def _facts(
    config: dict[str, Any],
    records: Sequence[dict[str, Any]],
    evaluations: Sequence[Evaluation],
    events: Sequence[dict[str, Any]],
    state: str,
) -> dict[str, list[tuple[str, str]]]:
    last = records[-1]
    rate = median(record["samples_per_second"] for record in records)
    facts = {
        "Training": [
            ("model", config["model"]["name"]),
            ("data", config["data"]["train"] or "a mixture"),
            ("steps", f"{last['step']:,} of {config['batch_size']:,} samples"),
            ("state", state),
            ("samples seen", f"{last['samples']:,} ({last['epoch']:.1f} epochs)"),
            ("time", duration(last["seconds"])),
            ("speed", f"{rate:,.0f} samples/s (median)" + (f", MFU {last['mfu']:.0%}" if "mfu" in last else "")),
            ("optimizer", f"{config['optim']['name']}, peak rate {config['optim']['lr']:g}"),
            ("precision", config["precision"]),
            ("skipped steps", f"{last['skipped']:,}"),
            ("final loss", f"{last['loss']:.3f}"),
        ]
    }
    if evaluations:
        latest = max(evaluations, key=lambda evaluation: evaluation.date)
        machine = latest.machine
        facts["Evaluation"] = [
            ("weights", "/".join(Path(latest.model.origin).parts[-2:])),
            ("parameters", f"{latest.model.parameters:,}"),
            ("SHA-256", latest.model.weights_sha256[:16]),
            ("date", datetime.fromisoformat(latest.date).strftime("%d %B %Y, %H:%M UTC")),
            ("time", duration(sum(evaluation.seconds for evaluation in evaluations))),
        ]
        facts["Machine"] = _machine(machine, latest.versions)
    if starts := [event["start"] for event in events if "start" in event]:
        trained_on = _machine(starts[-1]["machine"], starts[-1]["versions"])
        facts["Training"].append(("processes", f"{starts[-1]['processes']:,}, started {counted(len(starts), 'time')}"))
        if facts.get("Machine") != trained_on:
            facts["Trained on" if evaluations else "Machine"] = trained_on
    return facts


def _machine(machine: dict[str, Any], versions: dict[str, str]) -> list[tuple[str, str]]:
    return [
        ("processor", f"{machine['processor']}, {machine['cores']} cores"),
        ("GPU", ", ".join(machine["gpus"]) or "none"),
        ("system", machine["system"]),
        *versions.items(),
    ]


def describe_state(folder: Path, records: Objects, events: Objects) -> str | None:
    """How a run ended, or for how long it has been silent; None for one that goes on as usual."""
    now = time.time()
    written = max((_changed(folder / name) for name in (LOG_FILE, EVENTS_FILE)), default=0.0)
    silence = duration(max(0.0, now - max(written, _changed(folder / LOCK_FILE))))
    usual = _usual_interval(records)
    is_late = usual is not None and now - written > max(_LEAST_SILENCE, _PATIENCE * usual)
    if is_held(folder / LOCK_FILE):
        if events and "end" in events[-1]:
            return "starting again"
        return f"its lock is held, but nothing was written for {duration(now - written)}" if is_late else None
    if events and "end" in events[-1]:
        return _describe_end(events)
    # Where no events were written, no lock was held either.
    return f"no sign of life for {silence}" if events or is_late else None


def _describe_end(events: Objects) -> str:
    """How a run ended, by its last event."""
    if error := events[-1]["end"]:
        return f"ended by an error: {shorten(error, 200)}"
    is_stopped = len(events) > 1 and STOPPED in events[-2].get("message", "")
    return "ended: stopped by a signal" if is_stopped else "ended: done"


def describe_event(event: Mapping[str, Any]) -> tuple[datetime, int, str]:
    """Time (UTC), step and description of an event."""
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


def _usual_interval(records: Objects) -> float | None:
    seconds = [record["seconds"] for record in records[-_USUAL:]]
    return median(later - earlier for earlier, later in pairwise(seconds)) if len(seconds) > 1 else None


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
