"""The headers of a plain tar shard, read by themselves and parsed together: no Python object a member.

What most writers make (ustar, GNU or pax headers that add times and owners only, members of a sample side by side)
is served here. Anything else, damage too, is left to `tarfile`, which is slower and knows what to say.
"""

import os
import re
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

I64 = NDArray[np.int64]
U8 = NDArray[np.uint8]

BLOCK = 512
_RECORD = 20 * BLOCK
_AHEAD = 8 * BLOCK
_TOGETHER = 8192
_NAME, _SIZE, _SUM, _TYPE = slice(0, 100), slice(124, 136), slice(148, 156), 156
_MAGIC, _PREFIX = slice(257, 262), slice(345, 500)
_FILE, _FOLDER, _PAX = (0, ord("0")), ord("5"), ord("x")
_LONGEST_PAX = 16 * BLOCK
# What changes neither name nor size of the member that follows.
_HARMLESS = re.compile(rb"(?:\d+ (?:[acm]time|[ug]id|[ug]name|comment)=[^\n\0]*\n)+\0*")


class Members(NamedTuple):
    """The members of a shard, those of a sample side by side.

    Attributes:
        key_text: the UTF-8 keys, one after the other.
        key_ends: int64 [n], where they end in it.
        starts: int64 [n + 1]; members starts[i]:starts[i + 1] belong to sample i.
        suffixes: the k distinct suffixes, lower case, sorted.
        codes: int64 [m], of each member's suffix.
        offsets, sizes: int64 [m], in bytes.
    """

    key_text: U8
    key_ends: I64
    starts: I64
    suffixes: list[str]
    codes: I64
    offsets: I64
    sizes: I64


def scan(descriptor: int) -> Members | None:
    """The members of a sound plain tar; None where `tarfile` has to look. Raises OSError."""
    try:
        chunks = _walk(descriptor)
    except ValueError:
        return None
    names, offsets, sizes = (np.concatenate(parts) for parts in zip(*chunks, strict=True))
    return _grouped(names, offsets, sizes) if len(names) else None


def _walk(descriptor: int) -> list[tuple[U8, I64, I64]]:
    """Names [k, 100], offsets [k] and sizes [k] of files, by chunks. Raises ValueError for what isn't plain."""
    end, position = os.fstat(descriptor).st_size, 0
    ahead, base = b"", 0
    chunks, headers, offsets, sizes = list[tuple[U8, I64, I64]](), list[bytes](), list[int](), list[int]()
    while True:
        at = position - base
        # A sample's small members follow one another, so that one read has the headers of all.
        if at + BLOCK > len(ahead):
            ahead, base, at = os.pread(descriptor, _AHEAD, position), position, 0
        header = ahead[at : at + BLOCK]
        if len(header) < BLOCK:
            raise ValueError("no end-of-archive mark")
        if not header[0]:
            break
        kind, size = header[_TYPE], int(header[_SIZE].rstrip(b"\0"), 8)
        position += BLOCK
        if kind == _PAX:
            if not (0 <= size <= _LONGEST_PAX and _HARMLESS.fullmatch(os.pread(descriptor, size, position))):
                raise ValueError("a pax header of more than times and owners")
        elif kind == _FOLDER:
            size = 0
        elif kind not in _FILE or size < 0:
            raise ValueError("an unusual type of member")
        if position + size > end:
            raise ValueError("a member that is cut off")
        headers.append(header)
        offsets.append(position)
        sizes.append(size)
        position += (size + BLOCK - 1) // BLOCK * BLOCK
        if len(headers) == _TOGETHER:
            chunks.append(_files(headers, offsets, sizes))
            headers, offsets, sizes = [], [], []
    if any(os.pread(descriptor, _RECORD, position)):
        raise ValueError("a header without a name")
    return [*chunks, _files(headers, offsets, sizes)]


def _files(parts: list[bytes], offsets: list[int], sizes: list[int]) -> tuple[U8, I64, I64]:
    """Of some headers those of files, once their checksums are compared."""
    headers = np.frombuffer(b"".join(parts), np.uint8).reshape(-1, BLOCK)
    sums = headers.sum(axis=1, dtype=np.int64) - headers[:, _SUM].sum(axis=1, dtype=np.int64) + 8 * ord(" ")
    told = np.zeros(len(headers), np.int64)
    for column in headers[:, _SUM].T.astype(np.int64):
        told = np.where((column >= ord("0")) & (column < ord("8")), told * 8 + column - ord("0"), told)
    names = headers[:, _NAME]
    ended = np.maximum.accumulate(names == 0, axis=1)
    odd = (names > 127).any() or (names * ended).any() or headers[:, _PREFIX].any() or (names[:, 0] == ord("/")).any()
    if odd or not np.array_equal(sums, told) or (headers[:, _MAGIC] != np.frombuffer(b"ustar", np.uint8)).any():
        raise ValueError("an unusual header")
    kept = np.isin(headers[:, _TYPE], _FILE)
    return names[kept], np.array(offsets, np.int64)[kept], np.array(sizes, np.int64)[kept]


def _grouped(names: U8, offsets: I64, sizes: I64) -> Members | None:
    """The members by sample; None if members of a sample lie apart or come again."""
    columns = np.arange(names.shape[1], dtype=np.uint8)
    ends = np.where((names == 0).any(axis=1), (names == 0).argmax(axis=1), names.shape[1])
    bases = np.where(names == ord("/"), columns + 1, 0).max(axis=1)
    if (bases == ends).any():
        return None
    pairs = np.stack([_at(names, bases), _at(names, bases + 1)], axis=1)
    hidden = (pairs == np.frombuffer(b"._", np.uint8)).all(axis=1) | (pairs == ord("_")).all(axis=1)
    names, offsets, sizes, ends, bases = (part[~hidden] for part in (names, offsets, sizes, ends, bases))
    if not len(names):
        return None
    dots = (names == ord(".")) & (columns >= bases[:, None])
    stems = np.where(dots.any(axis=1), dots.argmax(axis=1), ends)
    in_key = columns < stems[:, None]
    keys = np.where(in_key, names, 0)
    first = np.flatnonzero(np.r_[True, (keys[1:] != keys[:-1]).any(axis=1)])
    if len(np.unique(keys[first].view("S100"))) != len(first):
        return None
    width = int((ends - stems).max())
    letters = np.stack(
        [np.where(stems + 1 + i < ends, _at(names, stems + 1 + i), 0) for i in range(width or 1)], axis=1
    )
    letters += (32 * ((letters >= ord("A")) & (letters <= ord("Z")))).astype(np.uint8)
    suffixes, codes = np.unique(np.ascontiguousarray(letters).view(f"S{width or 1}").ravel(), return_inverse=True)
    starts = np.r_[first, len(names)]
    sample = np.repeat(np.arange(len(first)), np.diff(starts))
    if len(np.unique(sample * len(suffixes) + codes)) != len(names):
        return None
    text = names[first][in_key[first]]
    return Members(text, np.cumsum(stems[first]), starts, [str(s, "ascii") for s in suffixes], codes, offsets, sizes)


def _at(names: U8, columns: I64) -> U8:
    """The bytes at one column of each row; what lies beyond the last column is 0."""
    inside = np.minimum(columns, names.shape[1] - 1)
    return np.where(columns < names.shape[1], names[np.arange(len(names)), inside], 0).astype(np.uint8)
