"""What an evaluation leaves behind: a JSON file that says what was measured, on what and how; and a table."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from evaclip.atomic import write_json
from evaclip.errors import UserError, counted
from evaclip.machine import machine, versions

Task = Literal["zero-shot", "classify", "retrieval", "linear-probe", "knn"]


@dataclass(frozen=True)
class ModelFacts:
    """Which weights were measured."""

    name: str
    origin: str
    parameters: int
    weights_sha256: str


@dataclass(frozen=True)
class DataFacts:
    """What they were measured on; `unreadable` samples, and those below `min_size` pixels, took no part."""

    path: str
    fingerprint: str
    samples: int
    unreadable: int
    exif_orientation: bool = False
    min_size: int = 0


@dataclass(frozen=True)
class Evaluation:
    """One result with everything needed to repeat it.

    Attributes:
        title: what the data is called in tables and in the report.
        metrics: the result's `to_dict()`.
        prompts: the templates and their class names' number, for tasks that use them.
        date: when it was measured, UTC, ISO 8601.
    """

    task: Task
    title: str
    metrics: dict[str, Any]
    model: ModelFacts
    data: DataFacts
    transform: str
    precision: str
    device: str
    seconds: float
    prompts: dict[str, Any] | None = None
    date: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    versions: dict[str, str] = field(default_factory=versions)
    machine: dict[str, Any] = field(default_factory=machine)

    def save(self, path: Path) -> None:
        """Writes the JSON file, atomically."""
        write_json(path, asdict(self))

    @classmethod
    def load(cls, path: Path) -> "Evaluation":
        """Reads what `save` wrote; UserError for a file that it did not write."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            known = {entry.name for entry in fields(cls)}
            values = {name: value for name, value in content.items() if name in known}
            values["model"] = ModelFacts(**values["model"])
            values["data"] = DataFacts(**values["data"])
            return cls(**values)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as exc:
            raise UserError(f"{path} is no evaluation result ({type(exc).__name__}: {exc})") from exc


def print_evaluation(evaluation: Evaluation, console: Console | None = None) -> None:
    """A table of the result, and for classes the best and the worst of them."""
    console = console or Console()
    rows = _retrieval_rows if evaluation.task == "retrieval" else _class_rows
    (size, *header), *lines = rows(evaluation.metrics)
    console.print(f"{evaluation.task}: {evaluation.title}, {size}", style="bold", markup=False, soft_wrap=True)
    table = Table("")
    for column in header:
        table.add_column(column, justify="right")
    for line in lines:
        table.add_row(*line)
    console.print(table)
    for what, unreadable in _unreadable(evaluation):
        console.print(f"{unreadable:,} {what} could not be read and took no part", style="yellow", soft_wrap=True)
    if lacking := evaluation.metrics.get("lacking"):
        left_out = counted(evaluation.metrics["left_out"], "picture")
        what = f"{left_out} took no part: the classifier lacks {len(lacking):,} of their classes"
        console.print(f"{what}, such as {lacking[0]}", style="yellow", markup=False, soft_wrap=True)
    console.print(
        f"{evaluation.model.name} ({evaluation.model.origin}), {evaluation.data.samples:,} samples of "
        f"{evaluation.data.path}, {evaluation.precision} on {evaluation.device}, {evaluation.seconds:.1f} s",
        style="dim",
        soft_wrap=True,
    )


def _unreadable(evaluation: Evaluation) -> Iterator[tuple[str, int]]:
    data, train = evaluation.data, evaluation.metrics.get("train_unreadable", 0)
    if data.unreadable:
        yield f"of {data.samples + data.unreadable:,} samples", data.unreadable
    if train:
        yield f"of {evaluation.metrics['train_samples'] + train:,} samples to train on", train


def print_classes(evaluation: Evaluation, console: Console | None = None) -> None:
    """The table of all classes of a classification, worst first."""
    table = Table(title=f"classes of {evaluation.title}", title_justify="left")
    for name in ("class", "samples", "top-1", "top-5", "most often taken for"):
        table.add_column(name, justify="right" if name in ("samples", "top-1", "top-5") else "left")
    for entry in sorted(
        evaluation.metrics["per_class"], key=lambda entry: (entry["top1"], entry["top5"], entry["name"])
    ):
        shares = (_percent(entry["top1"]), _percent(entry["top5"]))
        table.add_row(entry["name"], f"{entry['samples']:,}", *shares, entry["mistaken_for"] or "")
    (console or Console()).print(table)


def _class_rows(metrics: dict[str, Any]) -> list[tuple[str, ...]]:
    """Of all tasks that find a picture's class, each with what it has."""
    if "train_samples" in metrics:
        size = f"{metrics['train_samples']:,} to train, {metrics['samples']:,} to test"
    else:
        size = f"{metrics['samples']:,} pictures, {metrics['classes']:,} classes"
    chance = _percent(metrics["chance_top1"])
    chance5 = _percent(metrics["chance_top5"]) if "chance_top5" in metrics else ""
    rows: list[tuple[str, ...]] = [(size, "accuracy", "chance")]
    rows += [("top-1", _percent(metrics["top1"]), chance), ("top-5", _percent(metrics["top5"]), chance5)]
    if "mean_per_class" in metrics:
        rows.append(("mean per class", _percent(metrics["mean_per_class"]), chance))
    if real := metrics.get("real"):
        rows += [(f"ReaL top-{k}, of {real['samples']:,}", _percent(real[f"top{k}"]), "") for k in (1, 5)]
    if "strength" in metrics:
        rows.append((f"chosen C: {metrics['strength']:g}", "", ""))
    return rows


def _retrieval_rows(metrics: dict[str, Any]) -> list[tuple[str, ...]]:
    cutoffs = list(metrics["text_to_image"]["recall"])
    what = f"{metrics['images']:,} pictures, {metrics['captions']:,} captions"
    rows: list[tuple[str, ...]] = [(what, *(f"R@{k}" for k in cutoffs), "median rank", "mean rank")]
    for name in ("text_to_image", "image_to_text"):
        direction = metrics[name]
        recalls = tuple(_percent(direction["recall"][k]) for k in cutoffs)
        ranks = (f"{direction['median_rank']:,.1f}", f"{direction['mean_rank']:,.1f}")
        rows.append((name.replace("_", " "), *recalls, *ranks))
        rows.append(("  chance", *(_percent(direction["chance"][k]) for k in cutoffs), "", ""))
    rows.append(("mean recall", _percent(metrics["mean_recall"]), *("" for _ in range(len(cutoffs) + 1))))
    return rows


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"
