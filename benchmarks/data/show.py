"""The two measurements on the terminal, as JSON and as a picture."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from rich.text import Text

from benchmarks.columns import significant
from benchmarks.data.machines import MachinesPlan, Spread
from benchmarks.data.plans import RatePlan
from benchmarks.data.rate import Rate
from benchmarks.data.shuffle import QUANTILES, Shuffle, ShufflePlan
from benchmarks.report.drawing import LOOK, grid, number_axis, picture
from benchmarks.results import Machine
from benchmarks.table import make_console, plain_table
from evaclip.atomic import write_text
from evaclip.report.theme import PALETTE

_MEANING = (
    "same shard: others of its own shard that a sample meets in its batch, over those in a full permutation",
    "meet again: pairs that share a batch in two epochs in a row, over those by chance",
    "distance: between samples that are neighbours in a shard, in % of the epoch, 5 % quantile and median",
)
_MEANING_ON_MACHINES = (
    "shards: from how many a batch is drawn; largest: the share in it of the shard that has most",
    "read: which part of all shards each machine reads in an epoch",
)
_PEER = "webdataset"


@dataclass(frozen=True)
class DataResult:
    """What was measured, and of what."""

    machine: Machine
    rate_plan: RatePlan
    rates: Sequence[Rate]
    shuffle_plan: ShufflePlan
    shuffles: Sequence[Shuffle]
    machines_plan: MachinesPlan
    spreads: Sequence[Spread]

    def write_json(self, path: Path) -> None:
        """Writes everything."""
        write_text(path, json.dumps(asdict(self), indent=1) + "\n")


def print_result(result: DataResult) -> None:
    """Three tables."""
    console = make_console()
    console.print(Text(f"{result.machine.name}, copy {significant(result.machine.copy_gbps)} GB/s", "bold"))
    plan = result.rate_plan
    console.print(f"\nreading {plan.shards} shards of {plan.per_shard:,} samples, {plan.image_bytes:,} bytes each")
    table = plain_table("reader", "samples/s", "MB/s")
    for rate in result.rates:
        table.add_row(rate.reader, f"{rate.samples_per_second:,.0f}", f"{rate.megabytes_per_second:,.0f}")
    console.print(table)
    mixed = result.shuffle_plan
    console.print(f"\nmixing {mixed.shards} shards of {mixed.per_shard:,} samples, batches of {mixed.batch:,}")
    table = plain_table("order", "samples held", "same shard", "meet again", "distance 5 %", "median")
    for row in result.shuffles:
        distances = (f"{100 * row.distance(percent):.2g}" for percent in (5, 50))
        table.add_row(row.order, f"{row.held:,}", f"{row.same_shard:.2f}", f"{row.meet_again:.2f}", *distances)
    console.print(table)
    for line in _MEANING:
        console.print(Text(line, "dim"))
    spread = result.machines_plan
    console.print(
        f"\non {spread.machines} machines: {spread.shards:,} shards of {spread.scale * spread.per_shard:,} samples,"
        f" batches of {spread.scale * spread.batch:,}; computed at 1/{spread.scale} of the samples"
    )
    table = plain_table("order", "shards", "largest, %", "read, %")
    for found in result.spreads:
        shares = (f"{100 * share:.3g}" for share in (found.largest_share, found.shards_of_machine))
        table.add_row(found.order, f"{found.shards_of_batch:,.0f}", *shares)
    console.print(table)
    for line in _MEANING_ON_MACHINES:
        console.print(Text(line, "dim"))


def save_plot(result: DataResult, path: Path) -> None:
    """Writes the picture; its format follows from the file's name."""
    with mpl.rc_context(LOOK):
        figure = picture(result.machine, 4.2)
        left, right = figure.subplots(1, 2)
        _draw_rates(left, result.rates)
        _draw_distances(right, result.shuffles)
        figure.savefig(path)


def _draw_rates(axes: Axes, rates: Sequence[Rate]) -> None:
    colours = [PALETTE.muted if rate.reader.startswith(_PEER) else PALETTE.accent for rate in rates]
    bars = axes.barh([rate.reader for rate in rates], [rate.samples_per_second for rate in rates], color=colours)
    axes.bar_label(bars, [f"{rate.megabytes_per_second:,.0f} MB/s" for rate in rates], padding=3)
    axes.margins(x=0.2)
    axes.invert_yaxis()
    axes.set_title("samples/s of one process", loc="left", fontweight="bold")
    grid(axes, "x")
    number_axis(axes.xaxis)


def _draw_distances(axes: Axes, shuffles: Sequence[Shuffle]) -> None:
    for row in shuffles:
        style = "--" if row.order.startswith(_PEER) else "-"
        axes.plot([100 * distance for distance in row.distances], QUANTILES, style, label=row.order, linewidth=1.4)
    axes.set_xscale("log")
    axes.set_title("neighbours in a shard: how far apart in the epoch", loc="left", fontweight="bold")
    axes.set_xlabel("distance, % of the epoch")
    axes.set_ylabel("% of neighbours that are nearer")
    axes.legend(fontsize=7, frameon=False)
    grid(axes, "both")
    number_axis(axes.xaxis)
