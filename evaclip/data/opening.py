"""From a path to a source."""

import re
import resource
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from evaclip.data import KINDS, Kind
from evaclip.data.config import DEFAULT_TEMPLATE, DataConfig, RemoteConfig
from evaclip.data.image_folder import FolderSource
from evaclip.data.index_cache import IndexCache
from evaclip.data.mixture import MixtureSource
from evaclip.data.remote import ShardCache, is_command, is_remote
from evaclip.data.samples import Decoding
from evaclip.data.shard_list import LIST_SUFFIX, ShardList, expand_paths, list_shards, read_list, shards_at
from evaclip.data.source import Source
from evaclip.data.synthetic import SyntheticSource
from evaclip.data.tables import TABLES, TableSource
from evaclip.data.webdataset import WebDatasetSource
from evaclip.errors import UserError, unknown_name
from evaclip.pixels import DEFAULT_MAX_IMAGE_PIXELS

_PART = re.compile(r"-(\d{5})-of-(\d{5})\.json$")


def open_source(
    path: str,
    kind: Kind = "auto",
    *,
    image_key: str | None = None,
    caption_key: str | None = None,
    csv_separator: str | None = None,
    caption_template: str = DEFAULT_TEMPLATE,
    num_samples: int = 4096,
    remote: RemoteConfig | None = None,
    exif_orientation: bool = False,
    min_size: int = 0,
    max_image_pixels: int = DEFAULT_MAX_IMAGE_PIXELS,
    captions: bool = True,
) -> Source:
    """Opens and indexes a data set.

    `path` names tar shards (a brace pattern, a glob, a folder of them, URLs, 'pipe:COMMAND', several joined by '::',
    or a list of shards), a table (.csv, .tsv, .jsonl, .ndjson, .parquet), a folder of class folders, or 'synthetic'.
    The arguments are keys of DataConfig; keys of another kind of data are ignored. Without `captions` a sample may lack
    one, and a folder has images at any depth instead of classes. Raises UserError if nothing is usable, with a list of
    the files found.
    """
    if min_size < 0:
        raise UserError(f"min_size must be 0 or more, got {min_size}")
    if max_image_pixels < 1:
        raise UserError(f"max_image_pixels must be 1 or more, got {max_image_pixels}")
    if kind not in KINDS:
        raise unknown_name("kind of data", kind, KINDS)
    source: Source
    kind, paths = _kind_and_paths(path, kind)
    if kind == "synthetic":
        source = SyntheticSource(num_samples)
    elif kind == "webdataset":
        source = _open_shards(paths, remote or RemoteConfig(), IndexCache(), image_key, caption_key)
    elif kind == "folder":
        source = FolderSource(_one_local(kind, paths), caption_template if captions else None)
    else:
        source = TableSource(_one_local(kind, paths), kind, image_key, caption_key, csv_separator)
    source.decoding = Decoding(exif_orientation, min_size, max_pixels=max_image_pixels)
    source.wants_captions = captions
    return source


def open_configured(config: DataConfig, *, captions: bool = True) -> Source:
    """Opens the data set, or the mixture of several, that a configuration names; `captions` as for `open_source`."""
    if not config.mixture:
        return _open(config.train, config, captions)
    sources = [_open(item.train, config, captions) for item in config.mixture.values()]
    return MixtureSource(sources, [item.weight for item in config.mixture.values()])


def classes_of(config: DataConfig) -> Sequence[str]:
    """`Source.classes` of the data that a configuration names; no shard or table is opened."""
    if config.mixture or not config.train:
        return ()
    kind, _ = _kind_and_paths(config.train, config.kind)
    return open_configured(config).classes if kind in ("folder", "synthetic") else ()


_KEYS = (
    *("image_key", "caption_key", "csv_separator", "caption_template"),
    *("num_samples", "remote", "exif_orientation", "min_size", "max_image_pixels"),
)


def _open(path: str, config: DataConfig, captions: bool) -> Source:
    return open_source(path, config.kind, **{name: getattr(config, name) for name in _KEYS}, captions=captions)


def index_shards(path: str, part: int = 0, parts: int = 1) -> WebDatasetSource:
    """Opens tar shards, or lists of them, and writes the indexes of local ones next to them, if possible.

    Args:
        path: as `open_source` takes it.
        part, parts: which of so many equal parts of the shards is indexed; from 0.

    Raises:
        UserError: as `open_source` does, for parts of a list, for shards that are commands, and if there are fewer
            shards than parts.
    """
    paths = expand_paths(path)
    if not paths[0].endswith(LIST_SUFFIX) and (command := next(filter(is_command, paths), None)):
        raise UserError(
            f"a shard of a list must be a path or a URL, got {command!r}; set data.train to the command: lists run none"
        )
    return _open_shards(paths, RemoteConfig(), IndexCache(next_to_shards=True), part=(part, parts))


def allow_open_files() -> None:
    """Raises the limit of open files to the hard one: a source keeps 400 files open, a rank its connections."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _open_shards(
    paths: Sequence[str],
    remote: RemoteConfig,
    indexes: IndexCache,
    image_key: str | None = None,
    caption_key: str | None = None,
    part: tuple[int, int] = (0, 1),
) -> WebDatasetSource:
    allow_open_files()
    cache = ShardCache(remote)
    if paths[0].endswith(LIST_SUFFIX):
        if part[1] > 1:
            raise UserError(f"lists of shards are joined as a whole, so part {part[0]}/{part[1]} is none of {paths[0]}")
        _require_all_parts(paths)
        whole = ShardList(chain.from_iterable(map(read_list, paths)))
        return WebDatasetSource(whole, cache, indexes, image_key, caption_key)
    shards = shards_at(paths, cache)
    if len(shards) < part[1]:
        raise UserError(f"{len(shards)} shards can't be divided into {part[1]} parts")
    begin, end = (len(shards) * bound // part[1] for bound in (part[0], part[0] + 1))
    return WebDatasetSource(list_shards(shards[begin:end], indexes), cache, indexes, image_key, caption_key)


def _require_all_parts(lists: Sequence[str]) -> None:
    """Raises UserError unless lists that `evaclip data index --part` has written are all parts of one whole."""
    parts = [(int(name[1]), int(name[2])) for path in lists if (name := _PART.search(path))]
    count = parts[0][1] if parts else 0
    if sorted(parts) == (expected := [(part, count) for part in range(count)]):
        return
    missing = [f"{part:05d}-of-{count:05d}" for part, _ in sorted(set(expected) - set(parts))]
    raise UserError(
        f"lists of parts must be the {count} parts of one whole, each once, got {len(parts)}"
        + (f" without {', '.join(missing[:5])}" + ", ..." * (len(missing) > 5) if missing else "")
        + "; 'evaclip data index --part' makes missing lists; delete lists of another division"
    )


def _kind_and_paths(path: str, kind: Kind) -> tuple[Kind, list[str]]:
    """The kind of a data set, guessed if it is auto, and the paths of its files, folders and URLs."""
    if kind == "synthetic" or (kind == "auto" and path == "synthetic"):
        return "synthetic", []
    paths = expand_paths(path)
    first = paths[0]
    if kind != "auto":
        return kind, paths
    if is_remote(first) or first.endswith(LIST_SUFFIX):
        return "webdataset", paths
    if Path(first).is_dir():
        return "webdataset" if any(Path(first).glob("*.tar")) else "folder", paths
    suffix = Path(first).suffix.lower()
    if suffix == ".tar" or suffix in TABLES:
        return TABLES.get(suffix, "webdataset"), paths
    raise UserError(
        f"{first} is neither a .tar shard, a list of shards ({LIST_SUFFIX}), a table ({' '.join(TABLES)}), a folder nor"
        " the word 'synthetic'; if it is one of these by another name, give the kind (webdataset, csv, jsonl, parquet)"
    )


def _one_local(kind: str, paths: Sequence[str]) -> Path:
    if len(paths) > 1:
        raise UserError(f"a {kind} data set must be one path, got {len(paths)}, the first {paths[0]}")
    if is_remote(paths[0]):
        raise UserError(f"a {kind} data set is read from local files only: copy or mount {paths[0]!r} first")
    return Path(paths[0])
