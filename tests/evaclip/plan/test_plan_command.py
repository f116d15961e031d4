"""`evaclip plan` on the command line."""

import json
from pathlib import Path
from typing import Any

import pytest

from evaclip.commands.main import main


@pytest.fixture
def plan(capsys: Any) -> Any:
    """`plan(*arguments)` is what `evaclip plan` prints."""

    def run(*arguments: str) -> str:
        assert main(["plan", *arguments]) == 0
        return str(capsys.readouterr().out)

    return run


SMALL = ("--set", "batch_size=64", 'model.options={"vision": {"layers": 2}, "text": {"layers": 1}}')


def test_plan_prints_memory_and_flops(plan: Any) -> None:
    text = plan("tiny", "--gpus", "2", *SMALL)
    for word in ("parameters", "optimizer state", "fits", "FLOPs", "all-reduce", "GPU-hours"):
        assert word in text
    assert "--layouts" in plan("tiny", "--gpu", "rtx-4090", "--set", "batch_size=131072")


def test_plan_json_adds_up(plan: Any) -> None:
    tree = json.loads(plan("tiny", *SMALL, "--gpu", "h100-80g", "--non-tensor-gib", "3.5", "--mfu", "0.5", "--json"))
    (part,) = tree["parts"]
    assert part["peak"] == sum(part["kinds"].values())
    assert tree["room"] == tree["of_the_gpu"] - 3.5 * 2**30 == int(79.1 * 2**30) - 3.5 * 2**30
    assert part["seconds"] == pytest.approx(sum(part["flops"].values()) / 67e12 / 0.5)
    assert part["gpu_hours"] == pytest.approx(part["steps"] * part["seconds"] / 3600)


def test_plan_bounds_communication_by_links(plan: Any) -> None:
    given = ("tiny", "--gpus", "16", "--gpu", "h100-80g", *SMALL, "parallel.mode=shard")
    tree = json.loads(plan(*given, "--json"))
    part, hybrid = tree["parts"][0], tree["hybrid"]
    for each in (part, hybrid):
        links = each["links"]
        assert sum(links.values()) == sum(each["received"].values())
        assert each["link_seconds"] == pytest.approx(
            max(links["from the node"] / 450e9, links["from other nodes"] / 50e9)
        )
    assert part["links"]["from other nodes"] == pytest.approx(sum(part["received"].values()) / 8, rel=1e-3)
    # Between nodes only the mean over replicas: an all-reduce of a node's shard.
    assert (hybrid["mode"], hybrid["shard_size"]) == ("hybrid", 8)
    assert hybrid["links"]["from other nodes"] == pytest.approx(4 * hybrid["parameters"], rel=0.1)
    assert hybrid["link_seconds"] < part["link_seconds"]
    text = plan(*given)
    assert "communicates less" in text
    assert "GB at 50 GB/s" in text
    for other in (
        ("--gpus", "8"),
        ("--gpus", "12"),
        ("--gpus", "16", "--gpu", "a100-40g", "--non-tensor-gib", "39.499"),
    ):
        assert json.loads(plan("tiny", *other, *SMALL, "parallel.mode=shard", "--json"))["hybrid"] is None


def test_plan_reads_config_file(plan: Any, tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text("{batch_size: 64, accumulation_steps: 2}")
    tree = json.loads(plan("tiny", "--gpus", "16", "--config", str(tmp_path / "my.yaml"), "--json"))
    (part,) = tree["parts"]
    assert (part["accumulation"], part["micro_batch"]) == (2, 2)


def test_plan_needs_no_tokenizer(plan: Any) -> None:
    options = 'model.options={"text": {"hf_tokenizer_name": "/no/such/folder"}}'
    assert "GPU-hours" in plan("tiny", "--gpus", "2", "--set", "batch_size=64", options)


def test_plan_of_native_model_has_its_image_size(plan: Any) -> None:
    options = "model.options={preprocess: {max_patches: 9}}"
    assert "GPU-hours" in plan("tiny", "--gpus", "2", "--set", "batch_size=64", options)


def test_plan_of_several_image_sizes(plan: Any) -> None:
    sizes = "schedule.resolutions=[{image_size: 16, fraction: 0.4}, {image_size: 64, steps: 20}]"
    given = ("tiny", "--set", "batch_size=64", "schedule.steps=100")
    parts = json.loads(plan(*given, sizes, "--json"))["parts"]
    assert [(part["image_size"], part["steps"]) for part in parts] == [(16, 40), (64, 20), (32, 40)]
    assert parts[0]["peak"] < parts[2]["peak"] < parts[1]["peak"]
    (alone,) = json.loads(plan(*given, "model.options.vision.image_size=64", "--json"))["parts"]
    assert (parts[1]["flops"], parts[1]["peak"]) == (alone["flops"], alone["peak"])
    epochs = "schedule={steps: null, epochs: 3, resolutions: [{image_size: 16, fraction: 0.4}]}"
    parts = json.loads(plan("tiny", "--set", epochs, "--json"))["parts"]
    assert [(part["image_size"], part["gpu_hours"]) for part in parts] == [(16, None), (32, None)]


@pytest.mark.exhaustive
def test_layouts_fit_with_few_micro_batches(plan: Any) -> None:
    """The GPU has room for one copy of the model's state, and not for the activations of 1,024 samples."""
    given = ("tiny", "--gpus", "2", "--set", "batch_size=2048", "--gpu", "rtx-4090", "--layouts", "--json")
    tree = json.loads(plan(*given, "--non-tensor-gib", "23.1"))
    layouts = tree["layouts"]
    assert {(each["mode"], each["recompute"]) for each in layouts} == {
        (mode, recompute) for mode in ("replicate", "shard") for recompute in ("none", "activations", "block")
    }
    assert all(each["peak"] <= tree["room"] for each in layouts if each["fits"])
    assert {each["accumulation"] > 1 for each in layouts if each["fits"]} == {True, False}
    assert "Layouts" in plan(*given[:-1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "2"], "name a RECIPE"),
        (["tiny", "--gpu", "a100"], "did you mean 'a100-40g' or 'a100-80g'"),
        (["eva02"], "unknown recipe"),
        (["tiny", "--gpus", "64"], "64 micro-batches"),
        (["tiny", "--mfu", "0"], "--mfu must be"),
        (["tiny", "--caption-tokens", "-1"], "--caption-tokens must be 2 to"),
        (["tiny", "--set", "schedule.resolutions=[{image_size: 30, steps: 2}]"], "image_size 30"),
        (["finetune-eva02-b-in1k", "--set", "task.classes=null"], "task.classes"),
        (["finetune-eva02-b-in1k", "--caption-tokens", "15"], "--caption-tokens must be left out"),
    ],
)
def test_plan_mistake_is_one_line(arguments: list[str], message: str, capsys: Any) -> None:
    assert main(["plan", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("size", ["0", "nan", "inf"])
def test_non_tensor_gib_must_be_positive(size: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["plan", "tiny", "--non-tensor-gib", size])
    assert caught.value.code == 2
    assert "--non-tensor-gib" in capsys.readouterr().err
