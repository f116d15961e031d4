"""The stages of `make gpu-check` where there is no GPU: what they plan, and what they take for a failure."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_fakes import machine, registered, row, tanh_but_in_float64, tanh_operation

import benchmarks.cases  # noqa: F401  (registers the operations)
import evakernels.triton
from benchmarks.candidates import candidates
from benchmarks.gpu_check import child, kernels, tiny
from benchmarks.gpu_check.stage import Failure, Refusal, Settings
from benchmarks.gpu_check.stages import first_light, timing, why
from benchmarks.measure import Case
from benchmarks.operation import get_operation
from benchmarks.shapes import parse_shape
from evakernels import _native, backends

CPU = Settings(device="cpu", rehearsal=True)
needs_triton = pytest.mark.skipif(
    find_spec("triton") is None, reason="triton is not installed: its kernels' files hold the sizes"
)
ABSENT = ("pydantic", "ftfy", "open_clip", "flash_attn", "liger_kernel", "webdataset", "matplotlib")
BARE = f"""
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {ABSENT}:
            raise ModuleNotFoundError("No module named " + name, name=name)

sys.meta_path.insert(0, Absent())
"""
PLAN = """
import json
from benchmarks import cli as measuring
from benchmarks.gpu_check import child, cli
from benchmarks.gpu_check.stage import Settings

measuring._build_parser()
plan = child.plan(Settings(), [])
try:
    cli.main(["--help"])
finally:
    print(json.dumps(plan))
"""


def test_all_stages_are_planned_where_little_is_installed() -> None:
    call = [sys.executable, "-c", BARE + PLAN]
    result = subprocess.run(call, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert result.returncode == 0, result.stderr
    assert "exit status: 0 all passed" in result.stdout
    plan = json.loads(result.stdout.splitlines()[-1])
    assert plan["errors"] == {}
    assert {"first_light", "timing", "why"} <= set(plan["shares"])
    assert "tuning" not in plan["shares"]
    names = [(unit["stage"], unit["name"]) for unit in plan["units"]]
    assert len(set(names)) == len(names)
    assert ("timing", "op: rope_attention: bfloat16") in names
    assert ("timing", "dropin: timm/vit-b b64: bfloat16") in names
    assert sum(plan["shares"].values()) <= 540
    first = max(plan["units"], key=lambda unit: unit["value"])
    assert (first["stage"], first["name"]) == ("first_light", "cuda")


def test_make_installs_nothing() -> None:
    call = ["make", "--dry-run", "gpu-check", "PYTHON=python", "BUNDLE=none", "GPU_CHECK=--only why"]
    # The make that runs the tests would have this one tell that it is below another.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    result = subprocess.run(
        call, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2], env=environment
    )
    assert result.stdout.split() == ["python", "-m", "benchmarks.gpu_check", "--only", "why"]


@needs_triton
def test_tuning_is_planned_when_it_is_asked_for() -> None:
    plan = child.plan(Settings(), ["tuning"])
    assert set(evakernels.triton._FAMILY_OF) - {"siglip_backward", "lamb_step"} <= {
        unit["name"] for unit in plan["units"]
    }


def test_the_kernels_that_must_be_there_are_those_that_are_registered() -> None:
    """What this tree's library has for the CPU it has for GPUs too, but for what only either has."""
    cuda = set(kernels.cuda_ops())
    assert len(cuda) == len(kernels.cuda_ops())
    assert {"lamb_apply", "add_layer_norm_backward", "rope_attention_forward"} <= cuda
    assert cuda <= set(backends.ops())
    assert set(kernels.triton_ops()) <= set(backends.ops())
    assert not cuda & {"contrastive_forward", "siglip_forward"}


@needs_triton
@pytest.mark.parametrize("op", sorted({*kernels.cuda_ops(), *kernels.triton_ops()}))
def test_a_tiny_call_is_one_that_the_reference_serves(op: str) -> None:
    args = tiny.arguments(op, "cpu", torch.bfloat16)
    found = first_light.results(backends._implementations[op]["reference"].function, args)
    assert found
    assert all(values.isfinite().all() for values in found)


def serve(monkeypatch: pytest.MonkeyPatch, function: Callable[..., Any]) -> None:
    """Has `function` stand for the GPU kernel of gelu_forward."""
    monkeypatch.setattr(_native, "runs_gpu_kernels", lambda device: True)
    implementation = backends.Implementation("cpu", function, lambda *args: [], "cpu")
    monkeypatch.setitem(backends._implementations["gelu_forward"], "cpu", implementation)


def test_first_light_tells_right_from_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    reference = backends._implementations["gelu_forward"]["reference"].function
    serve(monkeypatch, reference)
    assert first_light.compare("gelu_forward", "cpu", CPU)["error"] < 0.01
    for wrong in (lambda *args: 1.1 * reference(*args), lambda *args: reference(*args) * float("nan")):
        serve(monkeypatch, wrong)
        with pytest.raises(Failure, match=r"the error is .*, at most 3e-02 is right"):
            first_light.compare("gelu_forward", "cpu", CPU)
    serve(monkeypatch, lambda *args: None)
    with pytest.raises(Failure, match="0 tensors came back where 1 were expected"):
        first_light.compare("gelu_forward", "cpu", CPU)


def test_a_kernel_that_is_missing_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Failure, match="no kernel: the library's kernels are those of the CPU"):
        first_light.compare("gelu_forward", "cpu", CPU)
    with pytest.raises(Failure, match=r"no compiled kernel of gelu_forward, .*, token_dropout_backward"):
        first_light._library(CPU)
    with pytest.raises(Failure, match=r"no kernel: gelu_forward has no triton implementation"):
        first_light.compare("gelu_forward", "triton", CPU)
    monkeypatch.setattr(_native, "LOADED", False)
    monkeypatch.setattr(_native, "REASON", "not built: _ops.so does not exist")
    with pytest.raises(Failure, match=r"the compiled library is not loaded: not built: _ops\.so does not exist"):
        first_light._library(CPU)


def test_triton_is_measured_on_a_gpu() -> None:
    found, absent = candidates(get_operation("layer_norm"), "cuda")
    named = {*absent, *(candidate.name for candidate in found)}
    assert {"evakernels cuda", "evakernels triton", "evakernels reference"} <= named
    assert "evakernels triton" not in candidates(get_operation("layer_norm"), "cpu")[1]


def rows_of(**changes: Any) -> dict[str, Any]:
    with registered(tanh_operation(**changes)) as op:
        case = Case(op, parse_shape("tiny b2"), "forward", torch.float32, torch.device("cpu"))
        return timing.rows_of(case, machine(), CPU, slow=False)


def test_rows_of_ours_that_are_wrong_are_a_failure_with_all_rows() -> None:
    assert [values["candidate"] for values in rows_of()["rows"]] == [
        "evakernels",
        "evakernels reference",
        "torch eager",
    ]
    with pytest.raises(Failure, match=r"evakernels: wrong: the outputs have an error") as raised:
        rows_of(ours=lambda x: 2 * x.tanh())
    assert len(raised.value.data["rows"]) == 3


def test_only_a_reference_may_lack_memory() -> None:
    out = "OutOfMemoryError: no room"
    assert timing._is_failure(row(failure=out))
    assert timing._is_failure(row(candidate="evakernels reference", failure="RuntimeError: no"))
    assert not timing._is_failure(row(candidate="evakernels reference", failure=out))
    assert not timing._is_failure(row(candidate="apex", kind="peer", failure="RuntimeError: no"))


def test_an_error_that_nobody_knows_is_told() -> None:
    notes = rows_of(eager=tanh_but_in_float64(torch.OutOfMemoryError()))["notes"]
    assert any("no error is known of evakernels, evakernels reference" in note for note in notes)


def test_a_baseline_that_is_not_installed_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "version_of", lambda package: None)
    with pytest.raises(Refusal, match="torch, the baseline, isn't installed"):
        rows_of()
    dropin = get_operation("dropin")
    for shape, package in (("open_clip/vit-b-32 b1", "open_clip_torch"), ("timm/vit-b b1", "timm")):
        case = Case(dropin, dropin.shape(shape), "forward", torch.float32, torch.device("cpu"))
        with pytest.raises(Refusal, match=f"{package}, the baseline, isn't installed"):
            timing.rows_of(case, machine(), CPU, slow=False)


NCU = """==PROF== Connected to process 4711
==PROF== Profiling "norm_forward" - 0: 0%....50%....100% - 2 passes
"ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value","Rule Name"
"0","norm_forward<BFloat16, 8>(Params)","GPU Speed Of Light Throughput","Duration","us","12.5",""
"0","norm_forward<BFloat16, 8>(Params)","Launch Statistics","Registers Per Thread","register/thread","64",""
"0","norm_forward<BFloat16, 8>(Params)","Launch Statistics","Waves Per SM","","3",""
"0","norm_forward<BFloat16, 8>(Params)","Occupancy","","","","TheoreticalOccupancy"
"1","norm_backward<BFloat16>(Params)","GPU Speed Of Light Throughput","Duration","nsecond","31,250",""
"1","norm_backward<BFloat16>(Params)","GPU Speed Of Light Throughput","Compute (SM) Throughput","%","n/a",""
"""
FAKE_NCU = """#!/bin/sh
case "$*" in *--metrics*) echo "==ERROR== no such metric" ;; *) cat {}/csv ;; esac
"""


def test_counters_are_those_of_the_slowest_kernel_first() -> None:
    slowest, other = why.parse(NCU)
    assert slowest == {"kernel": "norm_backward<BFloat16>(Params)", "nanoseconds": 31250.0, "compute_percent": None}
    assert other == {"kernel": "norm_forward<BFloat16, 8>(Params)", "nanoseconds": 12500.0, "registers": 64.0}
    assert why.parse("==ERROR== ERR_NVGPUCTRPERM") == []


def test_counters_that_this_gpu_does_not_know_are_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ncu = tmp_path / "ncu"
    ncu.write_text(FAKE_NCU.format(tmp_path))
    ncu.chmod(0o755)
    (tmp_path / "csv").write_text(NCU)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    norm = get_operation("layer_norm")
    found = why._counters(norm, "triton", Settings())
    assert (found["kernel"], found["kernels"], found["mode"]) == ("norm_backward<BFloat16>(Params)", 2, "training")
    (tmp_path / "csv").write_text("==ERROR== ERR_NVGPUCTRPERM - The user does not have permission")
    with pytest.raises(Refusal, match="ncu counted nothing: ==ERROR== ERR_NVGPUCTRPERM"):
        why._counters(norm, "triton", Settings())


def test_counters_that_can_not_be_had_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Refusal, match="ncu counts on a GPU"):
        why._counters(get_operation("gelu"), "cuda", CPU)
    monkeypatch.setattr(why.shutil, "which", lambda name: None)
    with pytest.raises(Refusal, match="ncu is not installed"):
        why._counters(get_operation("gelu"), "cuda", Settings())
