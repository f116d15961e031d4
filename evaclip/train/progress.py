"""Logs of a run: records and their sinks, which are the terminal, JSON-lines files, TensorBoard and W&B."""

import json
import math
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from textwrap import fill
from types import TracebackType
from typing import Any, Self

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

from evaclip.atomic import write_text
from evaclip.errors import UserError
from evaclip.machine import machine, versions
from evaclip.outputs import silence
from evaclip.redact import redacted
from evaclip.runs.files import EVENTS_FILE, LOG_FILE, TENSORBOARD_FOLDER, WANDB_FOLDER
from evaclip.runs.log import is_share, read_log
from evaclip.train.config import LogConfig

_FURTHER = ("_top5", "/top5", "_r5")
"""Suffixes of metrics that the terminal omits; it shows the value at 1."""
_PATIENCE = 30.0
"""Seconds that W&B may take to start and to end."""


@dataclass(frozen=True)
class Record:
    """One logged step.

    Attributes:
        step: optimizer steps so far.
        samples: samples so far, over all ranks.
        epoch: `samples` in passes over the data.
        lr: learning rate of parameters outside the towers in this step.
        grad_norm: L2 norm of all gradients, before clipping.
        loss_scale: factor of the next step's loss; 1 except under amp_fp16.
        skipped: steps so far without an update because a number was not finite.
        bad_samples: replaced samples so far, over all ranks.
        samples_per_second: over all ranks, since the last record.
        tokens_per_second: the same for tokens that enter the towers' blocks.
        data_wait: fraction of that time spent waiting for data.
        mfu: model FLOP/s over the GPU's peak; None, and left out of logs, if the peak is unknown.
        memory_gib: peak memory of the GPU's allocator, or of the main process without a GPU.
        seconds: duration of the run so far, with earlier starts.
        more: for each tower lr_TOWER (at its output, 0 if it isn't trained), grad_norm_TOWER, update_norm_TOWER (L2
            norm of this step's change of its weights) and update_ratio_TOWER (the same over the norm of its weights);
            and the task's metrics, see `Task.backward` and `Task.measures`.
    """

    step: int
    samples: int
    epoch: float
    loss: float
    lr: float
    grad_norm: float
    loss_scale: float
    skipped: int
    bad_samples: int
    samples_per_second: float
    tokens_per_second: float
    data_wait: float
    mfu: float | None
    memory_gib: float
    seconds: float
    more: Mapping[str, float] = field(default_factory=dict)

    def flat(self) -> dict[str, float]:
        """All numbers by name, as logs have them."""
        numbers = vars(self) | dict(self.more)
        return {name: value for name, value in numbers.items() if name != "more" and value is not None}


class Sink:
    """A destination of records and messages. Unimplemented hooks are no-ops."""

    def record(self, record: Record) -> None:
        """One logged step."""

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics of an evaluation after `step` steps."""

    def say(self, message: str) -> None:
        """A message."""

    def close(self, error: BaseException | None = None) -> None:
        """`error` ended the run, if it isn't None."""


class Report:
    """Passes records and messages on to all sinks; a context manager."""

    def __init__(self, sinks: list[Sink]) -> None:
        self._sinks = sinks

    def add(self, sinks: list[Sink]) -> None:
        """Adds sinks."""
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
    """The configured sinks, without W&B.

    Args:
        folder: of the run; None reports to the terminal only.
        start_step: records of later steps are dropped from the files, so that a resumed run logs no step twice.
        processes: number of ranks.
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


def require_trackers(config: LogConfig) -> None:
    """Raises a UserError for a configured tracker that isn't installed."""
    for name, extra, is_used, without in (
        ("tensorboard", "clip", config.tensorboard, "false"),
        ("wandb", "wandb", config.wandb is not None, "null"),
    ):
        if is_used and find_spec(name) is None:
            raise UserError(
                f"log.{name} needs `pip install 'evakernels[{extra}]'`; log.{name}={without} logs without it"
            )


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
            silence()  # the training goes on, with its files as logs


class _BarAndNumbers(Progress):
    """A bar with numbers in another line."""

    numbers = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        if self.numbers:
            # textwrap, unlike rich, keeps non-breaking spaces.
            yield Text(fill(self.numbers, self.console.width).replace("\xa0", " "))


class LiveDisplay(Sink):
    """A progress bar and the latest numbers, below the messages."""

    def __init__(self, start_step: int, total_steps: int) -> None:
        # Rich's own estimate needs a record in the last 30 seconds.
        columns = (TextColumn("[bold]train"), BarColumn(), MofNCompleteColumn(), TextColumn("eta {task.fields[eta]}"))
        self._progress = _BarAndNumbers(*columns, console=Console())
        self._total = total_steps
        self._task = self._progress.add_task("train", total=total_steps, completed=start_step, eta="-:--:--")
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
    """Warns once that the logs can't be written."""
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
    """A file with one JSON object for each start, message and end, over all starts of the run.

    Each has `time` (UTC), `step`, and `start` (processes, machine, versions), `message`, or `end` (null or the error).
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
    """Curves over the step; points are left out while the disk is full."""

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


class Wandb(Sink):
    """A run of Weights & Biases in RUN/wandb, which a resumed run continues.

    Args:
        project: of W&B.
        folder: of the run.
        name: of the run.
        tree: the configuration, shown without credentials.
        say: takes a line on the first failure, after which nothing more is sent.
    """

    def __init__(
        self, project: str, folder: Path, name: str, tree: Mapping[str, Any], say: Callable[[str], None]
    ) -> None:
        self._say = say
        self._run: Any = None
        self._do(lambda: self._open(project, folder, name, redacted(tree)))

    def record(self, record: Record) -> None:
        self._do(lambda: self._log("train", record.flat()))

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        self._do(lambda: self._log("eval", metrics))

    def close(self, error: BaseException | None = None) -> None:
        if self._run is not None:
            self._do(lambda: self._run.finish(exit_code=0 if error is None else 1))

    def _open(self, project: str, folder: Path, name: str, tree: Mapping[str, Any]) -> None:
        import wandb

        id_file = folder / WANDB_FOLDER / "evaclip_id"
        id_file.parent.mkdir(exist_ok=True)
        if not id_file.exists():
            id_file.write_text(uuid.uuid4().hex[:12], encoding="utf-8")
        run = wandb.init(
            project=project,
            name=name,
            id=id_file.read_text(encoding="utf-8"),
            resume="allow",
            dir=str(folder),
            config=dict(tree),
            settings=wandb.Settings(init_timeout=_PATIENCE, finish_timeout=_PATIENCE, console="off", quiet=True),
        )
        # W&B's own step must grow; a run that returns to a checkpoint repeats steps.
        run.define_metric("*", step_metric="train/samples")
        self._run = run

    def _log(self, kind: str, values: Mapping[str, float]) -> None:
        if self._run is not None:
            self._run.log({f"{kind}/{key}": value for key, value in values.items() if math.isfinite(value)})

    def _do(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as exc:
            self._run = None
            reason = " ".join(str(exc).split())
            self._say(f"log.wandb failed and is left out from now on ({type(exc).__name__}: {reason})")


def summary(record: Record) -> list[str]:
    """The numbers of a record that the terminal shows."""
    rates = dict.fromkeys(f"{rate:.2e}" for name, rate in record.more.items() if name.startswith("lr_"))
    return [
        f"loss {record.loss:.4f}",
        *([f"accuracy {record.more['accuracy']:.1%}"] if "accuracy" in record.more else []),
        f"lr {'/'.join(rates)}",
        f"{record.samples_per_second:,.1f} samples/s",
        f"data wait {record.data_wait:.0%}",
        *([] if record.mfu is None else [f"MFU {record.mfu:.1%}"]),
        *([f"skipped {record.skipped}"] if record.skipped else []),
        *([f"bad samples {record.bad_samples}"] if record.bad_samples else []),
    ]


def _without_nan(values: Mapping[str, float]) -> dict[str, float | None]:
    """JSON has no NaN."""
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def _drop_later_records(path: Path, step: int) -> None:
    kept = [record for record in read_log(path) if record["step"] <= step]
    write_text(path, "".join(json.dumps(record) + "\n" for record in kept))


def headlines(metrics: Mapping[str, float]) -> list[str]:
    """One line per evaluation set, with its loss and accuracies at 1."""
    lines: dict[str, list[str]] = {}
    for name, value in metrics.items():
        each, _, metric = name.rpartition("/")
        is_count = isinstance(value, int) and not (metric == "unreadable" and value)
        if name != "seconds" and not (is_count or metric.startswith("chance_") or metric.endswith(_FURTHER)):
            shown = str(value) if isinstance(value, int) else f"{value:.2%}" if is_share(name) else f"{value:.4g}"
            lines.setdefault(each, []).append(f"{metric} {shown}")
    return [f"{each}: ".removeprefix(": ") + "  ".join(numbers) for each, numbers in lines.items()]


def _eta(record: Record, total_steps: int) -> str:
    """Time for the remaining steps at the speed of the last ones."""
    left = (total_steps - record.step) * record.samples / max(1, record.step)
    seconds = left / record.samples_per_second if record.samples_per_second else 0.0
    return str(timedelta(seconds=round(seconds)))
