"""Captions of photographs, as operations on text are given them."""

from functools import cache
from pathlib import Path

from torch import Tensor

from evaclip.tokenizer import Tokenizer

_FILE = Path(__file__).parents[1] / "captions.txt"


def texts() -> list[str]:
    """The captions themselves."""
    return _FILE.read_text().splitlines()


@cache
def captions(context_length: int) -> Tensor:
    """Token ids int64 `[captions, context_length]`, as in use: most of a row is padding."""
    return Tokenizer(context_length)(texts())
