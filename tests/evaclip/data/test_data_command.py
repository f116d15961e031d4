"""`evaclip data`: check, bench, convert."""

import json

import numpy as np
import pytest
from data_samples import number_transform, picture, sample
from PIL import Image

from evaclip.commands.main import build_parser
from evaclip.data import iterate, open_source
from evaclip.data.shard_writer import write_shard
from evaclip.demo import emoji
from evaclip.errors import UserError


def evaclip(*words: str) -> None:
    args = build_parser().parse_args(words)
    args.run(args)


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")


def test_check_writes_and_names_all_faults(tmp_path, capsys):
    samples = [sample(i) for i in range(80)]
    for i in range(60, 70):
        samples[i][1]["png"] = picture(i)[:30]
    write_shard(tmp_path / "a.tar", [*samples, sample(5)])
    out = tmp_path / "deep" / "faults.json"
    with pytest.raises(SystemExit) as caught:
        evaclip("data", "check", str(tmp_path / "a.tar"), "--workers", "2", "--all", "--json", str(out))
    assert caught.value.code == 1
    printed = capsys.readouterr().out
    assert all(f"a.tar:{i:06d}" in printed for i in (5, *range(60, 70)))
    stored = json.loads(out.read_text())
    source = open_source(str(tmp_path / "a.tar"))
    assert (stored["samples"], stored["fingerprint"]) == (80, source.fingerprint)
    assert stored["counts"] == {"duplicate key": 1, "corrupt image": 10}
    (duplicate, *corrupt) = stored["faults"]
    shard = str(tmp_path / "a.tar")
    assert (duplicate["file"], duplicate["key"]) == (shard, "000005")
    assert [(f["kind"], f["file"], f["key"], f["index"]) for f in corrupt] == [
        ("corrupt image", shard, f"{i:06d}", i) for i in range(60, 70)
    ]
    assert all(f["name"] == f"{shard}:{f['key']}" and f["detail"] for f in corrupt)


def test_check_reports_conversions_and_guesses(tmp_path):
    for name, values in (("a", np.uint16(30000)), ("b", np.float32(0.5)), ("c", np.uint8(9))):
        Image.fromarray(np.full((4, 4), values)).save(tmp_path / f"{name}.tiff")
    (tmp_path / "pairs.csv").write_text("filepath|title\na.tiff|x\nb.tiff|x\na.tiff|y\nc.tiff|y\n")
    evaclip("data", "check", str(tmp_path / "pairs.csv"), "--workers", "0", "--json", str(tmp_path / "out.json"))
    stored = json.loads((tmp_path / "out.json").read_text())
    assert stored["converted"] == {"16-bit": 2, "float": 1}
    assert stored["notes"] == ["read as utf-8-sig, columns separated by pipes"]
    assert stored["faults"] == []


@pytest.mark.parametrize(
    "words", [("check", "SHARDS", "--json", "OUT"), ("index", "SHARDS", "--out", "OUT"), ("emoji", "OUT")]
)
def test_unwritable_output_is_refused_first(shards, tmp_path, monkeypatch, words):
    (tmp_path / "file").touch()
    monkeypatch.setattr("evaclip.data.open_source", lambda *_, **__: pytest.fail("the data is opened"))
    monkeypatch.setattr(emoji, "build_emoji", lambda *_: pytest.fail("the pictures are drawn"))
    out = str(tmp_path / "file" / "out.json")
    with pytest.raises(UserError, match=rf"^cannot write {out}\S*: Not a directory: {tmp_path}/file"):
        evaclip("data", *({"SHARDS": shards, "OUT": out}.get(word, word) for word in words))


def test_data_emoji_wrong_size_is_refused(tmp_path):
    with pytest.raises(UserError, match="size must be"):
        evaclip("data", "emoji", str(tmp_path), "--size", "100000")


def read(source) -> list[tuple]:
    """Captions and tensors of all samples, as evaluation reads them."""
    batches = list(iterate(source, number_transform, 5))
    return [(c, i.tolist()) for images, captions, _ in batches for c, i in zip(captions, images, strict=True)]


@pytest.fixture
def sources(shards, tmp_path):
    """The paths of equal images as class folders, table and shards."""
    rows = []
    for number in range(12):
        name = f"{['dog', 'cat'][number % 2]}/{number:02d}.v1.png"
        (tmp_path / "root" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / name).write_bytes(picture(number))
        rows.append({"filepath": f"root/{name}", "title": [f"caption {number}", "again"][: 1 + number % 2]})
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, [*rows, rows[1]])))
    return {"folder": str(tmp_path / "root"), "table": str(tmp_path / "pairs.jsonl"), "shards": shards}


@pytest.mark.parametrize("kind", ["folder", "table", "shards"])
def test_converted_shards_hold_the_same_samples(kind, sources, tmp_path, capsys):
    evaclip("data", "convert", sources[kind], str(tmp_path / "out"), "--samples-per-shard", "5")
    source, converted = open_source(sources[kind]), open_source(str(tmp_path / "out"))
    count = {"folder": 12, "table": 13, "shards": 64}[kind]
    assert f"{-(-count // 5)} shards, {count} samples" in capsys.readouterr().out
    assert list(converted.shard_sizes[:-1]) == [5] * (-(-count // 5) - 1)
    assert read(converted) == read(source)
    assert [converted[i].captions for i in range(count)] == [source[i].captions for i in range(count)]
    keys = open_source(str(tmp_path / "out"), caption_key="json:key")
    assert [keys[i].caption for i in range(count)] == [source[i].key for i in range(count)]


def test_converted_class_folders_keep_their_labels(sources, tmp_path):
    evaclip("data", "convert", sources["folder"], str(tmp_path / "out"))
    labels = open_source(str(tmp_path / "out"), caption_key="cls")
    assert [labels[i].caption for i in range(12)] == ["0"] * 6 + ["1"] * 6
    assert (tmp_path / "out/classes.txt").read_text() == "cat\ndog\n"


def test_convert_leaves_bad_samples_out(tmp_path, capsys):
    Image.new("RGB", (4, 4)).save(tmp_path / "c.tiff")
    (tmp_path / "b.png").write_bytes(b"rubbish")
    (tmp_path / "pairs.csv").write_text("filepath,title\ngone.png,x\nb.png,x\nc.tiff,x\n")
    evaclip("data", "convert", str(tmp_path / "pairs.csv"), str(tmp_path / "out"))
    output = capsys.readouterr().out
    assert "1 sample" in output
    assert "2 bad samples" in output
    assert "data.image_key='tiff'" in output
    assert open_source(str(tmp_path / "out"), image_key="tiff")[0].caption == "x"


def test_convert_overwrites_no_shards(shards, tmp_path):
    with pytest.raises(UserError, match=f"OUT .*{tmp_path}"):
        evaclip("data", "convert", shards, str(tmp_path))
    with pytest.raises(UserError, match="samples_per_shard"):
        evaclip("data", "convert", shards, str(tmp_path / "out"), "--samples-per-shard", "0")
