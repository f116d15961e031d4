"""What a model may leave out without changing its results beyond rounding."""

from dataclasses import dataclass
from typing import Literal, get_args

from evaclip.errors import unknown_name

Recompute = Literal["none", "activations", "block"]


@dataclass(frozen=True)
class Savings:
    """Work and memory that a model saves. Embeddings and gradients stay equal up to rounding; see docs/savings.md.

    Attributes:
        pack_text: run the text tower on the tokens up to each caption's end alone, without padding. Not in a
            graph of `torch.compile`, whose shapes would depend on the data; `cut_padding` serves there.
        pooled_last_block: compute the last block of each tower only for the one token that is used.
        early_drop: embed only the patches that token dropout keeps.
        recompute: what training computes again in the backward pass, instead of keeping it: nothing; norms,
            activation functions and the query-key-value projections; or each block as a whole.
    """

    pack_text: bool = True
    pooled_last_block: bool = True
    early_drop: bool = True
    recompute: Recompute = "none"

    def __post_init__(self) -> None:
        if self.recompute not in get_args(Recompute):
            raise unknown_name("savings.recompute", str(self.recompute), get_args(Recompute))
