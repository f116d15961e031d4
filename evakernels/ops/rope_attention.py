"""Attention with the rotary position embedding inside."""

from typing import Any, Literal, overload

import torch
from torch import Tensor

from ..autocast import matmul_inputs
from ..reference import accumulation_dtype
from ..reference import rope_attention as reference
from ..triton import head_reasons
from . import _check
from ._check import token_range
from ._op import define, differentiable

MAX_PREFIX = 16
"""Maximum number of unrotated tokens (class token and registers) before the patches."""

_MAX_GPU_TOKENS, _MAX_GPU_HEAD_DIM = 4096, 128  # as in csrc/include/rope_attention.h
_MAX_GPU_ELEMENTS = (1 << 29) - 1


@overload
def rope_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None = ...,
    sin: Tensor | None = ...,
    *,
    token_index: Tensor | None = ...,
    num_prefix: int = ...,
    causal: bool = ...,
    interleaved: bool = ...,
    scale: float | None = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...


@overload
def rope_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None = ...,
    sin: Tensor | None = ...,
    *,
    token_index: Tensor | None = ...,
    num_prefix: int = ...,
    causal: bool = ...,
    interleaved: bool = ...,
    scale: float | None = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def rope_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    token_index: Tensor | None = None,
    num_prefix: int = 0,
    causal: bool = False,
    interleaved: bool = True,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Multi-head attention with rotary embedding of queries and keys (RoPE, Su et al. 2021).

    Queries and keys are rotated inside the op; `q`, `k` and `v` are saved for backward as given.

    Args:
        q: `[B, N, H, D]`; may be a view of a packed projection.
        k, v: `[B, M, Hkv, D]` in the dtype of `q`. H is a multiple of Hkv: query head h uses head h // (H // Hkv)
            (grouped and multi-query attention). M may differ from N without rotation, or if `q` holds the first N of
            the M tokens, all of the prefix.
        cos, sin: `[P, D/2]`, or `[H, P, D/2]` if Hkv is H: one entry per rotated pair; without gradient. None
            for no rotation. `evakernels.nn.axial_rope` computes EVA's.
        token_index: int64 `[B, M - num_prefix]`: table row of each token after the prefix (see `token_dropout`); -1
            for no rotation. None for row i of token `num_prefix + i`; P is then `M - num_prefix`.
        num_prefix: number of leading tokens (class token, registers) that aren't rotated; 0 to 16.
        causal: mask later keys: query i sees keys up to i + M - N, so that the last query sees all.
        interleaved: the pairs are (2i, 2i+1), as in EVA and in timm's "cat" layout; False for (i, i + D/2),
            "rotate half".
        scale: factor of the scores; `D ** -0.5` by default.
        return_lse: whether to return the log-sum-exps of the scores, too.

    Returns:
        `[B, N, H, D]`, contiguous, in the dtype of `q`; zeros for a query that sees no key. With `return_lse` also
        `[B, H, N]`, float32 (float64 for float64 input), without gradient. Scores and softmax are float32 (float64 for
        float64 input); scores of bfloat16 input may have 16 significant bits instead of 24. Under autocast `q`, `k` and
        `v` are cast as for `torch.nn.functional.scaled_dot_product_attention`.

    Raises:
        TypeError: for a dtype that isn't accepted.
        ValueError: for shapes, devices or options that don't fit together.
        IndexError: on a CPU, for a `token_index` outside the table; other devices would have to synchronise.

    Examples:
        >>> q, k, v = torch.randn(2, 197, 3, 12, 64).unbind(2)  # a class token and 14 x 14 patches
        >>> cos, sin = evakernels.nn.axial_rope(14, 14, head_dim=64)
        >>> evakernels.rope_attention(q, k, v, cos, sin, num_prefix=1).shape
        torch.Size([2, 197, 12, 64])
    """
    args = q, k, v, cos, sin, token_index, num_prefix, causal, interleaved, scale
    if cos is not None and _has_first_queries(q, k):
        args = _rotate_keys(*args)
    if return_lse:
        both: tuple[Tensor, Tensor] = _forward.every_output(*args)
        return both[0], both[1].detach()
    out: Tensor = _forward(*args)
    return out


def _check_call(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Any:
    cos, sin, token_index, num_prefix, causal, interleaved, scale = rest
    _check.floating("rope_attention", q=q, k=k, v=v)
    q, k, v = matmul_inputs(q, k, v)
    _check.heads("rope_attention", "[B, N, H, D]", q, k, v)
    num_prefix = _check_rotation(q, k, cos, sin, token_index, num_prefix, causal)
    _check.scale("rope_attention", scale)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return q, k, v, cos, sin, token_index, num_prefix, causal, interleaved, scale


def _has_first_queries(q: Any, k: Any) -> bool:
    """Whether there are queries of the first tokens only."""
    return isinstance(q, Tensor) and isinstance(k, Tensor) and q.dim() == k.dim() == 4 and q.shape[1] < k.shape[1]


def _rotate_keys(*args: Any) -> Any:
    """The arguments with rotated keys and without tables; queries of the prefix aren't rotated."""
    _check_call(*args)
    q, k, v, cos, sin, token_index, num_prefix, causal, interleaved, scale = args
    refuse_gradients("rope_attention", cos, sin)
    if type(token_index) is Tensor and not torch.compiler.is_compiling():  # which hides values
        _check_values(q, k, v, cos, sin, token_index)
    rotation = reference.rotation_tables(k, cos, sin, token_index, num_prefix)
    k = reference.rotate_rounded(k.transpose(1, 2), rotation, interleaved).transpose(1, 2)
    return q, k, v, None, None, None, 0, causal, interleaved, scale


def _check_rotation(
    q: Tensor,
    k: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    token_index: Tensor | None,
    num_prefix: int,
    causal: bool,
) -> int:
    """Returns `num_prefix`, or 0 without tables."""
    op, (batch, tokens) = "rope_attention", k.shape[:2]
    _check.integer(op, "num_prefix", num_prefix, f"0 to {MAX_PREFIX}")
    if not 0 <= num_prefix <= MAX_PREFIX or (cos is not None and num_prefix > tokens):
        raise ValueError(f"{op}: num_prefix must be 0 to {MAX_PREFIX}, at most M = {tokens}, got {num_prefix}")
    if token_index is not None:
        if cos is None and sin is None:
            raise ValueError(f"{op}: token_index must be None without cos and sin, got {_check.kind(token_index)}")
        _check.dtypes(op, (torch.int64,), token_index=token_index)
    if cos is not None and q.shape[1] != tokens and (causal or q.shape[1] > num_prefix):
        raise ValueError(
            f"{op}: q must have the tokens of k with cos and sin, or the num_prefix = {num_prefix} first, not causal, "
            f"got {q.shape[1]} and {tokens}{', causal' * causal}: rotate q and k beforehand"
        )
    patches = tokens - num_prefix
    if not check_tables(op, q, k, cos, sin, patches if token_index is None else None):
        return 0
    _check.same_device(op, q=q, token_index=token_index)
    _check.shape(op, "token_index", token_index, (batch, patches), "[B, M - num_prefix]")
    return num_prefix


def check_tables(
    op: str, q: Tensor, k: Tensor, cos: Tensor | None, sin: Tensor | None, patches: int | None = None
) -> bool:
    """Whether there are tables, which must fit queries and keys `[..., H, D]`, and have `patches` rows if given."""
    if cos is None and sin is None:
        return False
    if cos is None or sin is None:
        present, missing = ("sin", "cos") if cos is None else ("cos", "sin")
        raise ValueError(f"{op}: {missing} must be a tensor, as {present} is one, got None")
    heads, head_dim = q.shape[-2:]
    if head_dim % 2:
        raise ValueError(f"{op}: head_dim must be even with cos and sin, got {head_dim}")
    _check.floating(op, cos=cos, sin=sin)
    _check.same_device(op, q=q, cos=cos, sin=sin)
    lines = cos.shape[-2] if cos.dim() >= 2 else cos.numel()
    rows = lines if patches is None else patches
    if cos.dim() == 3:
        _check.shape(op, "cos", cos, (heads, rows, head_dim // 2), "[H, P, D/2]")
        if k.shape[-2] != heads:
            raise ValueError(
                f"{op}: cos must be one table [P, D/2] for heads that share keys, got {heads} for {k.shape[-2]} of k"
            )
    else:
        _check.shape(op, "cos", cos, (rows, head_dim // 2), "[P, D/2]")
    _check.shape(op, "sin", sin, tuple(cos.shape), "cos.shape")
    return True


# --- ops ------------------------------------------------------------------------------------------------------------


def _forward_fake(q: Tensor, *rest: Any) -> Any:
    batch, tokens, heads, _ = q.shape
    lse = q.new_empty(batch, heads, tokens, dtype=accumulation_dtype(q))
    return torch.empty_like(q, memory_format=torch.contiguous_format), lse


def gradients_fake(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Any:
    """dq, and dk and dv for each head of the queries."""
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    return dq, *(x.new_empty(*x.shape[:-2], *q.shape[-2:]) for x in (k, v))


def _check_values(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor | None, sin: Tensor | None, token_index: Tensor | None, *rest: Any
) -> None:
    if cos is not None and token_index is not None:
        token_range("rope_attention", token_index, cos.shape[-2], lowest=-1)


def gpu_reasons(heads: list[Tensor], longest: int, cos: Tensor | None) -> list[str]:
    """Why the GPU kernels don't support sequences of up to `longest` tokens; `heads` are tensors `[..., H, D]`."""
    q, reasons, head_dim = heads[0], [], heads[0].shape[-1]
    if (size := q.shape[-2] * head_dim) > _MAX_GPU_ELEMENTS:
        reasons.append(f"tokens of {size} elements; the GPU kernels support up to {_MAX_GPU_ELEMENTS}")
    if cos is not None and (size := cos.shape[-2] * head_dim // 2) > _MAX_GPU_ELEMENTS:
        reasons.append(f"a table of {size} elements; the GPU kernels support up to {_MAX_GPU_ELEMENTS}")
    if q.dtype == torch.float32:
        reasons.append("float32; the GPU kernels support float16 and bfloat16, Triton's and the reference float32 too")
    if longest > _MAX_GPU_TOKENS:
        reasons.append(f"{longest} tokens; the GPU kernels support up to {_MAX_GPU_TOKENS}")
    if head_dim > _MAX_GPU_HEAD_DIM:
        reasons.append(f"head_dim {head_dim}; the GPU kernels support up to {_MAX_GPU_HEAD_DIM}")
    return reasons


def _gpu_reasons(**tensors: Any) -> list[str]:
    heads = list_heads(tensors)
    return gpu_reasons(heads, max(x.shape[1] for x in heads), tensors.get("cos")) if heads[0].dim() == 4 else []


def list_heads(tensors: dict[str, Any]) -> list[Tensor]:
    """Heads `[..., H, D]` among the arguments of an op, the gradient or the queries first."""
    return [x for name in ("dout", "q", "k", "v", "out") if (x := tensors.get(name)) is not None]


def refuse_gradients(op: str, *tables: Tensor | None) -> None:
    """Raises `ValueError` for tables that require a gradient."""
    if any(table is not None and table.requires_grad for table in tables):
        raise ValueError(f"{op}: cos and sin must not require a gradient, got one that does: pass them detached")


def sum_shared_heads(k: Tensor, gradients: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """dq, and dk and dv summed over the query heads that share a head of `k`."""
    dq, *head_gradients = gradients
    kv_heads, heads = k.shape[-2], dq.shape[-2]
    if kv_heads == heads:
        return gradients
    dk, dv = (x.reshape(*k.shape[:-1], heads // kv_heads, k.shape[-1]).sum(-2) for x in head_gradients)
    return dq, dk, dv


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, cos, sin, token_index, *ctx.options = inputs
    out, lse = output
    refuse_gradients("rope_attention", cos, sin)
    ctx.save_for_backward(q, k, v, out, lse, cos, sin, token_index)


def _gradient(ctx: Any, dout: Tensor) -> Any:
    saved = ctx.saved_tensors  # once, as a checkpoint recomputes them at each access
    return sum_shared_heads(saved[1], _backward(dout, *saved, *ctx.options))


_forward = define(
    reference.rope_attention_forward,
    check=_check_call,
    check_values=_check_values,
    fake=_forward_fake,
    exported=reference.rope_attention_sdpa,
    gpu_reasons=_gpu_reasons,
    triton_reasons=head_reasons,
)
_backward = define(
    reference.rope_attention_backward,
    check_values=lambda dout, q, k, v, out, lse, *rest: _check_values(q, k, v, *rest),
    fake=gradients_fake,
    gpu_reasons=_gpu_reasons,
    triton_reasons=head_reasons,
)
differentiable(_forward, _backward, setup_context=_setup, formula=_gradient, returned=1)
