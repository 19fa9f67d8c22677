"""A small server on loopback that speaks the Hub's API: listings, files, redirects to another host, and its errors.

It answers what `huggingface_hub` asks as huggingface.co does: status codes, `X-Error-Code`, ranges. Large files are
redirected to another host name, as the Hub does to its content network, which has no business with the token.
"""

from __future__ import annotations

import hashlib
import http.server
import json
import re
import threading
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Self

LARGE = 4096
"""Files from so many bytes on are stored in Git LFS, with a SHA-256; smaller ones have git's own id."""


@dataclass
class Repository:
    """A repository: its files, the commits of branches and tags, and how reading a file is refused, if it is.

    A refusal is the status, the `X-Error-Code` or an empty string, and the `X-Error-Message`.
    """

    files: dict[str, bytes]
    commit: str = "c0ffee" * 6 + "c0ff"
    revisions: dict[str, str] = field(default_factory=dict)
    refusal: tuple[int, str, str] | None = None

    @classmethod
    def of(cls, folder: Path) -> Repository:
        """Publish the files of a folder."""
        return cls({path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()})


class Request(NamedTuple):
    """A request: to which server, path, range and token; and how many bytes of a file went out."""

    server: str
    path: str
    range: str | None
    authorization: str | None
    sent: int


class HubServer:
    """The Hub and its content network; a context manager.

    Attributes:
        cuts: bytes of a file after which the connection breaks, once each.
        altered: what is sent of a file in place of a body.
        served: what there is of a file in place of what is listed.
        ranges: whether a part of a file may be asked for.
        endpoint: what HF_ENDPOINT is set to.
        cdn: the content network; another host name, so that redirects there leave the origin.
    """

    token = "hf_right"

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.cuts: dict[str, list[int]] = {}
        self.altered: dict[str, Callable[[bytes], bytes]] = {}
        self.served: dict[str, bytes] = {}
        self.ranges = True
        self.requests: list[Request] = []

    def __enter__(self) -> Self:
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self.cdn = f"http://localhost:{self._server.server_port}"
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def gets(self, file: str) -> list[Request]:
        """The requests that were answered with the content of a file."""
        return [request for request in self.requests if request.path.endswith(f"/{file}") and request.sent]

    def bytes_sent(self, file: str) -> int:
        """How much of a file went out in all."""
        return sum(request.sent for request in self.gets(file))


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._sent = 0
        self._token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        server = "cdn" if self.headers["Host"].startswith("localhost") else "hub"
        try:
            if server == "cdn":
                owner, name, file = path.lstrip("/").split("/", 2)
                self._content(file, self.hub.repositories[f"{owner}/{name}"].files[file])
            elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
                self._listing(match[1], match[2] or "main")
            elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                self._file(*match.groups())
            else:
                self._refuse(404, "", "Not here")
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        finally:
            asked = (self.headers.get("Range"), self.headers.get("Authorization"))
            self.hub.requests.append(Request(server, path, *asked, self._sent))

    def _found(self, name: str, revision: str) -> tuple[Repository, str] | None:
        """Return a repository and a commit of it, or refuse and return None."""
        repository = self.hub.repositories.get(name)
        if self._token not in {"", self.hub.token}:
            self._refuse(401, "", "Invalid credentials in Authorization header")
        elif repository is None and self._token:
            self._refuse(404, "RepoNotFound", "Repository not found")
        elif repository is None:
            # To those without a token the Hub does not tell what does not exist from what is private.
            self._refuse(401, "", "Invalid username or password.")
        else:
            revisions = {"main": repository.commit} | repository.revisions
            if commit := (revisions | {commit: commit for commit in revisions.values()}).get(revision):
                return repository, commit
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return None

    def _listing(self, name: str, revision: str) -> None:
        if (found := self._found(name, revision)) is None:
            return
        siblings = []
        for file, content in found[0].files.items():
            blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            sibling: dict[str, object] = {"rfilename": file, "size": len(content), "blobId": blob}
            if len(content) >= LARGE:
                sha256 = hashlib.sha256(content).hexdigest()
                sibling["lfs"] = {"sha256": sha256, "size": len(content), "pointerSize": 134}
            siblings.append(sibling)
        body = json.dumps({"id": name, "modelId": name, "sha": found[1], "siblings": siblings}).encode()
        self._send(200, {"Content-Type": "application/json"}, body)

    def _file(self, name: str, revision: str, file: str) -> None:
        if (found := self._found(name, revision)) is None:
            return
        repository, _ = found
        if repository.refusal:
            self._refuse(*repository.refusal)
        elif file not in repository.files:
            self._refuse(404, "EntryNotFound", "Entry not found")
        elif len(repository.files[file]) < LARGE:
            self._content(file, repository.files[file])
        else:
            self._send(302, {"Location": f"{self.hub.cdn}/{name}/{file}"}, b"")

    def _content(self, file: str, content: bytes) -> None:
        content = self.hub.served.get(file, content)
        status, start, headers = 200, 0, {}
        if self.hub.ranges and (match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")):
            start = int(match[1])
            if start >= len(content):
                self._send(416, {"Content-Range": f"bytes */{len(content)}"}, b"")
                return
            status, headers = 206, {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
        body = self.hub.altered.get(file, bytes)(content[start:])
        cut = self.hub.cuts[file].pop(0) if self.hub.cuts.get(file) else None
        self._send(status, headers, body, cut)

    def _refuse(self, status: int, code: str, message: str) -> None:
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self._send(status, headers, json.dumps({"error": message}).encode())

    def _send(self, status: int, headers: dict[str, str], body: bytes, cut: int | None = None) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        while left := memoryview(body)[self._sent : cut]:
            self._sent += self.wfile.write(left[:16384])
        if cut is not None:
            self.close_connection = True
