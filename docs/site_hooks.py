"""Hooks of mkdocs: files of the repository's top level become pages of the site."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

_ROOT = Path(__file__).parents[1]
_PAGES = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Adds pages from outside the documentation's folder."""
    for page, source in _PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(_ROOT / source)))
    return files
