"""Tar shards as WebDataset and img2dataset write them."""

import json
import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from evaclip.data.samples import BadSample, Fault, FaultKind, RawSample
from evaclip.data.source import Source, hash_list
from evaclip.data.tar_index import IndexCache, Member
from evaclip.errors import UserError

IMAGE_KEY = "jpg;jpeg;png;webp"
CAPTION_KEY = "txt;json:caption"
_OPEN_SHARDS = 64


class WebDatasetSource(Source):
    """Samples of plain tar shards, read with one `pread` per member.

    `image_key` lists member suffixes by preference, `caption_key` captions: 'txt' is the text of a member,
    'json:FIELD' a string or a list of strings in a JSON member. A damaged shard counts up to the damage and
    is listed in `faults`. Raises UserError if a file is no plain tar or no sample is left.
    """

    def __init__(self, paths: Sequence[Path], image_key: str = IMAGE_KEY, caption_key: str = CAPTION_KEY) -> None:
        self._paths = list(paths)
        self._image_suffixes = image_key.split(";")
        self._captions = [_CaptionField(text) for text in caption_key.split(";")]
        self._indexes = IndexCache()
        self._handles: OrderedDict[int, int] = OrderedDict()
        facts = [(len(index), index.damage, index.digest) for index in self._indexes.get_all(self._paths)]
        self._digests = [digest for _, _, digest in facts]
        self.description = f"{len(paths)} shards, the first {paths[0]}" if len(paths) > 1 else str(paths[0])
        self.shard_sizes = [size for size, _, _ in facts]
        self.faults = [
            Fault(FaultKind.DAMAGED_SHARD, str(path), f"{damage}; its first {size} samples are used")
            for path, (size, damage, _) in zip(self._paths, facts, strict=True)
            if damage
        ]
        self.fingerprint = hash_list(
            "webdataset",
            ((path.name, digest) for path, digest in zip(self._paths, self._digests, strict=True)),
        )
        self._ends = list(accumulate(self.shard_sizes))
        if not self._ends[-1]:
            reasons = "".join(f"; {fault.name}: {fault.detail}" for fault in self.faults[:1])
            raise UserError(f"there are 0 samples in {len(paths)} shard(s), the first {paths[0]}{reasons}")

    def __getitem__(self, index: int) -> RawSample:
        shard, position = self._locate(index)
        table = self._indexes.get(self._paths[shard])
        if table.digest != self._digests[shard]:
            detail = f"sample {position}: the shard changed after it was indexed"
            raise BadSample(FaultKind.UNREADABLE, str(self._paths[shard]), detail)
        members = table.members(position)
        image = next((members[suffix] for suffix in self._image_suffixes if suffix in members), None)
        if image is None:
            found = ", ".join(members) or "nothing"
            detail = f"no member {' or '.join(self._image_suffixes)}, only {found}"
            raise BadSample(FaultKind.MISSING_IMAGE, self.name(index), detail)
        if image.size == 0:
            raise BadSample(FaultKind.MISSING_IMAGE, self.name(index), "the image member has 0 bytes")
        captions = self._read_captions(index, shard, members)
        return RawSample(table.keys[position], self._read(index, shard, image), captions)

    def name(self, index: int) -> str:
        shard, position = self._locate(index)
        path = self._paths[shard]
        return f"{path}:{self._indexes.get(path).keys[position]}"

    def close(self) -> None:
        while self._handles:
            os.close(self._handles.popitem()[1])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handles": OrderedDict()}

    def __del__(self) -> None:
        if hasattr(self, "_handles"):
            self.close()

    def _locate(self, index: int) -> tuple[int, int]:
        if not 0 <= index < self._ends[-1]:
            raise IndexError(f"sample {index} of {self._ends[-1]}")
        shard = bisect_right(self._ends, index)
        return shard, index - (self._ends[shard] - self.shard_sizes[shard])

    def _read_captions(self, index: int, shard: int, members: Mapping[str, Member]) -> tuple[str, ...]:
        for field in self._captions:
            if field.suffix in members:
                try:
                    captions = field.extract(self._read(index, shard, members[field.suffix]))
                except ValueError as exc:
                    detail = f"the {field.suffix} member is unreadable: {exc}"
                    raise BadSample(FaultKind.MISSING_CAPTION, self.name(index), detail) from exc
                if captions:
                    return captions
        wanted = " or ".join(map(str, self._captions))
        detail = f"no text in {wanted}; members: {', '.join(members)}"
        raise BadSample(FaultKind.MISSING_CAPTION, self.name(index), detail)

    def _read(self, index: int, shard: int, member: Member) -> bytes:
        try:
            data = os.pread(self._handle(shard), member.size, member.offset)
        except OSError as exc:
            raise BadSample(FaultKind.UNREADABLE, self.name(index), str(exc)) from exc
        if len(data) != member.size:
            detail = f"{len(data)} of {member.size} bytes are there: the shard changed after it was indexed"
            raise BadSample(FaultKind.UNREADABLE, self.name(index), detail)
        return data

    def _handle(self, shard: int) -> int:
        if shard not in self._handles:
            self._handles[shard] = os.open(self._paths[shard], os.O_RDONLY)
            if len(self._handles) > _OPEN_SHARDS:
                os.close(self._handles.popitem(last=False)[1])
        self._handles.move_to_end(shard)
        return self._handles[shard]


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
        values: Any = text
        if self._field:
            parsed = json.loads(text)
            values = parsed.get(self._field) if isinstance(parsed, dict) else None
        listed = values if isinstance(values, list) else [values]
        # A number is a caption too: class labels often are.
        texts = (str(value) for value in listed if isinstance(value, str | int) and not isinstance(value, bool))
        stripped = (text.strip() for text in texts)
        return tuple(caption for caption in stripped if caption)
