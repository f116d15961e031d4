"""Weights & Biases: if the service fails, it is dropped with one line, and the run goes on."""

import math
import uuid
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from evaclip.errors import UserError
from evaclip.redact import redacted
from evaclip.run_files import WANDB_FOLDER
from evaclip.train.config import LogConfig, WandbConfig
from evaclip.train.sinks import Record, Sink

Say = Callable[[str], None]

_PATIENCE = 30.0
"""Seconds that W&B may take to start and to end."""


def require(config: LogConfig) -> None:
    """Raises a UserError for a tracker that the configuration asks for and that isn't installed."""
    for name, extra, nothing in (
        ("tensorboard", "clip", False),
        ("wandb", "wandb", None),
    ):
        if getattr(config, name) is not nothing and find_spec(name) is None:
            without = f"log.{name}={'null' if nothing is None else 'false'}"
            raise UserError(f"log.{name} needs `pip install 'evakernels[{extra}]'`; {without} logs without it")


def open_trackers(config: LogConfig, folder: Path, name: str, tree: Mapping[str, Any], say: Say) -> list[Sink]:
    """The trackers that `config` asks for.

    Args:
        folder: of the run. A run that goes on is the same run there; one that starts anew is another.
        name: of the run.
        tree: the whole configuration, which they show without credentials.
        say: called with a line for each failure.
    """
    sinks: list[Sink] = []
    shown: dict[str, Any] = redacted(tree)
    if (wandb := config.wandb) is not None:
        sinks.append(Guarded("log.wandb", lambda: Wandb(wandb, folder, name, shown), say))
    return sinks


class Guarded(Sink):
    """A sink that is left out from its first failure on, opening included."""

    def __init__(self, name: str, opened: Callable[[], Sink], say: Say) -> None:
        self._name = name
        self._say = say
        self._sink: Sink | None = None
        self._do(lambda: setattr(self, "_sink", opened()))

    def record(self, record: Record) -> None:
        if sink := self._sink:
            self._do(lambda: sink.record(record))

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        if sink := self._sink:
            self._do(lambda: sink.evaluation(step, metrics))

    def close(self, error: BaseException | None = None) -> None:
        if sink := self._sink:
            self._do(lambda: sink.close(error))

    def _do(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as exc:
            self._sink = None
            reason = " ".join(str(exc).split())
            self._say(f"{self._name} failed and is left out from now on ({type(exc).__name__}: {reason})")


class Wandb(Sink):
    """A run of Weights & Biases, in RUN/wandb; offline by `mode` or WANDB_MODE."""

    def __init__(self, config: WandbConfig, folder: Path, name: str, tree: Mapping[str, Any]) -> None:
        import wandb

        id_file = folder / WANDB_FOLDER / "evaclip_id"
        id_file.parent.mkdir(exist_ok=True)
        if not id_file.exists():
            id_file.write_text(uuid.uuid4().hex[:12], encoding="utf-8")
        self._run: Any = wandb.init(
            project=config.project,
            entity=config.entity,
            mode=config.mode,
            name=name,
            id=id_file.read_text(encoding="utf-8"),
            resume="allow",
            dir=str(folder),
            config=dict(tree),
            settings=wandb.Settings(init_timeout=_PATIENCE, finish_timeout=_PATIENCE, console="off", quiet=True),
        )
        # W&B's own step must grow; a run that returns to a checkpoint repeats steps.
        self._run.define_metric("*", step_metric="train/samples")

    def record(self, record: Record) -> None:
        self._run.log(_scalars("train", record.flat()))

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(_scalars("eval", metrics))

    def close(self, error: BaseException | None = None) -> None:
        self._run.finish(exit_code=0 if error is None else 1)


def _scalars(kind: str, values: Mapping[str, float]) -> dict[str, float]:
    """Finite values under TensorBoard's names."""
    return {f"{kind}/{key}": value for key, value in values.items() if math.isfinite(value)}
