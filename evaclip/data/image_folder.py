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


class FolderSource(Source):
    """Image files of a folder, in the order of their paths below it, which are the samples' keys.

    With a caption template the images are those of ROOT/CLASS/**, and the caption is the template with the class name,
    in which spaces stand for underscores. A class folder without images is not a class, but a fault. Without a template
    the images lie at any depth and have no captions. Hidden files and folders don't count.

    Raises UserError if there is no image.
    """

    def __init__(self, root: Path, template: str | None = DEFAULT_TEMPLATE) -> None:
        arrays, facts = _listing(root, by_class=template is not None)
        self.description = str(root)
        self.fingerprint = facts["fingerprint"]
        left_out = ", ".join(f"{count:,} {which}" for which, count in sorted(facts["left_out"].items()))
        self.notes = [f"images left out: {left_out}"] if left_out else []
        self._root = root
        self._template = template
        self._files = PackedStrings(arrays["text"], arrays["ends"])
        self.shard_sizes = [len(self._files)]
        empty = [str(root / name) for name in facts["empty"]] if template is not None else []
        if not len(self):
            layout = "images" if template is None else "one folder of images per class"
            content = "; ".join([f"0 images and {counted(len(empty), 'class folder')}", *self.notes])
            raise UserError(
                f"{root} must be a folder with {layout} ({', '.join(sorted(IMAGE_SUFFIXES))}), got {content}; a table"
                " (.csv, .jsonl, .parquet) lists images with their captions instead"
            )
        for note in self.notes:
            _LOG.warning("%s: %s", root, note)
        classes = facts["classes"] if template is not None else []
        self._labels = {name: label for label, name in enumerate(classes)}
        self.classes = list(map(_class_name, classes))
        self.faults = [Fault(FaultKind.EMPTY_CLASS, name, "it is not taken for a class", file=name) for name in empty]

    def __getitem__(self, index: int) -> RawSample:
        key, captions = self._files[index], tuple[str, ...]()
        if self._template is not None:
            captions = (self._template.replace("{}", _class_name(key.split("/", 1)[0])),)
        return RawSample(key, read_image_file(self._root / key), captions)

    def name(self, index: int) -> str:
        return str(self.file(index))

    def file(self, index: int) -> Path:
        return self._root / self._files[index]

    def place(self, index: int) -> tuple[str, str]:
        return self.name(index), self._files[index]

    def label(self, index: int) -> int | None:
        return self._labels.get(self._files[index].split("/", 1)[0])


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
    if listing := _stored(file, stamp, root):
        return listing
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with locked(file.parent / f".{name}.lock"):
            if listing := _stored(file, stamp, root):
                return listing
            scanned = _scan(root, by_class)
            with suppress(OSError):
                if len(scanned[0]["ends"]):
                    write_arrays(file, stamp, *scanned)
            return _stored(file, stamp, root) or scanned
    except OSError as exc:
        _LOG.warning("the list of files in %s is not stored, so each start makes it again: %s", root, exc)
    return _scan(root, by_class)


def _stored(file: Path, stamp: list[Any], root: Path) -> tuple[dict[str, Any], Any] | None:
    """The stored listing of a folder; None if there is none, or a folder changed after it was made."""
    if not (listing := map_arrays(file, stamp, _ARRAYS)):
        return None
    arrays, _ = listing
    folders = PackedStrings(arrays["folder_text"], arrays["folder_ends"])
    try:
        times = (Path(f"{root}/{folder}").stat().st_mtime_ns for folder in folders)
        return listing if all(map(int.__eq__, times, arrays["folder_times"].tolist())) else None
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
        with os.scandir(folder) as scan:
            entries = sorted(scan, key=lambda entry: entry.name)
    except PermissionError:
        return
    # Archives of macOS keep its metadata in that folder.
    yield from (entry for entry in entries if not entry.name.startswith(".") and entry.name != "__MACOSX")


def _size(file: "os.DirEntry[str]") -> int:
    try:
        return file.stat().st_size
    except OSError:  # such as a link to nowhere: a fault of that sample, when it is read
        return -1


def _class_name(folder: str) -> str:
    return folder.replace("_", " ")
