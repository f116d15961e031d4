"""The optimizers' table of a model's tensors on the device; a program updates a chunk of one tensor.

The table holds for each tensor the pointers to its buffers, the rates of its group and the bounds of its chunks. Each
is copied to the device when it changes, without synchronisation: pointers when a buffer moves, rates when a schedule
changes them, chunks once.

A kernel is compiled for the dtypes of the buffers, so tensors of different dtypes or alignment have separate launches.
The chunks of a launch are consecutive.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from ..tuning import config

TENSORS = 128
"""Tensors of a program that computes factors of whole tensors."""
KEPT = 64
"""Sizes of the caches of numbers and layouts."""
VECTOR = tl.constexpr(4)
"""Elements of an access: 16 bytes of float32 or 8 of 16-bit buffers. With 8 elements an access to a float32 buffer
would be two, each of half of every sector."""

_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class Layout(NamedTuple):
    """The chunks of tensors.

    Attributes:
        chunks: `[chunks, 3]` int64: index of the tensor, first element, end.
        spans: `[n, 2]` int64: first chunk of a tensor, end.
        launches: first chunk, number of chunks and constants of the kernel of each launch.
    """

    chunks: Tensor
    spans: Tensor
    launches: tuple[tuple[int, int, dict[str, Any]], ...]


class Table:
    """The tensors of a call of `op`; the names of the lists are those of the kernels' dtypes.

    Attributes:
        pointers: `[n, lists]` int64, with `steps` in the first column if there are any.
    """

    def __init__(self, op: str, steps: Sequence[Tensor] = (), **lists: Sequence[Tensor]) -> None:
        self._lists = lists
        self._dense = {name: [tensor.contiguous() for tensor in tensors] for name, tensors in lists.items()}
        columns = [[tensor.data_ptr() for tensor in tensors] for tensors in self._dense.values()]
        first, *_ = lists.values()
        self._device = first[0].device
        # Without fused multiply-adds results don't depend on the alignment of tensors.
        self._options = config(op, {}, first[0]) | {"enable_fp_fusion": False}
        sizes = tuple(tensor.numel() for tensor in first)
        rows = zip(*columns, strict=True)
        fits = (size % 4 == 0 and all(p % 16 == 0 for p in row) for size, row in zip(sizes, rows, strict=True))
        dtypes = ([tensor.dtype for tensor in tensors] for tensors in lists.values())
        kinds = tuple(zip(fits, *dtypes, strict=True))
        self.layout: Layout = _cached(_layout, self._device, tuple(lists), kinds, sizes, self._options.pop("CHUNK"))
        self.pointers = self.numbers(*([[step.data_ptr() for step in steps]] if steps else []), *columns)

    def numbers(self, *columns: Sequence[float], dtype: torch.dtype = torch.int64) -> Tensor:
        """`[n, columns]` on the device."""
        numbers: Tensor = _cached(_numbers, self._device, tuple(map(tuple, columns)), dtype)
        return numbers

    def rates(self, lrs: Sequence[float], device_lrs: Tensor | None) -> Tensor:
        """The learning rates on the device, float64: `device_lrs` if they are there already."""
        return self.numbers(lrs, dtype=torch.float64) if device_lrs is None else device_lrs.double()

    def room(self, rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(rows, columns, dtype=dtype, device=self._device)

    def rounding(self, seeds: Sequence[int], first_elements: Sequence[int]) -> tuple[Tensor | None, Tensor | None]:
        """The seeds on the device, and memory for the keys of `store_keys`."""
        return (self.numbers(seeds, first_elements), self.room(len(seeds), 2, torch.int32)) if seeds else (None, None)

    def prepare(self, kernel: Any, *arguments: Any, **constants: Any) -> None:
        """Launches a kernel with a lane for each tensor."""
        count = len(self.pointers)
        grid, constants = (triton.cdiv(count, TENSORS),), constants | {"BLOCK": TENSORS, "enable_fp_fusion": False}
        kernel[grid](self.pointers, *arguments, count, **constants)

    def launch(self, kernel: Any, *arguments: Any, **constants: Any) -> None:
        """Launches a kernel with a program for each chunk."""
        for first, count, dtypes in self.layout.launches:
            options = dtypes | constants | self._options
            kernel[(count,)](self.pointers, self.layout.chunks, first, *arguments, **options)

    def return_copies(self, *written: str) -> None:
        """Copies results to written tensors that aren't dense."""
        for name in written:
            for tensor, dense in zip(self._lists[name], self._dense[name], strict=True):
                if dense is not tensor:
                    tensor.copy_(dense)


def as_float(flag: Tensor | None) -> Tensor | None:
    return None if flag is None else flag.to(torch.float32)


def logs(*betas: float) -> tuple[float, ...]:
    return tuple(math.log(beta) if beta > 0 else -math.inf for beta in betas)


def _cached(make: Any, device: torch.device, *arguments: Any) -> Any:
    if device.type != "cuda":
        return make(device, None, *arguments)
    if torch.cuda.is_current_stream_capturing():
        return make.__wrapped__(device, None, *arguments)  # a graph's copies exist in its replays only
    # Another stream could read a copy before it has arrived.
    return make(device, torch.cuda.current_stream(device).cuda_stream, *arguments)


@lru_cache(KEPT)
def _numbers(
    device: torch.device, stream: int | None, columns: tuple[tuple[float, ...], ...], dtype: torch.dtype
) -> Tensor:
    return _copied(torch.tensor(columns, dtype=dtype, device="cpu").T.contiguous(), device)


@lru_cache(KEPT)
def _layout(
    device: torch.device,
    stream: int | None,
    names: tuple[str, ...],
    kinds: tuple[tuple[Any, ...], ...],
    sizes: tuple[int, ...],
    chunk: int,
) -> Layout:
    spans, launches, parts, position = [(0, 0)] * len(sizes), [], [], 0
    for kind in dict.fromkeys(kinds):
        start = position
        for i in (i for i, other in enumerate(kinds) if other == kind):
            begins = torch.arange(0, sizes[i], chunk, dtype=torch.int64, device="cpu")
            parts.append(torch.stack([torch.full_like(begins, i), begins, (begins + chunk).clamp(max=sizes[i])], 1))
            spans[i] = position, position + len(begins)
            position += len(begins)
        fits, *dtypes = kind
        constants = {name: _DTYPES[dtype] for name, dtype in zip(names, dtypes, strict=True)} | {"FITS": fits}
        if position > start:
            launches.append((start, position - start, constants))
    return Layout(_copied(torch.cat(parts), device), _copied(torch.tensor(spans, device="cpu"), device), (*launches,))


def _copied(host: Tensor, device: torch.device) -> Tensor:
    if device.type != "cuda":
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)  # torch keeps a graph's pinned memory


def draw_tensors(draw):
    """A matrix and a bias with float32 moments; rates; flags; for bfloat16 seeds and first elements."""
    sizes = (draw.elements // 1024, 1024), (1365,)  # vectors don't fit the second
    params, grads = ([draw(*size) for size in sizes] for _ in range(2))
    exp_avgs, exp_avg_sqs = ([draw.statistic(*size) for size in sizes] for _ in range(2))
    rounding = ([1, 2], [0, 0]) if draw.dtype == torch.bfloat16 else ([], [])
    tensors = params, grads, exp_avgs, exp_avg_sqs, [draw.statistic() for _ in sizes]
    return tensors, [0.1, 0.2], (draw.statistic(), torch.zeros((), device=draw.device)), rounding


# --- in kernels -----------------------------------------------------------------------------------------------------


@triton.jit
def is_set(found_inf):
    return tl.load(found_inf) > 0.0 if found_inf is not None else False


@triton.jit
def chunk_at(chunks, position, FITS: tl.constexpr):
    """Tensor, first element and end of a chunk."""
    chunks += 3 * position
    tensor, begin, end = tl.load(chunks), tl.load(chunks + 1), tl.load(chunks + 2)
    if FITS:
        begin, end = tl.multiple_of(begin, VECTOR), tl.multiple_of(end, VECTOR)
    return tensor, begin, end


@triton.jit
def buffer_at(pointers, DTYPE: tl.constexpr, FITS: tl.constexpr):
    pointer = tl.load(pointers).to(tl.pointer_type(DTYPE))
    if FITS:
        pointer = tl.multiple_of(pointer, VECTOR * DTYPE.primitive_bitwidth // 8)
    return pointer


@triton.jit
def load_floats(buffer, i, inside):
    return tl.load(buffer + i, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def store_floats(buffer, i, values, inside):
    tl.store(buffer + i, values.to(buffer.dtype.element_ty), mask=inside)


@triton.jit
def store_gradient_factor(factors, grad_scale, inside):
    """Stores the reciprocal of the scale, which is exact for powers of two."""
    factor = tl.div_rn(1.0, tl.load(grad_scale)) if grad_scale is not None else 1.0
    tl.store(factors, factor, mask=inside)


@triton.jit
def updated_moments(g, m, v, beta1, beta2):
    """The new moments; betas are float64, so that 1 - beta is exact in float32."""
    m = beta1.to(tl.float32) * m + (1.0 - beta1).to(tl.float32) * g
    return m, beta2.to(tl.float32) * v + (1.0 - beta2).to(tl.float32) * (g * g)


@triton.jit
def buffers_at(pointers, dtypes, FITS: tl.constexpr):
    """The buffers of a tensor from consecutive pointers."""
    buffers = ()
    for i in tl.static_range(len(dtypes)):
        buffers += (buffer_at(pointers + i, dtypes[i], FITS),)
    return buffers


@triton.jit
def lanes_at(pointers, count, found_inf, log_betas, LISTS: tl.constexpr, COUNTS: tl.constexpr, BLOCK: tl.constexpr):
    """A lane's tensor, whether it exists, its step and 1 - beta^step of both betas; COUNTS increments the step."""
    tensor = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = tensor < count
    counter = tl.load(pointers + LISTS * tensor, mask=inside, other=0).to(tl.pointer_type(tl.float32))
    step = tl.load(counter, mask=inside, other=1.0)
    if COUNTS:
        step = tl.where(is_set(found_inf), step, step + 1.0)
        tl.store(counter, step, mask=inside)
    return tensor, inside, step, bias_correction(log_betas[0], step), bias_correction(log_betas[1], step)


@triton.jit
def bias_correction(log_beta, step):
    """1 - beta^step, float64, to full precision also for beta close to 1."""
    return -libdevice.expm1(step.to(tl.float64) * log_beta)


@triton.jit
def scrambled(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def store_keys(keys, seeds, tensor, step, inside):
    """Keys of random bits [n, 2], from seeds and first elements [n, 2]."""
    seed = tl.load(seeds + 2 * tensor, mask=inside, other=0)
    first = tl.load(seeds + 2 * tensor + 1, mask=inside, other=0).to(tl.uint32)
    low, high, count = seed.to(tl.uint32), (seed >> 32).to(tl.uint32), step.to(tl.uint32)
    start = scrambled(scrambled(scrambled(low) + high) + count) + first
    mask = scrambled(scrambled(scrambled(high ^ 0x9E3779B9) + low) + count)
    tl.store(keys + 2 * tensor, start.to(tl.int32, bitcast=True), mask=inside)
    tl.store(keys + 2 * tensor + 1, mask.to(tl.int32, bitcast=True), mask=inside)


@triton.jit
def rounded(values, i, keys, tensor):
    """The values; with keys, bfloat16 values rounded up with the probability of the fraction that is cut off."""
    if keys is not None:
        start = tl.load(keys + 2 * tensor).to(tl.uint32, bitcast=True)
        mask = tl.load(keys + 2 * tensor + 1).to(tl.uint32, bitcast=True)
        random = scrambled(scrambled(i.to(tl.uint32) + start) ^ mask)
        bits = (values.to(tl.uint32, bitcast=True) + (random >> 16)) & 0xFFFF0000
        values = tl.where(values == values, bits.to(tl.float32, bitcast=True), values)
    return values
