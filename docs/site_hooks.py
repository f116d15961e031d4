"""What mkdocs calls while it builds the site: files of the repository's top level become pages of it."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

_ROOT = Path(__file__).parents[1]
_PAGES = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Adds the pages that lie outside of the documentation's folder; nobody copies them."""
    for page, source in _PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(_ROOT / source)))
    return files
