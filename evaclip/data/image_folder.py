"""A folder with one subfolder of pictures per class, and a folder with pictures."""

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from evaclip.data.config import DEFAULT_TEMPLATE
from evaclip.data.packed_strings import PackedStrings
from evaclip.data.samples import Fault, FaultKind, RawSample, read_image_file
from evaclip.data.source import Source, hash_list
from evaclip.errors import UserError, counted

_LOG = logging.getLogger("evaclip.data")

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp"})
_OTHER_SUFFIXES = frozenset({".avif", ".bmp", ".gif", ".heic", ".heif", ".jfif", ".jxl", ".ppm", ".tif", ".tiff"})
"""Of pictures that aren't taken, which is said."""
_OUTSIDE = "outside of the class folders"
_NOT_UTF_8 = "by names that aren't UTF-8"


def class_folders(root: Path) -> list[str]:
    """The classes of a folder of class folders, as `FolderSource.classes`, found without looking at every picture."""
    inside = sorted(root.iterdir()) if root.is_dir() else []
    folders = [path for path in inside if path.is_dir() and not _is_hidden(path.name)]
    return [
        _class_name(folder.name) for folder in folders if any(_is_picture(file, folder) for file in folder.rglob("*"))
    ]


class _Files(Source):
    """Picture files, in this order, by their paths below a root."""

    def __init__(self, root: Path, files: Sequence[Path], left_out: Counter[str]) -> None:
        self.description = str(root)
        self.notes = _notes(left_out)
        for note in self.notes:
            _LOG.warning("%s: %s", root, note)
        self.shard_sizes = [len(files)]
        self._root = root
        self._files = PackedStrings.pack(file.relative_to(root).as_posix() for file in files)

    def name(self, index: int) -> str:
        return str(self.file(index))

    def file(self, index: int) -> Path:
        return self._root / self._files[index]

    def place(self, index: int) -> tuple[str, str]:
        return self.name(index), self._files[index]


class FolderSource(_Files):
    """ROOT/CLASS/**/*.jpg in sorted order; the caption is the template with the class name.

    Underscores in folder names stand for spaces. A sample's key is its path below the root. Hidden files and folders
    don't count; a folder without pictures is no class, but a fault. Raises UserError if there is no picture at all.
    """

    def __init__(self, root: Path, template: str = DEFAULT_TEMPLATE) -> None:
        inside = sorted(root.iterdir()) if root.is_dir() else []
        folders = [path for path in inside if path.is_dir() and not _is_hidden(path.name)]
        left_out = Counter(_OUTSIDE for path in inside if _is_picture(path, root) and path.is_file())
        by_folder = {folder: _pictures(folder, left_out) for folder in folders}
        files = [file for pictures in by_folder.values() for file in pictures]
        if not files:
            wanted = f"{root} must hold one folder of images ({', '.join(sorted(IMAGE_SUFFIXES))}) per class"
            given = "; ".join([f"{counted(len(folders), 'folder')} with 0 images", *_notes(left_out)])
            table = "a table (.csv, .jsonl, .parquet) lists images with their captions instead"
            raise UserError(f"{wanted}, got {given}; {table}")
        super().__init__(root, files, left_out)
        self._template = template
        self.classes = [_class_name(folder.name) for folder in folders if by_folder[folder]]
        self.faults = [
            Fault(FaultKind.EMPTY_CLASS, str(folder), "it is not taken for a class", file=str(folder))
            for folder in folders
            if not by_folder[folder]
        ]
        self.fingerprint = hash_list("folder", ((name, _size(root / name)) for name in self._files))

    def __getitem__(self, index: int) -> RawSample:
        key = self._files[index]
        caption = self._template.replace("{}", _class_name(key.split("/", 1)[0]))
        return RawSample(key, read_image_file(self._root / key), (caption,))


class PictureFolder(_Files):
    """All pictures in a folder, at any depth, in sorted order; without captions.

    Keys are paths below the root, and hidden files and folders don't count. Raises UserError if there is no picture.
    """

    def __init__(self, root: Path) -> None:
        left_out = Counter[str]()
        files = _pictures(root, left_out)
        if not files:
            raise _no_pictures(f"{root}" + ("" if root.is_dir() else ": no folder"), left_out)
        super().__init__(root, files, left_out)
        self.fingerprint = hash_list("pictures", ((name, "") for name in self._files))

    def __getitem__(self, index: int) -> RawSample:
        return RawSample(self._files[index], read_image_file(self._root / self._files[index]), ())


def _pictures(folder: Path, left_out: Counter[str]) -> list[Path]:
    """The picture files in a folder, at any depth, in sorted order; `left_out` counts those of other kinds."""
    found = []
    for file in sorted(folder.rglob("*")):
        if _is_picture(file, folder):
            try:
                str(file).encode()
            except UnicodeEncodeError:  # no table, tar or database could hold it
                left_out[_NOT_UTF_8] += 1
            else:
                found.append(file)
        elif file.suffix.lower() in _OTHER_SUFFIXES:
            left_out[file.suffix.lower()] += 1
    return found


def _notes(left_out: Counter[str]) -> list[str]:
    told = ", ".join(f"{count:,} {which}" for which, count in sorted(left_out.items()))
    return [f"pictures left out: {told}"] if told else []


def _no_pictures(where: str, left_out: Counter[str]) -> UserError:
    suffixes = ", ".join(sorted(IMAGE_SUFFIXES))
    return UserError("; ".join([f"there are 0 pictures ({suffixes}) in {where}", *_notes(left_out)]))


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:  # such as a link to nowhere: a fault of that sample, when it is read
        return -1


def _is_picture(file: Path, folder: Path) -> bool:
    return file.suffix.lower() in IMAGE_SUFFIXES and not any(map(_is_hidden, file.relative_to(folder).parts))


def _is_hidden(name: str) -> bool:
    # The last is where archives of macOS keep what isn't hidden there.
    return name.startswith(".") or name == "__MACOSX"


def _class_name(folder: str) -> str:
    return folder.replace("_", " ")
