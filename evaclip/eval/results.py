"""Stored results of an evaluation: a JSON file, a table, and a gallery of retrieved images."""

import hashlib
import re
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import TypeAdapter
from rich.console import Console
from rich.table import Table

from evaclip.atomic import reading, write_json
from evaclip.errors import counted
from evaclip.machine import machine, versions

Task = Literal["zero-shot", "classify", "retrieval", "linear-probe", "knn"]


class _Stored:
    """A dataclass that is stored as a JSON file."""

    def save(self: Any, path: Path) -> None:
        """Write the JSON file, atomically."""
        write_json(path, asdict(self))

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a file of `save`. Keys of other versions are ignored.

        Raises:
            UserError: for any other file.
        """
        with reading(path):
            return TypeAdapter(cls).validate_json(path.read_bytes())


@dataclass(frozen=True)
class ModelFacts:
    """The weights that were evaluated; `weights` says whether those of a run are averaged."""

    name: str
    origin: str
    parameters: int
    weights_sha256: str
    weights: str = ""


@dataclass(frozen=True)
class DataFacts:
    """The data of an evaluation; `unreadable` samples, and those below `min_size` pixels, are left out."""

    path: str
    fingerprint: str
    samples: int
    unreadable: int
    exif_orientation: bool = False
    min_size: int = 0


@dataclass(frozen=True)
class Evaluation(_Stored):
    """A result with everything needed to repeat it.

    Attributes:
        title: name of the data in tables and in the report.
        metrics: the result's `to_dict()`.
        prompts: templates and class names, for tasks that have them.
        date: UTC, ISO 8601.
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

    @property
    def file_name(self) -> str:
        """Name of the stored result: equal if task, title, data, transform, kind of weights and prompts are."""
        key = repr((self.data.path, self.transform, self.model.weights, self.prompts, self.metrics.get("classes")))
        title = re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")
        return f"{self.task}-{title}-{hashlib.sha256(key.encode()).hexdigest()[:8]}.json"

    @property
    def setting(self) -> str:
        """Kind of weights, and templates if there are few, in words."""
        templates = (self.prompts or {}).get("templates", ())
        return ", ".join(filter(None, (self.model.weights, *(templates if len(templates) < 3 else ()))))


def print_evaluation(evaluation: Evaluation, console: Console | None = None) -> None:
    """Print a table of the result, and what was left out."""
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
    data, train = evaluation.data, evaluation.metrics.get("train_unreadable", 0)
    left_out = []
    if data.unreadable:
        left_out.append(f"{data.unreadable:,} of {data.samples + data.unreadable:,} samples could not be read")
    if train:
        samples = evaluation.metrics["train_samples"] + train
        left_out.append(f"{train:,} of {samples:,} samples to train on could not be read")
    if lacking := evaluation.metrics.get("lacking"):
        images = counted(evaluation.metrics["left_out"], "image")
        reason = f"the classifier lacks {len(lacking):,} of their classes, such as {lacking[0]}"
        left_out.append(f"{images} left out: {reason}")
    for note in left_out:
        console.print(note, style="yellow", markup=False, soft_wrap=True)
    origin = ": ".join(filter(None, (evaluation.model.origin, evaluation.model.weights)))
    console.print(
        f"{evaluation.model.name} ({origin}), {evaluation.data.samples:,} samples of "
        f"{evaluation.data.path}, {evaluation.precision} on {evaluation.device}, {evaluation.seconds:.1f} s",
        style="dim",
        soft_wrap=True,
    )


def print_classes(evaluation: Evaluation, console: Console | None = None) -> None:
    """Print a table of all classes of a classification, worst first."""
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
    """Size and rows of a task that predicts classes."""
    if "train_samples" in metrics:
        size = f"{metrics['train_samples']:,} to train, {metrics['samples']:,} to test"
    else:
        size = f"{metrics['samples']:,} images, {metrics['classes']:,} classes"
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
    what = f"{metrics['images']:,} images, {metrics['captions']:,} captions"
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


@dataclass(frozen=True)
class Found:
    """A retrieved image: the key of its sample, whether it is the right one, and a WebP data URI."""

    key: str
    correct: bool
    image: str


@dataclass(frozen=True)
class Query:
    """A text query, the rank (from 1) of its image among all, and the retrieved images, best first."""

    text: str
    rank: int
    found: tuple[Found, ...]


@dataclass(frozen=True)
class Section:
    """Queries chosen by one rule, which `note` describes."""

    title: str
    note: str
    queries: tuple[Query, ...]


@dataclass(frozen=True)
class Gallery(_Stored):
    """Examples of a retrieval; `pictures` is the number of images searched."""

    title: str
    pictures: int
    sections: tuple[Section, ...]
