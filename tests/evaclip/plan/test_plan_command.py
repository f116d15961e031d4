"""`evaclip plan` as it is typed."""

import json
from pathlib import Path
from typing import Any

import pytest

from evaclip.commands.main import main
from evaclip.plan.gpus import get_gpu, gpus


def test_shows_what_a_gpu_holds(plan: Any) -> None:
    text = plan("tiny", "--gpus", "2", "--set", "batch_size=64")
    for word in ("parameters", "optimizer state", "tensors", "fits", "64 = 2 (GPUs) x 1 (chunks) x 32"):
        assert word in text


def test_json_holds_the_same(plan: Any) -> None:
    arguments = ("eva02-b-16", "--gpus", "64", "--gpu", "h100-80g", "--beside", "3.5", "--json")
    memory = json.loads(plan(*arguments))["memory"]
    assert memory["model_parameters"] == 149_691_137
    assert memory["peak"] == sum(memory["kinds"].values())
    assert memory["of_the_gpu"] == get_gpu("h100-80g").memory
    assert memory["reserved"] == [3.5 * 2**30] * 2


def test_offload_is_in_host_memory(plan: Any) -> None:
    arguments = ("tiny", "--gpus", "8", "--set", "parallel={mode: shard, offload: cpu}", "ema_decay=0.9")
    tree = json.loads(plan(*arguments, "--json"))
    # The average of the temperature is there too.
    assert tree["memory"]["host"] == 20 * (tree["memory"]["parameters"] - 1) + 4
    assert not {"parameters", "optimizer state", "averaged weights"} & tree["memory"]["kinds"].keys()
    assert tree["time"]["seconds"]["host link"][0] > 0
    assert " a node" in plan(*arguments)
    host, count = json.loads(plan(*arguments, "--storage-gbps", "2", "--json"))["host"], 8
    assert host["seconds_of_a_checkpoint"] == host["checkpoint"] / 2e9 + host["checkpoint"] / 1.9e9 / count
    # Weights and averages, half of the checkpoint, are read and written once, and hashed each time.
    assert host["seconds_to_join_its_weights"] == pytest.approx(host["checkpoint"] * (1 / 2e9 + 1 / 1.9e9))


def test_a_file_and_what_nodes_need(plan: Any, tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text("{batch_size: 64, accumulation: 2, data: {workers: 3}, checkpoint: {keep: 1}}")
    given = ("--gpus", "16", "--config", str(tmp_path / "my.yaml"), "--images-per-core", "100", "--storage-gbps", "2")
    tree = json.loads(plan("tiny", *given, "--set", "checkpoint.keep_every=45", "--json"))
    assert (tree["job"]["global_batch"], tree["job"]["accumulation"]) == (64, 2)
    host, whole = tree["host"], 12 * tree["memory"]["model_parameters"]
    assert host["batches_waiting_in_a_node"] == 8 * 3 * 2 * 4 * 3 * 32**2
    # One that is kept, one that is being written, and those of steps 45, 90, 135 and 180.
    assert (host["checkpoint"], host["storage"]) == (whole, 6 * whole)
    assert host["seconds_of_a_checkpoint"] == whole / 2e9 + whole / 1.9e9
    assert "seconds_to_join_its_weights" not in host
    assert host["decoding_cores_of_a_node"][0] == pytest.approx(32 / tree["time"]["seconds"]["step"][0] / 100)
    assert "decoding cores of a node" in plan("tiny", *given)


def test_parts_of_other_image_sizes_are_planned_as_runs_of_their_own(plan: Any) -> None:
    sizes = "schedule.resolutions=[{image_size: 16, share: 0.4}, {image_size: 64, steps: 20}]"
    given = ("tiny", "--gpus", "2", "--images-per-core", "100", "--set", "batch_size=64", "schedule.steps=100")
    tree = json.loads(plan(*given, sizes, "--json"))
    parts = tree["parts"]
    assert [(part["image_size"], part["steps"]) for part in parts] == [(16, 40), (64, 20), (32, 40)]
    for part in parts:
        alone = json.loads(plan(*given, f"model.options.vision.image_size={part['image_size']}", "--json"))
        assert len(alone["parts"]) == 1
        assert part["seconds"] == alone["time"]["seconds"]["step"]
        assert part["peak"] == alone["memory"]["peak"]
        assert part["flops"] == sum(sum(of_stage.values()) for of_stage in alone["time"]["flops"].values())
        assert part["gpu_hours"] == pytest.approx([part["steps"] / 100 * each for each in alone["time"]["gpu_hours"]])
        assert part["decoding_cores_of_a_node"] == alone["host"]["decoding_cores_of_a_node"]
    # Memory is that of the largest images, and the node decodes for the smallest.
    assert tree["memory"]["peak"] == parts[1]["peak"] == max(part["peak"] for part in parts)
    assert tree["time"]["gpu_hours"] == pytest.approx([sum(part["gpu_hours"][i] for part in parts) for i in (0, 1)])
    assert tree["host"]["decoding_cores_of_a_node"] == parts[0]["decoding_cores_of_a_node"]
    text = plan(*given, sizes)
    assert "Parts of the run" in text
    assert "GPU-hours for" not in text
    assert "Parts of the run" not in plan(*given)


def test_parts_of_a_run_whose_steps_the_data_tells(plan: Any) -> None:
    epochs = ("schedule={steps: null, epochs: 3, resolutions: [{image_size: 16, share: 0.4}]}",)
    parts = json.loads(plan("tiny", "--set", *epochs, "--json"))["parts"]
    assert [(part["image_size"], part["steps"], part["gpu_hours"]) for part in parts] == [
        (16, None, None),
        (32, None, None),
    ]


def test_what_does_not_fit_is_said(plan: Any) -> None:
    assert "misses by" in plan("tiny", "--gpu", "rtx-4090", "--set", "batch_size=131072")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "2"], "name a RECIPE"),
        (["tiny", "--set", "model.name=EVA02-CLIP-B-1"], "did you mean"),
        (["tiny", "--gpu", "a100"], "did you mean 'a100-40g' or 'a100-80g'"),
        (["eva02"], "unknown recipe"),
        (["tiny", "--set", "model.savings.recompute=blocks"], "model.savings.recompute='blocks'"),
        (["tiny", "--gpus", "0"], "gpus is 0; expected at least 1"),
        (["tiny", "--gpus", "64"], "less than one sample for each of 64 chunks"),
        (["tiny", "--caption-tokens", "-1"], "caption_tokens is -1; expected 2 to"),
        (["tiny", "--set", "schedule.resolutions=[{image_size: 30, steps: 2}]"], "image_size 30 isn't a multiple of"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str, capsys: Any) -> None:
    assert main(["plan", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--beside", "--images-per-core", "--storage-gbps"])
@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "x"])
def test_a_size_that_is_none_is_one_line(option: str, value: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["plan", "tiny", option, value])
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"argument {option}: must be a number above 0, got {value!r}" in line


def test_gpus_are_complete() -> None:
    for gpu in gpus().values():
        assert gpu.source
        assert 0 < gpu.network_gbps[0] <= gpu.network_gbps[1] <= 8 * gpu.node_gbps
        assert gpu.single_tflops < gpu.half_tflops
