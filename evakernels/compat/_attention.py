"""Checks and calls that flash-attn's and xformers' attention functions share."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..ops import _check, packed_attention, rope_attention

_ACCEPTED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "alibi_slopes": (lambda slopes: slopes is None, "None"),
    "block_table": (lambda table: table is None, "None (no paged cache)"),
    "dropout_p": (lambda p: p == 0, "0.0 (use dropout after the output projection)"),
    "op": (lambda op: op is None, "None (evakernels.use_backend selects kernels)"),
    "p": (lambda p: p == 0, "0.0 (use dropout after the output projection)"),
    "softcap": (lambda cap: not cap or cap < 0, "0.0"),
    "window_size": (lambda window: window in ((-1, -1), [-1, -1]), "(-1, -1)"),
}
"""Of each option the check and the accepted value."""


def check_options(function: str, **options: Any) -> None:
    """Raises `NotImplementedError` for the first option with a value that the ops don't support."""
    for name, value in options.items():
        is_accepted, accepted = _ACCEPTED[name]
        if not is_accepted(value):
            given = _check.kind(value) if isinstance(value, Tensor) else repr(value)
            raise NotImplementedError(f"{function}: {name} must be {accepted}, got {given}")


def check_shape(function: str, name: str, tensor: Tensor, layout: str) -> None:
    """Raises `ValueError` unless the tensor has the dimensions of `layout`, such as `[T, 3, H, D]`."""
    sizes = layout.strip("[]").split(", ")
    fixed = {dim: int(size) for dim, size in enumerate(sizes) if size.isdigit()}
    if tensor.dim() != len(sizes) or any(tensor.shape[dim] != size for dim, size in fixed.items()):
        raise ValueError(f"{function}: {name} must have shape {layout}, got {tuple(tensor.shape)}")


def refuse_lengths(function: str, given: str) -> None:
    """Raises for keys whose sequence lengths differ from the queries'."""
    raise NotImplementedError(f"{function}: keys must have the queries' sequence lengths, got {given}")


def attend(
    function: str,
    qkv: dict[str, Tensor],
    packed: tuple[Tensor, int] | None = None,
    *,
    causal: bool,
    scale: float | None,
    return_lse: bool = False,
) -> Any:
    """Attention of `[B, N, H, D]`, or of packed sequences `[T, H, D]`.

    Args:
        function: name for error messages.
        qkv: queries, keys and values by the names of the function's arguments.
        packed: cu_seqlens and max_seqlen of packed sequences.

    Returns:
        The output; with `return_lse` also lse. An exported program without lse contains torch's attention.
    """
    _check.floating(function, **qkv)
    for name, tensor in qkv.items():
        check_shape(function, name, tensor, "[B, N, H, D]" if packed is None else "[T, H, D]")
    options: dict[str, Any] = {"causal": causal, "scale": scale, "return_lse": return_lse}
    q, k, v = qkv.values()
    if packed is None:
        return rope_attention(q, k, v, **options)
    first, *others = qkv
    for name in others:
        if len(qkv[name]) != len(q):
            refuse_lengths(function, f"{name} of {len(qkv[name])} tokens and {first} of {len(q)}")
    cu_seqlens, max_seqlen = packed
    return packed_attention(q, k, v, cu_seqlens, max_seqlen=max_seqlen, **options)
