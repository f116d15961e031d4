"""Tar shards as WebDataset and img2dataset write them."""

import json
import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from evaclip.data.index_cache import IndexCache, LocalShard, Shard
from evaclip.data.remote import RemoteError, RemoteShard, ShardCache, file_name, is_remote
from evaclip.data.samples import BadSample, FaultKind, RawSample, not_blank, texts_of
from evaclip.data.shard_list import ShardList
from evaclip.data.source import Source, hash_list
from evaclip.data.tar_index import Member, ShardFacts, TarIndex, build_index
from evaclip.errors import UserError

IMAGE_KEY = "jpg;jpeg;png;webp"
CAPTION_KEY = "txt;json:caption"
_OPEN_SHARDS = 192
"""Each keeps two files open: the shard and its index."""
_SHARDS_KEPT = 1024


class WebDatasetSource(Source):
    """Samples of plain tar shards, read with one `pread` per member; of remote ones, from local copies.

    `image_key` lists member suffixes by preference, `caption_key` captions: 'txt' is the text of a member,
    'json:FIELD' a string or a list of strings in a JSON member. Nothing is read on opening. A damaged shard counts up
    to the damage and is listed in `faults`. Raises UserError if there is no sample.
    """

    def __init__(
        self,
        shards: ShardList,
        cache: ShardCache,
        indexes: IndexCache,
        image_key: str | None = None,
        caption_key: str | None = None,
    ) -> None:
        self.shards = shards
        self._cache = cache
        self._indexes = indexes
        self._image_suffixes = (image_key or IMAGE_KEY).split(";")
        self._caption_key = caption_key or CAPTION_KEY
        self._captions = list[tuple[str, str]]()
        for key in self._caption_key.split(";"):
            suffix, _, field = key.partition(":")
            if (suffix == "json") != bool(field):
                raise UserError(f"the caption key {key!r} must be a suffix such as 'txt', or 'json:FIELD'")
            self._captions.append((suffix, field))
        self._shards = dict[int, tuple[Shard, ShardFacts]]()
        self._open_shards: OrderedDict[int, _OpenShard] = OrderedDict()
        self._ends = np.cumsum(shards.samples)
        first = shards[0].location
        self.description = f"{len(shards)} shards, the first {first}" if len(shards) > 1 else first
        self.shard_sizes = shards.samples.tolist()
        self.remote = any(is_remote(location) for location, _ in shards.digests())
        self.faults = shards.faults
        self.fingerprint = hash_list("webdataset", ((_name(location), digest) for location, digest in shards.digests()))
        if not self._ends[-1]:
            reasons = "".join(f"; {fault.name}: {fault.detail}" for fault in self.faults[:1])
            raise UserError(f"there are 0 samples in {len(shards)} shard(s), the first {first}{reasons}")

    def __getitem__(self, index: int) -> RawSample:
        number, position = self._locate(index)
        try:
            opened = self._open(number, position)
            members = opened.table.members(position)
            image = next((members[suffix] for suffix in self._image_suffixes if suffix in members), None)
            if image is None:
                found = ", ".join(members) or "nothing"
                detail = f"no member {' or '.join(self._image_suffixes)}, only {found}"
                raise BadSample(FaultKind.MISSING_IMAGE, self.name(index), detail)
            if image.size == 0:
                raise BadSample(FaultKind.MISSING_IMAGE, self.name(index), "the image member has 0 bytes")
            with opened.descriptor() as descriptor:
                captions = self._read_captions(index, descriptor, members)
                return RawSample(opened.table.keys[position], self._read(index, descriptor, image), captions)
        except RemoteError as exc:
            name = self.shards[number].location
            raise BadSample(FaultKind.UNREACHABLE, name, f"sample {position}: {exc}") from exc
        except OSError as exc:
            raise BadSample(FaultKind.UNREADABLE, self.name(index), str(exc)) from exc

    def name(self, index: int) -> str:
        position = self._locate(index)[1]
        file, key = self.place(index)
        return f"{file}:{key or f'sample {position}'}"

    def place(self, index: int) -> tuple[str, str]:
        number, position = self._locate(index)
        file = self.shards[number].location
        try:
            return file, self._open(number, position).table.keys[position]
        except BadSample:
            return file, ""

    def tar_shards(self, shards: Sequence[int]) -> list[Shard]:
        return [shard for shard, _ in map(self._shard, shards)]

    def close(self) -> None:
        while self._open_shards:
            self._open_shards.popitem()[1].close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open_shards": OrderedDict()}

    def __del__(self) -> None:
        if hasattr(self, "_open_shards"):
            self.close()

    def _shard(self, number: int) -> tuple[Shard, ShardFacts]:
        if number not in self._shards:
            if len(self._shards) >= _SHARDS_KEPT:
                self._shards.clear()
            location, version, facts = self.shards[number]
            shard: Shard = LocalShard(Path(location), facts.size)
            if is_remote(location):
                check = partial(_require_same, self._indexes, facts)
                shard = RemoteShard(location, self._cache, version, facts.size, check, self._cache.patience)
            self._shards[number] = shard, facts
        return self._shards[number]

    def _open(self, number: int, position: int) -> "_OpenShard":
        """A shard and its index. Raises BadSample if the shard changed after the source was opened."""
        if number in self._open_shards:
            self._open_shards.move_to_end(number)
            return self._open_shards[number]
        shard, facts = self._shard(number)
        try:
            table = self._indexes.get(shard)
            if not facts.matches(table.facts):
                raise UserError("the shard changed after it was indexed")
            opened = _OpenShard(shard, table, -1 if shard.path is None else os.open(shard.path, os.O_RDONLY))
        except (UserError, OSError) as exc:
            kind = FaultKind.UNREACHABLE if isinstance(shard, RemoteShard) else FaultKind.UNREADABLE
            raise BadSample(kind, str(shard), f"sample {position}: {exc}") from exc
        if len(self._open_shards) >= _OPEN_SHARDS:
            self._open_shards.popitem(last=False)[1].close()
        self._open_shards[number] = opened
        return opened

    def _locate(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return shard, index - int(self._ends[shard]) + self.shard_sizes[shard]

    def _read_captions(self, index: int, descriptor: int, members: Mapping[str, Member]) -> tuple[str, ...]:
        fields: Sequence[str] = ()
        for suffix, field in self._captions:
            if suffix in members:
                try:
                    captions, fields = _captions_in(self._read(index, descriptor, members[suffix]), field)
                except ValueError as exc:
                    detail = f"the {suffix} member is unreadable: {exc}"
                    raise BadSample(FaultKind.MISSING_CAPTION, self.name(index), detail) from exc
                if captions:
                    return captions
        if not self.wants_captions:
            return ()
        names = f"fields of the JSON: {', '.join(fields)}" if fields else f"members: {', '.join(members)}"
        detail = f"no text in {self._caption_key.replace(';', ' or ')}; {names}"
        raise BadSample(FaultKind.MISSING_CAPTION, self.name(index), detail)

    def _read(self, index: int, descriptor: int, member: Member) -> bytes:
        data = os.pread(descriptor, member.size, member.offset)
        if len(data) != member.size:
            detail = f"{len(data)} of {member.size} bytes are there: the shard changed after it was indexed"
            raise BadSample(FaultKind.UNREADABLE, self.name(index), detail)
        return data


class _OpenShard(NamedTuple):
    """A shard that is read, its index, and the descriptor of its file if it is local."""

    shard: Shard
    table: TarIndex
    file: int

    def descriptor(self) -> AbstractContextManager[int]:
        # A copy is opened for each sample: one that is held open would still take room after it was deleted.
        return self.shard.cache.opened(self.shard) if isinstance(self.shard, RemoteShard) else nullcontext(self.file)

    def close(self) -> None:
        if self.file >= 0:
            os.close(self.file)


def _require_same(indexes: IndexCache, facts: ShardFacts, shard: RemoteShard, path: Path) -> None:
    """Stores the index of a copy. Raises RemoteError if the copy is not the shard that was indexed."""
    try:
        index = build_index(path, str(shard))
    except UserError as exc:
        raise RemoteError(str(exc)) from exc
    if facts.matches(index.facts):
        indexes.put(shard, index)
        return
    indexes.forget(shard)
    found = f"it has {len(index)} samples now" + (f"; {index.facts.damage}" if index.facts.damage else "")
    # A transfer that was cut off is worth another try.
    raise RemoteError(f"the shard changed after it was indexed: {found}", permanent=not index.facts.damage)


def _name(location: str) -> str:
    """The name for the fingerprint: equal in any folder."""
    return file_name(location) if is_remote(location) else location.rpartition("/")[2]


def _captions_in(data: bytes, field: str) -> tuple[tuple[str, ...], Sequence[str]]:
    """The captions that are not blank, of a text, or of a field of JSON, and all fields. Raises ValueError."""
    text = data.decode("utf-8-sig")
    if not field:
        return not_blank([text]), ()
    parsed: Any = json.loads(text)
    return (not_blank(texts_of(parsed.get(field))), list(parsed)) if isinstance(parsed, dict) else ((), ())
