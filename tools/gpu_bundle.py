"""Pack files for `make gpu-check` on an offline machine.

    python tools/gpu_bundle.py [--python 3.12] [--arch 90 ...] [--limit 60] [--out build/gpu-bundle]

libraries/   _ops.so, _C.*.so and _build.json for that machine's Python and GPUs
wheels/      required packages, and as many peers as fit
csrc.sha256  hash of the sources that were compiled

Neither torch nor Triton is packed. The environment of the build stays in build/gpu-bundle-tools.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import build_wheel
import matrix
from requirements import requirements

sys.path.insert(0, str(build_wheel.ROOT))
from benchmarks.gpu_check import PACKAGES, hash_csrc

ROOT = build_wheel.ROOT
MIB = 1 << 20
NEEDED = tuple(filter(None, PACKAGES.values()))
"""Without these the check can't run."""
ALONE = ("tokenizers",)
"""Packed without their requirements: tokenizers requires huggingface_hub only to download."""
PEERS = ("open_clip_torch", "liger-kernel", "inf-cl", "xformers", "cut-cross-entropy")
"""In the order of their value. They require torch, which the machine has."""


def pack_libraries(python: Path, archs: Sequence[str], target: Path) -> None:
    """Compile the libraries."""
    os.environ["EVAKERNELS_CUDA_ARCHS"] = ",".join(archs)
    temporary = target / "wheel"
    temporary.mkdir()
    built = build_wheel.build(python, temporary / "plain", cuda=True)
    with zipfile.ZipFile(built) as archive:
        for name in archive.namelist():
            if re.fullmatch(r"evakernels/(_ops\.so|_C\..*\.so|_build\.json)", name):
                archive.extract(name, temporary)
    (temporary / "evakernels").rename(target / "libraries")
    shutil.rmtree(temporary)


def pack_wheels(python: Path, version: str, target: Path, room: int) -> None:
    """Download the needed packages, and those peers that fit into `room` bytes."""
    known = {re.split(r"[<>=!~\[]", text)[0]: text for text in requirements("test")}
    platforms = [f"manylinux_2_{minor}_x86_64" for minor in range(17, 40)] + ["manylinux2014_x86_64"]
    options = ["--quiet", "--only-binary", ":all:", "--python-version", version, "--implementation", "cp"]
    options += ["--constraint", str(build_wheel.CONSTRAINTS)]
    options += [option for name in platforms for option in ("--platform", name)]
    folder = target / "download"
    (target / "wheels").mkdir()
    # Together: each distribution comes in one version.
    for names in ([name for name in NEEDED if name not in ALONE], *([name] for name in (*ALONE, *PEERS))):
        depth = ["--no-deps"] if len(names) == 1 else []
        wanted = [known.get(name, name) for name in names]
        command = [python, "-m", "pip", "download", *options, *depth, "--dest", folder, *wanted]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        size = size_of(folder)
        problem = matrix.last_line(done.stderr) if done.returncode else ""
        if not problem and size > room:
            problem = f"{size / MIB:.1f} MiB, and {max(room, 0) / MIB:.1f} are left"
        if problem and names[0] in NEEDED:
            raise SystemExit(f"error: the check needs {', '.join(names)}: {problem}")
        if problem:
            print(f"left out {names[0]}: {problem}")
        else:
            room -= size
            for path in folder.iterdir():
                path.replace(target / "wheels" / path.name)
        shutil.rmtree(folder, ignore_errors=True)


def size_of(folder: Path) -> int:
    """Return the bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def build_python(interpreter: str, version: str) -> Path:
    """Return a Python of this version that can build: the interpreter, or a new environment's."""
    folder = ROOT / "build/gpu-bundle-tools" / version
    for python in (Path(interpreter).absolute(), folder / "bin/python"):
        if python.exists() and build_wheel.has_modules(python, *build_wheel.BUILD_MODULES):
            return python
    shutil.rmtree(folder, ignore_errors=True)
    return build_wheel.make_environment(interpreter, folder)


def require_nvcc(python: Path, archs: Sequence[str]) -> None:
    """Exit with setup.py's message if there is no nvcc, or it doesn't know a GPU."""
    chosen = {"EVAKERNELS_NATIVE": "on", "EVAKERNELS_CUDA": "on", "EVAKERNELS_CUDA_ARCHS": ",".join(archs)}
    command = [python, "setup.py", "--quiet", "--version"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | chosen, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(matrix.last_line(done.stderr))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default="3.12", help="version, found on PATH, or path (default: 3.12)")
    parser.add_argument("--arch", nargs="+", default=["90"], help="compute capabilities times ten (default: 90)")
    parser.add_argument("--limit", type=float, default=60, help="size in MiB (default: 60)")
    parser.add_argument("--out", type=Path, default=ROOT / "build/gpu-bundle", help="default: build/gpu-bundle")
    args = parser.parse_args()
    archs = [arch if "-" in arch else f"{arch}-real" for arch in args.arch]
    version, interpreter = matrix.find_python(shutil.which(f"python{args.python}") or args.python)
    python = build_python(interpreter, version)
    require_nvcc(python, archs)
    out = args.out.absolute()
    target = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    try:
        pack_libraries(python, archs, target)
        pack_wheels(python, version, target, int(args.limit * MIB) - size_of(target))
        (target / "csrc.sha256").write_text(hash_csrc(ROOT) + "\n")
        shutil.rmtree(out, ignore_errors=True)
        target.rename(out)
    finally:
        shutil.rmtree(target, ignore_errors=True)
    for path in sorted(path for path in out.rglob("*") if path.is_file()):
        print(f"{path.stat().st_size / MIB:8.2f} MiB  {path.relative_to(out)}")
    print(f"{size_of(out) / MIB:8.2f} MiB  {out}")


if __name__ == "__main__":
    main()
