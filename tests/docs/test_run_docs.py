"""The commands and snippets of the documentation run, and the runner reports the broken ones."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

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

WORKS = """
```console
$ cat NAME
what it prints
$ cat \\
    there.txt
```

```python
from pathlib import Path
text = Path("there.txt").read_text()
```

```python
assert text == "before\\n"
```

```bash
evaclip train eva02-b-16 --set data.train='nowhere/*.tar' batch_size=64
nvidia-smi --no-such-option
true  # runs
```

```yaml
optim: {lr: 1e-3}
```

```text
a tree
```

`evaclip train tiny --dry-run` in running text, and `evaclip eval`.
"""
MARKS_OF_WORKS = [
    {"at": "cat NAME", "before": "echo before > there.txt\n", "with": {"NAME": "there.txt"}},
    {"at": "nvidia-smi", "parse": "needs data", "lines": ["eva02"]},
    {"at": "nvidia-smi", "no": "needs a GPU", "lines": ["nvidia-smi"]},
]
PARSE = {"at": "", "parse": "needs data"}


@pytest.fixture
def page(tmp_path: Path) -> Path:
    return tmp_path / "page.md"


def run(page: Path, text: str, *marks: dict[str, Any]) -> tuple[tuple[int, int, int, int], list[str]]:
    """Numbers of blocks and commands run, parsed, left out, and text; and the failures."""
    page.write_text(text, encoding="utf-8")
    (scratch := page.parent / "scratch").mkdir()
    outcome = run_page(page, Path(sys.executable), scratch, marks=marks)
    return (outcome.ran, outcome.parsed, outcome.left_out.total(), outcome.text), outcome.failures


def test_a_page_that_works(page: Path) -> None:
    assert run(page, WORKS, *MARKS_OF_WORKS) == ((5, 4, 1, 1), [])


@pytest.mark.parametrize(
    ("text", "marks", "message"),
    [
        ("```bash\nfalse\ntrue\n```", [], "page.md:1: exit 1"),
        ("```bash\nfalse | true\n```", [], "page.md:1: exit 1"),
        ("```python\n\nmissing\n```", [], "line 3, in <module>"),
        ("```python\nraise SystemExit(3)\n```", [], "exit 3"),
        ("```python\nimport run_docs\n```", [], "No module named 'run_docs'"),
        ("```bash\nevaclip train tiny --no-such\n```", [PARSE], "unrecognized arguments: --no-such"),
        ("```bash\nevaclip train tiny --set optim.nope=1\n```", [PARSE], "nope"),
        ("```bash\ntorchrun -m evaclip trian tiny\n```", [PARSE], "trian"),
        ("```bash\npip install 'evakernels[nope]'\n```", [PARSE], "no such extra: nope"),
        ("```bash\nmake nope\n```", [PARSE], "no target 'nope'"),
        ("```bash\nsomething else\n```", [PARSE], "no parser is known"),
        ("```yaml\noptim: {lr: fast}\n```", [], "optim.lr"),
        ("`evaclip doctor --nope`", [], "--nope"),
        ("```sh\ntrue\n```", [], "language 'sh'"),
        ("```bash\ntrue\n```", [{"at": "true", "no": "on Sundays"}], "'on Sundays'"),
        ("```bash\ntrue\n```", [{"at": "true", "perhaps": "needs data"}], "perhaps"),
        ("```bash\ntrue\n```", [{"at": "true", "with": {"gone": "a"}}], "'gone'"),
        ("```bash\ntrue\n```", [{"at": "true", "no": "needs a GPU", "lines": ["gone"]}], "'gone'"),
        ("```bash\ntrue\n```", [{"at": "false", "no": "needs a GPU"}], "got 0 blocks"),
        ("```bash\ntrue\n```\n```bash\ntrue\n```", [{"at": "true", "no": "needs a GPU"}], "got 2 blocks"),
    ],
)
def test_broken_page_is_reported(page: Path, text: str, marks: list[dict[str, Any]], message: str) -> None:
    _, failures = run(page, text + "\n", *marks)
    assert len(failures) == 1
    assert message in failures[0]


def test_the_emoji_shards_are_drawn_once_for_all_pages(page: Path, tmp_path: Path) -> None:
    programs, shared, calls = tmp_path / "bin", tmp_path / "shared", tmp_path / "calls"
    programs.mkdir()
    (programs / "python").symlink_to(sys.executable)
    (programs / "evaclip").write_text(
        f'#!/bin/sh\necho "$@" >> {calls}; mkdir -p data/emoji; echo 1 > data/emoji/a.tar\n'
    )
    (programs / "evaclip").chmod(0o755)
    draw_once(shared)
    page.write_text("```bash\nevaclip data emoji data/emoji\ncat data/emoji/a.tar\nevaclip train tiny\n```\n")
    for number in range(2):
        (scratch := tmp_path / str(number)).mkdir()
        assert run_page(page, programs / "python", scratch, shared).failures == []
    assert calls.read_text() == "data emoji data/emoji --size 32\ntrain tiny\ntrain tiny\n"


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
