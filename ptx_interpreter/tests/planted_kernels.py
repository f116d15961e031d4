"""Triton kernels for test_ptx_command.py, most with a fault in the line of a comment that names it.

Arguments of this file are kernels, each of which is launched once on tensors of "cuda".
"""

import sys

import torch
import triton
import triton.language as tl


@triton.jit
def right(x, y, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(y + i, tl.load(x + i, i < n) * 2, i < n)


@triton.autotune([triton.Config({}, num_warps=64), triton.Config({}, num_warps=2)], key=["n"])
@triton.heuristics({"EVEN": lambda arguments: arguments["n"] % arguments["B"] == 0})
@triton.jit
def tuned(x, y, n, B: tl.constexpr, EVEN: tl.constexpr):
    """A block has no 64 warps."""
    i = tl.arange(0, B)
    square = tl.load(x + i[:, None] * B + i[None, :])
    tl.store(y + i, tl.sum(tl.dot(square, square), 0), EVEN or i < n)


@triton.jit
def described(x, y, B: tl.constexpr):
    source = tl.make_tensor_descriptor(x, [B, B], [B, 1], [B // 2, B // 2])
    half = source.load([tl.program_id(0) * (B // 2), 0])
    i = tl.arange(0, B // 2)
    tl.store(y + (tl.program_id(0) * (B // 2) + i) * B, tl.sum(half, 1))


@triton.jit
def locked(x, sums, lock, B: tl.constexpr):
    i = tl.arange(0, B)
    mine = tl.load(x + tl.program_id(0) * B + i)
    while tl.atomic_cas(lock, 0, 1) == 1:
        pass
    tl.store(sums + i, tl.load(sums + i) + mine)
    tl.debug_barrier()
    tl.atomic_xchg(lock, 0)


@triton.jit
def one_address(x, out, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(out, tl.sum(tl.load(x + i)))  # race


@triton.jit
def one_place(x, y, B: tl.constexpr):
    i = tl.arange(0, B)
    tl.store(y + i * 0, tl.load(x + i))  # race


@triton.jit
def counted(x, counts, B: tl.constexpr):
    bins = tl.load(x + tl.arange(0, 2 * B)).to(tl.int32) & 15
    tl.store(counts + tl.arange(0, 16), tl.histogram(bins, 16))


@triton.jit
def no_barrier(x, scratch, out, B: tl.constexpr):
    i = tl.arange(0, B)
    tl.store(scratch + i, tl.load(x + i))
    mirrored = tl.load(scratch + B - 1 - i)  # race
    tl.store(out + i, mirrored)


@triton.jit
def no_mask(x, y, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    loaded = tl.load(x + i)  # out of bounds
    tl.store(y + i, loaded, i < n)


@triton.jit
def before(x, y, B: tl.constexpr):
    i = tl.arange(0, B)
    loaded = tl.load(x + i - 1)  # out of bounds
    tl.store(y + i, loaded)


@triton.jit
def no_other(x, y, n, B: tl.constexpr):
    i = tl.arange(0, B)
    largest = tl.max(tl.load(x + i, i < n))
    tl.store(y + i, tl.exp(tl.load(x + i, i < n) - largest), i < n)  # masked off


@triton.jit
def no_other_bf16(x, y, n, B: tl.constexpr):
    i = tl.arange(0, B)
    total = tl.sum(tl.load(x + i, i < n).to(tl.float32))
    tl.store(y, total.to(tl.bfloat16))  # masked off


@triton.jit
def rows_off(x, y, rows, B: tl.constexpr):
    """Rows that are masked off in load and store; a masked-off value that isn't chosen."""
    row, column = tl.arange(0, B)[:, None], tl.arange(0, B)[None, :]
    loaded = tl.load(x + row * B + column, row < rows)
    tl.store(y + tl.arange(0, B), tl.max(loaded, 1), tl.arange(0, B) < rows)
    some = tl.load(x + row * B + column, column < 3)
    tl.store(y + tl.arange(0, B), tl.sum(tl.where(column < 3, some, 0), 1))


@triton.jit
def write(to, value, mask):
    tl.store(to, value, mask)  # out of bounds


@triton.jit
def wrong_mask(x, y, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    write(y + i, tl.load(x + i, i < n), i <= n)


@triton.jit
def unwritten(x, y, B: tl.constexpr):
    i = tl.arange(0, B)
    before = tl.load(y + i)  # uninitialised
    tl.store(y + i, before + tl.load(x + i))


@triton.jit
def wrong_hint(x, y, B: tl.constexpr):
    i = tl.arange(0, B)
    first = tl.multiple_of(tl.load(y).to(tl.int32), 16)
    loaded = tl.load(x + first + i)  # misaligned
    tl.store(y + i, loaded)


FIRST_WARP_WAITS = tl.constexpr(
    "{.reg .pred q; .reg .b32 t; mov.u32 t, %tid.x; setp.lt.u32 q, t, 32; @q bar.sync 0; mov.b32 $0, $1;}"
)


@triton.jit
def uneven(x, y, B: tl.constexpr):
    i = tl.arange(0, B)
    some = tl.inline_asm_elementwise(FIRST_WARP_WAITS, "=r,r", [tl.load(x + i)], tl.float32, False, 1)  # uneven barrier
    tl.debug_barrier()
    tl.store(y + i, some)


@triton.jit
def unknown(x, y, B: tl.constexpr):
    i = tl.arange(0, B)
    loaded = tl.load(x + i)
    tl.store(y + i, tl.inline_asm_elementwise("szext.wrap.b32 $0, $1, 8;", "=r,r", [loaded], tl.float32, False, 1))


class Double(torch.autograd.Function):
    @staticmethod
    def forward(context, x):
        y = torch.empty_like(x)
        right[(1,)](x, y, 100, B=128)
        return y

    @staticmethod
    def backward(context, gradient):
        assert gradient.is_cuda
        return Double.forward(context, gradient.contiguous())


def launch(name: str) -> None:
    x, y = torch.randn(1000, device="cuda"), torch.empty(1000).cuda()
    assert x.is_cuda and y.device == torch.device("cuda", 0)  # noqa: PT018
    if name == "right":
        right[(4,)](x, y, 1000, B=256)
        right[(0,)](x, y, 1000, B=256)
        torch.testing.assert_close(y, 2 * x)
    elif name == "differentiated":
        torch.set_default_device("cuda")
        x = torch.ones(100, requires_grad=True)
        with torch.cuda.stream(torch.cuda.Stream()):
            Double.apply(x).sum().backward()
        torch.set_default_device(None)
        assert x.grad.tolist() == [2] * 100
    elif name == "tuned":
        tuned[(1,)](x, y, 16, B=16)
        assert tuned.best_config.num_warps == 2
    elif name == "described":
        triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device="cuda"))
        described[(2,)](x, y, B=16)
        torch.testing.assert_close(y[:256:16], x[:256].view(16, 16)[:, :8].sum(1))
    elif name == "locked":
        sums, lock = torch.zeros(128, device="cuda"), torch.zeros(1, dtype=torch.int32, device="cuda")
        locked[(4,)](x, sums, lock, B=128)
        torch.testing.assert_close(sums, x[:512].view(4, 128).sum(0))
    elif name == "no_barrier":
        no_barrier[(1,)](x, y, torch.empty_like(x), B=256)
    elif name == "no_other_bf16":
        no_other_bf16[(1,)](x.bfloat16(), y.bfloat16(), 100, B=128)
    elif name == "rows_off":
        rows_off[(1,)](x, y, 9, B=16)
        torch.testing.assert_close(y[:16], x[:256].view(16, 16)[:, :3].sum(1))
    elif name == "no_other":
        no_other[(1,)](x, y, 100, B=128)
    elif name in ("no_mask", "wrong_mask"):
        globals()[name][(4,)](x, y, 1000, B=256)
    elif name == "wrong_hint":
        wrong_hint[(1,)](x, torch.ones(1000, device="cuda"), B=512)
    else:
        y[:64] = 1
        globals()[name][(4 if name == "one_address" else 1,)](x, y, B=128)


for each in sys.argv[1:]:
    launch(each)
