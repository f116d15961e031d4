"""Tables, class folders and synthetic images as data sets."""

import json
import logging
import os
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from data_samples import picture

from evaclip.data import BadSample, FaultKind, open_source
from evaclip.data.samples import decode_image
from evaclip.data.shard_list import expand_braces, expand_paths
from evaclip.errors import UserError


@pytest.fixture
def pictures(tmp_path):
    for name in ("a.png", "b.png"):
        write_picture(tmp_path / name)
    return tmp_path


def write_picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(picture(1))


def write(path, text: str, encoding: str = "utf-8") -> str:
    path.write_text(text, encoding=encoding)
    return str(path)


@pytest.mark.parametrize(
    ("separator", "encoding", "note"),
    [
        ("\t", "utf-8", "read as utf-8-sig, columns separated by tabs"),
        (",", "utf-16", "read as utf-16, columns separated by commas"),
        (";", "utf-8-sig", "read as utf-8-sig, columns separated by semicolons"),
        ("|", "cp1252", "read as cp1252, columns separated by pipes"),
    ],
)
def test_table_format_is_guessed(pictures, caplog, separator, encoding, note):
    rows = [("filepath", "id", "title"), ("a.png", "1", "a cat"), ("b.png", "2", "ein Hundé für 5 €")]
    path = write(pictures / "pairs.csv", "".join(separator.join(row) + "\n" for row in rows), encoding)
    with caplog.at_level(logging.WARNING, "evaclip.data"):
        source = open_source(path)
    assert [(source[i].key, source[i].caption) for i in (0, 1)] == [(row[0], row[2]) for row in rows[1:]]
    assert source[0].image == picture(1)
    assert source.place(1) == (path, "b.png")
    assert source.notes == [note]
    assert (note in caplog.text) == (separator in ";|")


def test_csv_columns_separators_and_quotes(pictures):
    text = f'url;text\n"{pictures / "a.png"}";"one; ""two""\nthree"\n'
    path = write(pictures / "pairs.txt", text, "utf-8-sig")
    keys = {"image_key": "url", "caption_key": "text"}
    assert open_source(path, "csv", **keys, csv_separator=";")[0].caption == 'one; "two"\nthree'
    for separator, message in ((",", "got 'url;text'"), ("", "got ''"), (";;", "got ';;'")):
        with pytest.raises(UserError, match=message):
            open_source(path, "csv", **keys, csv_separator=separator)


def test_json_lines(pictures):
    rows = [
        {"filepath": "a.png", "title": "a cat", "more": 1},
        {"filepath": "b.png", "title": ["Hundé", " ", "a dog"]},
        {"title": "no picture"},
        {"filepath": "a.png", "title": None},
        {"filepath": "a.png", "title": 7},
    ]
    path = write(pictures / "pairs.jsonl", "\n\n".join(json.dumps(row) for row in rows))
    source = open_source(path)
    assert [source[i].captions for i in (0, 1, 4)] == [("a cat",), ("Hundé", "a dog"), ("7",)]
    assert source[1].key == "b.png"
    for index, kind in ((2, FaultKind.MISSING_IMAGE), (3, FaultKind.MISSING_CAPTION)):
        with pytest.raises(BadSample, match=f"row {index + 1}") as caught:
            source[index]
        assert caught.value.fault.kind is kind
    renamed = write(pictures / "pairs.ndjson", '{"img": "a.png", "text": "x"}')
    assert open_source(renamed, image_key="img", caption_key="text")[0].caption == "x"


def test_parquet(pictures):
    pyarrow = pytest.importorskip("pyarrow", reason="it reads Parquet, of the extra [tables]")
    parquet = pytest.importorskip("pyarrow.parquet")
    columns = {"id": [1, 2, 3], "img": ["a.png", "b.png", None]}
    listed = pyarrow.table({**columns, "text": [["one", "two"], ["three"], []]})
    single = pyarrow.table({**columns, "text": ["one", "three", None]})
    for name, table, captions in (("listed", listed, ("one", "two")), ("single", single, ("one",))):
        parquet.write_table(table, pictures / f"{name}.parquet", row_group_size=2)
        source = open_source(str(pictures / f"{name}.parquet"), image_key="img", caption_key="text")
        assert len(source) == 3
        assert source[0].captions == captions
        assert source[1].caption == "three"
        with pytest.raises(BadSample, match="no image"):
            source[2]
    with pytest.raises(UserError, match=r"'filepath' .* got 'id', 'img', 'text'"):
        open_source(str(pictures / "single.parquet"))
    with pytest.raises(UserError, match=r"'id' of .* got int64"):
        open_source(str(pictures / "single.parquet"), image_key="id", caption_key="text")


def test_table_rows_with_faults(pictures):
    (pictures / "void.png").touch()
    images = ["a.png,", "gone.png,text", ",text", "b.png", "", ".,text", "void.png,text"]
    rows = ["filepath,title", *images, f"pipe:touch {pictures}/ran,text", "a.png,good"]
    source = open_source(write(pictures / "pairs.csv", "\n".join(rows)))
    kinds = []
    for index in range(len(source) - 1):
        with pytest.raises(BadSample) as caught:
            source[index]
        kinds.append(caught.value.fault.kind)
    caption, image, unreadable = FaultKind.MISSING_CAPTION, FaultKind.MISSING_IMAGE, FaultKind.UNREADABLE
    assert kinds == [caption, image, image, caption, unreadable, image, image]
    assert source[len(source) - 1].caption == "good"
    assert not (pictures / "ran").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", '{"filepath": "a.png", "title": "x"}\n{"filepath": ', r"x\.jsonl, line 2"),
        ("x.jsonl", '["a.png", "x"]', "line 1"),
        ("x.jsonl", '{"FilePath": "a.png", "title": "x"}', "'filepath' .* got 'FilePath', 'title'"),
        (
            "x.csv",
            "image,caption\na.png,x\n",
            "'filepath' .* got 'image', 'caption'; data.image_key",
        ),
        ("x.csv", "", "header row"),
        ("x.csv", b"filepath,title\na.png,\x81\n", "neither UTF-8, UTF-16 .* nor cp1252"),
    ],
)
def test_table_of_wrong_content_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        open_source(str(tmp_path / name))


def test_class_folder_captions_and_keys(tmp_path):
    hidden = ("dog/._1.png", "dog/.ipynb_checkpoints/1-checkpoint.png", ".hidden/2.png", "__MACOSX/dog/3.png")
    for name in ("tabby_cat/1.png", "dog/deep/2.JPG", "dog/3.png", "dog/notes.txt", "cat/notes.txt", *hidden):
        write_picture(tmp_path / "root" / name)
    source = open_source(str(tmp_path / "root"), caption_template="a drawing of a {}, {cropped}")
    assert list(source.classes) == ["dog", "tabby cat"]
    assert keys(source) == ["dog/3.png", "dog/deep/2.JPG", "tabby_cat/1.png"]
    assert source[2].caption == "a drawing of a tabby cat, {cropped}"
    (fault,) = source.faults
    assert (fault.kind, fault.file) == (FaultKind.EMPTY_CLASS, f"{tmp_path}/root/cat")


def test_pipe_as_image_is_a_fault(tmp_path):
    (tmp_path / "cats").mkdir()
    (tmp_path / "cats" / "0.png").symlink_to("/dev/null")
    os.mkfifo(tmp_path / "cats" / "1.png")
    table = write(tmp_path / "pairs.csv", "filepath\ttitle\ncats/0.png\ta\ncats/1.png\tb\n")
    for source in (open_source(str(tmp_path)), open_source(str(tmp_path), captions=False), open_source(table)):
        for index in (0, 1):
            with pytest.raises(BadSample) as caught:
                source[index]
            assert caught.value.fault.kind is FaultKind.UNREADABLE
            assert caught.value.fault.detail == "not a regular file"


def test_folder_without_images_is_refused(tmp_path):
    root = tmp_path / "root"
    (root / "dog").mkdir(parents=True)
    with pytest.raises(UserError, match=r"per class .* got 0 images and 1 class folder"):
        open_source(str(root))
    write_picture(root / "loose.png")
    write_picture(root / "dog" / "1.HEIC")
    with pytest.raises(UserError, match=r"1 \.heic, 1 outside of the class folders"):
        open_source(str(root))
    with pytest.raises(UserError, match=r"1 \.heic"):
        open_source(str(root / "dog"), captions=False)


@pytest.fixture
def class_folder(tmp_path):
    for number, name in enumerate(("b_b/z/1.JPG", "b_b/z.png", "b_b/z-.png", "a/é.webp", "c/10.jpeg", "c/9.png")):
        (tmp_path / "root" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / name).write_bytes(bytes(number + 1))
    return tmp_path / "root"


def keys(source):
    return [source[index].key for index in range(len(source))]


def test_class_folder_order_is_that_of_old_runs(class_folder):
    for _ in ("scanned", "stored"):
        source = open_source(str(class_folder))
        assert keys(source) == ["a/é.webp", "b_b/z/1.JPG", "b_b/z-.png", "b_b/z.png", "c/10.jpeg", "c/9.png"]
        assert list(source.classes) == ["a", "b b", "c"]
        assert source.fingerprint == "5694ee000e24ee92a2285325417009ee"
        assert open_source(str(class_folder), captions=False).fingerprint == "aeaef2dbfa635431c566c05126029b94"


def test_class_folder_change_is_noticed(class_folder):
    before = open_source(str(class_folder))
    (class_folder / "b_b/z/2.jpg").write_bytes(b"new")
    os.utime(class_folder / "b_b/z", ns=(0, 1))  # whatever the file system's resolution of times
    changed = open_source(str(class_folder))
    assert set(keys(changed)) - set(keys(before)) == {"b_b/z/2.jpg"}
    assert changed.fingerprint != before.fingerprint
    shutil.rmtree(class_folder / "b_b")
    os.utime(class_folder, ns=(0, 1))
    assert list(open_source(str(class_folder)).classes) == ["a", "c"]


def test_class_folder_is_scanned_by_one_rank(class_folder, monkeypatch):
    scanned = []
    scandir = os.scandir
    start = threading.Barrier(4)

    def slow_scandir(path):
        scanned.append(os.fspath(path))
        time.sleep(0.02)  # the others come meanwhile
        return scandir(path)

    def rank(path):
        start.wait()
        return open_source(path)

    monkeypatch.setattr(os, "scandir", slow_scandir)
    with ThreadPoolExecutor(4) as ranks:
        sources = list(ranks.map(rank, [str(class_folder)] * 4))
    assert len({source.fingerprint for source in sources}) == 1
    assert scanned.count(str(class_folder / "c")) == 1


def test_synthetic_images_match_their_captions():
    source = open_source("synthetic", num_samples=200)
    assert len(source) == 200
    assert len(set(source.classes)) == 64
    red_circle = source.classes.index("a red circle on white")
    one, other = source[red_circle], source[red_circle + 64]
    assert one.caption == other.caption == "a red circle on white"
    assert one.image != other.image
    for raw in (one, other):
        colours = {colour for _, colour in decode_image(raw.image, raw.key).getcolors()}
        assert colours == {(250, 250, 250), (220, 40, 40)}


@pytest.mark.parametrize(
    ("path", "kind", "message"),
    [
        ("{}/nowhere.tar", "auto", r"nowhere\.tar does not exist"),
        ("{}/notes.md", "auto", r"notes\.md is neither"),
        ("", "auto", "names no file"),
        ("{}/*.tar", "auto", "no file matches"),
        ("{}", "csv", "is a folder"),
        ("{}::{}/notes.md", "csv", "must be one path, got 2"),
        ("s3://bucket/pairs.csv", "csv", "local files only: copy or mount 's3:"),
        ("x.tar", "webdatset", "did you mean 'webdataset'"),
    ],
)
def test_wrong_data_path_is_refused(tmp_path, path, kind, message):
    (tmp_path / "notes.md").write_text("hello")
    with pytest.raises(UserError, match=message):
        open_source(path.replace("{}", str(tmp_path)), kind)


def test_path_patterns_are_expanded(tmp_path):
    for pattern, expected in (
        ("x{08..11}", ["x08", "x09", "x10", "x11"]),
        ("{a,b{9..11}}", ["a", "b9", "b10", "b11"]),
        ("{2..0}", ["2", "1", "0"]),
    ):
        assert expand_braces(pattern) == expected
    with pytest.raises(UserError, match="is neither"):
        expand_braces("x{abc}")
    file = tmp_path / "a[1].tar"
    file.touch()
    assert expand_paths(str(file)) == [str(file)]
