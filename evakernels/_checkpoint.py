"""A policy for selective activation checkpointing."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from torch._ops import OpOverload, OpOverloadPacket
from torch.utils.checkpoint import CheckpointPolicy

from . import backends
from .ops import _check


def checkpoint_policy(
    save: str | Sequence[str | OpOverload] = ("rope_attention", "packed_attention"),
) -> Callable[..., CheckpointPolicy]:
    """A policy of selective activation checkpointing that saves the outputs of some ops and recomputes the rest.

    The default saves attention, which costs the most to recompute and the least memory.

    Args:
        save: a name of a public function, such as `"swiglu"`, or a list of names and of overloads of any operators,
            such as `torch.ops.aten.mm.default`. `torch.compile` may save more.

    Returns:
        A policy for `torch.utils.checkpoint.create_selective_checkpoint_contexts`.

    Raises:
        TypeError: for anything else, such as an operator without its overload, `torch.ops.aten.mm`.
        ValueError: for an unknown name.

    Examples:
        >>> from functools import partial
        >>> from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
        >>> block = evakernels.nn.RotaryAttention(192, 3)
        >>> contexts = partial(create_selective_checkpoint_contexts, evakernels.checkpoint_policy())
        >>> x = torch.randn(2, 16, 192, requires_grad=True)
        >>> checkpoint(block, x, use_reentrant=False, context_fn=contexts).sum().backward()
    """
    single = isinstance(save, str | OpOverload) or not isinstance(save, Iterable)
    saved = frozenset(op for entry in ([save] if single else save) for op in _overloads(entry))
    return partial(_policy, saved)


def _overloads(entry: Any) -> list[OpOverload]:
    if isinstance(entry, OpOverload):
        return [entry]
    accepted = "names of ops and overloads, such as 'swiglu' and torch.ops.aten.mm.default"
    if isinstance(entry, OpOverloadPacket):
        accepted = f"one of its overloads, such as torch.ops.{entry}.{entry.overloads()[0]}"
    if not isinstance(entry, str):
        value = entry if isinstance(entry, OpOverloadPacket) else _check.kind(entry)
        raise TypeError(f"checkpoint_policy: save must be {accepted}, got {value}")
    try:
        names = backends.find_ops(entry)
    except ValueError as exc:
        raise ValueError(f"checkpoint_policy: {exc}") from None
    return [backends.overload(name) for name in names]


def _policy(saved: frozenset[OpOverload], context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in saved else CheckpointPolicy.PREFER_RECOMPUTE
