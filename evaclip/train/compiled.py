"""torch.compile of a model's blocks."""

import torch
from torch import nn

from evaclip.model.tower import ResidualBlock

_MOST_GRAPHS = 64


def compile_blocks(model: nn.Module, backend: str = "inductor") -> None:
    """Compiles every block of the towers in place; the compiler runs when a block is called first.

    Blocks that are alike share one graph: a tower has two, since its last block computes one token alone, and each
    once more without gradients. Stochastic depth makes every block different, each with its own graphs. The number of
    samples and of the captions' tokens is no part of a graph. Names and values of parameters stay as they are, and so
    does all around the blocks: sharding, recomputation of whole blocks, packing.
    """
    # All blocks count as one function to the compiler, which gives up at 8 graphs of it.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _MOST_GRAPHS)
    for module in model.modules():
        if isinstance(module, ResidualBlock):
            module.compile(fullgraph=True, dynamic=True, backend=backend)
