"""Reads runs that tests have trained."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evaclip.runs.log import read_log
from evaclip.weights.files import read_tensors


def checkpoint(folder: Path, step: int = 6) -> Path:
    return folder / f"checkpoints/step_{step:08d}"


def steps(folder: Path) -> list[int]:
    """Steps of the checkpoints of a run."""
    return sorted(int(path.name[5:]) for path in (folder / "checkpoints").glob("step_*"))


def weights(folder: Path, step: int = 6, file: str = "model") -> dict[str, Tensor]:
    return read_tensors(checkpoint(folder, step) / f"{file}.safetensors")


def records(folder: Path) -> list[dict[str, Any]]:
    """Logged steps of a run."""
    return [record for record in read_log(folder / "log.jsonl") if "loss" in record]


def column(folder: Path, key: str) -> list[Any]:
    """One number of all logged steps of a run."""
    return [record[key] for record in records(folder)]


def evaluations(folder: Path) -> dict[int, dict[str, Any]]:
    """Metrics of the evaluations of a run by step."""
    return {record["step"]: record["eval"] for record in read_log(folder / "log.jsonl") if "eval" in record}


def assert_equal(found: Any, expected: Any, path: str = "") -> None:
    """Both trees have equal keys and values, and bit-equal tensors."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), path
        for key in expected.keys() - {"seconds"}:
            assert_equal(found[key], expected[key], f"{path}.{key}")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), path
        for i, (left, right) in enumerate(zip(found, expected, strict=True)):
            assert_equal(left, right, f"{path}[{i}]")
    elif isinstance(expected, Tensor):
        assert torch.equal(found, expected), path
    else:
        assert found == expected, path
