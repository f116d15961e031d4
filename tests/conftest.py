"""What tests of all folders share, and in which order they run."""

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser

ROOT = Path(__file__).parents[1]


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Long tests come first: where tests run side by side, no process is left alone with one at the end.

    Raises:
        UsageError: pytest-xdist doesn't keep groups together, so that each process would make what they share.
    """
    grouped = [item for item in items if item.get_closest_marker("xdist_group")]
    if config.getoption("loadgroup", False) and not all("@" in item.nodeid for item in grouped):
        raise pytest.UsageError(
            f"pytest-xdist can't group the tests of pytest {pytest.__version__}; install pytest<9.2"
        )
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], object]], Path]:
    """`made_once(name, make)` is a folder that `make` filled, in the first of all processes that ask for it."""
    top = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        top = top.parent

    def folder_of(name: str, make: Callable[[Path], object]) -> Path:
        folder, made = top / name, top / f"{name}.made"
        with (top / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not made.exists():
                make(folder)
                made.touch()
        return folder

    return folder_of


@pytest.fixture(scope="session")
def wheel(made_once: Callable[..., Path]) -> Path:
    """What `make wheel` builds. What was compiled in the project's folder is not compiled again."""

    def make(folder: Path) -> None:
        command = [sys.executable, ROOT / "tools/build_wheel.py", "--out", folder]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-5000:]

    (built,) = made_once("wheel", make).glob("*.whl")
    return built


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    """A real one that asks nobody for anything by itself. Without one in PATH the test is skipped."""
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("no browser: chromium, chromium-browser or google-chrome isn't in PATH")
    from playwright.sync_api import sync_playwright

    quiet = ("background-networking", "component-update", "gpu", "quic", "sync")
    with sync_playwright() as playwright:
        options = ["--no-first-run", *(f"--disable-{name}" for name in quiet)]
        found = playwright.chromium.launch(executable_path=program, args=options, timeout=60_000)
        yield found
        found.close()
