"""Files over HTTP on the loopback, with faults on demand."""

import hashlib
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class ShardServer:
    """Serves a folder.

    Attributes:
        faults: by file name, what happens to its next requests, one each; the last one goes on for ever if it is
            followed by 'always'. A status such as 503, 'stall' (half of the bytes, then none until `release`), or 'cut'
            (half of the bytes, then the end).
        requests: methods and paths, in order.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.faults: defaultdict[str, list[int | str]] = defaultdict(list)
        self.requests: list[str] = []
        self.stalled = threading.Event()
        self._released = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._server.server_port}"

    def url(self, name: str) -> str:
        return f"{self.address}/{name}"

    def gets(self, name: str) -> int:
        """How often a file was asked for."""
        return sum(request == f"GET /{name}" for request in self.requests)

    def release(self) -> None:
        """Ends what stalls, and lets nothing stall from now on."""
        self._released.set()

    @contextmanager
    def running(self) -> Iterator["ShardServer"]:
        thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.release()
            self._server.shutdown()
            self._server.server_close()
            thread.join()

    def _next_fault(self, name: str) -> int | str | None:
        faults = self.faults[name]
        if not faults:
            return None
        return faults[0] if faults[1:] == ["always"] else faults.pop(0)

    def _handler(server) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.answer(b"")

            def do_GET(self) -> None:
                self.answer(None)

            def answer(self, body: bytes | None) -> None:
                server.requests.append(f"{self.command} {self.path}")
                name = self.path.lstrip("/")
                fault = server._next_fault(name)
                file = server.folder / name
                if isinstance(fault, int) or not file.is_file():
                    self.send_error(fault if isinstance(fault, int) else 404)
                    return
                content = file.read_bytes()
                span = self.headers["Range"]
                self.send_response(206 if span else 200)
                self.send_header("ETag", f'"{hashlib.md5(content).hexdigest()}"')
                if span:
                    first, last = span.removeprefix("bytes=").split("-")
                    self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
                    content = content[int(first) : int(last) + 1]
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                content = content if body is None else body
                self.wfile.write(content[: len(content) // 2] if fault else content)
                if fault == "stall":
                    server.stalled.set()
                    server._released.wait(20)

            def log_message(self, *args: object) -> None:
                pass

        return Handler
