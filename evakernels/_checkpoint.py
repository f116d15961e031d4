"""What selective activation checkpointing keeps."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch._ops import OpOverload
from torch.utils.checkpoint import CheckpointPolicy

from evakernels import backends


def checkpoint_policy(
    save: Sequence[str | OpOverload] = ("rope_attention", "packed_attention"),
) -> Callable[..., CheckpointPolicy]:
    """A policy of selective activation checkpointing that knows the ops of this library.

    By default attention's outputs are kept, which cost the most to compute again and the least memory; norms,
    activations and everything else in the region run again in the backward pass.

    Args:
        save: what is kept: names of public functions, such as `"swiglu"`, or overloads of any operators, such as
            `torch.ops.aten.mm.default`. Under `torch.compile` what isn't named runs again unless the compiler finds it
            better kept.

    Returns:
        What `torch.utils.checkpoint.create_selective_checkpoint_contexts` takes.

    Raises:
        ValueError: for an unknown name.

    Examples:
        >>> from functools import partial
        >>> from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
        >>> block = evakernels.nn.RotaryAttention(192, 3)
        >>> contexts = partial(create_selective_checkpoint_contexts, evakernels.checkpoint_policy())
        >>> x = torch.randn(2, 16, 192, requires_grad=True)
        >>> checkpoint(block, x, use_reentrant=False, context_fn=contexts).sum().backward()
    """
    kept = frozenset(op for given in save for op in _overloads(given))
    return partial(_policy, kept)


def _overloads(given: str | OpOverload) -> list[OpOverload]:
    if isinstance(given, OpOverload):
        return [given]
    return [getattr(torch.ops.evakernels, name).default for name in backends.ops_of(given)]


def _policy(kept: frozenset[OpOverload], context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in kept else CheckpointPolicy.PREFER_RECOMPUTE
