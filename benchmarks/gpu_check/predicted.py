"""What the roofline predicts beside what was measured, of the CUDA kernels."""

import statistics
from collections.abc import Sequence

from benchmarks.gpu_check.records import Record
from benchmarks.results import Row

HEADING = ("CUDA kernels", "measured, ms", "predicted, ms", "measured / predicted", "limiter", "predicted for")
MEANING = "A prediction, of instructions and bytes that were counted without a GPU and published rates:"


def rows(ends: Sequence[Record]) -> list[list[str]]:
    """The lines of a table, of which the last one is the model's error; none without predictions.

    Args:
        ends: the last record of each case.
    """
    found, ratios = [], []
    for record in ends:
        told = record["data"].get("predicted") if record.get("status") == "passed" else None
        if not told:
            continue
        for row in (Row(**values) for values in record["data"]["rows"]):
            if row.candidate == "evakernels cuda" and row.median_ms:
                ratios.append(row.median_ms / told["ms"])
                numbers = [f"{row.median_ms:.3f}", f"{told['ms']:.3f}", f"{ratios[-1]:.2f}"]
                found.append([record["case"], *numbers, told["limiter"], told["gpu"]])
    if ratios:
        worst = max(ratios, key=lambda ratio: max(ratio, 1 / ratio))
        found.append(
            [f"all {len(ratios)}: median; worst", "", "", f"{statistics.median(ratios):.2f}; {worst:.2f}", "", ""]
        )
    return found
