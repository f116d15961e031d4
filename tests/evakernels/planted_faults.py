"""Faults planted in the kernels for GPUs, each of which strikes when asked for.

All are compiled at once (`ptx_build.build_planted`), so that a source file is compiled once for all of its own.
"""

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from op_suite import ROOT

ASKED_FOR = "EVAKERNELS_PLANTED"


@dataclass(frozen=True)
class Fault:
    """`text` stands once in the file, but for what is planted, between « and »; PLANTED is true if it is asked for.

    `said` is a part of what the driver then says.
    """

    said: str
    file: str
    text: str

    @property
    def right(self) -> str:
        return re.sub("«.*?»", "", self.text, flags=re.DOTALL)

    @property
    def wrong(self) -> str:
        return re.sub("[«»]", "", self.text)

    @property
    def unit(self) -> str:
        """The source file that shows it."""
        return COMPILED_IN.get(self.file, self.file)

    @property
    def family(self) -> str:
        """What the driver is to drive."""
        return next(family for prefix, family in FAMILIES.items() if self.unit.startswith(prefix))


# The file that a changed header is compiled in, which the others are linked with as they are.
COMPILED_IN = {
    "norm_rows.cuh": "add_norm_forward.cu",
    "norm_plan.h": "add_norm_forward.cu",
    "column_sums.cuh": "swiglu_norm_backward.cu",
    "staged_rows.cuh": "swiglu_norm_forward.cu",
    "tensor_chunks.cuh": "lamb.cu",
    "tensor_table.cuh": "lamb.cu",
    "attention_plan.h": "rope_attention_forward.cu",
    "attention_tiles.cuh": "rope_attention_forward.cu",
    "online_softmax.cuh": "rope_attention_forward.cu",
    "rotary.cuh": "rope_attention_forward.cu",
}
FAMILIES = {
    "add_norm": "norms",
    "norm_add": "norms",
    "swiglu_norm": "swiglu",
    "token_dropout": "token_dropout",
    "gelu": "gelu",
    "lamb": "lamb",
    "rope_attention": "rope_attention",
}
FAULTS = {
    "barrier": Fault("race at", "norm_rows.cuh", "«    if (!PLANTED)\n»    __syncthreads();\n    const int warps"),
    "reuse": Fault("race at", "norm_rows.cuh", "«if (!PLANTED) »buffer_ ^= 1;"),
    "rows of a block": Fault("race at", "column_sums.cuh", "      }\n      «if (!PLANTED) »__syncthreads();\n    }"),
    # Before the next one, with which it shares a place.
    "uneven barrier": Fault(
        "race at",
        "norm_rows.cuh",
        "«      if (PLANTED) __syncthreads();\n»    }\n«    if (!PLANTED)\n»    __syncthreads();\n    const int warps",
    ),
    "uninitialised": Fault(
        "uninitialised at",
        "column_sums.cuh",
        "    «if (!PLANTED || sum != 0.0f) »scratch.sums[n][threadIdx.y][threadIdx.x] = sum;",
    ),
    "rows that haven't arrived": Fault(
        "race at", "staged_rows.cuh", "    wait_for_copies();\n    «if (!PLANTED) »synchronize_row();\n"
    ),
    "a row that isn't finished": Fault(
        "race at", "staged_rows.cuh", "    «if (!PLANTED) »synchronize_row();\n    (outputs"
    ),
    "the whole of a last word": Fault(
        "out of bounds at", "staged_rows.cuh", "at < «(PLANTED ? bytes : »end«)»; at += step"
    ),
    "the whole of a first word": Fault(
        "uninitialised at", "staged_rows.cuh", "at >= (last ? begin : «PLANTED && begin > 0 ? -kWidestAccess : »0)"
    ),
    "a stage that isn't changed": Fault(
        "uninitialised at", "norm_add_backward.cu", "«PLANTED ? wait_for_rows<L>(dx) : »wait_for_rows<L>(dx, branch);"
    ),
    "a row that isn't stored": Fault(
        "error inf",
        "add_norm_backward.cu",
        "«PLANTED ? finish_rows<L>(dresidual) : »finish_rows<L>(dresidual, dbranch);",
    ),
    "tile": Fault("race at", "token_dropout_tiles.cu", "    }\n    «if (!PLANTED) »__syncthreads();\n\n"),
    "sums over samples": Fault(
        "race at", "token_dropout_backward.cu", "sums[i];\n  «if (!PLANTED) »__syncthreads();\n"
    ),
    "alignment": Fault("misaligned at", "norm_plan.h", "«(PLANTED ? width > 0 : »width % elements == 0«)»"),
    "barrier of a stage": Fault(
        "race at", "rope_attention_forward.cu", "        «if (!PLANTED) »__syncthreads();  // The stage has arrived"
    ),
    "wait for copies": Fault(
        "not waited for at",
        "rope_attention_forward.cu",
        "        «if (!PLANTED) »wait_for_copies();\n        __syncthreads();  // The stage has arrived",
    ),
    "gradients of scores": Fault(
        "race at", "rope_attention_backward.cu", "      «if (!PLANTED) »__syncthreads();  // dS is there."
    ),
    "a stage that is overwritten": Fault(
        "race at", "rope_attention_backward.cu", "stages + («PLANTED ? 0 : »stage / kStageTiles & 1) * 2"
    ),
    "sums of earlier rounds": Fault("wrong: dq of", "rope_attention_backward.cu", "if (is_first« || PLANTED») return;"),
    "rows of the gradient before": Fault(
        "race at", "rope_attention_backward.cu", "  });\n  «if (!PLANTED) »__syncwarp();\n#pragma unroll\n"
    ),
    "slots before the first token": Fault("wrong: out of", "attention_plan.h", "return «(»first < 0« && !PLANTED)» ||"),
    "empty slots": Fault("wrong: out of", "rope_attention_forward.cu", "values[i] = «PLANTED ? 0.0f : »-INFINITY"),
    "a column's angles": Fault("wrong: out of", "rotary.cuh", "(«(PLANTED ? 1 : »grid«)» + patch % grid - 1)"),
    "a query that sees nothing": Fault(
        "wrong: out of", "online_softmax.cuh", "fmaxf(row_sum[row], «PLANTED ? 0.0f : »FLT_MIN)"
    ),
    "the last key that is seen": Fault(
        "wrong: out of", "attention_plan.h", "static_cast<int>(«PLANTED ? 0 : »shape.keys - shape.tokens) : k"
    ),
    "a head of keys for itself": Fault(
        "wrong: out of", "attention_tiles.cuh", "«(PLANTED ? 0 : »head«)» / static_cast"
    ),
    "the place of an index": Fault(
        "out of bounds at", "attention_tiles.cuh", "first = shape.offsets.data« && !PLANTED» ?"
    ),
    "another sequence": Fault(
        "wrong: out of", "attention_tiles.cuh", "«(PLANTED ? sample : »first_token()«)» * view.token_stride"
    ),
    "barrier of the norms": Fault(
        "race at", "tensor_chunks.cuh", "  «if (!PLANTED) »__syncthreads();\n  if (threadIdx.x >= N) return 0.0f;"
    ),
    "alignment of one buffer": Fault("misaligned at", "tensor_table.cuh", "common« || PLANTED» ? head : kNoVectors"),
    "one edge too many": Fault("out of bounds at", "tensor_table.cuh", "edges = size - vectors * kVector« + PLANTED»;"),
    "part of a step": Fault("wrong", "lamb.cu", "param[k] -= factor * «(PLANTED ? 2.0f : 1.0f) * »direction.of("),
    "a strip's columns": Fault("wrong", "gelu.cu", "partials + «(PLANTED ? 0 : »strip.first()«)»"),
    "one too far": Fault("out of bounds at", "norm_rows.cuh", "if (vector < vectors« + PLANTED») body"),
}
NUMBERS = {name: number for number, name in enumerate(FAULTS, 1)}


def changed_files() -> dict[str, str]:
    """The text of each file in which faults are planted."""
    files: dict[str, str] = {}
    # What is right of one may be a part of what is right of another.
    for name in sorted(FAULTS, key=lambda name: len(FAULTS[name].right), reverse=True):
        fault = FAULTS[name]
        text = files.get(fault.file) or (ROOT / "csrc/cuda" / fault.file).read_text()
        assert text.count(fault.right) == 1, (fault.file, fault.right)
        asked_for = f"(planted_fault == {NUMBERS[name]})"
        files[fault.file] = text.replace(fault.right, re.sub(r"\bPLANTED\b", asked_for, fault.wrong))
    return files


def call(command: list[str], folder: Path) -> None:
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-5000:]
