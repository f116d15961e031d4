"""What a stage is made of: units of work, the settings of the run, and the session that records the cases of a unit."""

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.gpu_check.records import Journal, Record

RESTART = 75
"""Exit status of a unit whose GPU context is broken: its other cases need a new process."""


@dataclass(frozen=True)
class Unit:
    """A piece of a stage, run in a process of its own.

    Attributes:
        stage, name: what it is called; together they are unique.
        seconds: of its turn; behind them it begins no further case, and goes on later if time is left.
        limit: seconds that one case, or what is in front of the first one, may take before the process is killed;
            its imports don't count.
        value: the larger, the earlier it runs.
        alone: nothing else may run beside it, as it measures time.
    """

    stage: str
    name: str
    seconds: float = 60
    limit: float = 60
    value: float = 50
    alone: bool = True


@dataclass(frozen=True)
class Settings:
    """What a whole run is given.

    Attributes:
        device: `cuda`, or `cpu` in a rehearsal.
        rehearsal: the GPU kernels are interpreted on a CPU; shapes are tiny, and times mean nothing.
        bundle: folder of what was compiled elsewhere; empty for none.
        dtypes: names of torch's dtypes, the most important first.
        package: where the stages are.
    """

    device: str = "cuda"
    rehearsal: bool = False
    bundle: str = ""
    dtypes: tuple[str, ...] = ("bfloat16", "float32", "float16")
    package: str = "benchmarks.gpu_check.stages"

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Settings":
        values = json.loads(text)
        return cls(**values | {"dtypes": tuple(values["dtypes"])})


def key_of(record: Record) -> tuple[str, str, str]:
    """Stage, unit and case of a record."""
    return record["stage"], record["unit"], record["case"]


class Refusal(Exception):
    """A case can't be run here; the message says why. Not a failure."""


class Failure(Exception):
    """A case has a wrong result; `data` is recorded all the same."""

    def __init__(self, message: str, data: dict[str, Any]) -> None:
        super().__init__(message)
        self.data = data


class Session:
    """Runs and records the cases of one unit.

    Attributes:
        deadline: on `time.monotonic`'s clock; no case begins behind it.
        complete: whether no case was left out for it.
    """

    def __init__(self, unit: Unit, settings: Settings, journal: Journal, deadline: float) -> None:
        self.unit, self.settings, self.deadline = unit, settings, deadline
        self.complete = True
        self._journal = journal
        self._ended = {key_of(record): record for record in journal.read() if record["record"] in ("end", "died")}

    def case(self, name: str, function: Callable[[], dict[str, Any] | None]) -> None:
        """Runs one case, unless it was run before or the time is over.

        It passes where `function` returns, with the values of JSON that it returns as data; is refused where it raises
        `Refusal`; and fails where it raises anything else.
        """
        if self.done(name):
            return
        if self.deadline <= time.monotonic():
            self.complete = False
            return
        names = {"stage": self.unit.stage, "unit": self.unit.name, "case": name}
        self._journal.append("begin", **names)
        start = time.monotonic()
        status, error, data = _outcome(function, self.settings.device)
        broken = "" if status == "passed" else _broken_context(self.settings.device)
        took = round(time.monotonic() - start, 4)
        self._ended[self.unit.stage, self.unit.name, name] = {"data": data, "status": status}
        self._journal.append("end", **names, status=status, seconds=took, data=data, error=error[:2000])
        if broken:
            os._exit(RESTART)

    def done(self, name: str) -> bool:
        """Whether the case was run before, or has cost its process the life."""
        return (self.unit.stage, self.unit.name, name) in self._ended

    def earlier(self, stage: str, unit: str, case: str) -> dict[str, Any] | None:
        """The data of a case that passed before this unit began; None where there is none."""
        record = self._ended.get((stage, unit, case), {})
        data: dict[str, Any] | None = record.get("data") if record.get("status") == "passed" else None
        return data

    def start(self) -> None:
        """Records that the unit's process is ready."""
        self._journal.append("start", stage=self.unit.stage, unit=self.unit.name)


def _outcome(function: Callable[[], dict[str, Any] | None], device: str) -> tuple[str, str, dict[str, Any]]:
    try:
        data = function() or {}
        _wait(device)  # an error of a kernel is that of its case
    except Refusal as exc:
        return "refused", str(exc), {}
    except Failure as exc:
        return "failed", str(exc), exc.data
    except Exception as exc:
        return "failed", f"{type(exc).__name__}: {exc}", {}
    return "passed", "", data


def _wait(device: str) -> None:
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def _broken_context(device: str) -> str:
    """What the GPU says to further work; empty if it is willing."""
    try:
        _wait(device)
    except Exception as exc:
        return str(exc)
    return ""
