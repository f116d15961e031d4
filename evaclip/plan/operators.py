"""What one operator costs: floating-point operations, and bytes read and written."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import evakernels  # noqa: F401  (defines the ops)

_COLLECTIVES = {"_allgather_base_": "gather", "_reduce_scatter_base_": "scatter", "allreduce_": "reduce"}
_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward")


class Cost(NamedTuple):
    """Of one call.

    Attributes:
        term: `products`, `attention`, `elementwise`, `gather`, `scatter` or `reduce`; empty where nothing is done.
        again: computed before, and now once more instead of having been kept.
        bits: of the type that is computed in.
        flops: floating-point operations, two for a MAC; 0 outside of products and attention.
        bytes: read and written, of a collective the size of the whole.
    """

    term: str
    again: bool
    bits: int
    flops: int
    bytes: int


NOTHING = Cost("", False, 0, 0, 0)


def cost_of(func: Any, args: Any, kwargs: Any, result: Any) -> Cost:
    """The cost of a call; `func` is an overload as a dispatch mode sees it."""
    packet, name = func._overloadpacket, func._overloadpacket.__name__
    # A backward pass itself needs no graph; our own ops make theirs without anybody's noticing.
    again = torch._C._current_graph_task_id() >= 0 and (torch.is_grad_enabled() or name.endswith("_forward"))
    if func.namespace == "c10d":
        size = max((_bytes(tensor) for tensor in _tensors((args, result))), default=0)
        return Cost(_COLLECTIVES.get(name, ""), again, 0, 0, size)
    if func.is_view or name.startswith(("empty", "new_empty", "detach", "alias", "_unsafe_view", "_reshape_alias")):
        return NOTHING
    tensors = _tensors((args, kwargs, result))
    moved = sum(_bytes(tensor) for tensor in tensors)
    formula = FLOPS.get(packet)
    flops = formula(*args, **kwargs, out_val=result) if formula else 0
    term = "elementwise" if formula is None else "products" if name in _PRODUCTS else "attention"
    bits = min((8 * t.itemsize for t in tensors if t.is_floating_point()), default=0)
    return Cost(term, again, bits, flops, moved)


def _tensors(tree: Any) -> list[Tensor]:
    unique = {id(leaf): leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)}
    return list(unique.values())


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.itemsize


def _rope_attention(q: Tensor, k: Tensor, *_: Any, **__: Any) -> int:
    batch, queries, heads, channels = q.shape
    return 4 * batch * heads * queries * k.shape[1] * channels


def _rope_attention_backward(dout: Tensor, q: Tensor, k: Tensor, *_: Any, **__: Any) -> int:
    return _BACKWARD_PRODUCTS * _rope_attention(q, k) // 2


def _packed_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, *_: Any, **__: Any) -> int:
    # The sequences' lengths are data; this is exact where they are all the same.
    tokens, heads, channels = q.shape
    return 4 * heads * channels * tokens * tokens // max(len(cu_seqlens) - 1, 1)


def _packed_attention_backward(dout: Tensor, q: Tensor, *rest: Any, **__: Any) -> int:
    cu_seqlens = rest[4]
    return _BACKWARD_PRODUCTS * _packed_attention(q, q, q, cu_seqlens) // 2


_BACKWARD_PRODUCTS = 5
"""The scores once more, and the gradients of scores, q, k and v: as torch's own counter has it."""

_aten, _ops = torch.ops.aten, torch.ops.evakernels
FLOPS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    _aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[_aten._scaled_dot_product_flash_attention],
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        _aten._scaled_dot_product_flash_attention_backward
    ],
    _ops.rope_attention_forward: _rope_attention,
    _ops.rope_attention_backward: _rope_attention_backward,
    _ops.packed_attention_forward: _packed_attention,
    _ops.packed_attention_backward: _packed_attention_backward,
}
"""Floating-point operations by operator, called with its arguments and `out_val`: torch's, and our own ops'."""
