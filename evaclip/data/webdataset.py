"""Tar shards as WebDataset and img2dataset write them."""

import json
import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from evaclip.data.remote import Copy, RemoteError, RemoteShard, ShardCache, file_name, is_remote
from evaclip.data.samples import BadSample, FaultKind, RawSample, not_blank, texts_of
from evaclip.data.shard_list import Shard, ShardList, shard_at
from evaclip.data.source import Source, hash_list
from evaclip.data.tar_index import IndexCache, LocalShard, Member, ShardFacts, TarIndex, build_index
from evaclip.errors import UserError

IMAGE_KEY = "jpg;jpeg;png;webp"
CAPTION_KEY = "txt;json:caption"
_OPEN_SHARDS = 128
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
        image_key: str = IMAGE_KEY,
        caption_key: str = CAPTION_KEY,
    ) -> None:
        self.shards = shards
        self._cache = cache
        self._indexes = indexes
        self._image_suffixes = image_key.split(";")
        self._captions = [_CaptionField(text) for text in caption_key.split(";")]
        self._handles: OrderedDict[int, int] = OrderedDict()
        self._recent = dict[int, tuple[Shard, ShardFacts]]()
        self._ends = np.cumsum(shards.samples)
        first = shards[0].location
        self.description = f"{len(shards)} shards, the first {first}" if len(shards) > 1 else first
        self.shard_sizes = shards.samples.tolist()
        self.remote = any(is_remote(location) for location, _ in shards.digests())
        self.faults = list(shards.faults())
        self.fingerprint = hash_list("webdataset", ((_name(location), digest) for location, digest in shards.digests()))
        if not self._ends[-1]:
            reasons = "".join(f"; {fault.name}: {fault.detail}" for fault in self.faults[:1])
            raise UserError(f"there are 0 samples in {len(shards)} shard(s), the first {first}{reasons}")

    def __getitem__(self, index: int) -> RawSample:
        shard, position = self._locate(index)
        try:
            return self._sample(index, shard, position)
        except RemoteError as exc:
            name = self.shards[shard].location
            raise BadSample(FaultKind.UNREACHABLE, name, f"sample {position}: {exc}") from exc

    def name(self, index: int) -> str:
        position = self._locate(index)[1]
        file, key = self.place(index)
        return f"{file}:{key or f'sample {position}'}"

    def place(self, index: int) -> tuple[str, str]:
        shard, position = self._locate(index)
        file = self.shards[shard].location
        try:
            return file, self._table(shard, position).keys[position]
        except BadSample:
            return file, ""

    def copies(self, shards: Sequence[int]) -> list[Copy]:
        return [
            Copy(shard, partial(self._check, number), facts.size)
            for number, (shard, facts) in ((number, self._shard(number)) for number in shards)
            if isinstance(shard, RemoteShard)
        ]

    def close(self) -> None:
        while self._handles:
            os.close(self._handles.popitem()[1])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handles": OrderedDict()}

    def __del__(self) -> None:
        if hasattr(self, "_handles"):
            self.close()

    def _sample(self, index: int, shard: int, position: int) -> RawSample:
        table = self._table(shard, position)
        members = table.members(position)
        image = next((members[suffix] for suffix in self._image_suffixes if suffix in members), None)
        if image is None:
            found = ", ".join(members) or "nothing"
            detail = f"no member {' or '.join(self._image_suffixes)}, only {found}"
            raise BadSample(FaultKind.MISSING_IMAGE, self.name(index), detail)
        if image.size == 0:
            raise BadSample(FaultKind.MISSING_IMAGE, self.name(index), "the image member has 0 bytes")
        try:
            with self._descriptor(shard) as descriptor:
                captions = self._read_captions(index, descriptor, members)
                return RawSample(table.keys[position], self._read(index, descriptor, image), captions)
        except OSError as exc:
            raise BadSample(FaultKind.UNREADABLE, self.name(index), str(exc)) from exc

    def _shard(self, number: int) -> tuple[Shard, ShardFacts]:
        # The prefetching thread calls this too, and may clear the dict.
        found = self._recent.get(number)
        if found is None:
            if len(self._recent) >= _SHARDS_KEPT:
                self._recent.clear()
            entry = self.shards[number]
            found = self._recent[number] = shard_at(entry.location, self._cache, entry.version), entry.facts
        return found

    def _table(self, number: int, position: int) -> TarIndex:
        """The index of a shard. Raises BadSample if the shard changed after the source was opened."""
        shard, facts = self._shard(number)
        try:
            table = self._indexes.get(shard)
        except (UserError, OSError) as exc:
            kind = FaultKind.UNREACHABLE if isinstance(shard, RemoteShard) else FaultKind.UNREADABLE
            raise BadSample(kind, str(shard), f"sample {position}: {exc}") from exc
        if not facts.matches(table.facts):
            detail = f"sample {position}: the shard changed after it was indexed"
            raise BadSample(FaultKind.UNREADABLE, str(shard), detail)
        return table

    def _check(self, number: int, path: Path) -> None:
        """Refuses a copy that is not the shard that was indexed, and keeps the index of one that is."""
        shard, facts = self._shard(number)
        try:
            index = build_index(path, str(shard))
        except UserError as exc:
            raise RemoteError(str(exc)) from exc
        if facts.matches(index.facts):
            self._indexes.put(shard, index)
            return
        self._indexes.forget(shard)
        found = f"it has {len(index)} samples now" + (f"; {index.facts.damage}" if index.facts.damage else "")
        # A transfer that was cut off is worth another try.
        raise RemoteError(f"the shard changed after it was indexed: {found}", permanent=not index.facts.damage)

    def _locate(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return shard, index - int(self._ends[shard]) + self.shard_sizes[shard]

    def _read_captions(self, index: int, descriptor: int, members: Mapping[str, Member]) -> tuple[str, ...]:
        for field in self._captions:
            if field.suffix in members:
                try:
                    captions = field.extract(self._read(index, descriptor, members[field.suffix]))
                except ValueError as exc:
                    detail = f"the {field.suffix} member is unreadable: {exc}"
                    raise BadSample(FaultKind.MISSING_CAPTION, self.name(index), detail) from exc
                if captions:
                    return captions
        if not self.wants_captions:
            return ()
        wanted = " or ".join(map(str, self._captions))
        detail = f"no text in {wanted}; members: {', '.join(members)}"
        raise BadSample(FaultKind.MISSING_CAPTION, self.name(index), detail)

    def _read(self, index: int, descriptor: int, member: Member) -> bytes:
        data = os.pread(descriptor, member.size, member.offset)
        if len(data) != member.size:
            detail = f"{len(data)} of {member.size} bytes are there: the shard changed after it was indexed"
            raise BadSample(FaultKind.UNREADABLE, self.name(index), detail)
        return data

    def _descriptor(self, number: int) -> AbstractContextManager[int]:
        shard, _ = self._shard(number)
        # A copy is opened for each sample: one that is held open would still take room after it was deleted.
        if isinstance(shard, RemoteShard):
            return shard.cache.opened(shard, partial(self._check, number))
        return nullcontext(self._handle(number, shard))

    def _handle(self, number: int, shard: LocalShard) -> int:
        if number not in self._handles:
            self._handles[number] = os.open(shard.path, os.O_RDONLY)
            if len(self._handles) > _OPEN_SHARDS:
                os.close(self._handles.popitem(last=False)[1])
        self._handles.move_to_end(number)
        return self._handles[number]


def _name(location: str) -> str:
    """The name for the fingerprint: equal in any folder."""
    return file_name(location) if is_remote(location) else location.rpartition("/")[2]


class _CaptionField:
    """Where captions lie in a sample: a text member, or a field of a JSON member."""

    def __init__(self, text: str) -> None:
        self.suffix, _, self._field = text.partition(":")
        if (self.suffix == "json") != bool(self._field):
            raise UserError(f"the caption key {text!r} must be a suffix such as 'txt', or 'json:FIELD'")

    def __str__(self) -> str:
        return f"{self.suffix}:{self._field}" if self._field else self.suffix

    def extract(self, data: bytes) -> tuple[str, ...]:
        """The captions that are not blank. Raises ValueError if the data is not UTF-8 or not JSON."""
        text = data.decode("utf-8-sig")
        if not self._field:
            return not_blank([text])
        parsed: Any = json.loads(text)
        return not_blank(texts_of(parsed.get(self._field))) if isinstance(parsed, dict) else ()
