"""Results of a run: rows, the machine, contests of candidates, verdicts, and the file."""

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import NamedTuple, TypeVar

from evaclip.atomic import write_text
from evaclip.errors import UserError

T = TypeVar("T")
K = TypeVar("K")

FORMAT = 1
"""Version of the file format."""

WRONG = "wrong: "
"""Prefix of the failure of a row with a wrong result."""


@dataclass
class Row:
    """One candidate on one operation, mode, shape and dtype.

    Attributes:
        kind: `ours`, `baseline` (plain PyTorch) or `peer`.
        version: version of the candidate's distribution.
        samples_ms: time of one call in milliseconds: a list for each pass over the whole suite, of one value a round.
        first_call_ms: the first call, compilation and tuning included.
        flops, bytes: least work of the mode, by formula.
        floor_ms: the least time of that work by the machine's measured ceilings.
        peak_bytes: the most memory that a call held beyond its inputs.
        saved_bytes: memory saved for backward, without inputs.
        error, baseline_error: relative RMS error against float64, of the candidate and of plain PyTorch in the same
            dtype: of the worst output, or in training of the worst gradient.
        failure: the reason for a missing time: the exception, or `WRONG` and the reason.
    """

    op: str
    mode: str
    shape: str
    dtype: str
    device: str
    candidate: str
    kind: str
    version: str
    sizes: dict[str, int] = field(default_factory=dict)
    samples_ms: list[list[float]] = field(default_factory=list)
    first_call_ms: float | None = None
    flops: float = 0.0
    bytes: float = 0.0
    floor_ms: float | None = None
    peak_bytes: int | None = None
    saved_bytes: int | None = None
    error: float | None = None
    baseline_error: float | None = None
    failure: str | None = None

    @property
    def key(self) -> tuple[str, ...]:
        """Identifies the measurement in two runs."""
        return (self.op, self.mode, self.shape, self.dtype, self.device, self.candidate)

    @property
    def case(self) -> tuple[str, ...]:
        """Identifies the case; its candidates were measured side by side."""
        return (self.op, self.mode, self.shape, self.dtype, self.device)

    @property
    def times(self) -> list[float]:
        """All samples, sorted."""
        return sorted(value for one_pass in self.samples_ms for value in one_pass)

    @property
    def median_ms(self) -> float | None:
        """Median time of a call."""
        return statistics.median(self.times) if self.samples_ms else None

    def quantile_ms(self, share: float) -> float | None:
        """The quantile `share` of the times, to the nearest sample."""
        times = self.times
        return times[round(share * (len(times) - 1))] if times else None

    @property
    def gigabytes_per_second(self) -> float | None:
        """Bytes by formula over the median time."""
        return self._rate(self.bytes, 1e9)

    @property
    def tflops(self) -> float | None:
        """FLOPs by formula over the median time, in 10^12 a second."""
        return self._rate(self.flops, 1e12) if self.flops else None

    @property
    def roofline(self) -> float | None:
        """The floor over the median time: 1 is as fast as this machine allows."""
        median = self.median_ms
        return self.floor_ms / median if self.floor_ms and median else None

    @property
    def mark(self) -> str:
        """`wrong` or `failed`, shown in place of a time; empty for a row without failure."""
        if self.failure is None:
            return ""
        return "wrong" if self.failure.startswith(WRONG) else "failed"

    def _rate(self, amount: float, unit: float) -> float | None:
        median = self.median_ms
        return amount / (median / 1e3) / unit if median else None


@dataclass
class Machine:
    """Place and date of a run, and the ceilings of the machine.

    Attributes:
        device: `cpu` or `cuda`.
        name: name of the processor or the GPU.
        threads: CPU threads of PyTorch.
        copy_gbps: rate of a large copy, bytes read plus bytes written, in 10^9 a second.
        matmul_tflops: rate of a large matmul, by dtype, in 10^12 a second.
        cache_bytes: last level of cache; inputs are rotated beyond it.
        versions: versions of Python, torch and the measured packages.
        commit: commit of this repository, with `+` if files were changed.
        package: the file of the imported evakernels, its version, and whether it is compiled.
        notes: reasons to doubt the numbers, such as a busy or throttled machine.
        clocks: the GPU's clocks in MHz, power in W and temperature in °C at the end of the run.
    """

    device: str
    name: str
    threads: int
    copy_gbps: float
    matmul_tflops: dict[str, float]
    cache_bytes: int
    versions: dict[str, str] = field(default_factory=dict)
    date: str = ""
    commit: str = ""
    command: str = ""
    notes: list[str] = field(default_factory=list)
    clocks: dict[str, float] = field(default_factory=dict)
    package: str = ""
    busy: bool = False


@dataclass
class Results:
    """A run: the machine, the rows, and the peers that were absent, each with the reason.

    Attributes:
        interrupted: by Ctrl-C, before all was measured; in a file a note says so.
    """

    machine: Machine
    rows: list[Row]
    absent: dict[str, str] = field(default_factory=dict)
    interrupted: bool = False

    def write_json(self, path: Path) -> None:
        """Writes everything, atomically; times with four digits, more than they repeat to."""
        head = {"format": FORMAT, "machine": asdict(self.machine), "absent": self.absent}
        rows = []
        for row in self.rows:
            times = [[float(f"{value:.4g}") for value in one_pass] for one_pass in row.samples_ms]
            rows.append(json.dumps(asdict(row) | {"samples_ms": times}))
        text = json.dumps(head, indent=1).removesuffix("\n}") + ',\n "rows": [\n' + ",\n".join(rows) + "\n ]\n}\n"
        write_text(path, text)


def read_results(path: Path) -> Results:
    """Reads a file of `Results.write_json`; a row's fields of earlier versions are ignored.

    Raises:
        UserError: the file is missing, no JSON, or of another format.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise UserError(f"can't read {path}: {exc}") from exc
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise UserError(f"{path} isn't a benchmark result of format {FORMAT}")
    known = {field.name for field in fields(Row)}
    try:
        rows = [Row(**{name: value for name, value in row.items() if name in known}) for row in data["rows"]]
        return Results(Machine(**data["machine"]), rows, data["absent"])
    except (KeyError, TypeError) as exc:
        raise UserError(f"{path} isn't a whole benchmark result: {exc}") from exc


class Contest:
    """The rows of one case, `op`, `mode`, `shape` and `dtype`: candidates that were measured side by side."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = tuple(rows)
        self.op, self.mode, self.shape, self.dtype, _ = rows[0].case

    @property
    def title(self) -> str:
        """One line that names it."""
        return f"{self.op}, {self.mode}, {self.shape}, {self.dtype}"

    @property
    def measured(self) -> list[Row]:
        """The rows that have a time, in the order of measurement: no failures and no wrong results."""
        return [row for row in self.rows if row.failure is None and row.median_ms is not None]

    @property
    def intensity(self) -> float | None:
        """FLOPs a byte; None for an operation without matmuls."""
        row = self.rows[0]
        return row.flops / row.bytes if row.flops and row.bytes else None

    def fastest(self, *kinds: str) -> Row | None:
        """The fastest candidate of these kinds, by default of all; None if none has a time."""
        rows = [row for row in self.measured if not kinds or row.kind in kinds]
        return min(rows, key=lambda row: row.median_ms or 0.0, default=None)

    @property
    def rival(self) -> Row | None:
        """The fastest of the others: plain PyTorch and the peers."""
        return self.fastest("baseline", "peer")

    def speedup(self, row: Row) -> float | None:
        """The median time of plain PyTorch over the one of `row`: 2 is twice as fast."""
        ours, eager = row.median_ms, self.fastest("baseline")
        return eager.median_ms / ours if ours and eager and eager.median_ms and row.failure is None else None


def grouped(items: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    """The items by their keys, in the order of the first ones."""
    groups: dict[K, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def contests(rows: Iterable[Row]) -> list[Contest]:
    """The rows by case, in the order of their first rows."""
    return list(map(Contest, grouped(rows, lambda row: row.case).values()))


class Verdict(NamedTuple):
    """This library's fastest against the fastest of all others, plain PyTorch among them.

    Attributes:
        ratio: median time of the others' fastest over ours: 2 is twice as fast.
        word: `faster`, `slower`, or `level` within the noise.
    """

    ratio: float
    word: str


def verdict(contest: Contest) -> Verdict | None:
    """Compare this library with the others in a case; None if it or all others have no time.

    Both were measured in the same rounds. The difference is noise if the ratios of these rounds lie on both sides of 1,
    the outer fifths left out, or the medians of the passes do, or the ratio of all times and the median ratio of the
    rounds: a machine that changes its speed between passes can turn the ratio of all times.
    """
    ours, rival = contest.fastest("ours"), contest.rival
    if ours is None or rival is None or not ours.median_ms or not rival.median_ms:
        return None
    passes = [
        sorted(other / own for own, other in zip(mine, theirs, strict=False))
        for mine, theirs in zip(ours.samples_ms, rival.samples_ms, strict=False)
    ]
    ratios = sorted(ratio for one_pass in passes for ratio in one_pass)
    if not ratios:
        return None
    inner = [ratios[round(share * (len(ratios) - 1))] for share in (0.2, 0.8)]
    medians = [statistics.median(one_pass) for one_pass in passes if one_pass]
    ratio = rival.median_ms / ours.median_ms
    if any(min(several) <= 1 <= max(several) for several in (inner, medians, (ratio, statistics.median(ratios)))):
        return Verdict(ratio, "level")
    return Verdict(ratio, "faster" if ratio > 1 else "slower")
