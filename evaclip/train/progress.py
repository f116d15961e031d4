"""Where a run reports: the terminal, JSON-lines files and TensorBoard."""

import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from textwrap import fill
from types import TracebackType
from typing import Any, Self

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

from evaclip.atomic import reading, write_text
from evaclip.machine import machine, versions
from evaclip.outputs import silence
from evaclip.run_files import EVENTS_FILE, LOG_FILE, TENSORBOARD_FOLDER
from evaclip.train.config import LogConfig
from evaclip.train.sinks import Record, Sink, is_share

_FURTHER = ("_top5", "/top5", "_r5")
"""Suffixes of metrics that the terminal omits; it shows the value at 1."""


class Report:
    """Passes everything on to all sinks; a context manager."""

    def __init__(self, sinks: list[Sink]) -> None:
        self._sinks = sinks

    def add(self, sinks: list[Sink]) -> None:
        """Tells these too from now on."""
        self._sinks += sinks

    def record(self, record: Record) -> None:
        for sink in self._sinks:
            sink.record(record)

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        for sink in self._sinks:
            sink.evaluation(step, metrics)

    def say(self, message: str) -> None:
        for sink in self._sinks:
            sink.say(message)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        # In reverse order, so that the first sinks can still report a failure.
        for sink in reversed(self._sinks):
            sink.close(error)


def open_report(
    config: LogConfig, folder: Path | None, start_step: int, total_steps: int, processes: int = 1
) -> Report:
    """The sinks that `config` asks for.

    Args:
        folder: of the run; None reports to the terminal only.
        start_step: what the files hold of later steps is dropped, so that a resumed run does not log a step twice.
        processes: that train together.
    """
    sinks: list[Sink] = []
    live = config.progress == "rich" or (config.progress == "auto" and sys.stdout.isatty())
    if config.progress != "none":
        sinks.append(LiveDisplay(start_step, total_steps) if live else PlainLines(total_steps))
    if folder is not None:
        sinks.append(JsonLines(folder / LOG_FILE, start_step))
        sinks.append(Events(folder / EVENTS_FILE, start_step, processes))
        if config.tensorboard:
            sinks.append(TensorBoard(folder / TENSORBOARD_FOLDER, start_step))
    return Report(sinks)


class PlainLines(Sink):
    """One line per record on standard output."""

    def __init__(self, total_steps: int) -> None:
        self._total = total_steps

    def record(self, record: Record) -> None:
        self.say(f"step {record.step}/{self._total}  {'  '.join(summary(record))}  eta {_eta(record, self._total)}")

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        for line in headlines(metrics):
            self.say(f"step {step}/{self._total}  {line}")

    def say(self, message: str) -> None:
        try:
            print(message, flush=True)
        except BrokenPipeError:
            silence()  # no reason to end a training: its files tell the same


class _BarAndNumbers(Progress):
    """Numbers in their own line: next to the bar, 80 columns aren't enough."""

    numbers = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        if self.numbers:
            # Where they take several lines none is broken: textwrap, unlike rich, breaks at no other space.
            yield Text(fill(self.numbers, self.console.width).replace("\xa0", " "))


class LiveDisplay(Sink):
    """A bar and the latest numbers, below the messages."""

    def __init__(self, start_step: int, total_steps: int) -> None:
        # Rich's own estimate is of the last 30 seconds, in which a large model makes no record.
        columns = (TextColumn("[bold]train"), BarColumn(), MofNCompleteColumn(), TextColumn("eta {task.fields[eta]}"))
        self._progress = _BarAndNumbers(*columns, console=Console())
        self._total = total_steps
        self._task = self._progress.add_task("train", total=total_steps, completed=start_step, eta="-:--")
        self._progress.start()

    def record(self, record: Record) -> None:
        self._progress.numbers = "  ".join(number.replace(" ", "\xa0") for number in summary(record))
        self._progress.update(self._task, completed=record.step, eta=_eta(record, self._total))

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        for line in headlines(metrics):
            self.say(f"step {step}: {line}")

    def say(self, message: str) -> None:
        self._progress.console.print(message, markup=False, highlight=False)

    def close(self, error: BaseException | None = None) -> None:
        self._progress.stop()


class _Lines:
    """A file that JSON objects are appended to; on a full disk they wait in memory until there is room."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("ab", buffering=0)
        self._waiting = b""

    def write(self, value: Mapping[str, Any]) -> None:
        self._waiting += json.dumps(value).encode() + b"\n"
        self._flush()

    def close(self) -> None:
        self._flush()
        self._file.close()

    def _flush(self) -> None:
        try:
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
        except OSError as exc:
            _warn(self._path.parent, exc.strerror or str(exc))


@cache
def _warn(folder: Path, reason: str) -> None:
    """Says once what keeps the logs from being written."""
    print(f"warning: the logs in {folder} can't be written ({reason}); the run goes on", file=sys.stderr, flush=True)


class JsonLines(Sink):
    """A file with one JSON object per record: `Record`'s fields, or `step` and `eval`."""

    def __init__(self, path: Path, start_step: int) -> None:
        _drop_later_records(path, start_step)
        self._lines = _Lines(path)

    def record(self, record: Record) -> None:
        self._lines.write(_without_nan(record.flat()))

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        self._lines.write({"step": step, "eval": _without_nan(metrics)})

    def close(self, error: BaseException | None = None) -> None:
        self._lines.close()


class Events(Sink):
    """A file with one JSON object for what happened: each start and end, and every message.

    Each has `time` (UTC) and `step`, and `start` (processes, machine, versions), `message`, or `end` (null, or what
    ended the run). It is history: what a resumed run does anew stays in it.
    """

    def __init__(self, path: Path, start_step: int, processes: int) -> None:
        self._lines = _Lines(path)
        self._step = start_step
        self._write("start", {"processes": processes, "machine": machine(), "versions": versions()})

    def record(self, record: Record) -> None:
        self._step = record.step

    def say(self, message: str) -> None:
        self._write("message", message)

    def close(self, error: BaseException | None = None) -> None:
        reason = None if error is None else " ".join(f"{type(error).__name__}: {error}".split())
        self._write("end", reason)
        self._lines.close()

    def _write(self, kind: str, value: Any) -> None:
        self._lines.write({"time": datetime.now(UTC).isoformat(timespec="seconds"), "step": self._step, kind: value})


class TensorBoard(Sink):
    """Curves over the step; points that find the disk full are left out."""

    def __init__(self, folder: Path, start_step: int) -> None:
        self._folder = folder
        self._writer: Any = None
        self._open(start_step + 1)

    def record(self, record: Record) -> None:
        self._add("train", {name: value for name, value in record.flat().items() if name != "step"}, record.step)

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        self._add("eval", metrics, step)

    def close(self, error: BaseException | None = None) -> None:
        with self._warning():
            if self._writer is not None:
                self._writer.close()

    def _open(self, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self._folder), purge_step=step)

    def _add(self, kind: str, values: Mapping[str, float], step: int) -> None:
        with self._warning():
            if self._writer is None:
                self._open(step)
            for name, value in values.items():
                self._writer.add_scalar(f"{kind}/{name}", value, step)

    @contextmanager
    def _warning(self) -> Iterator[None]:
        """Inside, an OSError drops the writer (its thread has ended); the next point opens another one."""
        try:
            yield
        except OSError as exc:
            _warn(self._folder.parent, exc.strerror or str(exc))
            given_up, self._writer = self._writer, None
            with suppress(OSError):
                if given_up is not None:
                    given_up.close()


def summary(record: Record) -> list[str]:
    """The numbers that a person watches."""
    rates = dict.fromkeys(f"{rate:.2e}" for name, rate in record.more.items() if name.startswith("lr_"))
    return [
        f"loss {record.loss:.4f}",
        *([f"accuracy {record.more['accuracy']:.1%}"] if "accuracy" in record.more else []),
        f"lr {'/'.join(rates)}",
        f"{record.samples_per_second:,.1f} samples/s",
        f"data wait {record.data_wait:.0%}",
        f"MFU {record.mfu:.1%}",
        *([f"skipped {record.skipped}"] if record.skipped else []),
        *([f"bad samples {record.bad_samples}"] if record.bad_samples else []),
    ]


def read_log(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines log; a last line that was cut off is left out."""
    if not path.exists():
        return []
    with reading(path):
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]


def _without_nan(values: Mapping[str, float]) -> dict[str, float | None]:
    """JSON has no NaN."""
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def _drop_later_records(path: Path, step: int) -> None:
    kept = [record for record in read_log(path) if record["step"] <= step]
    write_text(path, "".join(json.dumps(record) + "\n" for record in kept))


def headlines(metrics: Mapping[str, float]) -> list[str]:
    """A line on each evaluation set: its loss and accuracies at 1; the log has all metrics."""
    lines: dict[str, list[str]] = {}
    for name, value in metrics.items():
        each, _, metric = name.rpartition("/")
        is_count = isinstance(value, int) and not (metric == "unreadable" and value)
        if name != "seconds" and not (is_count or metric.startswith("chance_") or metric.endswith(_FURTHER)):
            shown = str(value) if isinstance(value, int) else f"{value:.2%}" if is_share(name) else f"{value:.4g}"
            lines.setdefault(each, []).append(f"{metric} {shown}")
    return [f"{each}: ".removeprefix(": ") + "  ".join(numbers) for each, numbers in lines.items()]


def _eta(record: Record, total_steps: int) -> str:
    """How long the steps that are left take at the rate of the last ones."""
    left = (total_steps - record.step) * record.samples / max(1, record.step)
    seconds = left / record.samples_per_second if record.samples_per_second else 0.0
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
