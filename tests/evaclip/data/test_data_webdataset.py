"""Tar shards as a data set: samples, images, captions, faults."""

import io
import os
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from data_samples import make_loader, picture, sample
from PIL import EpsImagePlugin, Image

from evaclip.data import BadSample, FaultKind, open_source
from evaclip.data.samples import Decoding, decode_image
from evaclip.data.shard_writer import write_shard, write_shards
from evaclip.errors import UserError

OPEN_FILES = Path("/proc/self/fd")


def kind_of_fault(source, index: int) -> FaultKind:
    with pytest.raises(BadSample) as caught:
        decode_image(source[index].image, source.name(index), source.decoding)
    assert f"{index:06d}" in str(caught.value.fault)
    return caught.value.fault.kind


def test_shard_samples_are_in_order(shards):
    source = open_source(shards)
    assert len(source) == 64
    assert source.shard_sizes == [20, 30, 14]
    for number in (0, 19, 20, 49, 50, 63):
        raw = source[number]
        assert (raw.key, raw.caption, raw.image) == (f"{number:06d}", f"caption {number}", picture(number))
    for wrong in (-1, 64):
        with pytest.raises(IndexError):
            source[wrong]
    assert not source.faults


def test_patterns_globs_and_folders_are_equivalent(shards, tmp_path):
    expected = open_source(shards).fingerprint
    listed = "::".join(str(tmp_path / f"{i:02d}.tar") for i in range(3))
    for path in (listed, str(tmp_path / "*.tar"), str(tmp_path), f"{tmp_path}/00.tar::{tmp_path}/{{01,02}}.tar"):
        assert open_source(path).fingerprint == expected


def test_fingerprint_depends_on_names_and_sizes(shards, tmp_path):
    before = open_source(shards).fingerprint
    assert open_source(f"{tmp_path}/{{01,00,02}}.tar").fingerprint != before
    write_shard(tmp_path / "02.tar", map(sample, range(51, 65)))
    assert open_source(shards).fingerprint != before


@pytest.mark.parametrize(
    ("caption_key", "captions"),
    [
        ("txt", ("caption 3",)),
        ("json:caption", ("caption 3",)),
        ("json:captions", ("caption 3", "caption 1003")),
        ("json:nothing;txt", ("caption 3",)),
        ("cls;json:captions", ("caption 3", "caption 1003")),
    ],
)
def test_captions_by_key(shards, caption_key, captions):
    assert open_source(shards, caption_key=caption_key)[3].captions == captions


def test_missing_json_field_names_the_others(shards):
    with pytest.raises(BadSample, match="no text in json:captoin; fields of the JSON: caption, captions"):
        open_source(shards, caption_key="json:captoin")[3]


def test_all_files_that_are_no_shards_are_named(shards, tmp_path):
    for name in ("03", "05"):
        (tmp_path / f"{name}.tar").write_text("not a tar\n" * 200)
    with pytest.raises(UserError, match=r"03\.tar is not a plain tar.*05\.tar is not a plain tar"):
        open_source(str(tmp_path))


@pytest.mark.parametrize("kind", ["shards", "a folder"])
def test_cache_that_cannot_be_written_is_logged(kind, shards, tmp_path, cache_folder, caplog):
    cache_folder.parent.mkdir(parents=True)
    cache_folder.touch()
    if kind == "a folder":
        (tmp_path / "images" / "cat").mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / "cat" / "1.png")
    open_source(shards if kind == "shards" else str(tmp_path / "images"))
    assert "is not stored" in caplog.text


def test_images_by_key(tmp_path):
    members = {"jpg": picture(1, kind="jpeg"), "webp": picture(2, kind="webp"), "txt": b"two pictures"}
    write_shard(tmp_path / "a.tar", [("000000", members)])
    path = str(tmp_path / "a.tar")
    assert open_source(path)[0].image == members["jpg"]
    assert open_source(path, image_key="webp;jpg")[0].image == members["webp"]
    assert kind_of_fault(open_source(path, image_key="png"), 0) is FaultKind.MISSING_IMAGE


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"txt": None, "json": None}, FaultKind.MISSING_CAPTION),
        ({"txt": b" \n", "json": b'{"caption": null}'}, FaultKind.MISSING_CAPTION),
        ({"txt": None, "json": b"{broken"}, FaultKind.MISSING_CAPTION),
        ({"png": None}, FaultKind.MISSING_IMAGE),
        ({"png": b""}, FaultKind.MISSING_IMAGE),
        ({"png": picture(1)[:40]}, FaultKind.CORRUPT_IMAGE),
        ({"png": picture(1)[:45] + b"\0\0\0" + picture(1)[48:]}, FaultKind.CORRUPT_IMAGE),
        ({"png": b"<html>404</html>"}, FaultKind.CORRUPT_IMAGE),
    ],
)
def test_faults_by_kind(tmp_path, change, kind):
    key, members = sample(0)
    members = {name: content for name, content in {**members, **change}.items() if content is not None}
    write_shard(tmp_path / "a.tar", [(key, members), sample(1)])
    source = open_source(str(tmp_path / "a.tar"))
    assert kind_of_fault(source, 0) is kind
    assert source[1].caption == "caption 1"


def test_oversized_image_is_not_decoded(tmp_path):
    path = str(tmp_path / "a.tar")
    write_shard(tmp_path / "a.tar", [sample(0)])
    assert kind_of_fault(open_source(path, max_image_pixels=63), 0) is FaultKind.OVERSIZED_IMAGE
    source = open_source(path, max_image_pixels=64)
    assert decode_image(source[0].image, "x", source.decoding).size == (8, 8)
    for wrong in ({"max_image_pixels": 0}, {"min_size": -1}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            open_source(path, **wrong)


def test_eps_image_starts_no_ghostscript(monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a program was started"))
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", "gs")
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "eps")
    with pytest.raises(BadSample, match="format") as caught:
        decode_image(buffer.getvalue(), "x")
    assert caught.value.fault.kind is FaultKind.CORRUPT_IMAGE


@pytest.mark.parametrize("kind", ["jpeg", "mpo", "png", "webp", "gif", "bmp", "tiff", "ppm"])
def test_image_format_is_read(kind):
    assert decode_image(picture(1, kind=kind), "x").size == (8, 8)


def test_decoding_keeps_mode_and_applies_exif():
    buffer = io.BytesIO()
    Image.new("RGBA", (4, 4), (10, 20, 30, 40)).save(buffer, "png")
    assert decode_image(buffer.getvalue(), "x").getpixel((0, 0)) == (10, 20, 30, 40)
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.new("L", (8, 4)).save(buffer, "jpeg", exif=exif)
    for turned, size in ((False, (8, 4)), (True, (4, 8))):
        image = decode_image(buffer.getvalue(), "x", Decoding(exif_orientation=turned))
        assert (image.size, image.mode) == (size, "L")


def test_jpeg_reduction_keeps_the_least_size():
    buffer = io.BytesIO()
    Image.new("RGB", (400, 320)).save(buffer, "jpeg")
    sizes = {
        limit: decode_image(buffer.getvalue(), "x", Decoding(at_least=limit)).size
        for limit in (None, 40, 81, 320, 1000)
    }
    assert sizes == {None: (400, 320), 40: (50, 40), 81: (200, 160), 320: (400, 320), 1000: (400, 320)}


def test_second_sample_with_a_key_is_a_fault(tmp_path):
    again = ("000001", {"png": picture(70), "txt": b"another"})
    write_shard(tmp_path / "a.tar", [sample(0), sample(1), again, sample(2)])
    source = open_source(str(tmp_path / "a.tar"))
    assert [source[i].caption for i in range(3)] == ["caption 0", "caption 1", "caption 2"]
    assert source[1].image == picture(1)
    (fault,) = source.faults
    assert fault.kind is FaultKind.DUPLICATE_KEY
    assert (fault.file, fault.key) == (str(tmp_path / "a.tar"), "000001")
    write_shard(tmp_path / "once.tar", map(sample, range(3)))
    assert source.shards[0].facts.digest == open_source(str(tmp_path / "once.tar")).shards[0].facts.digest


def test_data_without_samples_lists_its_members(tmp_path):
    (tmp_path / "empty.tar").touch()
    with pytest.raises(UserError, match=r"0 samples in 1 shard.*empty\.tar.*0 bytes"):
        open_source(str(tmp_path / "empty.tar"))
    write_shard(tmp_path / "hollow.tar", [])
    with pytest.raises(UserError, match=r"0 samples in 2 shard"):
        open_source(f"{tmp_path}/{{empty,hollow}}.tar")
    with pytest.raises(UserError, match=r"2 of 3 files are missing: .*b\.tar"):
        open_source(f"{tmp_path}/{{empty,b,c}}.tar")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=r"0 \.tar shards in the folder"):
        open_source(str(tmp_path / "folder"), "webdataset")
    with pytest.raises(UserError, match="caption key 'json' must be"):
        open_source(str(tmp_path / "hollow.tar"), caption_key="json")


def test_open_files_stay_bounded_and_close(tmp_path):
    write_shards(tmp_path, "s", map(sample, range(250)), 1)
    source = open_source(str(tmp_path / "*.tar"))
    before = len(list(OPEN_FILES.iterdir()))
    assert [source[i].caption for i in range(250)] == [f"caption {i}" for i in range(250)]
    assert len(list(OPEN_FILES.iterdir())) - before <= 400
    source.close()
    assert len(list(OPEN_FILES.iterdir())) == before
    assert source[7].caption == "caption 7"


def test_shard_truncated_after_indexing(shards, tmp_path):
    source = open_source(shards)
    os.truncate(tmp_path / "01.tar", 600)
    with pytest.raises(BadSample, match="changed after it was indexed") as caught:
        source[40]
    assert caught.value.fault.kind is FaultKind.UNREADABLE


def test_write_shards_deletes_stale_shards(tmp_path):
    write_shards(tmp_path, "s", map(sample, range(10)), 2)
    (tmp_path / "s-extra.tar").touch()
    assert [path.name for path in write_shards(tmp_path, "s", map(sample, range(3)), 2)] == [
        "s-00000.tar",
        "s-00001.tar",
    ]
    assert sorted(path.name for path in tmp_path.glob("*.tar")) == ["s-00000.tar", "s-00001.tar", "s-extra.tar"]


def test_failed_shard_write_leaves_no_file(tmp_path):
    def broken():
        yield sample(0)
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        write_shard(tmp_path / "a.tar", broken())
    assert not [path for path in tmp_path.iterdir() if path.is_file()]


def test_shards_of_two_windows_are_read_ahead(tmp_path, monkeypatch):
    for number in range(6):
        write_shard(tmp_path / f"{number}.tar", map(sample, range(20 * number, 20 * number + 20)))
    asked = []
    monkeypatch.setattr(
        os, "posix_fadvise", lambda file, *span: asked.append((str(Path(f"/proc/self/fd/{file}").readlink()), span))
    )
    loader = make_loader(open_source(str(tmp_path / "{0..5}.tar")), batch_size=4, window=20)
    expected = [
        str(tmp_path / f"{shard}.tar") for shards in loader._samples.order.shards(np.arange(4)) for shard in shards
    ]
    stream = loader.batches()
    for _ in range(5):  # one window
        next(stream)
    deadline = time.monotonic() + 10
    while len(asked) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    assert [file for file, _ in asked] == expected
    assert all(span == (0, 2**17, os.POSIX_FADV_WILLNEED) for _, span in asked)
