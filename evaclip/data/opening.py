"""From a path to a source."""

from collections.abc import Sequence
from pathlib import Path

from evaclip.data import webdataset
from evaclip.data.config import DEFAULT_TEMPLATE, DataConfig, RemoteConfig
from evaclip.data.image_folder import FolderSource, PictureFolder
from evaclip.data.kinds import KINDS, Kind
from evaclip.data.mixture import MixtureSource
from evaclip.data.paths import expand_paths
from evaclip.data.remote import is_remote
from evaclip.data.samples import Decoding
from evaclip.data.shard_cache import Fetching, ShardCache
from evaclip.data.shard_list import LIST_SUFFIX, read_list
from evaclip.data.shards import LocalShard, RemoteShard, Shard
from evaclip.data.source import Source
from evaclip.data.synthetic import SyntheticSource
from evaclip.data.table import COLUMNS, TABLES, TableSource
from evaclip.data.table_text import Columns
from evaclip.data.webdataset import WebDatasetSource
from evaclip.errors import UserError, unknown_name


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
    captions: bool = True,
) -> Source:
    """Opens and indexes a data set.

    `path` names tar shards (a brace pattern, a glob, a folder of them, URLs, 'pipe:COMMAND', several joined by '::',
    or a list of shards), a table (.csv, .tsv, .jsonl, .ndjson, .parquet), a folder of class folders, or 'synthetic'.
    The keys are those of DataConfig; those of another kind of data are not looked at. Without `captions` a sample may
    lack one, and a folder has pictures at any depth instead of classes. Raises UserError if there is nothing usable,
    and says what was found.
    """
    if min_size < 0:
        raise UserError(f"the smallest size of pictures must be 0 or more, got {min_size}")
    if kind not in KINDS:
        raise unknown_name("kind of data", kind, KINDS)
    if kind == "synthetic" or (kind == "auto" and path == "synthetic"):
        source: Source = SyntheticSource(num_samples)
    else:
        paths = expand_paths(path)
        chosen = _guess_kind(paths[0]) if kind == "auto" else kind
        if chosen == "webdataset":
            keys = (image_key or webdataset.IMAGE_KEY, caption_key or webdataset.CAPTION_KEY)
            source = _open_shards(paths, ShardCache(_fetching(remote or RemoteConfig())), *keys)
        elif chosen == "folder":
            root = _one_local(chosen, path, paths)
            source = FolderSource(root, caption_template) if captions else PictureFolder(root)
        else:
            columns = Columns(image_key or COLUMNS.image, caption_key or COLUMNS.caption)
            source = TableSource(_one_local(chosen, path, paths), chosen, columns, csv_separator)
    source.decoding = Decoding(exif_orientation, min_size)
    source.wants_captions = captions
    return source


def open_configured(config: DataConfig) -> Source:
    """Opens the data set, or the mixture of several, that a configuration names."""
    if not config.mixture:
        return _open(config.train, config)
    parts = [_open(part.train, config) for part in config.mixture.values()]
    return MixtureSource(parts, [part.weight for part in config.mixture.values()])


def _open(path: str, config: DataConfig) -> Source:
    return open_source(
        path,
        config.kind,
        image_key=config.image_key,
        caption_key=config.caption_key,
        csv_separator=config.csv_separator,
        caption_template=config.caption_template,
        num_samples=config.num_samples,
        remote=config.remote,
        exif_orientation=config.exif_orientation,
        min_size=config.min_size,
    )


def _fetching(config: RemoteConfig) -> Fetching:
    folder = Path(config.cache_folder).expanduser() if config.cache_folder else None
    return Fetching(folder, int(config.cache_gb * 1e9), config.timeout, config.attempts)


def _open_shards(paths: Sequence[str], cache: ShardCache, image_key: str, caption_key: str) -> Source:
    if not paths[0].endswith(LIST_SUFFIX):
        shards = [shard for path in paths for shard in _shards_in(path, cache)]
        return WebDatasetSource(shards, image_key, caption_key)
    entries = [entry for path in paths for entry in read_list(path)]
    shards = [
        RemoteShard(entry.location, cache, entry.version)
        if is_remote(entry.location)
        else LocalShard(Path(entry.location))
        for entry in entries
    ]
    return WebDatasetSource(shards, image_key, caption_key, [entry.facts for entry in entries])


def _guess_kind(path: str) -> Kind:
    if is_remote(path) or path.endswith(LIST_SUFFIX):
        return "webdataset"
    if Path(path).is_dir():
        return "webdataset" if any(Path(path).glob("*.tar")) else "folder"
    suffix = Path(path).suffix.lower()
    if suffix in TABLES:
        return TABLES[suffix]
    if suffix == ".tar":
        return "webdataset"
    raise UserError(
        f"{path} is neither a .tar shard, a list of shards ({LIST_SUFFIX}), a table ({' '.join(TABLES)}), a folder nor"
        " the word 'synthetic'; if it is one of these by another name, give the kind (webdataset, csv, jsonl, parquet)"
    )


def _shards_in(path: str, cache: ShardCache) -> list[Shard]:
    if is_remote(path):
        return [RemoteShard(path, cache)]
    if not Path(path).is_dir():
        return [LocalShard(Path(path))]
    shards = sorted(Path(path).glob("*.tar"))
    if not shards:
        raise UserError(f"there are 0 .tar shards in the folder {path}")
    return [LocalShard(shard) for shard in shards]


def _one_local(kind: str, path: str, paths: Sequence[str]) -> Path:
    if len(paths) > 1:
        raise UserError(f"a {kind} data set is one path, but {path!r} names {len(paths)}")
    if is_remote(paths[0]):
        raise UserError(f"a {kind} data set is read from local files only: copy or mount {paths[0]!r} first")
    return Path(paths[0])
