"""The numbers of a row as columns, in the terminal and on pages, and the text form of numbers and machines."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.candidates import OURS
from benchmarks.contests import Contest, tally, verdict
from benchmarks.results import Machine, Row

NOTHING = "–"  # noqa: RUF001
TIMES = "\N{MULTIPLICATION SIGN}"


@dataclass(frozen=True)
class Column:
    """One number of a row.

    Attributes:
        title: the heading, unit included.
        value: of a row within its contest; None if it has none.
        text: the form in which the value is shown.
        meaning: one sentence.
    """

    title: str
    value: Callable[[Contest, Row], float | None]
    text: Callable[[float], str]
    meaning: str

    def show(self, contest: Contest, row: Row) -> str:
        """The cell's text."""
        value = self.value(contest, row)
        return NOTHING if value is None else self.text(value)


def significant(value: float, digits: int = 3) -> str:
    """That many significant digits, without an exponent: 0.0123, 1.20, 1,230."""
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    value = float(f"{value:.{digits - 1}e}")
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}"


def mebibytes(size: float) -> str:
    """Bytes in MiB; what is less than a hundredth is not told apart."""
    return "<0.01" if 0 < size < 0.01 * 2**20 else significant(size / 2**20)


def percent(share: float) -> str:
    """A share in percent: two digits below 10 %, whole numbers above."""
    return f"{significant(100 * share, 2)} %" if share < 0.1 else f"{100 * share:.0f} %"


def times(ratio: float) -> str:
    """A ratio with its sign."""
    return f"{significant(ratio)} {TIMES}"


def scientific(value: float) -> str:
    """Two digits and an exponent."""
    return f"{value:.1e}" if value else "0"


LEVEL = "equal within noise"


def tally_text(found: Sequence[Contest]) -> str:
    """In how many cases this library is faster than everybody else, in one sentence."""
    counts = tally(found)
    return (
        f"Against the fastest of all others whose results are right, plain PyTorch among them: faster in "
        f"{counts['faster']} of {counts.total()} cases, {LEVEL} in {counts['level']}, slower in {counts['slower']}."
    )


def verdict_text(contest: Contest) -> str:
    """The speedup over the best of the others in a case, or that the difference is noise."""
    found = verdict(contest)
    if found is None:
        return NOTHING
    if found.level:
        return LEVEL
    return times(found.ratio) if found.word == "faster" else f"{times(found.ratio)} ({found.word})"


def time_text(contest: Contest, *kinds: str) -> str:
    """The median in ms and the name of the fastest candidate of these kinds; what kept them all from one."""
    row = contest.fastest(*kinds)
    if row is None:
        return next((row.mark for row in contest.rows if row.kind in kinds and row.mark), NOTHING)
    name = row.candidate.removeprefix(OURS).strip()
    return f"{significant(row.median_ms or 0.0)} {name}".strip()


def _error_ratio(contest: Contest, row: Row) -> float | None:
    return row.error / row.baseline_error if row.error is not None and row.baseline_error else None


MEDIAN = Column("ms", lambda contest, row: row.median_ms, significant, "median time of a call")
P20 = Column("p20", lambda contest, row: row.quantile_ms(0.2), significant, "20 % of the calls took less, in ms")
P80 = Column("p80", lambda contest, row: row.quantile_ms(0.8), significant, "80 % of the calls took less, in ms")
BANDWIDTH = Column(
    "GB/s", lambda contest, row: row.gigabytes_per_second, significant, "bytes by formula over the median"
)
RATE = Column("TFLOP/s", lambda contest, row: row.tflops, significant, "FLOPs of matrix products over the median")
ROOFLINE = Column("roofline", lambda contest, row: row.roofline, percent, "least possible time over the median")
SPEEDUP = Column(
    f"{TIMES} eager", Contest.speedup, significant, "median of torch eager over this median: above 1 is faster"
)
PEAK = Column("peak MiB", lambda contest, row: row.peak_bytes, mebibytes, "most memory held beyond the inputs")
SAVED = Column("saved MiB", lambda contest, row: row.saved_bytes, mebibytes, "memory kept for the backward pass")
ERROR = Column(
    "error", lambda contest, row: row.error, scientific, "relative RMS error against float64, the worst tensor"
)
ERROR_RATIO = Column(
    f"{TIMES} eager's", _error_ratio, significant, "that error over the error of torch eager in the same dtype"
)
FIRST = Column("first ms", lambda contest, row: row.first_call_ms, significant, "the first call, compilation included")

COLUMNS = (MEDIAN, P20, P80, BANDWIDTH, RATE, ROOFLINE, SPEEDUP, PEAK, SAVED, ERROR, ERROR_RATIO, FIRST)
"""All of them, in the order in which they are shown."""


def machine_facts(machine: Machine) -> dict[str, str]:
    """What there is to know about a machine and its run; empty facts are left out."""
    facts = {
        "device": machine.name,
        "CPU threads": str(machine.threads),
        "copy": f"{significant(machine.copy_gbps)} GB/s",
        **{f"{dtype} matmul": f"{significant(rate)} TFLOP/s" for dtype, rate in machine.matmul_tflops.items()},
        "last-level cache": f"{machine.cache_bytes / 2**20:.0f} MiB",
        **{name: significant(value) for name, value in machine.clocks.items()},
        "date": machine.date,
        "commit": machine.commit,
        "evakernels from": machine.package,
        "command": machine.command,
    }
    return {name: text for name, text in facts.items() if text}
