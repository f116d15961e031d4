"""Limits of a request: size, time, images, texts and access."""

import asyncio
import base64
import hmac
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from PIL import Image
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from evaclip.data.samples import UPRIGHT, BadSample, decode_image
from evaclip.pixels import open_image

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "AVIF")
_SCANS = 100
"""Of a JPEG file. Each costs a pass over all pixels and may take a few bytes; an image has some ten."""
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:;"
    " connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


@dataclass(frozen=True)
class Limits:
    """Limits of requests."""

    body: int = 16 << 20  # bytes of a request
    pixels: int = 50_000_000  # of an image
    images: int = 16  # of a request, as are the texts
    texts: int = 128
    length: int = 1000  # characters of a text
    top: int = 200  # results of a search
    requests: int = 128  # that are worked on at once
    waiting: int = 1024  # images and texts that wait to be encoded
    seconds: float = 30.0  # for a request


class Rejected(Exception):
    """A rejected request: HTTP status, and a sentence for the client."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason

    def response(self, headers: Mapping[str, str] | None = None) -> JSONResponse:
        """The response `{"error": reason}`, with `headers` or the headers of the status."""
        of_status = {503: {"Retry-After": "1"}, 401: {"WWW-Authenticate": 'Basic realm="evaclip", charset="UTF-8"'}}
        return JSONResponse({"error": self.reason}, self.status, headers or of_status.get(self.status))


def decode(data: bytes, limits: Limits) -> Image.Image:
    """The image in an uploaded file, upright. Its size is read, and judged, before any pixel.

    Raises:
        Rejected: it is not an image, a damaged one, or one with too many pixels.
    """
    try:
        header = open_image(data, formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as exc:
        raise _too_large(limits) from exc
    except Exception as exc:  # the parsers raise almost anything on damaged data
        formats = "JPEG, PNG, WebP, GIF or AVIF"
        raise Rejected(415, f"The file of {len(data):,} bytes is not a readable image; send {formats}.") from exc
    if header.width * header.height > limits.pixels:
        raise _too_large(limits, f" of {header.width:,} x {header.height:,} pixels")
    # Noise in files of other formats has these bytes too.
    if header.format in ("JPEG", "MPO") and data.count(b"\xff\xda") > _SCANS:
        raise Rejected(422, f"The JPEG file has more than {_SCANS} scans; save it anew.")
    try:
        return decode_image(data, "the image", UPRIGHT)
    except (BadSample, MemoryError) as exc:
        raise Rejected(422, "The image is damaged and can't be decoded; save it anew.") from exc


def _too_large(limits: Limits, size: str = "") -> Rejected:
    return Rejected(413, f"An image{size} is too large; send one of {limits.pixels:,} pixels at most.")


def check_texts(texts: Sequence[str], limits: Limits) -> None:
    """Raises Rejected where texts are too many, or one is too long."""
    if len(texts) > limits.texts:
        raise Rejected(422, f"There are {len(texts):,} texts; send {limits.texts:,} at most.")
    longest = max(map(len, texts), default=0)
    if longest > limits.length:
        raise Rejected(422, f"A text has {longest:,} characters; send {limits.length:,} at most.")


class Guard:
    """ASGI middleware that reads a request, and passes it on if it is within the limits and has the key.

    Work on a request ends after its time limit, and when the client disconnects. The middleware of starlette and the
    limits of uvicorn answer in plain text and without `Retry-After`; this one answers in JSON.

    Args:
        app: the application.
        limits: of requests.
        key: required as a bearer token or as the password of basic authentication; None for no key.
        hosts: accepted names of the server; see `create_app`.
    """

    def __init__(self, app: ASGIApp, limits: Limits, key: str | None = None, hosts: Sequence[str] = ("*",)) -> None:
        self._app, self._limits, self._key, self._hosts = app, limits, key, hosts
        self._running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        begun = False

        async def answer(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        try:
            headers = Headers(scope=scope)
            self._require_host(headers.get("host", ""))
            if scope["path"] != "/healthz":
                self._admit(headers)
            if self._running >= self._limits.requests:
                raise Rejected(503, "The server has too much to do; try again in a second.")
            self._running += 1
            try:
                await self._serve(scope, receive, answer)
            finally:
                self._running -= 1
        except Rejected as exc:
            if not begun:
                await exc.response()(scope, receive, answer)

    def _require_host(self, address: str) -> None:
        name = re.sub(r":\d*$", "", address.lower())
        if not any(name.endswith(host[1:]) if host.startswith("*") else name == host.lower() for host in self._hosts):
            raise Rejected(400, f"The server isn't called {address!r} here; ask for {', '.join(self._hosts)}.")

    def _admit(self, headers: Headers) -> None:
        if self._key is not None and not _has_key(headers.get("authorization", ""), self._key):
            raise Rejected(401, "The API key is missing or wrong; send it as 'Authorization: Bearer KEY'.")
        if headers.get("content-type", "").startswith("application/json"):
            raise Rejected(415, "Requests are forms, and this one is JSON; send multipart or URL-encoded fields.")
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self._limits.body:
            raise _too_long(self._limits)

    async def _serve(self, scope: Scope, receive: Receive, answer: Send) -> None:
        clock, seconds = asyncio.get_running_loop().time, self._limits.seconds
        end = clock() + seconds
        try:
            async with asyncio.timeout_at(end):
                body = await self._body(receive)
        except TimeoutError as exc:
            raise Rejected(408, f"The request didn't arrive within {seconds:g} seconds.") from exc
        if body is None:
            return
        messages: list[Message] = [{"type": "http.request", "body": body}]
        gone = asyncio.ensure_future(receive())

        async def replay() -> Message:
            return messages.pop() if messages else await asyncio.shield(gone)

        work = asyncio.ensure_future(self._app(scope, replay, answer))
        try:
            done, _ = await asyncio.wait({gone, work}, timeout=end - clock(), return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            work.cancel()
        if work in done:
            work.result()
        elif not done:
            raise Rejected(503, f"The answer took more than {seconds:g} seconds; try again later.")

    async def _body(self, receive: Receive) -> bytes | None:
        """The whole body; None if the client has disconnected."""
        body, more = bytearray(), True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            if len(body) > self._limits.body:
                raise _too_long(self._limits)
            more = message.get("more_body", False)
        return bytes(body)


def _too_long(limits: Limits) -> Rejected:
    return Rejected(413, f"The request is too large; send {limits.body >> 20} MiB at most.")


def _has_key(authorization: str, key: str) -> bool:
    scheme, _, token = authorization.partition(" ")
    if scheme.lower() == "basic":
        with suppress(ValueError):
            token = base64.b64decode(token).decode("utf-8").partition(":")[2]
    elif scheme.lower() != "bearer":
        return False
    return hmac.compare_digest(token.strip().encode("utf-8", "replace"), key.encode())
