"""The quantiser, which runs in a child process: jobs go in, what happens to each tensor comes out."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import msgspec

from edge_phi3.llama import QuantizerError
from edge_phi3.llama.child_process import ChildProcess, WorkerDiedError


class Job(msgspec.Struct, frozen=True):
    """One call of ``llama_model_quantize``; without `output` a dry run.

    `importance` has float32 values for each column of a tensor, as bytes; `metadata` is added to the file.
    """

    source: str
    output: str | None
    ftype: int
    threads: int
    importance: dict[str, bytes] = {}
    metadata: dict[str, str | int] = {}
    tensor_types: list[tuple[str, int]] = []
    output_tensor_type: int | None = None
    token_embedding_type: int | None = None
    pure: bool = False
    allow_requantize: bool = False


class TensorType(msgspec.Struct, frozen=True):
    """A tensor type (``enum ggml_type``): `block_size` weights take `block_bytes` bytes.

    `writable` is whether a file may hold it, `needs_imatrix` whether ggml refuses to make it without a matrix.
    """

    name: str
    number: int
    block_size: int
    block_bytes: int
    quantized: bool
    writable: bool
    needs_imatrix: bool


class Ready(msgspec.Struct, tag=True, frozen=True):
    """The child's first event: what its llama.cpp can make."""

    types: list[TensorType]


class LogText(msgspec.Struct, tag=True, frozen=True):
    """A piece of llama.cpp's log. Pieces do not end where lines do."""

    text: str


class Finished(msgspec.Struct, tag=True, frozen=True):
    """The end of a job, with what ``llama_model_quantize`` returned: 0 when it succeeded."""

    code: int


@dataclass(frozen=True, slots=True)
class TensorStarted:
    """The quantiser turned to a tensor: the `index`-th (from 1) of `count`. `shape` has the columns first."""

    index: int
    count: int
    name: str
    shape: tuple[int, ...]
    source_type: str


@dataclass(frozen=True, slots=True)
class TensorFinished:
    """The quantiser is done with a tensor, or says what it would make of it."""

    name: str
    target_type: str


class LogReader:
    """Finds the quantiser's steps in the pieces of llama.cpp's log; what it does not know it skips.

    Attributes:
        error: the last line of the log that tells of a failure, without llama.cpp's function name.
        fallbacks: how many tensors got another type because their columns do not fill whole blocks.
        wants_imatrix: whether a dry run said that the real one will need an importance matrix.
    """

    _START = re.compile(r"\[\s*(\d+)/\s*(\d+)\]\s+(\S+)\s+-\s+\[([\d,\s]+)\],\s+type =\s*(\S+),")
    _TARGET = re.compile(r"converting to\s+(\S+)\s+\.\.|MiB\s*\((\S+)\)\s*$")
    _SIZE = re.compile(r"\bsize =\s*[\d.]+ MiB")
    _FALLBACKS = re.compile(r"(\d+) of \d+ tensor\(s\) required fallback")
    _FAILED = re.compile(r"\w+: (?:failed to quantize|error loading model): (.+)$")

    def __init__(self) -> None:
        self.error = ""
        self.fallbacks = 0
        self.wants_imatrix = False
        self._line = ""
        self._tensor: TensorStarted | None = None

    def feed(self, text: str) -> Iterator[TensorStarted | TensorFinished]:
        """Take the next piece of the log, and yield the steps that it completes."""
        self._line += text
        while True:
            if self._tensor is None and (match := self._START.search(self._line)):
                index, count, name, shape, type_ = match.groups()
                sizes = tuple(int(size) for size in shape.split(","))
                self._tensor = TensorStarted(int(index), int(count), name, sizes, type_)
                yield self._tensor
            line, end, rest = self._line.partition("\n")
            if not end:
                return
            self._line = rest
            if self._tensor is not None and self._SIZE.search(line):
                match = self._TARGET.search(line)
                target = next(filter(None, match.groups())) if match else self._tensor.source_type
                yield TensorFinished(self._tensor.name, target)
                self._tensor = None
            elif match := self._FAILED.search(line):
                self.error = match[1].strip()
            elif match := self._FALLBACKS.search(line):
                self.fallbacks = int(match[1])
            elif "will require an imatrix" in line:
                self.wants_imatrix = True


class QuantizerProcess(ChildProcess):
    """A child process that runs one job after another; a context manager that leaves no process behind.

    Attributes:
        types: the tensor types of its llama.cpp, by lower-case name.

    Raises:
        QuantizerError: it does not start.
    """

    def __init__(self) -> None:
        # The quantiser runs on the CPU: a GPU build must not take GPU memory for it.
        super().__init__("edge_phi3.llama.quantize_worker", Ready | LogText | Finished, gpu="")
        self.types: dict[str, TensorType] = {}

    def __enter__(self) -> Self:
        super().__enter__()
        try:
            ready: Ready = self.receive()
        except WorkerDiedError as error:
            self.__exit__(type(error), error, None)
            raise QuantizerError(f"llama.cpp's quantiser died before it started: {error}") from error
        self.types = {type_.name.lower(): type_ for type_ in ready.types}
        return self

    def run(self, job: Job, log: LogReader) -> Iterator[TensorStarted | TensorFinished]:
        """Run a job and yield its steps as they happen.

        Args:
            job: the call to make.
            log: takes llama.cpp's log; read its attributes afterwards.

        Raises:
            QuantizerError: llama.cpp refused or failed, or its process died.
        """
        self.send(job)
        tensor = "before the first tensor"
        while True:
            try:
                event: LogText | Finished = self.receive()
            except WorkerDiedError as error:
                raise QuantizerError(f"llama.cpp's quantiser died {tensor}: {error}") from error
            if isinstance(event, Finished):
                if event.code != 0:
                    raise QuantizerError(log.error or f"llama_model_quantize returned {event.code} and no reason")
                return
            for step in log.feed(event.text):
                if isinstance(step, TensorStarted):
                    tensor = f"at the tensor {step.name}, {step.shape[0]} columns of {step.source_type}"
                yield step

    def bytes_of(self, type_name: str, shape: tuple[int, ...]) -> int:
        """Return the bytes of a tensor of a type; its columns (`shape[0]`) are rounded up to whole blocks."""
        type_ = self.types[type_name.lower()]
        return -(-shape[0] // type_.block_size) * type_.block_bytes * math.prod(shape[1:])
