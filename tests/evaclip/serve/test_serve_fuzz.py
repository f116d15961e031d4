"""A thousand damaged and hostile uploads: each gets an answer that isn't the server's failure, and the server lives."""

import io
import random
import struct
import zipfile
import zlib
from collections import Counter

import pytest
from image_files import as_file
from PIL import Image
from starlette.testclient import TestClient

from evaclip.serve import create_app

UPLOADS = 1000
_SVG = (
    b'<?xml version="1.0"?><!DOCTYPE svg [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;">'
    b'<!ENTITY c "&b;&b;&b;&b;&b;&b;&b;&b;">]><svg xmlns="http://www.w3.org/2000/svg">&c;&c;&c;</svg>'
)


def _chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png(width, height, rows, *chunks):
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        (_chunk(b"IHDR", header), *chunks, _chunk(b"IDAT", zlib.compress(rows)), _chunk(b"IEND", b""))
    )


def _bombs():
    """Files that are small and would become large."""
    jpeg = bytearray(as_file(Image.new("RGB", (64, 64), "red"), "JPEG"))
    at = jpeg.index(b"\xff\xc0") + 5
    jpeg[at : at + 4] = b"\xff\xff\xff\xff"
    webp = bytearray(as_file(Image.new("RGB", (64, 64), "red"), "WEBP"))
    webp[26:30] = b"\xff\x3f\xff\x3f"
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("bomb.png", bytes(4 << 20))
    text = _chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(8 << 20)))
    profile = _chunk(b"iCCP", b"profile\0\0" + zlib.compress(bytes(8 << 20)))
    gif = b"GIF89a" + struct.pack("<HH", 65535, 65535) + b"\x80\0\0\0\0\0\xff\xff\xff,\0\0\0\0" + b"\xff" * 4
    return [
        _png(60_000, 60_000, bytes(1 << 20)), _png(2**31 - 1, 2**31 - 1, b""), _png(8, 8, bytes(1 << 20)),
        _png(8, 8, bytes(200), text), _png(8, 8, bytes(200), profile), _png(0, 0, b""), bytes(jpeg), bytes(webp),
        archive.getvalue(), gif, _SVG, as_file(Image.new("RGB", (64, 64)), "JPEG") + b"\xff\xda" * 999,
    ]  # fmt: skip


def _whole(draw):
    noise = Image.frombytes("RGB", (32, 24), draw.randbytes(32 * 24 * 3))
    files = [as_file(noise.convert(mode), kind) for kind, mode in (
        ("JPEG", "RGB"), ("JPEG", "CMYK"), ("JPEG", "L"), ("PNG", "RGB"), ("PNG", "RGBA"), ("PNG", "P"), ("PNG", "1"),
        ("PNG", "I;16"), ("WEBP", "RGB"), ("WEBP", "RGBA"), ("GIF", "P"), ("AVIF", "RGB"), ("TIFF", "RGB"),
    )]  # fmt: skip
    return [*files, as_file(noise, "JPEG", progressive=True), as_file(noise, "WEBP", lossless=True)]


def _damaged(draw, whole):
    """Cut off, with bits flipped, a piece missing or doubled, wrong sizes, or two files in one."""
    data = bytearray(draw.choice(whole))
    kind = draw.randrange(6)
    at, length = draw.randrange(len(data)), draw.randrange(1, 40)
    if kind == 0:
        del data[at:]
    elif kind == 1:
        for _ in range(draw.choice((1, 3, 30))):
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    elif kind == 2:
        del data[at : at + length]
    elif kind == 3:
        data[at:at] = data[at : at + length] * draw.choice((1, 100))
    elif kind == 4:  # sizes stand near the beginning
        at = draw.randrange(min(200, len(data)))
        data[at : at + 4] = draw.choice((b"\xff\xff\xff\xff", bytes(4), b"\x7f\xff\xff\xff", b"\0\0\xff\xff"))
    else:
        data = data[:at] + draw.choice(whole)[at:]
    return bytes(data)


def _uploads():
    draw = random.Random(0)
    whole, bombs = _whole(draw), _bombs()
    yield from whole
    yield from bombs
    for _ in range(UPLOADS - len(whole) - len(bombs)):
        yield draw.randbytes(draw.randrange(3000)) if draw.random() < 0.05 else _damaged(draw, whole)


@pytest.mark.slow
def test_damaged_uploads_are_rejected(store, encoder, pictures):
    found = Counter()
    app = create_app(store, encoder, delay=0)
    with TestClient(app, raise_server_exceptions=False) as client:
        for number, data in enumerate(_uploads()):
            path = ("/embed/image", "/search")[number % 2]
            answer = client.post(path, files={"image": ("a.png", data)}, data={"top": "1"} if number % 2 else {})
            found[answer.status_code] += 1
            assert answer.status_code in (200, 413, 415, 422), (number, answer.text)
            assert answer.status_code == 200 or answer.json()["error"].endswith("."), number
        whole = client.post("/search", files={"image": as_file(pictures[0])})
        assert whole.json()["results"][0]["row"] == 0
    assert found.total() == UPLOADS
    assert all(found[status] for status in (200, 413, 415, 422)), found
