"""Modules of this package that run in a process of their own: both ends of the pipe.

llama.cpp cannot be interrupted during its longer work, ends the whole process when an assertion fails, and has one log
per process. In a child process it can be killed at any moment, a crash becomes an error message, its log disturbs
nobody, and its memory, the GPU's included, is free again at the end. The protocol is one JSON value per line: jobs in
on stdin, events out on stdout.
"""

import contextlib
import os
import queue
import resource
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self, TypeVar

import msgspec

from edge_phi3.errors import EdgePhi3Error

_PACKAGE_PARENT = Path(__file__).resolve().parents[2]

Emit = Callable[[msgspec.Struct], None]
_Job = TypeVar("_Job", bound=msgspec.Struct)


def _path_to_text(path: object) -> str:
    return os.fsencode(path).decode("latin-1")  # type: ignore[arg-type]  # JSON has no other type of ours


def _path_from_text(_kind: type, text: str) -> Path:
    """Return a path, which may hold bytes that are no UTF-8."""
    return Path(os.fsdecode(text.encode("latin-1")))


class Failed(msgspec.Struct, tag=True, frozen=True):
    """The event of a job that cannot be done, with the reason."""

    sentence: str


class WorkerError(EdgePhi3Error):
    """A child process says why it cannot do its job."""


class WorkerDiedError(WorkerError):
    """A child process ended before its job was done; the message is its last words, without a full stop."""


class ChildProcess:
    """A module, which calls `serve_jobs`, in a process of its own; a context manager that leaves no process behind.

    `events` is the type of what it emits, tagged msgspec structs; `gpu` is the one GPU that it may see, as
    CUDA_VISIBLE_DEVICES names it; empty for none, None for all.
    """

    def __init__(self, module: str, events: Any, *, gpu: str | None = None) -> None:
        self._command = [sys.executable, "-P", "-m", module]
        self._decoder = msgspec.json.Decoder(events | Failed)
        # The child finds this very package, wherever the parent found it.
        path = os.pathsep.join(filter(None, [str(_PACKAGE_PARENT), os.environ.get("PYTHONPATH")]))
        # Two threads that fail an assertion together wait for each other's backtrace for ever.
        self._environment = os.environ | {"PYTHONPATH": path, "GGML_NO_BACKTRACE": "1"}
        if gpu is not None:
            self._environment["CUDA_VISIBLE_DEVICES"] = gpu

    def __enter__(self) -> Self:
        self._stderr = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._stderr, env=self._environment
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            # A job that the dead process did not take is still in the buffer, and cannot be flushed.
            with contextlib.suppress(BrokenPipeError):
                pipe.close()  # type: ignore[union-attr]  # both are pipes
        self._process.wait()
        self._stderr.close()

    def send(self, job: msgspec.Struct) -> None:
        """Send a job. If the process has died, the next `receive` says so."""
        stdin = self._process.stdin
        assert stdin is not None
        with contextlib.suppress(BrokenPipeError):
            stdin.write(msgspec.json.encode(job, enc_hook=_path_to_text) + b"\n")
            stdin.flush()

    def receive(self) -> Any:
        """Return the next event, or raise `WorkerDiedError`, or `WorkerError` where the job cannot be done."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.endswith(b"\n"):
            raise WorkerDiedError(self._last_words())
        event = self._decoder.decode(line)
        if isinstance(event, Failed):
            raise WorkerError(event.sentence)
        return event

    def _last_words(self) -> str:
        code = self._process.wait()
        self._stderr.seek(0)
        lines = self._stderr.read().decode("utf-8", "replace").strip().splitlines()
        # An assertion of ggml prints its text, then a stack of addresses that helps nobody.
        words = next((line for line in lines if "GGML_ASSERT" in line or "fatal error" in line), "")
        how = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
        return words or f"{how}{f', {lines[-1].strip()}' if lines else ''}"


def bound(**limits: int) -> None:
    """Limit what this process may use (`resource`'s ``RLIMIT_...``), to no more than it may already."""
    for name, most in limits.items():
        kind = getattr(resource, name)
        hard = resource.getrlimit(kind)[1]
        resource.setrlimit(kind, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def serve_jobs(
    job_type: type[_Job], work: Callable[[_Job, Emit], None], *, ready: Callable[[Emit], None] | None = None
) -> None:
    """Do the jobs that come in on stdin until it ends, which it does when the parent dies, too.

    An `EdgePhi3Error` of `work` becomes a `Failed`; `ready` is called once, before the first job.
    """
    # Ctrl-C reaches the parent too, which ends this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Whatever libraries print must not mix with the events.
    events = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)

    def emit(event: msgspec.Struct) -> None:
        events.write(msgspec.json.encode(event) + b"\n")

    if ready is not None:
        ready(emit)
    jobs: queue.SimpleQueue[_Job] = queue.SimpleQueue()
    threading.Thread(target=_read_jobs, args=(sys.stdin.buffer, job_type, jobs), daemon=True).start()
    while True:
        try:
            work(jobs.get(), emit)
        except EdgePhi3Error as error:
            emit(Failed(str(error)))


def _read_jobs(stdin: IO[bytes], job_type: type[_Job], jobs: queue.SimpleQueue[_Job]) -> None:
    for line in stdin:
        jobs.put(msgspec.json.decode(line, type=job_type, dec_hook=_path_from_text))
    os._exit(0)
