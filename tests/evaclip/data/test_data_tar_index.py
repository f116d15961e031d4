"""Indexes of tar shards and their cache."""

import io
import os
import shutil
import tarfile

import pytest
from data_samples import sample
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from evaclip.data import index_cache, tar_index
from evaclip.data.index_cache import IndexCache, LocalShard
from evaclip.data.shard_writer import write_shard
from evaclip.data.tar_index import build_index
from evaclip.errors import UserError


@pytest.fixture
def shard(tmp_path):
    path = tmp_path / "shard.tar"
    write_shard(path, map(sample, range(12)))
    return path


def test_tar_index_offsets_lead_to_the_contents(shard):
    index = build_index(shard)
    assert list(index.keys) == [f"{number:06d}" for number in range(12)]
    data = shard.read_bytes()
    for number in range(12):
        members = index.members(number)
        assert list(members) == ["png", "txt", "json"]
        assert {name: data[m.offset : m.offset + m.size] for name, m in members.items()} == sample(number)[1]
    assert index.facts.damage == ""


def test_tar_members_need_not_be_adjacent(tmp_path):
    path = tmp_path / "mixed.tar"
    entries = [("a/1.PNG", b"x"), ("b/1.png", b"yy"), ("a/1.txt", b"t"), ("a/._1.png", b"mac"), ("b/1.seg.png", b"s")]
    with tarfile.open(path, "w") as tar:
        for name, content in entries:
            (tmp_path / "content").write_bytes(content)
            tar.add(tmp_path / "content", name)
    index = build_index(path)
    assert list(index.keys) == ["a/1", "b/1"]
    assert [list(index.members(i)) for i in range(2)] == [["png", "txt"], ["png", "seg.png"]]


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_truncated_tar_is_indexed_up_to_the_damage(shard, data):
    whole = shard.read_bytes()
    full = build_index(shard)
    content_end = full.members(11)["json"].offset + full.members(11)["json"].size
    cut = data.draw(st.integers(512, content_end), label="cut")
    damaged = shard.with_name("damaged.tar")
    damaged.write_bytes(whole[:cut])
    index = build_index(damaged)
    assert index.facts.damage
    for number in range(len(index)):
        assert index.keys[number] == full.keys[number]
        assert index.members(number).items() <= full.members(number).items()
        assert all(member.offset + member.size <= cut for member in index.members(number).values())
    complete = sum(full.members(i)["json"].offset + full.members(i)["json"].size <= cut for i in range(12))
    assert complete <= len(index) <= complete + 1


@pytest.mark.parametrize("rubbish", [b"\xff" * 512, b"\0" * 512, b"y"], ids=["header", "zero block", "checksum"])
def test_broken_tar_header_is_damage(shard, rubbish):
    header = build_index(shard).members(5)["png"].offset - 512
    data = bytearray(shard.read_bytes())
    data[header : header + len(rubbish)] = rubbish
    shard.write_bytes(data)
    index = build_index(shard)
    assert len(index) == 5
    assert "unreadable from byte" in index.facts.damage


def test_index_of_other_files_is_refused(tmp_path):
    text = tmp_path / "text.tar"
    text.write_text("not a tar\n" * 200)
    with pytest.raises(UserError, match=r"text\.tar is not a plain tar shard"):
        build_index(text)
    packed = tmp_path / "packed.tar"
    with tarfile.open(packed, "w:gz") as tar:
        tar.add(text, "1.txt")
    with pytest.raises(UserError, match="compressed with gzip"):
        build_index(packed)
    with pytest.raises(UserError, match=r"cannot read .*missing\.tar"):
        build_index(tmp_path / "missing.tar")


ODD_NAMES = ["/a.jpg", "ä.jpg", "folder/" * 15 + "a.jpg", "x" * 120 + ".jpg", "a", "a.", ".jpg", "__a.jpg"]


@pytest.mark.parametrize("names", [["a.jpg", "b.c.JPG", "a.txt", "a.jpg", "__b.jpg", "f/a"], ODD_NAMES])
@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tar_index_is_that_of_tarfile(names, form, tmp_path, monkeypatch):
    path = tmp_path / "odd.tar"
    with tarfile.open(path, "w", format=form) as tar:
        for name in names if form != tarfile.USTAR_FORMAT else [name for name in names if len(name) < 115]:
            info = tarfile.TarInfo(name)
            info.size = 3
            tar.addfile(info, io.BytesIO(b"abc"))
    found = build_index(path)
    monkeypatch.setattr(tar_index, "_FILE", ())
    expected = build_index(path)
    assert found.facts == expected.facts
    assert list(found.keys) == list(expected.keys)
    assert [found.members(i) for i in range(len(found))] == [expected.members(i) for i in range(len(found))]


def test_index_cache_evicts_the_oldest_files(tmp_path, cache_folder, monkeypatch):
    monkeypatch.setattr(index_cache, "_TRIM_EVERY", 1)
    monkeypatch.setattr(index_cache, "_CAPACITY", 4000)
    left_behind = cache_folder / "older.npz"
    cache_folder.mkdir(parents=True)
    left_behind.write_bytes(bytes(4000))
    os.utime(left_behind, (1, 1))
    for number in range(8):
        write_shard(tmp_path / f"{number}.tar", map(sample, range(2)))
        IndexCache().get(LocalShard(tmp_path / f"{number}.tar"))
    assert not left_behind.exists()
    assert 2 <= len(list(cache_folder.iterdir())) < 8
    assert sum(file.stat().st_size for file in cache_folder.iterdir()) <= 4000


def test_index_cache_is_reused(shard, cache_folder, monkeypatch):
    first = IndexCache().get(LocalShard(shard))
    assert len(list(cache_folder.iterdir())) == 1
    monkeypatch.setattr(index_cache, "build_index", lambda *args: pytest.fail("built again"))
    second = IndexCache().get(LocalShard(shard))
    assert second.facts == first.facts
    assert list(second.keys) == list(first.keys)
    assert [second.members(i) for i in range(12)] == [first.members(i) for i in range(12)]


def test_copied_shard_keeps_its_index(shard, cache_folder, monkeypatch):
    """`cp` without -p sets other times."""
    indexes = IndexCache(next_to_shards=True)
    first = indexes.get(LocalShard(shard))
    copied = shutil.copytree(shard.parent, shard.parent / "copied", ignore=lambda *_: ["cache"]) / shard.name
    os.utime(copied, (1, 1))
    monkeypatch.setattr(index_cache, "build_index", lambda *args: pytest.fail("built again"))
    assert IndexCache().get(LocalShard(copied)).facts == first.facts
    assert not cache_folder.exists()


def append(shard, number):
    with tarfile.open(shard, "a") as tar:
        info = tarfile.TarInfo(f"{number:06d}.txt")
        tar.addfile(info)


@pytest.mark.parametrize(
    "change", [lambda shard: write_shard(shard, map(sample, range(12, 24))), lambda shard: append(shard, 20)]
)
def test_index_of_a_changed_shard_is_rebuilt(change, shard):
    first = IndexCache().get(LocalShard(shard))
    before = shard.stat()
    change(shard)
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert shard.stat().st_size == before.st_size
    assert list(IndexCache().get(LocalShard(shard)).keys) == list(build_index(shard).keys) != list(first.keys)


def test_index_of_a_shorter_shard_is_rebuilt(shard):
    IndexCache().get(LocalShard(shard))
    write_shard(shard, map(sample, range(3)))
    assert len(IndexCache().get(LocalShard(shard))) == 3


def test_damaged_index_file_is_replaced(shard, cache_folder):
    IndexCache().get(LocalShard(shard))
    (file,) = cache_folder.iterdir()
    sound = file.read_bytes()
    for damaged in (b"", b"rubbish", sound[: len(sound) // 2], sound[:-200] + b"\0" * 200):
        file.write_bytes(damaged)
        assert len(IndexCache().get(LocalShard(shard))) == 12
        assert file.read_bytes() == sound
