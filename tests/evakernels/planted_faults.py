"""Faults planted in the GPU kernels. Each one is compiled in and applies only when its number is requested.

A fault names a line of csrc/cuda by its tag, a comment such as `// #warp-sums` on the line or alone above it.
`ptx_build.build_planted` compiles all faults at once, so that every source is compiled only once more.
"""

import re
from dataclasses import dataclass

from op_suite import GPU_OPS, ROOT

SOURCES = ROOT / "csrc/cuda"
TAG = re.compile(r"//.*#([\w-]+)$")
REQUESTED = "EVAKERNELS_PLANTED"
"""Environment variable with a fault's number."""


@dataclass(frozen=True)
class Fault:
    """A change of one line.

    Attributes:
        report: part of the error message.
        change: expression in the line and the one that replaces it; None: the whole statement is skipped.
        unless: C++ condition under which the statement is executed after all.
        tag: tag of the line; "": the fault's own name.
    """

    report: str
    change: tuple[str, str] | None = None
    unless: str = "false"
    tag: str = ""

    def applied(self, line: str, number: int) -> str:
        """The line with this fault as an alternative."""
        requested = f"(planted_fault == {number})"
        if self.change is None:
            statement = line.lstrip()
            return f"{line[: -len(statement)]}if (!{requested} || ({self.unless})) {statement}"
        right, wrong = self.change
        code, slashes, comment = line.partition("//")
        assert code.count(right) == 1, (line, right)
        return code.replace(right, f"({requested} ? {wrong} : {right})") + slashes + comment


# The source that is compiled with a changed header; the other sources are linked unchanged.
COMPILED_IN = {
    "norm_rows.cuh": "add_norm_forward.cu",
    "norm_plan.h": "add_norm_forward.cu",
    "column_sums.cuh": "swiglu_norm_backward.cu",
    "attention_tiles.cuh": "rope_attention_forward.cu",
    "contrastive_tiles.cuh": "contrastive_gradients.cu",
}
FAULTS = {
    "warp-sums": Fault("race at"),
    "uneven-barrier": Fault("race at", unless="threadIdx.x % kWarpSize == 0", tag="warp-sums"),
    "buffer": Fault("race at"),
    "vectors": Fault("out of bounds at", ("vector < vectors", "vector < vectors + 1")),
    "rows-of-block": Fault("race at"),
    "partial-sums": Fault("uninitialised at", unless="sum != 0.0f"),
    "aligned-rows": Fault("misaligned at", ("width % elements == 0", "width > 0")),
    "tile": Fault("race at"),
    "sums-of-samples": Fault("race at"),
    "dropped": Fault("out of bounds at"),
    "stage": Fault("race at"),
    "stage-copies": Fault("not waited for at"),
    "first-index": Fault("out of bounds at", ("shape.offsets.data", "nullptr")),
    "dS": Fault("race at"),
    "stages": Fault("race at", ("stage / kStageTiles & 1", "0")),
    "dk-stored": Fault("race at"),
    "features": Fault("race at"),
    "parts-of-warps": Fault("race at"),
    "gradients": Fault("out of bounds at", ("row < rows", "row <= rows")),
    "own-dq": Fault("not written", ("part", "0")),
    "parts": Fault("not written", ("max(ceil_div(seen, plan.block_tiles), 1)", "parts")),
}
NUMBERS = {name: number for number, name in enumerate(FAULTS, 1)}
REPEATED = {"buffer", "sums-of-samples", "stages", "dk-stored", "parts-of-warps", "parts"}
"""Faults whose report another fault of the same family has."""


def tags_in(lines: list[str]) -> dict[int, str]:
    """Index of each tagged line of code, and its tag."""
    found = {i: match[1] for i, line in enumerate(lines) if (match := TAG.search(line))}
    return {i + lines[i].lstrip().startswith("//"): tag for i, tag in found.items()}


def files_of_tags() -> dict[str, str]:
    """Name of the file with each tag."""
    return {tag: path.name for path in SOURCES.iterdir() for tag in tags_in(path.read_text().splitlines()).values()}


def changed_files() -> dict[str, str]:
    """Name and text of every file with planted faults."""
    files: dict[str, str] = {}
    names = files_of_tags()
    for name, fault in FAULTS.items():
        tag = fault.tag or name
        lines = files.get(names[tag], (SOURCES / names[tag]).read_text()).splitlines()
        (at,) = (i for i, found in tags_in(lines).items() if found == tag)
        lines[at] = fault.applied(lines[at], NUMBERS[name])
        files[names[tag]] = "\n".join(lines) + "\n"
    return files


def units() -> dict[str, str]:
    """The source file whose object shows each fault."""
    names = files_of_tags()
    found = {name: names[fault.tag or name] for name, fault in FAULTS.items()}
    return {name: COMPILED_IN.get(file, file) for name, file in found.items()}


def family_of(unit: str) -> str:
    """The family of tests/cuda/drive.py that runs a source file."""
    return next((op for op in GPU_OPS if unit.startswith(op)), "layer_norm")
