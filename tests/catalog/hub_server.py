"""A small server on loopback that speaks the Hub's API: listings, files, redirects to another host, and its errors.

It answers as huggingface.co does to what `huggingface_hub` asks: status codes, `X-Error-Code`, `X-Repo-Commit`, ETags,
ranges. Large files are redirected to a second server, as the Hub does to its content network, which has no business
with the token.
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
    """A repository. `gated`, `private`: needs the server's token; `granted`: whether its account was let in."""

    files: dict[str, bytes]
    commit: str = "c0ffee" * 6 + "c0ff"
    revisions: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    granted: bool = True
    private: bool = False
    forbidden: bool = False

    @classmethod
    def of(cls, folder: Path, **options: object) -> Repository:
        """Publish the files of a folder."""
        return cls({path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}, **options)  # type: ignore[arg-type]  # fields


@dataclass(frozen=True)
class Request:
    """What was asked: by which server, path, range and token; and how many bytes of a file went out."""

    server: str
    method: str
    path: str
    range: str | None
    authorization: str | None
    sent: int = 0


class Hold:
    """Keep back the rest of a file, once `after` bytes are sent, until it is released."""

    def __init__(self, after: int) -> None:
        self.after = after
        self.reached = threading.Event()
        self.released = threading.Event()

    def pause(self) -> None:
        """Wait, in the server's thread."""
        self.reached.set()
        self.released.wait()


def once(change: Callable[[bytes], bytes]) -> Callable[[bytes], bytes]:
    """Return a change of the bodies of a file that is made to the first only."""
    changes = iter([change])

    def altered(body: bytes) -> bytes:
        return next(changes, bytes)(body)

    return altered


class HubServer:
    """The Hub and its content network; a context manager."""

    token = "hf_right"

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.cuts: dict[str, list[int]] = {}
        """Bytes of a file after which the connection breaks, once each."""
        self.altered: dict[str, Callable[[bytes], bytes]] = {}
        """What is sent of a file in place of a body."""
        self.ranges = True
        """Whether a part of a file may be asked for."""
        self.served: dict[str, bytes] = {}
        """What there is of a file in place of what is listed."""
        self.holds: dict[str, Hold] = {}
        self.requests: list[Request] = []
        self._servers: list[http.server.ThreadingHTTPServer] = []

    def __enter__(self) -> Self:
        for name in ("hub", "cdn"):
            handler = type("Handler", (_Handler,), {"hub": self, "name": name})
            server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
            self._servers.append(server)
        return self

    def __exit__(self, *_: object) -> None:
        for hold in self.holds.values():
            hold.released.set()
        for server in self._servers:
            server.shutdown()
            server.server_close()

    @property
    def endpoint(self) -> str:
        """What HF_ENDPOINT is set to."""
        return f"http://127.0.0.1:{self._servers[0].server_port}"

    @property
    def cdn(self) -> str:
        """Another host name, so that redirects there leave the origin."""
        return f"http://localhost:{self._servers[1].server_port}"

    def gets(self, file: str) -> list[Request]:
        """The requests that were answered with the content of a file."""
        return [r for r in self.requests if r.method == "GET" and r.path.endswith(f"/{file}") and r.sent]

    def bytes_sent(self, file: str) -> int:
        """How much of a file went out in all."""
        return sum(request.sent for request in self.gets(file))


class _Refusal(NamedTuple):
    status: int
    code: str
    message: str


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer
    name: str

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        self._sent = 0
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        try:
            if self.name == "cdn":
                self._cdn(path)
            elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
                self._listing(match[1], match[2] or "main")
            elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                self._file(*match.groups())
            else:
                self._error(404, "", "Not here")
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        finally:
            wanted, token = self.headers.get("Range"), self.headers.get("Authorization")
            self.hub.requests.append(Request(self.name, self.command, path, wanted, token, self._sent))

    def _repository(self, name: str, revision: str, *, listing: bool) -> tuple[Repository, str] | None:
        found = self._look_up(name, revision, listing=listing)
        if isinstance(found, _Refusal):
            self._error(*found)
            return None
        return found

    def _look_up(self, name: str, revision: str, *, listing: bool) -> tuple[Repository, str] | _Refusal:
        given = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if given and given != self.hub.token:
            return _Refusal(401, "", "Invalid credentials in Authorization header")
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and not given):
            # To those without a token the Hub does not tell what does not exist from what is private.
            if given:
                return _Refusal(404, "RepoNotFound", "Repository not found")
            return _Refusal(401, "", "Invalid username or password.")
        commit = {"main": repository.commit, repository.commit: repository.commit, **repository.revisions}.get(revision)
        if commit is None:
            return _Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if repository.gated and not listing and given != self.hub.token:
            return _Refusal(401, "GatedRepo", "Access to model is restricted.")
        if repository.gated and not listing and not repository.granted:
            return _Refusal(403, "GatedRepo", "Your access request is awaiting a review.")
        if repository.forbidden and not listing:
            return _Refusal(403, "", "Fine-grained token lacks the permission")
        return repository, commit

    def _listing(self, name: str, revision: str) -> None:
        found = self._repository(name, revision, listing=True)
        if found is None:
            return
        repository, commit = found
        siblings = []
        for file, content in repository.files.items():
            sibling: dict[str, object] = {"rfilename": file, "size": len(content), "blobId": _blob_id(content)}
            if len(content) >= LARGE:
                sha256 = hashlib.sha256(content).hexdigest()
                sibling["lfs"] = {"sha256": sha256, "size": len(content), "pointerSize": 134}
            siblings.append(sibling)
        body = json.dumps({"id": name, "modelId": name, "sha": commit, "siblings": siblings}).encode()
        self._send(200, {"Content-Type": "application/json"}, body)

    def _file(self, name: str, revision: str, file: str) -> None:
        found = self._repository(name, revision, listing=False)
        if found is None:
            return
        repository, commit = found
        if file not in repository.files:
            self._error(404, "EntryNotFound", "Entry not found")
            return
        content = repository.files[file]
        headers = {"X-Repo-Commit": commit, "ETag": f'"{_blob_id(content)}"'}
        if len(content) < LARGE:
            self._content(file, content, headers)
            return
        headers |= {
            "Location": f"{self.hub.cdn}/{name}/{file}",
            "X-Linked-Size": str(len(content)),
            "X-Linked-ETag": f'"{hashlib.sha256(content).hexdigest()}"',
        }
        self._send(302, headers, b"")

    def _cdn(self, path: str) -> None:
        owner, name, file = path.lstrip("/").split("/", 2)
        self._content(file, self.hub.repositories[f"{owner}/{name}"].files[file], {})

    def _content(self, file: str, content: bytes, headers: dict[str, str]) -> None:
        content = self.hub.served.get(file, content)
        status, start = 200, 0
        if self.hub.ranges and (match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")):
            start = int(match[1])
            if start >= len(content):
                self._send(416, {"Content-Range": f"bytes */{len(content)}"}, b"")
                return
            status = 206
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        body, cut = content[start:], None
        if self.command == "GET":
            body = self.hub.altered.get(file, bytes)(body)
            cut = self.hub.cuts[file].pop(0) if self.hub.cuts.get(file) else None
        self._send(status, headers, body, cut=cut, hold=self.hub.holds.get(file))

    def _error(self, status: int, code: str, message: str) -> None:
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self._send(status, headers, json.dumps({"error": message}).encode())

    def _send(
        self, status: int, headers: dict[str, str], body: bytes, *, cut: int | None = None, hold: Hold | None = None
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        for start in range(0, len(body), 16384):
            chunk = body[start : start + 16384][: None if cut is None else max(0, cut - start)]
            if hold is not None and self._sent >= hold.after:
                hold.pause()
            self.wfile.write(chunk)
            self._sent += len(chunk)
        if cut is not None:
            self.close_connection = True


def _blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
