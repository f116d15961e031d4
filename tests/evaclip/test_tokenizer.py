"""The tokenizer against open_clip's, on written and on random texts."""

import pickle

import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import evaclip
from evaclip.errors import UserError
from evaclip.tokenizer import Tokenizer

PEER = open_clip.SimpleTokenizer()

WRITTEN = [
    "",
    " \t\n ",
    "a photo of a cat",
    "It's we'll I'VE can't '",
    "1234567890 3.14 ½ ² Ⅷ ١٢٣",
    "&amp;lt;b&amp;gt; &lt;p&gt; &#39;quoted&#39; &nbsp;&hearts; &amp;amp;amp;",
    "<b> &amp;amp; &amp;lt;i&amp;gt; &amp;amp;hearts;",
    "rÃ©sumÃ© â€œquotesâ€\x9d naïve",
    "日本語のテキスト 中文 한국어 العربية हिन्दी",
    "😀 👩‍🎓 🏳️‍🌈 👍🏽 ❤️",
    "<start_of_text> in the middle <end_of_text> and <END_OF_TEXT>",
    "<<end_of_text>> <end_of_text <\u017ftart_of_text>",
    "\x00\x1b[31m\x85\u2028\u200b\ufeff control",
    "İstanbul \u017f ß ẞ K ΑΣ",
    "unbelievable-hyphenated/slashed_underscored #hashtag @user http://a.b/c?d=e",
    "long " * 200,
    "x" * 3000,
]

PIECES = st.one_of(
    st.text(max_size=12),
    st.text(st.characters(max_codepoint=0x2FF), max_size=12),
    st.sampled_from([*WRITTEN, "'s", "'LL", "&amp;", "&#x1F600;", "<end_of_text>", "<start_of_text>", "  "]),
)


@pytest.mark.parametrize("text", WRITTEN)
def test_ids_equal_open_clip(text: str) -> None:
    tokenizer = Tokenizer()
    assert tokenizer.encode(text) == PEER.encode(text)
    assert torch.equal(tokenizer(text), PEER(text))


@settings(max_examples=500, deadline=None, derandomize=True)
@given(st.lists(PIECES, max_size=8).map("".join), st.integers(2, 90))
def test_random_ids_equal_open_clip(text: str, length: int) -> None:
    assert torch.equal(Tokenizer()(text, length), PEER(text, length)), repr(text)


def test_tokenizer_of_smaller_vocabulary() -> None:
    whole, small = Tokenizer(16), Tokenizer(16, 4096)
    row = small("a black cat's rhinoceros")[0]
    assert row[:4].tolist() == [4094, *whole.encode("a black cat")]
    assert (small.start_id, small.end_id, int(row.max())) == (4094, 4095, 4095)
    assert len(small.encode("rhinoceros")) > len(whole.encode("rhinoceros"))
    assert torch.equal(pickle.loads(pickle.dumps(small))("rhinoceros"), small("rhinoceros"))
    # With no merges at all every byte stands for itself.
    assert len(Tokenizer(16, 514).encode("cat")) == 3


def test_tokenizer_wrong_input() -> None:
    with pytest.raises(UserError, match="context_length"):
        Tokenizer(1)
    for size in (513, 49409):
        with pytest.raises(UserError, match=f"vocab_size must be 514 to 49408, got {size}"):
            Tokenizer(16, size)
    with pytest.raises(TypeError, match="texts must be str, got int"):
        Tokenizer()([3])  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"token id 600 is outside of 0\.\.599"):
        Tokenizer(vocab_size=600).decode([1, 600])


@pytest.mark.parametrize("text", ["A cat's 3 tails!", "naïve 東京 🙂", "", "a" * 300])
def test_decode_equals_open_clip(text: str) -> None:
    tokenizer = Tokenizer()
    ids = tokenizer.encode(text)
    expected = PEER.decode(ids).strip()
    assert tokenizer.decode(ids) == expected
    if len(ids) < 76:
        # The start, the end and the padding of a row are no text.
        assert tokenizer.decode(tokenizer(text)[0]) == evaclip.decode(evaclip.tokenize(text)[0]) == expected
