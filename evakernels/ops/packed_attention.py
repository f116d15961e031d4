"""Attention within the sequences of a packed batch."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from evakernels.ops import _check
from evakernels.ops._autocast import matmul_inputs
from evakernels.ops._op import define, differentiable
from evakernels.ops.rope_attention import gpu_reasons
from evakernels.reference import packed_attention as reference
from evakernels.reference import rope_attention
from evakernels.reference._numerics import accumulation_dtype


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    *,
    max_length: int,
    causal: bool = True,
    scale: float | None = None,
) -> Tensor:
    """Multi-head attention of sequences that lie one behind the other, without padding between them.

    A token sees the tokens of its own sequence. This is what text needs, whose sequences differ in length.

    Args:
        q, k, v: `[T, H, D]` in one dtype, the tokens of all sequences; views of one packed projection are fine.
        offsets: int32 or int64 `[B + 1]`, from 0 to T: sequence b has the tokens `offsets[b]` to
            `offsets[b + 1] - 1`. It may be empty.
        max_length: no sequence is longer. It is an argument so that the host needn't wait for the device.
        causal: a query sees no later key.
        scale: factor of the scores; `D ** -0.5` by default.

    Returns:
        `[T, H, D]`, contiguous, in the dtype of `q`. Precision and autocast are as for `rope_attention`.

    Raises:
        TypeError: for a dtype that isn't accepted.
        ValueError: for shapes, devices or options that don't fit together; on a CPU also for offsets that don't,
            elsewhere they aren't checked.

    Examples:
        >>> lengths = torch.tensor([5, 77, 12])
        >>> offsets = torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)))
        >>> q, k, v = torch.randn(94, 3, 8, 64).unbind(1)
        >>> evakernels.packed_attention(q, k, v, offsets, max_length=77).shape
        torch.Size([94, 8, 64])
    """
    out: Tensor = _forward(q, k, v, offsets, max_length, causal, scale)
    return out


def _check_call(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, max_length: int, causal: bool, scale: float | None
) -> Any:
    op = "packed_attention"
    _check.floating(op, q=q, k=k, v=v)
    q, k, v = matmul_inputs(q, k, v)
    _check.heads(op, "[T, H, D]", q, k, v)
    _check.integers(op, (torch.int32, torch.int64), offsets=offsets)
    _check.same_device(op, q=q, offsets=offsets)
    if offsets.dim() != 1 or offsets.shape[0] == 0:  # len would fix a size that a program leaves open
        raise ValueError(f"{op}: offsets has shape {tuple(offsets.shape)}; expected [B + 1]")
    _check.number(op, "max_length", max_length, "at least 0")
    _check.scale(op, scale)
    if max_length < 0:
        raise ValueError(f"{op}: max_length is {max_length}; accepted: at least 0")
    return q, k, v, offsets, max_length, causal, q.shape[-1] ** -0.5 if scale is None else scale


# --- ops ------------------------------------------------------------------------------------------------------------


def _forward_fake(q: Tensor, *rest: Any) -> Any:
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=accumulation_dtype(q))
    return torch.empty_like(q, memory_format=torch.contiguous_format), lse


def _backward_fake(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Any:
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


def _check_values(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, max_length: int, *rest: Any) -> None:
    """Only on a CPU: elsewhere the question would make the host wait for the device."""
    if offsets.device.type != "cpu":
        return
    op, first, last = "packed_attention", int(offsets[0]), int(offsets[-1])
    if first != 0 or last != q.shape[0]:
        raise ValueError(f"{op}: offsets go from {first} to {last}; expected 0 to T = {q.shape[0]}")
    if len(offsets) > 1:
        shortest, longest = (int(bound) for bound in torch.aminmax(offsets.diff()))
        if shortest < 0 or longest > max_length:
            found = f"the sequences have lengths from {shortest} to {longest}"
            raise ValueError(f"{op}: {found}; accepted: 0 to max_length = {max_length}")


def _forward_gpu_reasons(
    q: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    offsets: Tensor | None = None,
    max_length: int = 0,
    *_: Any,
) -> list[str]:
    return gpu_reasons(q, min(max_length, q.shape[0])) if q.dim() == 3 else []


def _backward_gpu_reasons(dout: Tensor, *rest: Any) -> list[str]:
    return _forward_gpu_reasons(dout, *rest[:2], None, *rest[6:])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, offsets, *ctx.options = inputs
    out, lse = output
    ctx.save_for_backward(q, k, v, out, lse, offsets)


def _gradient(ctx: Any, dout: Tensor) -> Any:
    return _backward(dout, *ctx.saved_tensors, *ctx.options)


_forward = define(
    reference.packed_attention_forward,
    check=_check_call,
    check_values=_check_values,
    fake=_forward_fake,
    composed=partial(reference.packed_attention, rope_attention.rope_attention_forward),
    lowered=reference.packed_attention_sdpa,
    gpu_reasons=_forward_gpu_reasons,
)
_backward = define(
    reference.packed_attention_backward,
    check_values=lambda dout, q, k, v, out, lse, *rest: _check_values(q, k, v, *rest),
    fake=_backward_fake,
    gpu_reasons=_backward_gpu_reasons,
)
differentiable(_forward, _backward, setup_context=_setup, formula=_gradient, returned=1)
