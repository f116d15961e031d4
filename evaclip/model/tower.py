"""What both towers share: running their blocks, and the depth that a parameter belongs to."""

import re
from typing import Any, ClassVar

from torch import Tensor, nn

from evaclip.model.norm import Stream
from evaclip.model.recompute import ResidualBlock, run_block
from evaclip.model.savings import Savings

_BLOCK = re.compile(r"\b(?:blocks|resblocks)\.(\d+)\.")


class Tower(nn.Module):
    """A stack of transformer blocks between an embedding and a projection.

    Attributes:
        layers: number of blocks.
        savings: what is left out; may be changed at any time.
    """

    embeddings: ClassVar[tuple[str, ...]]
    """First parts of the names of the parameters in front of the first block."""
    projection: ClassVar[str]
    """First part of the names of the parameters behind the last norm."""

    def __init__(self, layers: int, savings: Savings) -> None:
        super().__init__()
        self.layers = layers
        self.savings = savings

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

    def lock(self, unlocked_groups: int = 0) -> None:
        """Takes the tower out of training but for its last groups, counted from the output: the projection, the last
        block with the norm behind it, each block before it, the embeddings.
        """
        for name, parameter in self.named_parameters():
            layer = self.layer_id(name)
            behind = layer > self.layers and not name.startswith(self.projection)
            parameter.requires_grad_(layer - behind >= self.num_layer_ids - unlocked_groups)

    def run_blocks(self, blocks: nn.ModuleList, x: Tensor, *context: Any, pooled_last: bool = True) -> Tensor:
        """`x` through all blocks; each is called as `block(stream, *context, pooled)`.

        `pooled` asks a block for the one token of each sample that the tower uses. It is true for the last block,
        if that saving is on and `pooled_last` says that no other token is used.
        """
        recompute = self.savings.recompute if self.training else "none"
        stream = Stream(x)
        for index, block in enumerate(blocks):
            assert isinstance(block, ResidualBlock)
            pooled = pooled_last and self.savings.pooled_last_block and index == len(blocks) - 1
            stream = run_block(block, recompute, stream, *context, pooled)
        return stream.total()
