"""`evaclip plan` as it is typed."""

import json
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest

from evaclip.commands.main import main
from evaclip.plan.gpus import get_gpu, gpus
from evaclip.plan.job import Job
from evaclip.train.recipes import get_recipe


def plan(capsys: Any, *arguments: str) -> str:
    assert main(["plan", *arguments]) == 0
    text: str = capsys.readouterr().out
    return text


def test_shows_what_a_gpu_holds(capsys: Any) -> None:
    text = plan(capsys, "--model", "tiny", "--gpus", "2", "--global-batch", "64", "--parallel", "replicate")
    for word in ("parameters", "optimizer state", "tensors", "fits"):
        assert word in text


def test_json_holds_the_same(capsys: Any) -> None:
    arguments = ("--recipe", "eva02-b-16", "--gpus", "64", "--gpu", "h100-80g", "--json")
    memory = json.loads(plan(capsys, *arguments))["memory"]
    assert memory["model_parameters"] == 149_691_137
    assert memory["peak"] == sum(memory["kinds"].values())
    assert memory["of_the_gpu"] == get_gpu("h100-80g").memory


def test_an_average_is_counted(capsys: Any) -> None:
    arguments = ("--model", "tiny", "--parallel", "replicate", "--json")
    without, memory = (json.loads(plan(capsys, *arguments, *more))["memory"] for more in ([], ["--ema"]))
    assert memory["kinds"]["averaged weights"] == memory["peak"] - without["peak"] == 4 * memory["parameters"]
    averaged = replace(get_recipe("tiny"), ema_decay=0.9)
    with patch("evaclip.plan.job.get_recipe", lambda name: averaged):
        assert Job.of_recipe("tiny").ema


@pytest.mark.parametrize(("more", "of_each"), [([], 16), (["--ema"], 20)])
def test_offload_is_in_host_memory(capsys: Any, more: list[str], of_each: int) -> None:
    arguments = ("--model", "tiny", "--gpus", "8", "--offload", "cpu", "--parallel", "shard", *more)
    tree = json.loads(plan(capsys, *arguments, "--json"))
    assert tree["memory"]["host"] == of_each * (tree["memory"]["parameters"] - 1)
    assert not {"parameters", "optimizer state", "averaged weights"} & tree["memory"]["kinds"].keys()
    assert tree["time"]["seconds"]["host link"][0] > 0
    assert " a node" in plan(capsys, *arguments)


def test_what_does_not_fit_is_said(capsys: Any) -> None:
    text = plan(capsys, "--model", "tiny", "--gpu", "rtx-4090", "--global-batch", "131072", "--recompute", "none")
    assert "misses by" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "2"], "name a --model or a --recipe"),
        (["--model", "EVA02-CLIP-B-1"], "did you mean"),
        (["--model", "tiny", "--gpu", "a100"], "did you mean 'a100-40g' or 'a100-80g'"),
        (["--recipe", "eva02"], "unknown recipe"),
        (["--model", "tiny", "--recompute", "blocks"], "did you mean 'block'"),
        (["--model", "tiny", "--samples", "-5"], "samples is -5; expected at least 1"),
        (["--model", "tiny", "--gpus", "0"], "gpus is 0; expected at least 1"),
        (["--model", "tiny", "--parallel", "hybrid", "--shard-size", "0"], "shard_size is 0; expected at least 1"),
        (["--model", "tiny", "--caption-tokens", "-1"], "caption_tokens is -1; expected 2 to"),
        (["--model", "tiny", "--plot", "nowhere/x.png"], "cannot write nowhere/x.png: there is no folder 'nowhere'"),
        (["--model", "tiny", "--plot", "x.doc"], "'x.doc' can't be written; its name must end in"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str, capsys: Any) -> None:
    assert main(["plan", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_gpus_are_complete() -> None:
    for gpu in gpus().values():
        assert gpu.source
        assert 0 < gpu.network_gbps[0] <= gpu.network_gbps[1] <= 8 * gpu.node_gbps
        assert gpu.single_tflops < gpu.half_tflops
