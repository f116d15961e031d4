"""Hooks of mkdocs: files from outside the documentation's folder become a part of the site."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel

_ROOT = Path(__file__).parents[1]
_PAGES = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Adds pages of the top level, and the benchmark results under the links that also work in the repository."""
    for page, source in _PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(_ROOT / source)))
    for result in (_ROOT / "benchmarks/results").glob("*.json"):
        source = f"../benchmarks/results/{result.name}"
        file = File.generated(config, source, abs_src_path=str(result), inclusion=InclusionLevel.INCLUDED)
        file.dest_uri = f"results/{result.name}"
        files.append(file)
    return files
