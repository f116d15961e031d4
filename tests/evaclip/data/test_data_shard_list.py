"""Lists of shards, from which a data set is opened without reading it."""

import json
import shutil

import pytest
from data_samples import sample

from evaclip.commands.main import build_parser
from evaclip.data import BadSample, FaultKind, open_source
from evaclip.data.config import RemoteConfig
from evaclip.data.shard_writer import write_shard
from evaclip.errors import UserError


def index(path: str, out, *options: str) -> None:
    args = build_parser().parse_args(["data", "index", path, "--out", str(out), *options])
    args.run(args)


@pytest.mark.parametrize("remote", [False, True])
def test_shard_list_opens_without_reading_shards(remote, shards, server, tmp_path, cache_folder, capsys, monkeypatch):
    source = open_source(shards)
    index(server.url("{00..02}.tar") if remote else shards, tmp_path / "list.json")
    assert f"3 shards, 64 samples, fingerprint {source.fingerprint}" in capsys.readouterr().out
    shutil.rmtree(cache_folder.parent)
    server.requests.clear()
    with monkeypatch.context() as patched:
        patched.setattr("evaclip.data.tar_index._plain_files", lambda _: pytest.fail("a shard is read"))
        listed = open_source(str(tmp_path / "list.json"))
    assert not server.requests
    assert (listed.fingerprint, listed.shard_sizes) == (source.fingerprint, source.shard_sizes)
    assert [listed[i] for i in (0, 20, 63)] == [source[i] for i in (0, 20, 63)]
    assert server.gets("00.tar") == int(remote)


def test_shard_list_moves_with_its_shards(shards, server, tmp_path):
    index(shards, tmp_path / "list.json")
    moved = tmp_path / "moved"
    shutil.copytree(tmp_path, moved, ignore=lambda *_: ["moved", "cache"])
    assert open_source(str(moved / "list.json")).name(63) == f"{moved}/02.tar:000063"
    remote = open_source(server.url("moved/list.json"))
    assert remote.name(63) == f"{server.url('moved/02.tar')}:000063"
    assert remote[63].caption == "caption 63"


@pytest.mark.parametrize("remote", [False, True])
def test_shards_changed_after_listing_are_faults(remote, shards, server, tmp_path):
    (tmp_path / "00.tar").rename(tmp_path / "kept.tar")
    write_shard(tmp_path / "00.tar", map(sample, range(100, 120)))
    index(server.url("{00..02}.tar") if remote else shards, tmp_path / "list.json")
    (tmp_path / "kept.tar").rename(tmp_path / "00.tar")
    (tmp_path / "02.tar").unlink()
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    source = open_source(str(tmp_path / "list.json"), remote=RemoteConfig(attempts=1))
    for number, reason in ((3, "changed after it was indexed"), (60, "HTTP 404" if remote else "No such file")):
        with pytest.raises(BadSample, match=reason) as caught:
            source[number]
        assert caught.value.fault.kind is (FaultKind.UNREACHABLE if remote else FaultKind.UNREADABLE)
    assert source[30].caption == "caption 30"


def test_shard_list_has_the_faults_of_shards(shards, tmp_path):
    path = tmp_path / "01.tar"
    path.write_bytes(path.read_bytes()[:50_000])
    write_shard(tmp_path / "02.tar", [*map(sample, range(3)), sample(1)])
    index(shards, tmp_path / "list.json")
    faults = open_source(shards).faults
    assert [fault.kind for fault in faults] == [FaultKind.DAMAGED_SHARD, FaultKind.DUPLICATE_KEY]
    assert open_source(str(tmp_path / "list.json")).faults == faults


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not a list of shards"),
        ('{"kind": "other", "shardlist": []}', "its kind is 'other'"),
        ('{"kind": "evaclip-shards-v1", "shardlist": [{"url": "a.tar"}]}', "KeyError: 'nsamples'"),
    ],
)
def test_shard_list_of_wrong_content_is_refused(text, message, tmp_path):
    (tmp_path / "list.json").write_text(text)
    with pytest.raises(UserError, match=message):
        open_source(str(tmp_path / "list.json"))


@pytest.mark.parametrize("remote", [False, True])
def test_shard_list_command_is_not_run(remote, shards, server, tmp_path):
    index(shards, tmp_path / "list.json")
    listed = json.loads((tmp_path / "list.json").read_text())
    listed["shardlist"][1]["url"] = command = f"pipe:touch {tmp_path}/ran"
    (tmp_path / "list.json").write_text(json.dumps(listed))
    place = server.url("list.json") if remote else str(tmp_path / "list.json")
    with pytest.raises(UserError) as caught:
        open_source(place)[20]
    assert place in str(caught.value)
    assert command in str(caught.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("path", ["*.tar", ".", "./pipe:touch ran;.tar"])
def test_file_name_like_a_command_is_not_run(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_shard(tmp_path / "pipe:touch ran;.tar", [sample(1)])
    assert open_source(path)[0].caption == "caption 1"
    assert not (tmp_path / "ran").exists()


def test_data_index_wrong_arguments_are_refused(shards, server, tmp_path, capsys):
    for part in ("2/2", "1/0", "a/b"):
        with pytest.raises(SystemExit):
            index(shards, tmp_path / "list.json", f"--part={part}")
        assert f"--part: must be I/N with I from 0 to N - 1, got '{part}'" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"--out must end in \.json, got '\S+list'"):
        index(shards, tmp_path / "list")
    with pytest.raises(UserError, match=r"data\.train"):
        index(f"pipe:cat {shards}", tmp_path / "list.json")
    with pytest.raises(UserError, match=r"cannot read the list of shards \S+none\.json: HTTP 404"):
        open_source(server.url("none.json"))


def test_shard_list_parts_are_joined(shards, tmp_path, monkeypatch, capsys):
    index(shards, tmp_path / "list.json", "--part", "0/2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    index(shards, tmp_path / "list.json")
    index(str(tmp_path / "list-*.json"), tmp_path / "whole.json", "--part", "0/1")
    source = open_source(shards)
    assert f"whole.json: 3 shards, 64 samples, fingerprint {source.fingerprint}" in capsys.readouterr().out
    joined = open_source(str(tmp_path / "whole.json"))
    assert (joined.fingerprint, joined.shard_sizes) == (source.fingerprint, [20, 30, 14])
    lists = [tmp_path / f"list-0000{part}-of-00002.json" for part in (0, 1)]
    for paths, message in ((lists[:1], "got 1 without 00001-of-00002;"), ([*lists, lists[0]], "2 parts .* got 3;")):
        with pytest.raises(UserError, match=message):
            index("::".join(map(str, paths)), tmp_path / "whole.json", "--part", "0/1")
    with pytest.raises(UserError, match="3 shards can't be divided into 4 parts"):
        index(shards, tmp_path / "list.json", "--part", "0/4")
    with pytest.raises(UserError, match=r"lists of shards are joined as a whole, so part 1/2 is none of \S+whole.json"):
        index(str(tmp_path / "whole.json"), tmp_path / "list.json")


def test_shard_indexes_are_stored_next_to_shards(shards, tmp_path, cache_folder, monkeypatch, caplog):
    index(shards, tmp_path / "list.json")
    assert sorted(path.name for path in tmp_path.glob("*.index")) == ["00.tar.index", "01.tar.index", "02.tar.index"]
    assert not cache_folder.exists()
    with monkeypatch.context() as patched:
        patched.setattr("evaclip.data.tar_index._plain_files", lambda _: pytest.fail("a shard is read"))
        index(shards, tmp_path / "again.json")
        assert open_source(shards)[63] == open_source(str(tmp_path / "again.json"))[63]
    write_shard(tmp_path / "01.tar", map(sample, range(100, 120)))
    index(shards, tmp_path / "again.json")
    assert open_source(str(tmp_path / "again.json"))[20].caption == "caption 100"
    (tmp_path / "02.tar.index").unlink()
    (tmp_path / "02.tar.index").mkdir()
    index(shards, tmp_path / "again.json")
    assert "02.tar.index" in caplog.text
    assert len(list(cache_folder.iterdir())) == 1
