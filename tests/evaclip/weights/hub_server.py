"""A hub on loopback: the routes and headers that huggingface_hub's client asks for, over files in memory."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from huggingface_hub import constants

COMMIT = "0123456789abcdef0123456789abcdef01234567"
_COMMIT_ROUTE = re.compile(r"/api/models/(?P<repository>[^/]+/[^/]+)/(?P<verb>preupload|commit)/(?P<revision>[^?]+)")
_INFO_ROUTE = re.compile(r"/api/models/(?P<repository>[^/]+/[^/?]+)")
_ROUTE = re.compile(r"/(?P<repository>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<name>[^?]+)")


@dataclass
class Hub:
    """What the server has, and what it was asked for."""

    files: dict[tuple[str, str], bytes]
    damaged: bool = False
    """Whether downloads differ from what the checksum promises."""
    token: str = "right"
    """What may write."""
    private: set[str] = field(default_factory=set)
    """Repositories that were made private."""
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    """Method, file and range of each request."""
    url: str = ""


def ask(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Does what HF_ENDPOINT does when the client is imported, and lets it wait for nothing."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Runs the server in a thread; `hub.url` is what HF_ENDPOINT must be."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def do_POST(self) -> None:
            sent = self.rfile.read(int(self.headers["Content-Length"]))
            hub.requests.append((self.command, self.path, None))
            if self.headers.get("Authorization") != f"Bearer {hub.token}":
                self._tell(401, {"error": "Invalid username or password."})
            elif match := _COMMIT_ROUTE.match(self.path):
                self._tell(200, _commit(hub, match["repository"], match["verb"], sent))
            elif self.path.startswith("/api/repos/create"):
                asked = json.loads(sent)
                repository = f"{asked.get('organization') or 'me'}/{asked['name']}"
                if asked.get("visibility", asked.get("private")) in (True, "private"):
                    hub.private.add(repository)
                self._tell(200, {"url": f"{hub.url}/{repository}", "id": repository})
            else:
                self._tell(200, {"errors": [], "warnings": []})

        def _tell(self, status: int, answer: dict[str, Any]) -> None:
            body = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def _answer(self, with_body: bool) -> None:
            match = _ROUTE.match(self.path)
            name = match["name"] if match else self.path
            asked = self.headers.get("Range")
            hub.requests.append((self.command, name, asked))
            content = hub.files.get((match["repository"], name)) if match else None
            if content is None:
                named = match or _INFO_ROUTE.match(self.path)
                known = named and any(repository == named["repository"] for repository, _ in hub.files)
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


def _commit(hub: Hub, repository: str, verb: str, sent: bytes) -> dict[str, Any]:
    """Takes whole files, as the hub does of small ones."""
    if verb == "preupload":
        paths = [file["path"] for file in json.loads(sent)["files"]]
        return {"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]}
    for line in map(json.loads, sent.splitlines()):
        if line["key"] == "file":
            hub.files[repository, line["value"]["path"]] = base64.b64decode(line["value"]["content"])
    return {"commitUrl": f"{hub.url}/{repository}/commit/{COMMIT}", "commitOid": COMMIT, "success": True}
