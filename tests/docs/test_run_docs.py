"""The commands and snippets of the documentation run."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path

import pytest
from markdown_blocks import MARKS, read_blocks, read_spans
from run_docs import ROOT, draw_once, pages, run_page
from warm import environment, warm

sys.path.append(str(ROOT / "tests/packaging"))

from clean_room import make_room

FIRST = ("README.md", "docs/index.md", "docs/install.md", "docs/ops.md", "docs/coming-from.md")
PAGES = [
    pytest.param(path, id=str(path), marks=[] if str(path).startswith(FIRST) else pytest.mark.exhaustive)
    for path in pages()
    if path.parts[:2] != ("docs", "api")
]


@pytest.fixture
def clean(path: Path, request: pytest.FixtureRequest, made_once: Callable[..., Path]) -> Path:
    """The Python of an environment that holds a wheel, not the source tree; EVAKERNELS_DOCS_PYTHON names another.

    The packages are those of `make test`, for exhaustive pages those of `make test-all`.
    """
    if given := os.environ.get("EVAKERNELS_DOCS_PYTHON"):
        return Path(given)
    extra = "test" if str(path).startswith(FIRST) else "test-all"

    def make(folder: Path) -> None:
        folder.mkdir()
        make_room(folder, request.getfixturevalue("wheel"), extra)

    return made_once(f"documented-{extra}", make) / "env/bin/python"


@pytest.fixture(scope="module")
def hosts() -> Iterator[Callable[[Path], Path]]:
    """The folder of a Python's programs that have torch imported already."""
    with ExitStack() as stack:
        yield cache(lambda python: stack.enter_context(warm(python, environment(python, Path("/")))))


@pytest.fixture
def programs(path, clean, made_once, hosts):
    """What stands in front of the environment's own programs; of the first pages everything is started as users do."""
    shared = made_once("shared", draw_once)
    return (shared,) if str(path).startswith(FIRST) else (shared, hosts(clean))


@pytest.mark.parametrize("path", pages(), ids=str)
def test_marks_match_page(path: Path) -> None:
    read_blocks(ROOT / path, path, MARKS.get(str(path), []))
    read_spans(ROOT / path)


def test_marks_name_pages() -> None:
    assert set(MARKS) <= {str(path) for path in pages()}


@pytest.mark.slow
@pytest.mark.parametrize("path", PAGES)
def test_the_page_works(path: Path, clean: Path, programs: tuple[Path, ...], tmp_path: Path) -> None:
    outcome = run_page(path, clean, tmp_path, *programs)
    assert outcome.failures == [], "\n\n".join(outcome.failures)
