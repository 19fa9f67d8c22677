"""Files from the Hugging Face Hub: what a repository holds, and downloads that go on where they stopped.

`huggingface_hub` speaks to the Hub (tokens, mirrors, redirects, retries). Its own download functions throw away a
half-finished file when the process ends, hours of work for one on a slow line; here it stays, and is continued.
"""

import contextlib
import hashlib
import logging
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import huggingface_hub
from huggingface_hub import HfApi, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # exported, but lazily
    build_hf_headers,
    hf_raise_for_status,
    http_stream_backoff,
)

from edge_phi3.catalog.listing import HubError, RemoteFile, Snapshot, UnreachableError
from edge_phi3.catalog.manifest import FileRecord
from edge_phi3.files import PARTIAL_SUFFIX, sha256_of
from edge_phi3.progress import ProgressReporter, Step
from edge_phi3.version import __version__

_HTTP_ERROR: type[Exception] = next(base for base in HfHubHTTPError.__bases__ if base is not OSError)
"""The base error of the HTTP library under huggingface_hub, whichever this version uses (httpx, httpx2)."""

_TIMEOUT = 30.0
"""Seconds without a byte after which a server counts as gone."""
_ATTEMPTS, _WAIT = 5, 1.0
"""How many attempts in a row may bring nothing new of a file, and the seconds to wait after the first one."""


class _DamagedError(Exception):
    """A download that is worth another attempt; the text goes on a sentence that begins with the file's name."""


class Repository:
    """A repository of the Hub, or of the mirror that `HF_ENDPOINT` names, at the commit that a revision is now.

    `HubError` says that there is none, or that it may not be seen, and `UnreachableError` that nothing answers.
    """

    def __init__(self, name: str, revision: str, progress: ProgressReporter) -> None:
        # huggingface_hub reads these when it is imported, which may be long before a test or a program sets them.
        self.endpoint = (os.environ.get("HF_ENDPOINT") or huggingface_hub.constants.ENDPOINT).rstrip("/")
        offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in huggingface_hub.constants.ENV_VARS_TRUE_VALUES
        if offline or huggingface_hub.is_offline_mode():
            raise UnreachableError("HF_HUB_OFFLINE is set")
        self._name, self._revision, self._progress = name, revision, progress
        api = HfApi(endpoint=self.endpoint, library_name="edge-phi3", library_version=__version__)
        with self._sentences(None):
            try:
                info = api.model_info(name, revision=revision, files_metadata=True, timeout=_TIMEOUT)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                if isinstance(error, HfHubHTTPError):
                    raise
                raise HubError(
                    f"{self.endpoint} does not answer as the Hub does ({error}); check HF_ENDPOINT and any proxy."
                ) from error
        files = {
            sibling.rfilename: RemoteFile(
                sibling.rfilename, sibling.size, sibling.lfs.sha256 if sibling.lfs else None, sibling.blob_id
            )
            for sibling in info.siblings or []
        }
        if info.sha is None or not files:
            raise HubError(f"{self.endpoint} lists no files for {name}; check the name and HF_ENDPOINT.")
        self.snapshot = Snapshot(name, info.sha, files)

    def fetch(self, files: Iterable[RemoteFile], folder: Path) -> list[FileRecord]:
        """Download what `folder` lacks of some files: they get their names once they have been checked.

        `HubError` is a file that may not be read, is gone, or arrives damaged again and again; `UnreachableError` a
        network that went away, and what has arrived stays for the next time.
        """
        return [self._download(file, folder / Path(file.name).name) for file in files]

    def _download(self, file: RemoteFile, target: Path) -> FileRecord:
        if target.exists():
            return FileRecord(target.name, _size(target), sha256_of(target))
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(target.name + PARTIAL_SUFFIX)
        with (
            self._progress.step(f"Downloading {file.name}", file.size) as step,
            self._sentences(file.name),
            self._notes(),
        ):
            digest = self._complete(file, partial, step)
            with partial.open("rb") as content:
                os.fsync(content.fileno())
            partial.replace(target)
        return FileRecord(target.name, _size(target), digest)

    def _complete(self, file: RemoteFile, partial: Path, step: Step) -> str:
        """Fetch until `partial` is whole; return its SHA-256."""
        farthest, fruitless = _size(partial), 0
        while True:
            try:
                self._fetch(file, partial, step)
                return _check(partial, file)
            except (_DamagedError, _HTTP_ERROR) as error:
                if isinstance(error, HfHubHTTPError):
                    raise
                # A server that has less of a file than it says brings the same bytes again and again.
                fruitless = 0 if _size(partial) > farthest else fruitless + 1
                farthest = max(farthest, _size(partial))
                damaged = isinstance(error, _DamagedError)
                if fruitless == _ATTEMPTS and damaged:
                    raise HubError(
                        f"{file.name} of {self._name} {error}, time and again; try later, or another mirror"
                        f" (HF_ENDPOINT is {self.endpoint})."
                    ) from error
                if fruitless == _ATTEMPTS:
                    raise
                self._progress.note(f"{file.name} {error if damaged else f'broke off ({error})'}; trying again.")
                time.sleep(_WAIT * fruitless)

    def _fetch(self, file: RemoteFile, partial: Path, step: Step) -> None:
        done = _size(partial)
        if done == file.size:
            return
        if file.size is not None and done > file.size:
            partial.unlink()
            done = 0
        url = hf_hub_url(self._name, file.name, revision=self.snapshot.commit, endpoint=self.endpoint)
        headers = build_hf_headers(library_name="edge-phi3", library_version=__version__)
        # Ranges count the bytes of what is sent: it must not be compressed on the way.
        headers |= {"Accept-Encoding": "identity"} | ({"Range": f"bytes={done}-"} if done else {})
        with http_stream_backoff("GET", url, headers=headers, timeout=_TIMEOUT, retry_on_exceptions=()) as response:
            if response.status_code == 416:
                partial.unlink()
                raise _DamagedError("could not be continued")
            hf_raise_for_status(response)
            if response.status_code != 206:
                done = 0
            step.update(done, file.size)
            with partial.open("ab" if done else "wb") as content:
                for chunk in response.iter_bytes():
                    content.write(chunk)
                    done += len(chunk)
                    step.update(done)
        if file.size not in {None, done}:
            raise _DamagedError(f"ended at {done:,} of {file.size:,} bytes")

    @contextlib.contextmanager
    def _sentences(self, file: str | None) -> Iterator[None]:
        try:
            yield
        except OfflineModeIsEnabled as error:
            raise UnreachableError("HF_HUB_OFFLINE is set") from error
        except HfHubHTTPError as error:
            raise HubError(self._explanation(error, file)) from error
        except _HTTP_ERROR as error:
            reason = str(error) or type(error).__name__
            raise UnreachableError(f"{self.endpoint} cannot be reached ({reason})") from error
        except OSError as error:
            raise HubError(f"{file or self._name} cannot be downloaded: {error.strerror or error}.") from error

    def _explanation(self, error: HfHubHTTPError, file: str | None) -> str:
        status = error.response.status_code if error.response is not None else 0
        page = f"{self.endpoint}/{self._name}"
        has_token = huggingface_hub.get_token() is not None
        if isinstance(error, GatedRepoError):
            then = (
                "the account of your token (HF_TOKEN) has not been let in yet"
                if has_token
                else f"then set HF_TOKEN to a token of it, from {self.endpoint}/settings/tokens"
            )
            return f"{self._name} is gated: accept its terms on {page} with your account; {then}."
        if status == 401 and "Invalid credentials" in str(error):
            return f"The Hub does not accept the token; set HF_TOKEN to one from {self.endpoint}/settings/tokens."
        if isinstance(error, RevisionNotFoundError):
            return f"{self._name} has no revision {self._revision!r}; give a branch, a tag or a commit of {page}."
        if isinstance(error, RemoteEntryNotFoundError):
            return f"{self._name} has no file {file} at {self.snapshot.commit}; see {page}."
        if isinstance(error, RepositoryNotFoundError) or status in {401, 404}:
            private = "the token may not see it" if has_token else "it is private, which takes a token in HF_TOKEN"
            return f"{self.endpoint} has no repository {self._name}, or {private}; check the name."
        if status == 403:
            return f"The Hub forbids reading {file or self._name}; the token in HF_TOKEN lacks the permission."
        if status == 429:
            return "The Hub answers that there were too many requests; wait some minutes, or set HF_TOKEN."
        return f"The Hub answered {status} for {file or self._name}; try again later."

    @contextlib.contextmanager
    def _notes(self) -> Iterator[None]:
        """Let what huggingface_hub says while it retries come out as notes, not as lines across the bars."""
        logger = logging.getLogger("huggingface_hub")
        handlers, logger.handlers = logger.handlers, [_NoteHandler(self._progress)]
        try:
            yield
        finally:
            logger.handlers = handlers


class _NoteHandler(logging.Handler):
    def __init__(self, progress: ProgressReporter) -> None:
        super().__init__(logging.WARNING)
        self._progress = progress

    def emit(self, record: logging.LogRecord) -> None:
        self._progress.note(record.getMessage().replace("\n", " "))


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _check(partial: Path, file: RemoteFile) -> str:
    """Compare a download with the listing; return its SHA-256, or delete it when it differs."""
    digest, size = sha256_of(partial), _size(partial)
    intact = file.size in {None, size}
    if file.sha256 is not None:
        intact = intact and digest == file.sha256
    elif intact and file.blob_id is not None:
        # The id that git gives to a file's content; only small files lie in git itself.
        content = b"blob %d\0" % size + partial.read_bytes()
        intact = hashlib.sha1(content, usedforsecurity=False).hexdigest() == file.blob_id
    if not intact:
        partial.unlink()
        raise _DamagedError("arrived with other content than the Hub lists")
    return digest
