"""Attention as other libraries call it, on this library's ops; what these don't serve is refused here, in one place."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from evakernels.ops import _check, packed_attention, rope_attention

_Served = tuple[Callable[[Any], bool], str]
_SERVED: dict[str, _Served] = {
    "alibi_slopes": (lambda slopes: slopes is None, "None"),
    "block_table": (lambda table: table is None, "None, as there is no paged cache"),
    "dropout_p": (lambda p: p == 0, "0.0; drop behind the output projection instead"),
    "op": (lambda op: op is None, "None; evakernels.use_backend chooses"),
    "p": (lambda p: p == 0, "0.0; drop behind the output projection instead"),
    "softcap": (lambda cap: not cap or cap < 0, "0.0"),
    "window_size": (lambda window: window in ((-1, -1), [-1, -1]), "(-1, -1), no window"),
}
"""Of each option whether a value is served, and which are."""


def check_options(function: str, **options: Any) -> None:
    """Raises `NotImplementedError` for the first option that the ops don't serve."""
    for name, value in options.items():
        is_served, accepted = _SERVED[name]
        if not is_served(value):
            found = _check.kind(value) if isinstance(value, Tensor) else repr(value)
            raise NotImplementedError(f"{function}: {name} is {found}; accepted: {accepted}")


Found = tuple[Tensor, Tensor | None]
"""The output, and lse if it was asked for: programs that are exported without it hold torch's own attention."""


def attend(
    function: str, qkv: dict[str, Tensor], *, causal: bool, scale: float | None, return_lse: bool = False
) -> Found:
    """Attention of `[B, N, H, D]`; queries, keys and values come under the names that `function` has for them."""
    _check_heads(function, "[B, N, H, D]", qkv)
    q, k, v = qkv.values()
    if return_lse:
        return rope_attention(q, k, v, causal=causal, scale=scale, return_lse=True)
    return rope_attention(q, k, v, causal=causal, scale=scale), None


def attend_packed(
    function: str,
    qkv: dict[str, Tensor],
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    causal: bool,
    scale: float | None,
    return_lse: bool = False,
) -> Found:
    """The same within sequences that lie one behind the other, `[T, H, D]`."""
    _check_heads(function, "[T, H, D]", qkv)
    q, k, v = qkv.values()
    (first, _), *others = qkv.items()
    for name, tensor in others:
        if len(tensor) != len(q):
            refuse_lengths(function, f"{name} has {len(tensor)} tokens and {first} has {len(q)}")
    if return_lse:
        return packed_attention(q, k, v, cu_seqlens, max_seqlen=max_seqlen, causal=causal, scale=scale, return_lse=True)
    return packed_attention(q, k, v, cu_seqlens, max_seqlen=max_seqlen, causal=causal, scale=scale), None


def refuse_lengths(function: str, found: str) -> None:
    """Raises for keys of other lengths than the queries'; `found` says which those are."""
    raise NotImplementedError(f"{function}: {found}; accepted: as many keys as queries in each sequence")


def _check_heads(function: str, layout: str, qkv: dict[str, Tensor]) -> None:
    _check.floating(function, **qkv)
    for name, tensor in qkv.items():
        if tensor.dim() != layout.count(",") + 1:
            raise ValueError(f"{function}: {name} has shape {tuple(tensor.shape)}; expected {layout}")
