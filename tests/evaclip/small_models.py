"""Small models without zero weights."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from evaclip import CLIP, create_model

NO_ROPE = {"mlp": "gelu", "sub_norm": False, "rope": False}


class without_start_values(TorchFunctionMode):
    """Random initialization gives zeros in the `with` block, which is faster: for weights that are loaded next."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.normal_, Tensor.uniform_, Tensor.erfinv_):
            return args[0].zero_()
        return func(*args, **(kwargs or {}))


def stir(model: nn.Module, seed: int = 0, std: float = 0.05) -> None:
    """Adds noise to all parameters, so that biases, norms and the head's factor matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=std)


def small_model(seed: int = 0, *, text: dict[str, Any] | None = None, **vision: Any) -> CLIP:
    """`tiny` with some options changed and all weights stirred, in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = create_model("tiny", vision=vision, text=text or {})
    stir(model, seed)
    return model.eval()


def random_images(count: int, size: int = 32, seed: int = 1) -> Tensor:
    """Float32 [count, 3, size, size]."""
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def random_tokens(count: int, length: int = 16, seed: int = 2) -> Tensor:
    """Rows of start, words, end and padding, int64 [count, length]."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, 49406, (count, length), generator=generator)
    ends = torch.randint(2, length, (count,), generator=generator)
    tokens[:, 0] = 49406
    for row, end in enumerate(ends.tolist()):
        tokens[row, end:] = 0
        tokens[row, end] = 49407
    return tokens
