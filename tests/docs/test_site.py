"""The documentation's site: it builds in strict mode, and nothing is missing from it."""

import re
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMPAT = tuple(f"evakernels.compat.{name}" for name in ("apex", "flash_attn", "xformers"))
PUBLIC = ("evakernels", "evakernels.image", "evakernels.nn", "evakernels.optim", *COMPAT, "evaclip", "evaclip.data")

pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.xdist_group("site"),
    pytest.mark.skipif(
        find_spec("mkdocs") is None or find_spec("mkdocstrings") is None,
        reason="mkdocs isn't installed: pip install '.[docs]'",
    ),
]


def build(folder: Path, config: Path = ROOT / "mkdocs.yml") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", config, "--site-dir", folder],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    built = build(folder)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


def test_site_pages_load_nothing_from_elsewhere(site: Path) -> None:
    pages = {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}
    pages |= {"contributing.md", "changelog.md"}
    for page in pages:
        built = site / (page if page == "index.md" else page.removesuffix(".md") + "/index.md")
        text = built.with_suffix(".html").read_text("utf-8")
        loaded = re.findall(r"<(?:script|img)[^>]+src=\"?(https?:[^\" >]+)", text)
        loaded += re.findall(r"<link[^>]+rel=\"?(?:stylesheet|preload)\"?[^>]*href=\"?(https?:[^\" >]+)", text)
        assert loaded == []


def test_site_has_contributing_and_changelog(site: Path) -> None:
    assert "Add an op" in (site / "contributing/index.html").read_text("utf-8")
    assert "Semantic Versioning" in (site / "changelog/index.html").read_text("utf-8")


@pytest.mark.parametrize("module", PUBLIC)
def test_the_api_has_all_public_names(site: Path, module: str) -> None:
    names = set(import_module(module).__all__) - {"image", "layers", "nn", "optim", "__version__"}
    api = "".join(page.read_text("utf-8") for page in (site / "api").rglob("index.html"))
    # Files are called like the functions in them; it is the functions that must be there.
    found = re.findall(
        r'id="[\w.]+" class="doc doc-heading">\s*<code class="[^"]*doc-symbol-(\w+)"></code>\s*([\s\S]*?)</h', api
    )
    documented = {re.findall(r"\w+", re.sub(r"<[^>]+>", "", name))[0] for kind, name in found if kind != "module"}
    assert names - documented == set()


def test_a_link_that_leads_nowhere_fails_the_build(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/index.md").write_text("# Home\n\n[gone](gone.md) and [no such part](#nowhere)\n")
    validation = (ROOT / "mkdocs.yml").read_text("utf-8").split("\nvalidation:\n")[1].split("\nnav:\n")[0]
    config = tmp_path / "mkdocs.yml"
    config.write_text(f"site_name: test\nvalidation:\n{validation}\n")
    built = build(tmp_path / "site", config)
    assert built.returncode != 0
    assert "gone.md" in built.stderr
    assert "#nowhere" in built.stderr
