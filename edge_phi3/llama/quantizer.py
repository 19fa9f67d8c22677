"""The quantiser, which runs in a child process: jobs go in, what happens to each tensor comes out."""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import msgspec

from edge_phi3.llama import QuantizerError
from edge_phi3.llama.child_process import ChildProcess, WorkerDiedError


class Job(msgspec.Struct, frozen=True):
    """One call of ``llama_model_quantize``; without `output` a dry run.

    `importance` has float32 values for each column of a tensor, as bytes; `metadata` is added to the file.
    """

    source: Path
    output: Path | None
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

    def bytes_of(self, shape: tuple[int, ...]) -> int:
        """Return the bytes of a tensor; its columns (`shape[0]`) are rounded up to whole blocks."""
        return -(-shape[0] // self.block_size) * self.block_bytes * math.prod(shape[1:])


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
class TensorPlan:
    """What becomes of one tensor: `target` is None until llama.cpp tells it. `shape` has the columns first."""

    name: str
    shape: tuple[int, ...]
    source: TensorType
    target: TensorType | None = None

    @property
    def made(self) -> TensorType:
        """The type that it gets."""
        return self.target or self.source

    @property
    def source_bytes(self) -> int:
        """Bytes that it has in the source."""
        return self.source.bytes_of(self.shape)


class LogReader:
    """Finds the quantiser's steps in the pieces of llama.cpp's log; what it does not know it skips.

    `count` is how many tensors llama.cpp says there are, `fallbacks` of them got another type because their columns do
    not fill whole blocks. `error` is the last line that tells of a failure, without llama.cpp's function name;
    `wants_imatrix` is whether a dry run said that the real one will need an importance matrix.
    """

    _START = re.compile(r"\[\s*\d+/\s*(\d+)\]\s+(\S+)\s+-\s+\[([\d,\s]+)\],\s+type =\s*(\S+),")
    _TARGET = re.compile(r"converting to\s+(\S+)\s+\.\.|MiB\s*\((\S+)\)\s*$")
    _SIZE = re.compile(r"\bsize =\s*[\d.]+ MiB")
    _FALLBACKS = re.compile(r"(\d+) of \d+ tensor\(s\) required fallback")
    _FAILED = re.compile(r"\w+: (?:failed to quantize|error loading model): (.+)$")

    def __init__(self, types: Mapping[str, TensorType]) -> None:
        self.count = self.fallbacks = 0
        self.error = ""
        self.wants_imatrix = False
        self._types = types
        self._line = ""
        self._tensor: TensorPlan | None = None

    def feed(self, text: str) -> Iterator[TensorPlan]:
        """Take the next piece of the log; yield each tensor when the quantiser turns to it, and when it is done."""
        self._line += text
        while True:
            if self._tensor is None and (match := self._START.search(self._line)):
                count, name, shape, source = match.groups()
                self.count = int(count)
                if source.lower() in self._types:
                    sizes = tuple(int(size) for size in shape.split(","))
                    self._tensor = TensorPlan(name, sizes, self._types[source.lower()])
                    yield self._tensor
            line, end, rest = self._line.partition("\n")
            if not end:
                return
            self._line = rest
            if self._tensor is not None and self._SIZE.search(line):
                match = self._TARGET.search(line)
                target = (match[1] or match[2]).lower() if match else self._tensor.source.name.lower()
                if target in self._types:
                    yield replace(self._tensor, target=self._types[target])
                self._tensor = None
            elif match := self._FAILED.search(line):
                self.error = match[1].strip()
            elif match := self._FALLBACKS.search(line):
                self.fallbacks = int(match[1])
            elif "will require an imatrix" in line:
                self.wants_imatrix = True


class QuantizerProcess(ChildProcess):
    """Runs one job after another. `types` are the tensor types of its llama.cpp, by lower-case name.

    `log` is what it said of the last job.
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

    def run(self, job: Job) -> Iterator[TensorPlan]:
        """Run a job and yield its steps as they happen; `log` tells the rest afterwards."""
        self.send(job)
        self.log = LogReader(self.types)
        tensor = "before the first tensor"
        while True:
            try:
                event: LogText | Finished = self.receive()
            except WorkerDiedError as error:
                raise QuantizerError(f"llama.cpp's quantiser died {tensor}: {error}") from error
            if isinstance(event, Finished):
                if event.code != 0:
                    raise QuantizerError(self.log.error or f"llama_model_quantize returned {event.code} and no reason")
                return
            for step in self.log.feed(event.text):
                tensor = f"at the tensor {step.name}, {step.shape[0]} columns of {step.source.name}"
                yield step
