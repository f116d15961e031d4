import argparse

import pytest
from data_samples import picture, sample
from pydantic import TypeAdapter, ValidationError

from evaclip.commands import data as command
from evaclip.data import DataConfig, open_configured, open_source
from evaclip.data.bench import time_stages
from evaclip.data.check import check
from evaclip.data.shard_writer import write_shard
from evaclip.demo import emoji
from evaclip.errors import UserError
from evaclip.transforms import train_transform


def evaclip(*words: str) -> None:
    parser = argparse.ArgumentParser()
    command.add_commands(parser.add_subparsers(required=True))
    args = parser.parse_args(words)
    args.run(args)


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")


def test_check_of_sound_data(shards, capsys):
    evaclip("data", "check", shards, "--workers", "0")
    output = capsys.readouterr().out
    assert "64 samples" in output
    assert "no faults" in output


def test_check_lists_faults_by_kind_and_ends_with_1(tmp_path, capsys):
    samples = [sample(i) for i in range(150)]
    for i in range(100, 110):
        samples[i][1].pop("txt")
        samples[i][1].pop("json")
    samples[3][1]["png"] = picture(3)[:30]
    write_shard(tmp_path / "a.tar", samples)
    (tmp_path / "b.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:2000])
    with pytest.raises(SystemExit) as caught:
        evaclip("data", "check", str(tmp_path), "--workers", "2")
    assert caught.value.code == 1
    lines = capsys.readouterr().out.splitlines()
    (missing,) = [line for line in lines if "missing caption" in line]
    assert "10" in missing.split()
    assert "a.tar:000100" in missing
    assert any("corrupt image" in line and "a.tar:000003" in line for line in lines)
    assert any("damaged shard" in line and "b.tar" in line for line in lines)
    assert not any("000106" in line for line in lines)


def test_check_counts_every_sample(shards):
    source = open_source(shards)
    report = check(source)
    assert (report.samples, report.bad) == (64, 0)
    assert report.image_bytes == sum(len(picture(i)) for i in range(64))


def test_check_takes_the_columns_of_a_table(tmp_path, capsys):
    (tmp_path / "a.png").write_bytes(picture(1))
    (tmp_path / "pairs.txt").write_text("url;text\na.png;a cat\n")
    options = ["--kind", "csv", "--image-key", "url", "--caption-key", "text", "--csv-separator", ";"]
    evaclip("data", "check", str(tmp_path / "pairs.txt"), *options, "--workers", "0")
    assert "no faults" in capsys.readouterr().out


def test_bench_shows_stages_and_throughput(shards, capsys):
    evaclip(
        "data",
        "bench",
        shards,
        "--workers",
        "1",
        "--batch-size",
        "16",
        "--image-size",
        "32",
        "--seconds",
        "0.1",
    )
    output = capsys.readouterr().out
    assert all(word in output for word in ("read", "decode", "transform", "samples/s", "MB/s"))


def test_bench_does_not_count_bad_samples(tmp_path):
    write_shard(tmp_path / "a.tar", [sample(0), ("000001", {"png": b"rubbish", "txt": b"x"})])
    stages = time_stages(open_source(str(tmp_path / "a.tar")), train_transform(16))
    assert stages.image_bytes == len(picture(0))
    assert min(stages.read_ms, stages.decode_ms, stages.transform_ms) > 0


def test_bench_mistakes(shards):
    with pytest.raises(UserError, match="--seconds must be more than 0, got 0"):
        evaclip("data", "bench", shards, "--seconds", "0")
    with pytest.raises(UserError, match="64 samples are too few for one global batch of 65"):
        evaclip("data", "bench", shards, "--batch-size", "65", "--workers", "0")


@pytest.mark.parametrize(("style", "expected"), [("both", ("twemoji", "openmoji")), ("openmoji", ("openmoji",))])
def test_emoji_passes_its_options_on(tmp_path, monkeypatch, capsys, style, expected):
    calls = []

    def build(folder, styles, size, skin_tones):
        calls.append((folder, styles, size, skin_tones))
        return {name: [folder / f"{name}-00000.tar"] for name in styles}

    monkeypatch.setattr(emoji, "build_emoji", build)
    evaclip("data", "emoji", str(tmp_path), "--style", style, "--size", "48", "--skin-tones")
    assert calls == [(tmp_path, expected, 48, True)]
    assert f"{tmp_path}/openmoji-*.tar" in capsys.readouterr().out


def test_the_configuration_opens_its_data(shards):
    config = TypeAdapter(DataConfig).validate_python({"train": shards, "caption_key": "json:captions"})
    assert open_configured(config)[5].captions == ("caption 5", "caption 1005")
    assert len(open_configured(DataConfig(num_samples=12))) == 12


@pytest.mark.parametrize(
    "wrong",
    [
        {"trian": "x"},
        {"workers": -1},
        {"kind": "tar"},
        {"csv_separator": "ab"},
        {"caption_template": "no place"},
        {"augmentation": {"scael": [0.5, 1]}},
    ],
)
def test_configuration_mistakes_are_refused(wrong):
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        TypeAdapter(DataConfig).validate_python(wrong)
