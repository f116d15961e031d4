"""What both towers share: running their blocks, and the depth that a parameter belongs to."""

import re
from collections.abc import Iterable
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

_BLOCK = re.compile(r"\b(?:blocks|resblocks)\.(\d+)\.")


class Tower(nn.Module):
    """A stack of transformer blocks between an embedding and a projection.

    Attributes:
        layers: number of blocks.
        grad_checkpointing: recompute each block in the backward pass instead of keeping its activations.
    """

    embeddings: ClassVar[tuple[str, ...]]
    """First parts of the names of the parameters in front of the first block."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = layers
        self.grad_checkpointing = False

    @property
    def num_layer_ids(self) -> int:
        """How many values `layer_id` has: the embeddings, each block, and what follows."""
        return self.layers + 2

    def layer_id(self, name: str) -> int:
        """Depth of a parameter for layer-wise learning rates: 0 embeddings, i+1 block i, then the rest.

        Args:
            name: as in `named_parameters()` of this tower.
        """
        if name.split(".")[0] in self.embeddings:
            return 0
        block = _BLOCK.search(name)
        return int(block[1]) + 1 if block else self.layers + 1

    def run_blocks(self, blocks: Iterable[nn.Module], x: Tensor, *context: Any) -> Tensor:
        """`x` through all blocks; each is called as `block(x, *context)`."""
        for block in blocks:
            if self.grad_checkpointing and self.training:
                x = checkpoint(block, x, *context, use_reentrant=False)
            else:
                x = block(x, *context)
        return x
