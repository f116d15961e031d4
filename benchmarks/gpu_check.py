"""Check and measure a GPU: `python -m benchmarks.gpu_check`, on a machine without a network if it must be.

Each step is a command in its own process with its own time limit: a crash or a hang costs that step alone. Each step
appends a line to OUT/results.jsonl; another call runs the steps without a line. Only the standard library is imported
here: the steps load torch and the kernels.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BUNDLE = ROOT / "build/gpu-bundle"
PASSED, FAILED, WRONG_INPUT, OPEN, NO_GPU = range(5)
"""Exit statuses."""

_TESTS = ["rope_attention", "layer_norm", "on_gpu", "swiglu", "token_dropout", "gelu", "adamw", "lamb"]
_TESTS += ["stochastic_rounding", "packed_attention", "contrastive", "native_optimizers", "optimizers", "norm_widths"]
_OPS = ["rope_attention", "causal_attention", "packed_attention", "layer_norm", "add_layer_norm", "layer_norm_add"]
_OPS += ["swiglu", "token_dropout", "gelu", "clip_loss", "siglip_loss", "lamb_step", "adamw_step"]
_DRIVEN = ("layer_norm", "rope_attention", "swiglu", "token_dropout", "gelu")
_SANITIZERS = ("memcheck", "synccheck", "racecheck", "initcheck")
PACKAGES = {
    **dict.fromkeys(("torch", "triton"), ""),
    **{name: name for name in ("numpy", "pytest", "rich", "psutil", "pydantic", "regex", "tokenizers", "safetensors")},
    "xdist": "pytest-xdist",
    "yaml": "pyyaml",
    "PIL": "pillow",
    "ftfy": "ftfy",
}
"""Distributions of the modules that the check imports; the bundle has all of them except torch and Triton."""
_OF_MODELS = ("open_clip", "timm", "torchvision")
"""Modules of the models that are compared; torchvision must fit the machine's torch."""
_SHORTEST = 20.0
"""Seconds: no step begins if the budget has less left."""
_CSRC = (".h", ".cpp", ".cu", ".cuh")


@dataclass(frozen=True)
class Step:
    """A command, its time limit in seconds, and why it can't run here (empty if it can)."""

    name: str
    command: tuple[str, ...]
    seconds: float
    missing: str = ""


def list_steps(device: str, out: Path) -> list[Step]:
    """Return all steps, the most valuable first: proofs, then times, then the search for launch configurations."""
    python = sys.executable
    # A test that hangs or breaks the GPU's context ends its worker; pytest-xdist goes on with another worker.
    pytest = [python, "-m", "pytest", "-q", "-rfE", "-p", "no:cacheprovider", "--device", device, "-n", "2"]
    pytest += ["--max-worker-restart", "50", "--test-seconds", "60"]
    folder = ROOT / "tests/evakernels"
    others = sorted(path.stem for path in (ROOT / "evakernels/reference").glob("[a-z]*.py"))
    tested = [name for name in dict.fromkeys((*_TESTS, *others)) if (folder / f"test_{name}.py").exists()]
    steps = [Step("first light", (*pytest, str(folder / "test_first_light.py")), 300)]
    for backend in (device, "triton"):
        for name in tested:
            command = (*pytest, "--backend", backend, str(folder / f"test_{name}.py"))
            steps.append(Step(f"tests of {name} on {backend}", command, 240))

    absent = [name for name in _OF_MODELS if find_spec(name) is None]

    def measure(name: str, seconds: float, verb: str, *options: str) -> Step:
        file = out / f"{name.replace(' ', '-')}.json"
        command = (python, "-m", "benchmarks", verb, *options, "--device", device, "--check", "--json", str(file))
        missing = f"not installed: {', '.join(absent)}" if verb == "model" and absent else ""
        return Step(name, command, seconds, missing)

    quick = ("--first", "2", "--dtype", "bfloat16")
    steps += [measure(f"times of {op}", 240, "op", op, *quick) for op in _OPS]
    steps += [measure("times of models", 600, "model"), measure("times of drop-in models", 600, "model", "dropin")]
    steps += list(_sanitizer_steps(device))
    steps += [measure(f"all shapes of {op}", 600, "op", op, "--dtype", "bfloat16", "--dtype", "float32") for op in _OPS]
    steps.append(Step("tuning", (python, "-m", "evakernels.tuning", "run"), 1800))
    return steps


def run_step(step: Step, out: Path, seconds: float, environment: dict[str, str]) -> dict[str, Any]:
    """Run a step for at most `seconds`.

    Returns:
        `step`, `status` ("passed", "failed", "timed out", "died of SIGNAL", "missing"), `seconds`, the last line of the
        output as `summary`, and the `failures` that pytest named.
    """
    if step.missing:
        return {"step": step.name, "status": "missing", "seconds": 0.0, "summary": step.missing, "failures": []}
    log = out / f"{step.name.replace(' ', '-')}.log"
    began, limit = time.monotonic(), min(seconds, step.seconds)
    with log.open("wb") as output:
        process = subprocess.Popen(
            step.command, stdout=output, stderr=output, cwd=ROOT, env=environment, start_new_session=True
        )
        try:
            code = process.wait(timeout=limit)
            status = "passed" if code == 0 else "failed" if code > 0 else f"died of {signal.Signals(-code).name}"
        except subprocess.TimeoutExpired:
            status = "timed out"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            with suppress(subprocess.TimeoutExpired):  # a process that hangs in the driver can't be killed
                process.wait(timeout=5)
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    failures = [line for line in lines if line.startswith(("FAILED ", "ERROR "))]
    summary = lines[-1][:300] if lines else ""
    took = round(time.monotonic() - began, 1)
    return {"step": step.name, "status": status, "seconds": took, "summary": summary, "failures": failures[:50]}


def run_steps(
    steps: Sequence[Step], out: Path, budget: float, environment: dict[str, str], report: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Run the steps without a result until `budget` seconds are over, and return all results.

    A step that the budget cuts short stays open. So does one that Ctrl-C or SIGTERM ends.
    """
    file = out / "results.jsonl"
    results = read_results(file)
    finished, end = {result["step"] for result in results}, time.monotonic() + budget
    try:
        for step in steps:
            left = end - time.monotonic()
            if step.name in finished:
                continue
            if left < _SHORTEST:
                break
            report(f"{step.name} ...")
            result = run_step(step, out, left, environment)
            if result["status"] == "timed out" and left < step.seconds:
                break
            with file.open("a", encoding="utf-8") as stream:
                stream.write("\n" + json.dumps(result))  # a full disk damages no line but this one
            results.append(result)
            report(describe(result))
    except KeyboardInterrupt:
        report("interrupted")
    return results


def read_results(file: Path) -> list[dict[str, Any]]:
    """Return the results in a file; a last line that a full disk cut short is left out."""
    results = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        with suppress(ValueError):
            results.append(json.loads(line))
    return results


def describe(result: dict[str, Any]) -> str:
    """Return the lines that the terminal shows for a result."""
    lines = [f"{result['status']:<10} {result['seconds']:6.0f} s  {result['step']}: {result['summary']}"]
    return "\n".join([*lines, *(f"    {failure[:200]}" for failure in result["failures"][:10])])


def install(bundle: Path, packages: Path) -> None:
    """Copy the bundle's libraries into this checkout, and unpack missing packages into a folder for PYTHONPATH.

    Raises:
        SystemExit: the bundle is for other kernels or another Python.
    """
    expected = (bundle / "csrc.sha256").read_text().strip()
    if expected != hash_csrc(ROOT):
        sys.exit("error: csrc has changed since the bundle was made: run `make gpu-bundle` again")
    tag = f"cpython-{sys.version_info.major}{sys.version_info.minor}"
    if not any(tag in path.name for path in (bundle / "libraries").iterdir()):
        sys.exit(f"error: the bundle has no library for {tag}: run `make gpu-bundle GPU_PYTHON=...` again")
    for library in (bundle / "libraries").iterdir():
        shutil.copy(library, ROOT / "evakernels")
    shutil.rmtree(packages, ignore_errors=True)
    installed = {re.sub("[-_.]+", "_", found.name).lower() for found in metadata.distributions()}
    for wheel in (bundle / "wheels").glob("*.whl"):
        if wheel.name.partition("-")[0].lower() not in installed:
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(packages)


def hash_csrc(root: Path) -> str:
    """Return the SHA-256 of the sources of the compiled libraries."""
    digest = hashlib.sha256()
    for path in [root / "CMakeLists.txt", *sorted(p for p in (root / "csrc").rglob("*") if p.suffix in _CSRC)]:
        digest.update(f"{path.relative_to(root).as_posix()}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def find_machine(environment: dict[str, str]) -> dict[str, Any]:
    """Return the output of `evaclip doctor --json`.

    Raises:
        SystemExit: it can't run.
    """
    command = [sys.executable, "-m", "evaclip", "doctor", "--json"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    try:
        machine: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        sys.exit(f"error: 'evaclip doctor' failed: {done.stderr.strip()[-500:]}")
    return machine


def main(argv: Sequence[str] | None = None) -> int:
    """Return 0 if all passed, 1 if a step failed, 2 for wrong input, 3 if steps are open, 4 without a GPU."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check",
        description="Check and measure this machine's GPU; another call runs the steps that are open.",
        epilog="exit status: 0 all passed, 1 a step failed, 2 wrong input, 3 steps are open, 4 no GPU",
    )
    parser.add_argument("--out", type=Path, default=ROOT / "build/gpu-check", help="folder of results and logs")
    parser.add_argument("--budget", type=float, default=540, metavar="SECONDS", help="default: %(default)g")
    parser.add_argument("--only", action="append", default=[], metavar="TEXT", help="steps with this in their name")
    parser.add_argument("--bundle", type=Path, default=BUNDLE, metavar="FOLDER", help="default: build/gpu-bundle")
    parser.add_argument("--device", default="cuda", help="cpu rehearses the check on kernels that serve the CPU")
    args = parser.parse_args(argv)
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    packages = ROOT / "build/gpu-check-packages"
    if args.bundle.is_dir():
        install(args.bundle, packages)
    environment = os.environ | {"PYTHONFAULTHANDLER": "1", "COLUMNS": "160"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), str(packages), os.environ.get("PYTHONPATH")]))
    sys.path.append(str(packages))
    if lacking := [name for name in PACKAGES if find_spec(name) is None]:
        parser.error(f"missing packages: {', '.join(lacking)}; install them, or use a bundle of `make gpu-bundle`")
    steps = list_steps(args.device, out)
    if args.only:
        steps = [step for step in steps if any(text in step.name for text in args.only)]
    if not steps:
        parser.error(f"--only must be a part of a step's name, got {', '.join(map(repr, args.only))}")
    machine = find_machine(environment)
    if args.device == "cuda" and not machine["cuda"]["available"]:
        print(f"error: there is no usable GPU: {machine['cuda']['error'] or 'torch.cuda.is_available() is False'}")
        return NO_GPU
    (out / "machine.json").write_text(json.dumps(machine, indent=1))
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    results = run_steps(steps, out, args.budget, environment, partial(print, flush=True))
    return conclude(steps, results, out)


def conclude(steps: Sequence[Step], results: Sequence[dict[str, Any]], out: Path) -> int:
    """Print failed and open steps, and return the exit status."""
    last = {result["step"]: result for result in results}
    bad = [step.name for step in steps if last.get(step.name, {}).get("status") not in (None, "passed", "missing")]
    left = [step.name for step in steps if step.name not in last]
    print(f"{len(steps) - len(bad) - len(left)} of {len(steps)} steps passed or lack a program; results are in {out}")
    if bad:
        print(f"failed: {', '.join(bad)}")
    if left:
        print(f"open, for another call: {', '.join(left[:5])}{' ...' if len(left) > 5 else ''}")
    return FAILED if bad else OPEN if left else PASSED


def _sanitizer_steps(device: str) -> Iterator[Step]:
    """The launchers on buffers without spare memory, alone and under NVIDIA's sanitizers."""
    program = sys.executable, str(ROOT / "tests/cuda/drive.py")
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin"])
    sanitizer = shutil.which("compute-sanitizer", path=path)
    for tool in ("", *_SANITIZERS):
        for family in _DRIVEN:
            prefix = (str(sanitizer), "--tool", tool, "--error-exitcode", "42") if tool else ()
            missing = "no GPU" if device == "cpu" else "no compute-sanitizer" if tool and sanitizer is None else ""
            yield Step(f"{tool or 'launchers'} of {family}", (*prefix, *program, family), 120, missing)


if __name__ == "__main__":
    raise SystemExit(main())
