"""silu(gate) * up, alone or with the LayerNorm after it: one program a row, each byte read and written once.

Backward walks over the rows with as many programs as the GPU runs at a time, so that the sums over rows, which give
the norm's weight and bias their gradients, are one row of partial sums a program. They are added in a fixed order.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from evakernels.triton._launch import multiprocessors, on_device_of, rows_of
from evakernels.tuning import config

MAX_WIDTH = 1 << 15
"""A row is held in registers."""


def reasons(op: str, *args: Any) -> list[str]:
    width = args[0].shape[-1]
    return [f"rows of {width} elements are longer than {MAX_WIDTH}"] if width > MAX_WIDTH else []


@triton.jit
def _row(pointer, row, stride, columns, inside):
    return tl.load(pointer + row * stride + columns, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def forward_kernel(
    gate,
    up,
    weight,
    bias,
    out,
    mean,
    rstd,
    gate_stride: tl.int64,
    up_stride: tl.int64,
    width: tl.int64,
    eps: tl.float32,
    HAS_NORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    g = _row(gate, row, gate_stride, columns, inside)
    values = g * tl.sigmoid(g) * _row(up, row, up_stride, columns, inside)
    if HAS_NORM:
        row_mean = tl.sum(values, 0) / width
        centred = tl.where(inside, values - row_mean, 0.0)
        row_rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / width + eps)
        values = centred * row_rstd * tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
        if HAS_BIAS:
            values += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(mean + row, row_mean)
        tl.store(rstd + row, row_rstd)
    tl.store(out + row * width + columns, values.to(out.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(
    dout,
    gate,
    up,
    weight,
    mean,
    rstd,
    dgate,
    dup,
    dweight,
    dbias,
    gate_stride: tl.int64,
    up_stride: tl.int64,
    rows,
    width: tl.int64,
    HAS_NORM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    weight_sum = tl.zeros([BLOCK], tl.float32)
    bias_sum = tl.zeros([BLOCK], tl.float32)
    if HAS_NORM:
        scale = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        d = _row(dout, row, width, columns, inside)
        g = _row(gate, row, gate_stride, columns, inside)
        u = _row(up, row, up_stride, columns, inside)
        sigmoid = tl.sigmoid(g)
        silu = g * sigmoid
        if HAS_NORM:
            row_rstd = tl.load(rstd + row)
            normed = tl.where(inside, (silu * u - tl.load(mean + row)) * row_rstd, 0.0)
            weight_sum += d * normed
            bias_sum += d
            d *= scale
            d = (d - tl.sum(d, 0) / width - normed * (tl.sum(d * normed, 0) / width)) * row_rstd
        at = row * width + columns
        dsilu = sigmoid * (1.0 + g * (1.0 - sigmoid))
        tl.store(dgate + at, (d * u * dsilu).to(dgate.dtype.element_ty), mask=inside)
        tl.store(dup + at, (d * silu).to(dup.dtype.element_ty), mask=inside)
    if HAS_NORM:
        at = tl.program_id(0) * width + columns
        tl.store(dweight + at, weight_sum, mask=inside)
        tl.store(dbias + at, bias_sum, mask=inside)


def swiglu_forward(
    gate: Tensor, up: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    gate_rows, up_rows = rows_of(gate), rows_of(up)
    rows, width = gate_rows.shape
    out = torch.empty_like(gate, memory_format=torch.contiguous_format)
    statistics = gate.shape[:-1] if norm_weight is not None else (0,)
    mean, rstd = (gate.new_empty(statistics, dtype=torch.float32) for _ in range(2))
    if out.numel() == 0:
        return out, mean, rstd
    with on_device_of(gate):
        forward_kernel[(rows,)](
            *(gate_rows, up_rows, norm_weight, norm_bias, out, mean, rstd),
            *(gate_rows.stride(0), up_rows.stride(0), width, eps),
            HAS_NORM=norm_weight is not None,
            HAS_BIAS=norm_bias is not None,
            BLOCK=triton.next_power_of_2(width),
            **config("swiglu_forward", {"width": width}, gate),
        )
    return out, mean, rstd


def swiglu_backward(
    dout: Tensor, gate: Tensor, up: Tensor, norm_weight: Tensor | None, mean: Tensor, rstd: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gate_rows, up_rows = rows_of(gate), rows_of(up)
    rows, width = gate_rows.shape
    dgate, dup = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (gate, up))
    programs = min(rows, 2 * multiprocessors(gate))
    sums = gate.new_empty(2, programs if norm_weight is not None else 0, width, dtype=torch.float32)
    if gate.numel() > 0:
        with on_device_of(gate):
            backward_kernel[(programs,)](
                *(dout.contiguous(), gate_rows, up_rows, norm_weight, mean, rstd, dgate, dup, sums[0], sums[1]),
                *(gate_rows.stride(0), up_rows.stride(0), rows, width),
                HAS_NORM=norm_weight is not None,
                BLOCK=triton.next_power_of_2(width),
                **config("swiglu_backward", {"width": width}, gate),
            )
    if norm_weight is None:
        return dgate, dup, mean.new_empty(0), mean.new_empty(0)
    dweight, dbias = sums.sum(1).to(norm_weight.dtype)
    return dgate, dup, dweight, dbias if has_bias else norm_weight.new_empty(0)
