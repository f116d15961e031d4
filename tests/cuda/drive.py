"""Runs the launchers of `evakernels._C` on buffers without spare memory, for programs that watch every access.

    compute-sanitizer python tests/cuda/drive.py [FAMILY ...]                              on a GPU
    LD_PRELOAD=allocations.so python tests/cuda/drive.py --interpret 80 [FAMILY ...]       in ptx_interpreter

The interpreter and NVIDIA's sanitizers report races and wrong accesses; the ops' tests compare results. Here only
outputs that aren't written, and elements before them that are, raise an error.
"""

import argparse
import gc
import math
import os
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import pairwise
from typing import Any, NamedTuple

os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")  # torch's cache would round sizes up

import torch
from torch import Tensor

from evakernels import _C, _native

DEVICE = torch.device("cuda")
FLOAT, HALF, FLOAT16 = torch.float32, torch.bfloat16, torch.float16
EPS = 1e-6
GUARD = 7.0
"""Value of the elements in front of a buffer."""

# Several rows a warp and a block; several warps; unaligned, several rows a block too; a row in memory only.
MATRICES = [(29, 64, FLOAT), (14, 264, HALF), (5, 1408, HALF), (18, 2730, HALF), (7, 225, FLOAT16), (4, 513, FLOAT)]
MATRICES += [(4, 2049, HALF), (4, 3072, FLOAT), (3, 8200, HALF)]


def draw(*shape: int, dtype: torch.dtype = FLOAT, before: int = 0) -> Tensor:
    """Numbers in [-1, 1), with `before` elements of another buffer before them."""
    whole = torch.full((before + math.prod(shape),), GUARD, dtype=dtype, device=DEVICE)
    view = whole[before:].view(shape)
    return view.copy_(torch.rand(shape) * 2 - 1)


def blank(*shape: int, dtype: torch.dtype = FLOAT, before: int = 0) -> Tensor:
    """A buffer for results, of NaN."""
    return draw(*shape, dtype=dtype, before=before).fill_(torch.nan)


def run(launcher: str, *arguments: Any, writes: Sequence[Tensor | None] = (), **options: Any) -> None:
    """Calls a launcher and checks its outputs `writes`."""
    getattr(_C, launcher)(*arguments, **options, out=list(writes))
    check(launcher, *writes)


def check(name: str, *outputs: Tensor | None) -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    for number, output in enumerate(outputs):
        if output is None:
            continue
        label = f"{name}: output {number} of shape {tuple(output.shape)}, {output.dtype}"
        assert not output.isnan().any(), f"{label}: not written"
        assert output._base is None or (output._base[: output.storage_offset()] == GUARD).all(), f"before {label}"


class Matrices:
    """Matrices of one shape; with `before` each begins two elements farther from a word of 16 bytes than the last."""

    def __init__(self, rows: int, width: int, dtype: torch.dtype, before: int) -> None:
        self._shape, self._dtype, self._before = (rows, width), dtype, before

    def given(self) -> Tensor:
        return draw(*self._shape, dtype=self._dtype, before=self._next())

    def made(self) -> Tensor:
        return blank(*self._shape, dtype=self._dtype, before=self._next())

    def _next(self) -> int:
        before = self._before
        self._before += 2 * (before > 0)
        return before


def shifts(width: int, dtype: torch.dtype) -> tuple[int, ...]:
    """Where matrices begin; unaligned too where aligned rows have vectors."""
    return (0,) if dtype == FLOAT or width % 2 else (0, 6)


# --- families -------------------------------------------------------------------------------------------------------


def layer_norm(rows: int, width: int, dtype: torch.dtype) -> None:
    for before in shifts(width, dtype):
        affine = weight, bias = draw(width), draw(width)
        layer_scale, row_scale = (draw(width), draw(rows)) if before == 0 else (None, None)
        scales = {"layer_scale": layer_scale, "row_scale": row_scale}

        def of_scale(buffer: Tensor, scale: Tensor | None = layer_scale) -> Tensor | None:
            return buffer if scale is not None else None

        matrices, statistics = Matrices(rows, width, dtype, before), blank(2, rows)
        x = matrices.given()
        run("layer_norm_forward", x, *affine, EPS, False, writes=[matrices.made(), None, statistics])
        writes = [matrices.made(), None, blank(width), blank(width), None]
        needs_grad = [True, True, False, False]
        run("layer_norm_backward", matrices.given(), x, weight, statistics, needs_grad, writes=writes)

        matrices, statistics = Matrices(rows, width, dtype, before), blank(2, rows)
        residual, branch, y, total = matrices.given(), matrices.given(), matrices.made(), matrices.made()
        options = {"residual": residual, "add_first": True, **scales}
        run("layer_norm_forward", branch, *affine, EPS, False, writes=[y, total, statistics], **options)
        dy, options = matrices.given(), {"dtotal": matrices.given(), "branch": branch, **scales}
        writes = [matrices.made(), of_scale(matrices.made()), blank(width), blank(width), of_scale(blank(width))]
        scaled = layer_scale is not None
        needs_grad = [True, True, scaled, scaled]
        run("layer_norm_backward", dy, total, weight, statistics, needs_grad, writes=writes, **options)

        matrices, statistics = Matrices(rows, width, dtype, before), blank(2, rows)
        residual, x, y = matrices.given(), matrices.given(), matrices.made()
        options = {"residual": residual, **scales}
        run("layer_norm_forward", x, *affine, EPS, False, writes=[y, None, statistics], **options)
        dy, options = matrices.given(), {"bias": bias, **scales}
        writes = [matrices.made(), None, blank(width), blank(width), of_scale(blank(width))]
        needs_grad = [True, True, scaled, False]
        run("layer_norm_backward", dy, x, weight, statistics, needs_grad, writes=writes, **options)


def swiglu(rows: int, width: int, dtype: torch.dtype) -> None:
    """Gate and up are halves of a packed matrix, or separate; halves are also padded to a multiple of 64 channels."""
    forms = [(packed, normed, 0, 0) for packed in (False, True) for normed in (False, True)]
    forms += [(True, True, before, 0) for before in shifts(width, dtype)[1:]]
    forms += [(True, normed, 0, -width % 64) for normed in (False, True) if width % 64]
    for packed, normed, before, padding in forms:
        wide = width + padding
        matrices = Matrices(rows, wide, dtype, before)
        gate, up = matrices.given(), matrices.given()
        if packed:
            gate, up = draw(rows, 2 * wide, dtype=dtype, before=before).chunk(2, -1)
        weight, bias, mean, rstd = (draw(wide), draw(wide), blank(rows), blank(rows)) if normed else (None,) * 4
        for padded in (gate, up, weight, bias):
            if padded is not None:
                padded[..., width:] = 0
        run("swiglu_forward", gate, up, weight, bias, EPS, padding, writes=[matrices.made(), mean, rstd])
        dout, sums = matrices.given(), [blank(wide), blank(wide)] if normed else [None, None]
        statistics = (mean, rstd) if normed else (blank(0), blank(0))
        writes = [matrices.made(), matrices.made(), *sums]
        run("swiglu_backward", dout, gate, up, weight, *statistics, [normed, normed], padding, writes=writes)


def gelu(rows: int, width: int, dtype: torch.dtype) -> None:
    matrices = Matrices(rows, width, dtype, 0)
    for form, has_bias in enumerate((True, False, True)):
        x, bias = matrices.given(), draw(width) if has_bias else None
        run("gelu_forward", x, bias, form, writes=[matrices.made()])
        writes = [matrices.made(), blank(width) if has_bias else None]
        run("gelu_backward", matrices.given(), x, bias, form, [has_bias], writes=writes)


def token_dropout(rows: int, width: int, dtype: torch.dtype) -> None:
    """Every second token of each sample, the last ones first, so that samples differ; two prefix tokens."""
    tokens = 2 * rows + 6
    for by_channel in (False, True):
        batch = 3 if by_channel or width > 1000 else 10  # once more samples than the backward pass has warps
        last = tokens - 1 - (torch.arange(batch) + tokens) % 2
        index = (last[:, None] - 2 * torch.arange(tokens // 2)).to(DEVICE)
        sizes = [(batch, tokens, width), (2, width), (2 + tokens, width)]
        patches, prefix, pos_embed = (draw(*size, dtype=dtype) for size in sizes)
        if by_channel:
            patches = draw(batch, width, tokens, dtype=dtype).mT
        out = blank(batch, 2 + tokens // 2, width, dtype=dtype)
        run("token_dropout_forward", patches, index, prefix, pos_embed, writes=[out])
        dout = draw(*out.shape, dtype=dtype)
        writes = [blank(*size, dtype=dtype) for size in sizes]
        run("token_dropout_backward", dout, index, 2, tokens, [True, True, True], writes=writes)


# Several row tiles per block, with pairs in several blocks and unfilled last tiles; stages of channels; one pair.
PAIRS = [(600, 1300, 16, 600, HALF), (70, 261, 72, 0, FLOAT16), (1, 1, 9, 0, HALF)]


def contrastive() -> None:
    for rows, columns, width, offset, dtype in PAIRS:
        inputs = draw(rows, width, dtype=dtype), draw(columns, width, dtype=dtype), draw(1), offset
        sizes = (rows,), (columns,), (rows,), (rows,), (columns,), (rows, columns)
        writes = [blank(*size) for size in sizes]
        run("contrastive_forward", *inputs, True, writes=writes)
        run("contrastive_forward", *inputs, False, writes=[*(blank(*size) for size in sizes[:5]), None])
        row_lse, col_lse = writes[:2]
        upstream = draw(rows), draw(columns), draw(rows)
        dlogits = blank(rows, columns + columns % 2, dtype=dtype)
        run("contrastive_dlogits", *upstream, *inputs[:3], row_lse, col_lse, offset, writes=[dlogits])
        sums = 8 * math.ceil(rows / 128) * math.ceil(columns / 256)
        for written in (None, blank(*dlogits.shape, dtype=dtype)):
            needs_grad = [written is not None]
            run("siglip_dlogits", *inputs[:3], draw(1), offset, needs_grad, writes=[blank(2, sums), written])


class Attention(NamedTuple):
    """A call of attention.

    Attributes:
        tables: "shared" or "heads"; None for no rotation.
        indexed: whether there is a token_index.
        packed: whether q, k and v are one tensor `[B, N, 3, H, D]`.
        offsets: cu_seqlens of a packed batch, which has no `batch`, `tokens` and `keys`.
    """

    batch: int
    tokens: int
    keys: int
    heads: int
    kv_heads: int
    head_dim: int
    num_prefix: int
    scale: float
    causal: bool
    dtype: torch.dtype
    tables: str | None = None
    interleaved: bool = True
    indexed: bool = False
    packed: bool = False
    offsets: tuple[int, ...] = ()


SEVERAL, TWO = (0, 17, 17, 18, 60), (0, 5, 30)
# Prefix and patches that fill their tile; pairs half a vector apart; access by element; text; more tiles than warps;
# stages; blocks whose warps take queries twice. Then a negative scale with all options, access by element, and twice
# the tiles that a warp has at a time; sequences, one of them empty. Fewer keys than queries, of which
# some see none: tiles of them, in several rounds too, and all of them; more keys, in stages and rounds; no queries;
# heads of keys for several of queries; rotated sequences.
ATTENTIONS = [
    Attention(2, 17, 17, 2, 2, 64, 1, 0.125, False, HALF, "shared", True, True, True),
    Attention(2, 37, 37, 1, 1, 32, 5, 0.2, True, FLOAT16, "heads", False, False, True),
    Attention(1, 20, 20, 3, 3, 18, 1, -0.2, False, HALF, "heads", False, True, False),
    Attention(1, 33, 33, 1, 1, 112, 2, 0.1, True, HALF, "shared", False, False, False),
    Attention(3, 97, 97, 1, 1, 16, 1, 0.3, True, HALF, "shared", False, False, True),
    Attention(1, 145, 145, 1, 1, 128, 1, 0.1, False, FLOAT16, "shared", True, False, True),
    Attention(3, 120, 120, 1, 1, 128, 1, 0.1, False, HALF, "shared", False, True, True),
    Attention(1, 45, 45, 2, 2, 64, 1, -0.125, False, FLOAT16, "heads", True, True, True),
    Attention(1, 30, 30, 1, 1, 18, 1, 0.2, True, FLOAT16, "shared", False, False, True),
    Attention(1, 97, 97, 1, 1, 112, 0, 0.1, True, FLOAT16),
    Attention(1, 113, 113, 1, 1, 8, 0, 0.3, True, HALF, packed=True),
    Attention(0, 0, 0, 2, 2, 64, 0, 0.125, True, HALF, packed=True, offsets=SEVERAL),
    Attention(0, 0, 0, 1, 1, 32, 0, 0.2, False, FLOAT16, packed=True, offsets=TWO),
    Attention(2, 50, 13, 4, 2, 64, 0, 0.125, True, HALF),
    Attention(1, 70, 35, 1, 1, 112, 0, 0.1, True, FLOAT16),
    Attention(1, 170, 150, 1, 1, 128, 0, 0.1, True, HALF),
    Attention(1, 21, 0, 2, 1, 16, 0, 0.3, False, HALF),
    Attention(1, 18, 170, 3, 1, 128, 0, 0.1, True, FLOAT16),
    Attention(1, 3, 90, 1, 1, 18, 0, 0.2, False, HALF),
    Attention(1, 0, 20, 1, 1, 32, 0, 0.2, False, FLOAT16),
    Attention(2, 17, 17, 6, 2, 64, 1, 0.125, False, HALF, "shared", True, True, False),
    Attention(0, 0, 0, 2, 2, 64, 0, 0.125, True, HALF, "shared", True, True, True, SEVERAL),
    Attention(0, 0, 0, 4, 2, 18, 0, 0.2, False, FLOAT16, "shared", False, False, False, TWO),
]


SPLIT = (3, 7, 9, 10, 11, 14, 17)
"""Calls with two blocks per head: a prefix, causal ones by element and in words, sequences, and fewer keys."""


def rope_attention() -> None:
    for call in ATTENTIONS:
        attend(call)
    os.environ["EVAKERNELS_ATTENTION_PLAN"] = "1x2"
    for number in SPLIT:
        attend(ATTENTIONS[number])
    del os.environ["EVAKERNELS_ATTENTION_PLAN"]


def attend(call: Attention) -> None:
    dim, offsets = call.head_dim, call.offsets
    of_queries = (offsets[-1],) if offsets else (call.batch, call.tokens)
    of_keys = (offsets[-1],) if offsets else (call.batch, call.keys)
    if call.packed:
        q, k, v = draw(*of_queries, 3, call.heads, dim, dtype=call.dtype).unbind(-3)
    else:
        q = draw(*of_queries, call.heads, dim, dtype=call.dtype)
        k, v = (draw(*of_keys, call.kv_heads, dim, dtype=call.dtype) for _ in range(2))
    longest, op, offset_table = call.tokens, "rope_attention", ()
    if offsets:
        longest, op = max(end - start for start, end in pairwise(offsets)), "packed_attention"
        offset_table = (torch.tensor(offsets, device=DEVICE),)
    tables = tables_of(call, longest - call.num_prefix) if call.tables else {}
    more = [*offset_table, *(tables.get(name) for name in ("cos", "sin", "token_index"))]
    more += [longest if offsets else call.num_prefix, call.causal, call.interleaved, call.scale]
    lse_shape = (call.heads, offsets[-1]) if offsets else (call.batch, call.heads, call.tokens)
    out, lse = blank(*q.shape, dtype=call.dtype), blank(*lse_shape)
    run(f"{op}_forward", q, k, v, *more, writes=[out, lse])
    dout = draw(*q.shape, dtype=call.dtype)
    gradients = [q.shape, (*of_keys, call.heads, dim), (*of_keys, call.heads, dim)]
    writes = [blank(*shape, dtype=call.dtype) for shape in gradients]
    run(f"{op}_backward", dout, q, k, v, out, lse, *more, writes=writes)


def tables_of(call: Attention, patches: int) -> dict[str, Tensor]:
    """The tables have more rows than patches if there is an index."""
    rows, pairs = patches + 3 * call.indexed, call.head_dim // 2
    angles = 3 * draw(*([call.heads] if call.tables == "heads" else []), rows, pairs)
    found = {"cos": angles.cos(), "sin": angles.sin()}
    if call.indexed:
        sizes = (call.offsets[-1],) if call.offsets else (call.batch, patches)
        index = [-1 if i % 7 == 6 else i * 5 % rows for i in range(math.prod(sizes))]
        found["token_index"] = torch.tensor(index, device=DEVICE).view(sizes)
    return found


OF_MATRICES = {"layer_norm": layer_norm, "gelu": gelu, "swiglu": swiglu, "token_dropout": token_dropout}
OTHERS = {"contrastive": contrastive, "rope_attention": rope_attention}


def with_planted_fault(ptx: str) -> str:
    """PTX in which the fault with the requested number applies; none without a number."""
    return ptx.replace("PLANTED_FAULT", os.environ.get("EVAKERNELS_PLANTED", "0"))


def main() -> None:
    global DEVICE
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", metavar="FAMILY")
    parser.add_argument("--interpret", type=int, metavar="CAPABILITY", help="run the PTX on the CPU")
    given = parser.parse_args()
    context: Any = nullcontext()
    if given.interpret:
        from ptx_interpreter.runtime import Launches

        gc.disable()  # of the many objects that kernels are read into none is garbage
        DEVICE = torch.device("cpu")
        context = Launches(_native._LIBRARY, given.interpret, edit=with_planted_fault, count=False)
    torch.manual_seed(0)
    with context:
        for family in given.families or [*OF_MATRICES, *OTHERS]:
            for matrix in MATRICES if family in OF_MATRICES else ():
                OF_MATRICES[family](*matrix)
            if family in OTHERS:
                OTHERS[family]()
    print("all right")


if __name__ == "__main__":
    main()
