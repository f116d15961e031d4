"""Reading rate and shuffle quality."""

import json
from pathlib import Path

import pytest

from benchmarks import cli
from benchmarks.data import machines as on_machines
from benchmarks.data import rate, shuffle
from benchmarks.data.machines import MachinesPlan
from benchmarks.data.shuffle import ShufflePlan

SMALL = ShufflePlan(shards=20, per_shard=50, batch=100, windows=(0, 100), buffers=(100,), nodes=2)
FEW = MachinesPlan(scale=100, shards=128, per_shard=100, batch=1280, machines=4, gpus=2, workers=2)


def test_both_are_measured_shown_and_kept(tmp_path, monkeypatch, capsys, steady):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(shuffle, "measure", lambda plan, look=shuffle.measure: look(SMALL))
    monkeypatch.setattr(on_machines, "measure", lambda plan, look=on_machines.measure: look(FEW))
    files = ["--json", str(tmp_path / "data.json"), "--plot", str(tmp_path / "data.png")]
    sizes = ["--shards", "2", "--per-shard", "10", "--image-bytes", "100", "--window", "10", "--passes", "1"]
    assert cli.main(["data", *sizes, *files]) == 0
    text = capsys.readouterr().out
    result = json.loads((tmp_path / "data.json").read_text())
    readers = [found["reader"] for found in result["rates"]]
    assert "HTTP, each shard fetched" in readers
    assert "webdataset: HTTP by curl, in order" in readers
    assert all(reader in text for reader in readers)
    for found in result["rates"]:
        assert found["megabytes_per_second"] == pytest.approx(found["samples_per_second"] * 100 / 1e6)
    assert [found["order"] for found in result["shuffles"]] == [
        "full permutation",
        "window of 100",
        "2 canonical nodes, window of 50 each",
        "webdataset, buffer of 100",
    ]
    assert all(found["order"].split(":")[0] in text for found in result["spreads"])
    assert (tmp_path / "data.png").stat().st_size > 10_000


def test_a_reader_that_leaves_something_out_is_no_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rate, "_readers", lambda *_: {"lazy": lambda: [100] * 19})
    with pytest.raises(RuntimeError, match="lazy gave 1900 bytes of images"):
        rate.measure(rate.RatePlan(2, 10, 100, 10, 1), tmp_path, lambda line: None)


def test_a_full_permutation_is_the_measure_and_windows_mix_less() -> None:
    full, window, nodes, _ = shuffle.measure(SMALL)
    assert full.same_shard == pytest.approx(1, abs=0.1)
    assert full.meet_again == pytest.approx(1, abs=0.1)
    # Two uniform positions are 1 - sqrt(1/2) of the epoch apart in the median.
    assert full.distance(50) == pytest.approx(0.293, abs=0.03)
    # A batch is a window of two shards, whose samples meet 49 others of their own; by chance it were 99 * 49 / 999.
    assert window.same_shard == pytest.approx(999 / 99, rel=0.01)
    assert window.distance(99) < 0.1
    assert (window.held, nodes.held) == (100, 100)


def test_parts_of_their_own_spread_a_batch_and_spare_machines_shards() -> None:
    full, window, recipe, open_clip = on_machines.measure(FEW)
    # 1280 samples of 128 shards at random; of a window of 1,000, ten shards, the next one is begun.
    assert (full.shards_of_batch, full.shards_of_machine) == (pytest.approx(128, abs=1), 1)
    assert 12 < window.shards_of_batch < 24
    assert window.largest_share == pytest.approx(0.078, abs=0.02)
    assert window.shards_of_machine == pytest.approx(1, abs=0.02)
    # Each of the 64 parts is of two shards, which both lie in its windows of 163 and 37.
    assert 64 * 1.5 < recipe.shards_of_batch <= 128
    assert recipe.shards_of_machine == pytest.approx(1 / 4, abs=0.03)
    # Batches of 160 samples from eight GPUs, whose buffers hold 50.
    assert 8 < open_clip.shards_of_batch < 32
    assert open_clip.shards_of_machine <= 1 / 4


def test_mistakes(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data", "--shards", "0"]) == 2
    assert "shards must be at least 1, got 0" in capsys.readouterr().err
