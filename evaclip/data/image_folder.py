"""A folder with one subfolder of pictures per class."""

from pathlib import Path

from evaclip.data.config import DEFAULT_TEMPLATE
from evaclip.data.csv_table import read_image_file
from evaclip.data.packed_strings import PackedStrings
from evaclip.data.samples import RawSample
from evaclip.data.source import Source, hash_list
from evaclip.errors import UserError

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp"})


class FolderSource(Source):
    """ROOT/CLASS/**/*.jpg in sorted order; the caption is the template with the class name.

    Underscores in folder names stand for spaces. A sample's key is its path below the root. Raises
    UserError if there is no picture.
    """

    def __init__(self, root: Path, template: str = DEFAULT_TEMPLATE) -> None:
        folders = sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
        files = [
            file for folder in folders for file in sorted(folder.rglob("*")) if file.suffix.lower() in IMAGE_SUFFIXES
        ]
        if not files:
            suffixes = ", ".join(sorted(IMAGE_SUFFIXES))
            raise UserError(f"there are 0 pictures ({suffixes}) in the {len(folders)} class folders of {root}")
        self.description = str(root)
        self._root = root
        self._template = template
        self._files = PackedStrings.pack(file.relative_to(root).as_posix() for file in files)
        self.classes = [_class_name(folder.name) for folder in folders]
        self.shard_sizes = [len(files)]
        self.fingerprint = hash_list("folder", ((name, (root / name).stat().st_size) for name in self._files))

    def __getitem__(self, index: int) -> RawSample:
        key = self._files[index]
        caption = self._template.format(_class_name(key.split("/", 1)[0]))
        return RawSample(key, read_image_file(self._root / key), (caption,))

    def name(self, index: int) -> str:
        return str(self._root / self._files[index])


def _class_name(folder: str) -> str:
    return folder.replace("_", " ")
