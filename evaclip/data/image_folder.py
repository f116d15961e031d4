"""A folder with one subfolder of images per class, and a folder of images.

One process lists a folder into a file of the index cache; all others that share the cache map that file.
"""

import hashlib
import logging
import os
from array import array
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from evaclip.atomic import locked
from evaclip.data.config import DEFAULT_TEMPLATE
from evaclip.data.packed_strings import PackedStrings, StringPacker, map_arrays, narrow, write_arrays
from evaclip.data.samples import Fault, FaultKind, RawSample, read_image_file
from evaclip.data.source import Source, hash_list
from evaclip.errors import UserError, counted
from evaclip.machine import user_cache

_LOG = logging.getLogger("evaclip.data")

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp"})
_OTHER_SUFFIXES = frozenset({".avif", ".bmp", ".gif", ".heic", ".heif", ".jfif", ".jxl", ".ppm", ".tif", ".tiff"})
"""Of images that are left out, with a warning."""
_OUTSIDE = "outside of the class folders"
_NOT_UTF_8 = "by names that aren't UTF-8"
_FORMAT = 1
_ARRAYS = ("text", "ends", "folder_text", "folder_ends", "folder_times")


def class_folders(root: Path) -> list[str]:
    """The classes of a folder of class folders, as `FolderSource.classes`, found without listing every image."""
    folders = _entries(str(root)) if root.is_dir() else iter(())
    return [_class_name(folder.name) for folder in folders if folder.is_dir() and _has_image(folder.path)]


class _Files(Source):
    """Image files of a folder, in the order of their paths below it.

    Attributes:
        notes: which images were left out.
    """

    def __init__(self, root: Path, by_class: bool) -> None:
        arrays, facts = _listing(root, by_class)
        self.description = str(root)
        self._root = root
        self._files = PackedStrings(arrays["text"], arrays["ends"])
        self._facts = facts
        self.fingerprint = facts["fingerprint"]
        self.shard_sizes = [len(self._files)]
        left_out = ", ".join(f"{count:,} {which}" for which, count in sorted(facts["left_out"].items()))
        self.notes = [f"images left out: {left_out}"] if left_out else []
        if len(self._files):
            for note in self.notes:
                _LOG.warning("%s: %s", root, note)

    def name(self, index: int) -> str:
        return str(self.file(index))

    def file(self, index: int) -> Path:
        return self._root / self._files[index]

    def place(self, index: int) -> tuple[str, str]:
        return self.name(index), self._files[index]


class FolderSource(_Files):
    """ROOT/CLASS/**/*.jpg in sorted order; the caption is the template with the class name.

    Underscores in folder names stand for spaces. A sample's key is its path below the root. Hidden files and folders
    don't count; a folder without images is no class, but a fault. Raises UserError if there is no image at all.
    """

    def __init__(self, root: Path, template: str = DEFAULT_TEMPLATE) -> None:
        super().__init__(root, by_class=True)
        classes, empty = self._facts["classes"], self._facts["empty"]
        if not len(self):
            wanted = f"{root} must hold one folder of images ({', '.join(sorted(IMAGE_SUFFIXES))}) per class"
            given = "; ".join([f"{counted(len(empty), 'folder')} with 0 images", *self.notes])
            table = "a table (.csv, .jsonl, .parquet) lists images with their captions instead"
            raise UserError(f"{wanted}, got {given}; {table}")
        self._template = template
        self._labels = {name: label for label, name in enumerate(classes)}
        self.classes = list(map(_class_name, classes))
        self.faults = [
            Fault(FaultKind.EMPTY_CLASS, str(root / name), "it is not taken for a class", file=str(root / name))
            for name in empty
        ]

    def __getitem__(self, index: int) -> RawSample:
        key = self._files[index]
        caption = self._template.replace("{}", _class_name(key.split("/", 1)[0]))
        return RawSample(key, read_image_file(self._root / key), (caption,))

    def label(self, index: int) -> int:
        return self._labels[self._files[index].split("/", 1)[0]]


class PictureFolder(_Files):
    """All images in a folder, at any depth, in sorted order; without captions.

    Keys are paths below the root, and hidden files and folders don't count. Raises UserError if there is no image.
    """

    def __init__(self, root: Path) -> None:
        super().__init__(root, by_class=False)
        if not len(self):
            suffixes = ", ".join(sorted(IMAGE_SUFFIXES))
            where = str(root) if root.is_dir() else f"{root}: no folder"
            raise UserError("; ".join([f"there are 0 images ({suffixes}) in {where}", *self.notes]))

    def __getitem__(self, index: int) -> RawSample:
        return RawSample(self._files[index], read_image_file(self._root / self._files[index]), ())


def _listing(root: Path, by_class: bool) -> tuple[dict[str, Any], Any]:
    """The files of a folder, from the cache if no folder below it has changed since.

    The first process scans and stores; other processes wait for it. A cache that can't be written costs time only.

    Returns:
        arrays of `PackedStrings`; `classes` (folders with images), `empty` (others), `left_out` and `fingerprint`.
    """
    try:
        inode = root.stat()
    except OSError:
        return _scan(root, by_class)
    # Machines that share the cache may have copies of their own at this path: they don't wait for one another.
    stamp = [_FORMAT, by_class, str(root.absolute()), inode.st_ino, inode.st_ctime_ns]
    name = hashlib.sha256(repr(stamp).encode("utf-8", "surrogateescape")).hexdigest()[:32]
    file = user_cache("tar-index") / f"{name}.files"
    if found := _stored(file, stamp, root):
        return found
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with locked(file.parent / f".{name}.lock"):
            if found := _stored(file, stamp, root):
                return found
            scanned = _scan(root, by_class)
            with suppress(OSError):
                if len(scanned[0]["ends"]):
                    write_arrays(file, stamp, *scanned)
            return _stored(file, stamp, root) or scanned
    except OSError as exc:
        _LOG.debug("the files of %s are not listed in %s: %s", root, file, exc)
    return _scan(root, by_class)


def _stored(file: Path, stamp: list[Any], root: Path) -> tuple[dict[str, Any], Any] | None:
    """The stored listing of a folder; None if there is none, or a folder changed after it was made."""
    if not (found := map_arrays(file, stamp, _ARRAYS)):
        return None
    arrays, _ = found
    folders = PackedStrings(arrays["folder_text"], arrays["folder_ends"])
    try:
        times = (Path(f"{root}/{folder}").stat().st_mtime_ns for folder in folders)
        return found if all(map(int.__eq__, times, arrays["folder_times"].tolist())) else None
    except OSError:
        return None


def _scan(root: Path, by_class: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    files, folders, sizes, times = StringPacker(), StringPacker(), array("q"), array("q")
    left_out, images_of = Counter[str](), Counter[str]()

    def visit(folder: str, name_of_class: str) -> None:
        folders.add(folder or ".")
        times.append(Path(f"{root}/{folder}").stat().st_mtime_ns)  # before its entries: a later change is noticed
        for entry in _entries(f"{root}/{folder}"):
            name = f"{folder}/{entry.name}" if folder else entry.name
            suffix = os.path.splitext(entry.name)[1].lower()  # noqa: PTH122 - millions of Path objects are slow
            if entry.is_dir(follow_symlinks=by_class and not folder):
                images_of[name_of_class or name] += 0
                visit(name, name_of_class or name)
            elif by_class and not folder:
                left_out[_OUTSIDE] += suffix in IMAGE_SUFFIXES
            elif suffix in _OTHER_SUFFIXES:
                left_out[suffix] += 1
            elif suffix in IMAGE_SUFFIXES:
                try:
                    name.encode()
                except UnicodeEncodeError:  # no table, tar or database could hold it
                    left_out[_NOT_UTF_8] += 1
                    continue
                files.add(name)
                images_of[name_of_class] += 1
                if by_class:
                    sizes.append(_size(entry))

    if root.is_dir():
        visit("", "")
    packed, of_folders = files.packed(), folders.packed()
    kind, entries = ("folder", zip(packed, sizes, strict=True)) if by_class else ("pictures", ((n, "") for n in packed))
    arrays = (packed.text, narrow(packed.ends), of_folders.text, narrow(of_folders.ends), np.array(times, np.int64))
    facts = {
        "classes": [name for name, images in images_of.items() if images],
        "empty": [name for name, images in images_of.items() if not images],
        "left_out": {which: count for which, count in left_out.items() if count},
        "fingerprint": hash_list(kind, entries),
    }
    return dict(zip(_ARRAYS, arrays, strict=True)), facts


def _entries(folder: str) -> Iterator["os.DirEntry[str]"]:
    """The entries of a folder that aren't hidden, by name; none if the folder may not be read."""
    try:
        with os.scandir(folder) as found:
            entries = sorted(found, key=lambda entry: entry.name)
    except PermissionError:
        return
    # Archives of macOS keep its metadata in that folder.
    yield from (entry for entry in entries if not entry.name.startswith(".") and entry.name != "__MACOSX")


def _has_image(folder: str) -> bool:
    return any(
        _has_image(entry.path)
        if entry.is_dir(follow_symlinks=False)
        else os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES  # noqa: PTH122
        for entry in _entries(folder)
    )


def _size(file: "os.DirEntry[str]") -> int:
    try:
        return file.stat().st_size
    except OSError:  # such as a link to nowhere: a fault of that sample, when it is read
        return -1


def _class_name(folder: str) -> str:
    return folder.replace("_", " ")
