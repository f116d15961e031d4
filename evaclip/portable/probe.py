"""Inputs and the embeddings that belong to them, kept in an ONNX file's metadata so that anyone can check the file.

The inputs come from a seed by numpy's `RandomState`, whose stream is frozen. Pictures are noise of several scales, so
that places in them differ; captions have several lengths.
"""

import base64
import json
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from evaclip.errors import UserError

OPSET = 20
KEY = "evaclip.probe"
LOWEST = {"fp32": 0.9999, "fp16": 0.9999, "bf16": 0.9999, "int8": 0.99}
"""The cosine to the model's embedding in float32 that a file must reach in every engine."""
SEED, COUNT = 20, 4

_FORMAT = 1


@dataclass(frozen=True)
class Probe:
    """Inputs, and what they must give.

    Attributes:
        tower: `image` or `text`.
        shape: of one input: 3, height, width; or the context length.
        vocab_size: number of token ids; 0 for images.
        lowest: the cosine that must be reached.
        expected: float32 `[count, embed_dim]`, the model's embeddings in float32.
        seed: of the inputs.
    """

    tower: Literal["image", "text"]
    shape: tuple[int, ...]
    vocab_size: int
    lowest: float
    expected: NDArray[np.float32]
    seed: int = SEED

    def inputs(self) -> NDArray[Any]:
        """float32 `[count, 3, height, width]`, or int64 `[count, context_length]`."""
        return make_inputs(self.tower, self.shape, self.vocab_size, self.seed, len(self.expected))

    def to_metadata(self) -> dict[str, str]:
        """The entry of the file's `metadata_props`."""
        packed = base64.b64encode(zlib.compress(self.expected.astype("<f4").tobytes())).decode()
        return {KEY: json.dumps({"format": _FORMAT, **asdict(self), "expected": packed, "count": len(self.expected)})}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str], file: str) -> "Probe":
        """The probe of a file.

        Raises:
            UserError: the file has none, or one that can't be read.
        """
        if KEY not in metadata:
            raise UserError(f"{file!r} holds no probe; expected a file that `evaclip export` wrote")
        try:
            held = json.loads(metadata[KEY])
            if held.pop("format") != _FORMAT:
                raise ValueError("it is of a newer version")
            values = np.frombuffer(zlib.decompress(base64.b64decode(held["expected"])), "<f4")
            expected = values.reshape(held.pop("count"), -1)
            return cls(**{**held, "shape": tuple(held["shape"]), "expected": expected})
        except (KeyError, TypeError, ValueError, zlib.error) as exc:
            raise UserError(f"the probe in {file!r} can't be read: {exc}; export the file again") from exc


def make_inputs(tower: str, shape: tuple[int, ...], vocab_size: int, seed: int, count: int = COUNT) -> NDArray[Any]:
    """The inputs of a seed; see `Probe.inputs`."""
    random = np.random.RandomState(seed)
    return _pictures(random, count, *shape[1:]) if tower == "image" else _captions(random, count, shape[0], vocab_size)


def cosines(found: NDArray[Any], expected: NDArray[Any]) -> NDArray[np.float64]:
    """`[n, m]` of the rows of both; not a number where a row holds one that isn't, or only zeros."""
    a, b = (x.astype(np.float64) for x in (found, expected))
    with np.errstate(invalid="ignore", divide="ignore"):
        a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
        return np.asarray(a @ b.T)


def agreement(found: NDArray[Any], expected: NDArray[Any]) -> tuple[float, bool]:
    """The lowest cosine of an embedding to the one expected, and whether each is nearest to its own.

    The second tells an encoder that gives every input the same vector, whose cosines may be high.
    """
    if found.shape != expected.shape:
        return float("nan"), False
    table = cosines(found, expected)
    if not np.isfinite(table).all():
        return float("nan"), False
    return float(table.diagonal().min()), bool((table.argmax(1) == np.arange(len(table))).all())


def _pictures(random: np.random.RandomState, count: int, height: int, width: int) -> NDArray[np.float32]:
    total = np.zeros((count, 3, height, width))
    for cells in (2, 4, 8, 16, 32):
        noise = random.standard_normal((count, 3, cells, cells))
        rows, columns = (np.arange(side) * cells // side for side in (height, width))
        total += noise[:, :, rows][..., columns]
    return np.asarray(total / np.sqrt(5), dtype=np.float32)


def _captions(random: np.random.RandomState, count: int, length: int, vocab_size: int) -> NDArray[np.int64]:
    start, end = vocab_size - 2, vocab_size - 1
    tokens = np.zeros((count, length), dtype=np.int64)
    for row, words in zip(tokens, np.linspace(1, length - 2, count).astype(int), strict=True):
        row[: words + 2] = [start, *random.randint(1, start, words), end]
    return tokens
