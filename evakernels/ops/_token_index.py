"""Token indices, as token dropout and its attention use them."""

import torch
from torch import Tensor


def check_range(op: str, token_index: Tensor, num_tokens: int, *, lowest: int = 0, name: str = "token_index") -> None:
    """Raises `IndexError` for a value outside `lowest .. num_tokens - 1`.

    Only on a CPU: elsewhere the question would make the host wait for the device.
    """
    if token_index.device.type != "cpu" or token_index.numel() == 0:
        return
    low, high = (int(bound) for bound in torch.aminmax(token_index))
    if low < lowest or high >= num_tokens:
        raise IndexError(f"{op}: {name} has values from {low} to {high}; accepted: {lowest} to {num_tokens - 1}")


def check_unique(op: str, token_index: Tensor, num_tokens: int) -> None:
    """Raises `IndexError` for a row [B, K] that names a token twice, on a CPU; the values are in range."""
    if token_index.device.type != "cpu":
        return
    seen = torch.zeros(token_index.shape[0], num_tokens, dtype=torch.bool).scatter_(1, token_index, True)
    distinct = seen.sum(1)
    if bool((distinct < token_index.shape[1]).any()):
        sample = int(distinct.argmin())
        raise IndexError(
            f"{op}: token_index names a token twice in sample {sample}; the tokens of a sample are distinct"
        )
