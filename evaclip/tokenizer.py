"""The CLIP tokenizer: byte-pair encoding of cleaned, lower-cased text (Radford et al. 2021).

The merges of OpenAI's vocabulary file are applied by the Rust implementation of the `tokenizers` package. Text is split
into words by the `regex` package: the regex engine of `tokenizers` has an older Unicode version, and would split words
of newer scripts elsewhere.
"""

import gzip
import html
from collections.abc import Sequence
from functools import cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import regex
from numpy.typing import NDArray
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as BpeTokenizer

from evaclip.atomic import write_json
from evaclip.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

START, END = "<start_of_text>", "<end_of_text>"
VOCAB_SIZE = 49408

_VOCABULARY = Path(__file__).with_name("bpe_simple_vocab_16e6.txt.gz")
_BYTES_AND_ENDS = 2 * 256 + 2
_SPACE = "\u0120"  # its letter in byte-level BPE
_WORD = regex.compile(rf"{START}|{END}|'s|'t|'re|'ve|'m|'ll|'d|\p{{L}}+|\p{{N}}|[^\s\p{{L}}\p{{N}}]+", regex.IGNORECASE)
_WORD_OF_TOKENIZERS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class Tokenizer:
    """Turns captions into token ids. Can be pickled, and used from several threads and processes.

    Args:
        context_length: default length of rows.
        vocab_size: number of ids. A smaller vocabulary than CLIP's uses the merges of the most frequent pairs, so
            rare words take more tokens.

    Attributes:
        start_id, end_id: the last two ids.

    Raises:
        UserError: a number is out of range.
    """

    def __init__(self, context_length: int = 77, vocab_size: int = VOCAB_SIZE) -> None:
        self.context_length = _checked_length(context_length)
        if not _BYTES_AND_ENDS <= vocab_size <= VOCAB_SIZE:
            raise UserError(f"vocab_size must be {_BYTES_AND_ENDS} to {VOCAB_SIZE}, got {vocab_size}")
        self.vocab_size = vocab_size
        self.start_id, self.end_id = vocab_size - 2, vocab_size - 1
        self._bpe = byte_pair_encoder(vocab_size)

    def __call__(self, texts: str | Sequence[str], context_length: int | None = None) -> "Tensor":
        """Token ids of each text, int64 `[n, context_length]`.

        A row is the start token, the text, the end token, and zeros. A text that is too long is truncated, with the end
        token at the last position. `<start_of_text>` and `<end_of_text>` inside a text become these tokens.

        Raises:
            TypeError: `texts` isn't a string or a sequence of strings.
        """
        # Imported here so that a search in a store doesn't wait for torch.
        import torch

        return torch.from_numpy(self.array(texts, context_length))

    def array(self, texts: str | Sequence[str], context_length: int | None = None) -> NDArray[np.int64]:
        """Token ids of each text as a numpy array, without torch."""
        length = self.context_length if context_length is None else _checked_length(context_length)
        texts = [texts] if isinstance(texts, str) else texts
        rows = np.zeros((len(texts), length), dtype=np.int64)
        for row, text in zip(rows, texts, strict=True):
            ids = [self.start_id, *self.encode(text)[: length - 2], self.end_id]
            row[: len(ids)] = ids
        return rows

    def encode(self, text: str) -> list[int]:
        """Ids of the text without start, end, padding and truncation."""
        if not isinstance(text, str):
            raise TypeError(f"texts must be str, got {type(text).__name__}")
        ids: list[int] = self._bpe.encode(_WORD.findall(clean(text)), is_pretokenized=True).ids
        return ids

    def decode(self, ids: "Sequence[int] | Tensor") -> str:
        """The text of token ids, from `encode` or a row of a call; without start, end and padding.

        It is in lower case, with a space after each word.

        Example:
            `tokenizer.decode(tokenizer("A cat!")[0])` is `"a cat !"`.
        """
        row: list[int] = ids.tolist() if hasattr(ids, "tolist") else list(ids)
        if self.end_id in row:
            row = row[: row.index(self.end_id)]
        for index in row:
            if not 0 <= index < self.vocab_size:
                raise ValueError(f"token id {index} is outside of 0..{self.vocab_size - 1}")
        tokens = [str(self._bpe.id_to_token(index)) for index in row if index != self.start_id]
        return str(decoders.ByteLevel().decode([token.replace("</w>", _SPACE) for token in tokens])).strip()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `to_tokenizers` with the configuration files that transformers and Immich read."""
        folder = Path(folder)
        self.to_tokenizers().save(str(folder / "tokenizer.json"))
        names = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
        kind = {"tokenizer_class": "CLIPTokenizer", "model_max_length": self.context_length, "do_lower_case": True}
        write_json(folder / "tokenizer_config.json", {**kind, **names})
        write_json(folder / "special_tokens_map.json", names)

    def to_tokenizers(self) -> BpeTokenizer:
        """A tokenizer of the `tokenizers` package with all steps inside, for a tokenizer.json.

        It splits words by the Unicode version of its runtime, and neither repairs mis-encoded characters nor resolves
        HTML entities. For all other text the ids are equal, except the padding, which is the end token; CLIP models
        ignore it.
        """
        tokenizer = BpeTokenizer.from_str(self._bpe.to_str())
        spaces = normalizers.Replace(Regex(r"\s+"), " ")
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Lowercase()])
        words = pre_tokenizers.Split(Regex(_WORD_OF_TOKENIZERS), "removed", invert=True)
        letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, letters])
        ends = [(START, self.start_id), (END, self.end_id)]
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{START} $A {END}", special_tokens=ends)
        tokenizer.enable_truncation(self.context_length)
        tokenizer.enable_padding(length=self.context_length, pad_id=self.end_id, pad_token=END)
        return tokenizer


def tokenize(texts: str | Sequence[str], context_length: int = 77) -> "Tensor":
    """Token ids int64 `[n, context_length]` of texts, by the tokenizer of all released models.

    Example:
        `evaclip.tokenize(["a cat", "a dog"])`
    """
    return _released_tokenizer()(texts, context_length)


def decode(output_ids: "Tensor") -> str:
    """The text of a row of token ids; see `Tokenizer.decode`.

    Example:
        `evaclip.decode(evaclip.tokenize("a cat")[0])` is `"a cat"`.
    """
    return _released_tokenizer().decode(output_ids)


@cache
def _released_tokenizer() -> Tokenizer:
    return Tokenizer()


def clean(text: str, lower: bool = True) -> str:
    """The text with mis-encoded characters and HTML entities resolved, single spaces, in lower case if `lower`."""
    # Most captions need no repair, and the check of ftfy takes longer than all other steps.
    if not text.isascii() or "&" in text or not text.isprintable():
        import ftfy  # not needed to build a model

        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    text = " ".join(text.split())
    return text.lower() if lower else text


@cache
def byte_pair_encoder(vocab_size: int) -> BpeTokenizer:
    """CLIP's byte-level BPE with the first merges up to `vocab_size` ids."""
    with gzip.open(_VOCABULARY, "rt", encoding="utf-8") as lines:
        # The first line is a version header; after CLIP's merges come others that it never used.
        count = vocab_size - _BYTES_AND_ENDS
        merges = [(first, second) for first, second in map(str.split, islice(lines, 1, count + 1))]
    # Bytes that are printable in Latin-1 stand for themselves and come first; the others follow as U+0100, U+0101, ...
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*letters, *(letter + "</w>" for letter in letters), *(a + b for a, b in merges), START, END]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = BpeTokenizer(models.BPE(vocabulary, merges, end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.add_special_tokens([START, END])
    return tokenizer


def _checked_length(context_length: int) -> int:
    if context_length < 2:
        raise UserError(f"context_length must be 2 or more, for the start and the end token, got {context_length}")
    return context_length
