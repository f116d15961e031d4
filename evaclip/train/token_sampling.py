"""Which patch tokens each sample of a batch keeps: a pure function of the seed, the step and the sample's row."""

import hashlib

import torch
from torch import Tensor

from evakernels import sample_token_index

_BLOCK = 256


def token_index(key: tuple[int, ...], rows: range, num_tokens: int, num_keep: int, device: torch.device) -> Tensor:
    """Kept tokens of these rows of the batch of all processes.

    Rows are drawn in fixed blocks, one generator per block: every rank draws just the blocks that its rows
    touch, and the number of processes does not change the outcome.

    Args:
        key: seed and step.
        rows: consecutive rows of the batch.

    Returns:
        int64 [len(rows), num_keep], ascending in each row.
    """
    first, last = rows.start // _BLOCK, (rows.stop - 1) // _BLOCK
    blocks = [_draw((*key, block), num_tokens, num_keep, device) for block in range(first, last + 1)]
    offset = first * _BLOCK
    return torch.cat(blocks)[rows.start - offset : rows.stop - offset]


def _draw(key: tuple[int, ...], num_tokens: int, num_keep: int, device: torch.device) -> Tensor:
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    generator = torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)
    index: Tensor = sample_token_index(_BLOCK, num_tokens, num_keep, generator=generator, device=device)
    return index
