"""A hub on loopback: the routes and headers that huggingface_hub's client asks for, over files in memory."""

import hashlib
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"
_ROUTE = re.compile(r"/(?P<repository>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<name>[^?]+)")


@dataclass
class Hub:
    """What the server has, and what it was asked for."""

    files: dict[tuple[str, str], bytes]
    break_after: int | None = None
    """Bytes after which the next download breaks off."""
    damaged: bool = False
    """Whether downloads differ from what the checksum promises."""
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    """Method, file and range of each request."""
    url: str = ""


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Runs the server in a thread; `hub.url` is what HF_ENDPOINT must be."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def _answer(self, with_body: bool) -> None:
            match = _ROUTE.match(self.path)
            name = match["name"] if match else self.path
            asked = self.headers.get("Range")
            hub.requests.append((self.command, name, asked))
            content = hub.files.get((match["repository"], name)) if match else None
            if content is None:
                known = match and any(repository == match["repository"] for repository, _ in hub.files)
                self.send_response(404)
                self.send_header("X-Error-Code", "EntryNotFound" if known else "RepoNotFound")
                self.send_header("X-Repo-Commit", COMMIT)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            first = int(asked.removeprefix("bytes=").split("-")[0]) if asked else 0
            body = content[first:]
            self.send_response(206 if asked else 200)
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(len(body)))
            if asked:
                self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
            self.end_headers()
            if not with_body:
                return
            if hub.damaged:
                body = body[:-1] + bytes([body[-1] ^ 1])
            if hub.break_after is not None:
                body, hub.break_after = body[: hub.break_after], None
                self.close_connection = True
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
