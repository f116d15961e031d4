"""Write this package as a repository of Hugging Face's kernels, https://github.com/huggingface/kernels.

    python tools/hub.py [--out build/hub/evakernels]

`build/<variant>/` is a copy of evakernels: `torch-universal` has the Triton kernels, the others also the compiled
library, if it was built, which runs with any later torch. `build.toml` and `torch-ext/` are the source from which
kernel-builder builds the Triton variant.
"""

import argparse
import base64
import hashlib
import json
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1].resolve()
PACKAGE = ROOT / "evakernels"
LIBRARY = "_ops.so"
STABLE_ABI = "211"  # torch 2.11, as TORCH_TARGET_VERSION in CMakeLists.txt
VERSION = 0  # the hub's major version; 0 is for software that may still change
NATIVE = b"evakernels_native"  # the compiled library's namespace of operators
BUILD = f"""\
[general]
name = "evakernels"
version = {VERSION}
edition = 5
license = "mit"
backends = ["cpu", "cuda"]

[torch-noarch]
"""


def sources() -> dict[str, bytes]:
    """Return the Python files of the package."""
    return {str(file.relative_to(PACKAGE)): file.read_bytes() for file in sorted(PACKAGE.rglob("*.py"))}


def variants() -> Iterator[tuple[str, dict[str, Any], dict[str, bytes]]]:
    """Yield name, backend and files of each variant."""
    yield "torch-universal", {"type": "cuda"}, sources()
    if not (PACKAGE / LIBRARY).exists():
        return
    native = {name: (PACKAGE / name).read_bytes() for name in (LIBRARY, "_build.json")}
    record = json.loads(native["_build.json"])
    host = f"{platform.machine()}-{platform.system().lower()}"
    stable = f"torch-stable-abi{STABLE_ABI}"
    yield f"{stable}-cpu-{host}", {"type": "cpu"}, sources() | native
    if record["cuda"]:
        archs = sorted({f"{int(code.partition('_')[2]) / 10}" for code in record["cuda_codes"]}, key=float)
        release = record["cuda_release"].replace(".", "")
        yield f"{stable}-cu{release}-{host}", {"type": "cuda", "archs": archs}, sources() | native


def rename_operators(name: str, files: dict[str, bytes]) -> str:
    """Give the compiled library a namespace of operators that no other build has, and return the package's name.

    The library holds its namespace as a string, which is replaced by one of the same length. The Python files take
    theirs from the name under which the package is imported.
    """
    digest = hashlib.sha256(name.encode())
    for path, content in files.items():
        digest.update(path.encode() + b"\0" + content)
    identity = f"ek_{digest.hexdigest()[:7]}"
    if LIBRARY in files:
        renamed = f"{identity}_native".encode()
        if len(renamed) != len(NATIVE) or NATIVE not in files[LIBRARY]:
            raise SystemExit(f"error: {LIBRARY} must hold {NATIVE.decode()}, of the length of {renamed.decode()}")
        files[LIBRARY] = files[LIBRARY].replace(NATIVE, renamed)
    return identity


def write(folder: Path, files: dict[str, bytes]) -> None:
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)


def write_repository(out: Path) -> None:
    """Write the repository in place of a former one."""
    if out.exists() and not (out / "build.toml").exists():
        raise SystemExit(f"error: --out must be a new folder or one that this script wrote, got {out}")
    shutil.rmtree(out, ignore_errors=True)
    write(out, {"build.toml": BUILD.encode()})
    write(out / "torch-ext" / "evakernels", sources())
    for name, backend, files in variants():
        metadata = {
            "name": "evakernels",
            "id": rename_operators(name, files),
            "version": VERSION,
            "license": "mit",
            "python-depends": [],
            "backend": backend,
            "digest": {
                "algorithm": "sha256",
                "files": {
                    path: base64.b64encode(hashlib.sha256(content).digest()).decode()
                    for path, content in sorted(files.items())
                },
            },
        }
        write(out / "build" / name, files | {"metadata.json": json.dumps(metadata, indent=2).encode()})
        print(out / "build" / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "build/hub/evakernels", help="default: %(default)s")
    write_repository(parser.parse_args().out)


if __name__ == "__main__":
    main()
