"""GGUF -> smaller GGUF: llama.cpp's quantiser, with progress, output that is whole or absent, and a dry run."""

import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_phi3.conversion.imatrix_file import read_imatrix
from edge_phi3.conversion.quantization_types import (
    QUANTIZATION_TYPES,
    QuantizationType,
    quantization_type,
    tensor_type_number,
)
from edge_phi3.errors import EdgePhi3Error
from edge_phi3.files import NotGgufError, atomic_output, check_magic, require_space
from edge_phi3.gguf_file import split_files
from edge_phi3.llama import QuantizerError
from edge_phi3.llama.quantizer import Job, QuantizerProcess, TensorPlan
from edge_phi3.system_resources import usable_cores

_METADATA_SLACK, _TENSOR_SLACK = 4096, 64
"""Bytes by which the real size may differ: keys added to the metadata, a source with another alignment."""


class QuantizeError(EdgePhi3Error):
    """A model that cannot be quantised as requested."""


class SizePrediction(NamedTuple):
    """What a quantisation would give, computed without doing it.

    `bytes` are the file's, `bits_per_weight` those of all tensors without metadata, `fallbacks` counts tensors that get
    another type because their columns do not fill whole blocks; `tensors` are in the order in which they are made.
    """

    type: QuantizationType
    bytes: int
    bits_per_weight: float
    needs_imatrix: bool
    fallbacks: int
    tensors: tuple[TensorPlan, ...]


@dataclass(slots=True)
class Options:
    """What decides on the tensors of a quantised file, beside its type.

    Of `tensor_types` the first pattern, a regular expression, that is found in a tensor's name counts; `pure` gives
    every tensor the file type's base type. `importance` and `metadata`, under the keys of llama-quantize, are the
    matrix's.
    """

    imatrix: Path | None = None
    tensor_types: Mapping[str, str] = field(default_factory=dict)
    output_tensor_type: str | None = None
    token_embedding_type: str | None = None
    pure: bool = False
    importance: Mapping[str, NDArray[np.float32]] = field(init=False, default_factory=dict)
    metadata: dict[str, str | int] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        if self.imatrix is None:
            return
        matrix = read_imatrix(self.imatrix)
        self.importance = matrix.importance()
        self.metadata["quantize.imatrix.file"] = self.imatrix.name
        if matrix.datasets:
            self.metadata["quantize.imatrix.dataset"] = matrix.datasets[0]
        self.metadata["quantize.imatrix.entries_count"] = len(matrix.entries)
        if matrix.chunk_count > 0:
            self.metadata["quantize.imatrix.chunks_count"] = matrix.chunk_count


class QuantizeResult(NamedTuple):
    """A finished quantisation; see `SizePrediction` for the figures."""

    path: Path
    type: QuantizationType
    bytes: int
    bits_per_weight: float
    fallbacks: int
    seconds: float


def quantize(
    source: Path,
    output: Path,
    *,
    type: str,  # noqa: A002 (the word of the command line)
    threads: int | None = None,
    allow_requantize: bool = False,
    force: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
    **options: Any,
) -> QuantizeResult:
    """Quantise a GGUF model, with the tensors that ``llama-quantize`` gives for the same arguments.

    llama.cpp runs in a child process, so that Ctrl-C (or any exception out of `progress`) ends it at once and a crash
    becomes an error. The first file of a split model stands for all of it; `type` is a name of `QUANTIZATION_TYPES` or
    of `ALIASES`, in any case. `progress` is called when each tensor begins and once at the end, with the bytes of the
    source's tensors that are done, those of all, and the tensor's name. The other options are those of `Options`.

    Raises:
        OutputExistsError: `output` exists and `force` is false.
        UnknownQuantizationError: a type that llama.cpp does not have.
        ImatrixFileError: `imatrix` cannot be read.
        DiskFullError: the disk has no room for `output`.
        QuantizeError: anything else; the message says what to do.
    """
    chosen, given = quantization_type(type), Options(**options)
    report = progress or (lambda _done, _total, _name: None)
    _check_source(source)
    started = time.monotonic()
    with atomic_output(output, force=force) as temporary, QuantizerProcess() as process:
        job = make_job(process, source, chosen, given, threads)
        plan = make_plan(process, job, chosen)
        quantized = [tensor for tensor in plan.tensors if tensor.source.quantized]
        if quantized and not allow_requantize:
            raise QuantizeError(
                f"{source} is quantised already ({quantized[0].name} is {quantized[0].source.name}), and each time"
                " loses more; quantise from F16, BF16 or F32, or accept the loss with --allow-requantize."
            )
        if plan.needs_imatrix and given.imatrix is None:
            rivals = [type_ for type_ in QUANTIZATION_TYPES.values() if not (type_.needs_imatrix or type_.special)]
            nearest = min(rivals, key=lambda type_: abs(type_.bits_per_weight - plan.bits_per_weight))
            raise QuantizeError(
                f"{chosen.name} needs an importance matrix: make one with `edge-phi3 imatrix` and give it with"
                f" --imatrix, or choose a type that does without, such as {nearest.name}."
            )
        check_plan(plan, given)
        require_space(temporary.parent, plan.bytes, str(output))
        job = msgspec.structs.replace(job, output=temporary.absolute(), allow_requantize=allow_requantize)
        total, done = sum(tensor.source_bytes for tensor in plan.tensors), 0
        # llama.cpp makes the tensors in the order in which its dry run listed them.
        remaining = iter(plan.tensors)
        for step in _run(process, job):
            if step.target is None and (tensor := next(remaining, None)) is not None:
                report(done, total, step.name)
                done += tensor.source_bytes
        report(total, total, plan.tensors[-1].name)
        size = temporary.stat().st_size
        # A write that failed without a word shows here: only a few keys of the metadata may differ.
        if abs(size - plan.bytes) > _METADATA_SLACK + _TENSOR_SLACK * len(plan.tensors):
            raise QuantizeError(
                f"llama.cpp wrote {size:,} bytes where {plan.bytes:,} belong, and {output} was not made;"
                " check the disk and try again."
            )
    seconds = time.monotonic() - started
    return QuantizeResult(output, chosen, size, plan.bits_per_weight, plan.fallbacks, seconds)


def predict_size(source: Path, *, type: str, **options: Any) -> SizePrediction:  # noqa: A002 (as in quantize)
    """Return the size of what `quantize` would write with the same `Options`, without reading the weights."""
    (plan,) = predict_sizes(source, [type], **options)
    check_plan(plan, Options(**options))
    return plan


def predict_sizes(source: Path, types: Iterable[str], **options: Any) -> list[SizePrediction]:
    """Return what each of several file types would give; types that lack a matrix are not refused."""
    chosen, given = [quantization_type(name) for name in types], Options(**options)
    _check_source(source)
    with QuantizerProcess() as process:
        return [make_plan(process, make_job(process, source, type_, given), type_) for type_ in chosen]


def _check_source(source: Path) -> None:
    """Refuse what does not begin as a GGUF does."""
    try:
        check_magic(source, "make one of a checkpoint with `edge-phi3 convert`.")
    except NotGgufError as error:
        raise QuantizeError(str(error)) from error


def make_job(
    process: QuantizerProcess, source: Path, chosen: QuantizationType, options: Options, threads: int | None = None
) -> Job:
    """Return the dry run of a quantisation, its names turned into llama.cpp's numbers."""
    numbers = {name: type_.number for name, type_ in process.types.items() if type_.writable}

    def number(name: str | None, option: str) -> int | None:
        return None if name is None else tensor_type_number(name, numbers, option)

    overrides = []
    for pattern, name in options.tensor_types.items():
        try:
            re.compile(pattern)
        except re.error as error:
            raise QuantizeError(f"--tensor-type: {pattern!r} is not a regular expression: {error}.") from error
        overrides.append((_lower(pattern), tensor_type_number(name, numbers, f"--tensor-type {pattern}")))
    return Job(
        source=source.absolute(),
        output=None,
        ftype=chosen.ftype,
        threads=threads or usable_cores(),
        importance={name: values.tobytes() for name, values in options.importance.items()},
        metadata=options.metadata,
        tensor_types=overrides,
        output_tensor_type=number(options.output_tensor_type, "--output-tensor-type"),
        token_embedding_type=number(options.token_embedding_type, "--token-embedding-type"),
        pure=options.pure,
    )


def make_plan(process: QuantizerProcess, job: Job, chosen: QuantizationType) -> SizePrediction:
    """Let llama.cpp say what it would make of each tensor."""
    tensors = [step for step in _run(process, job) if step.target is not None]
    if not tensors or len(tensors) != process.log.count:
        raise QuantizeError(
            f"llama.cpp planned {process.log.count} tensors of {job.source} and its log lists {len(tensors)};"
            " install the version of llama-cpp-python that edge-phi3 asks for."
        )
    weights = sum(math.prod(tensor.shape) for tensor in tensors)
    sizes = [tensor.made.bytes_of(tensor.shape) for tensor in tensors]
    # All that is not tensors is copied from the source, but for a key or two.
    metadata = sum(part.stat().st_size for part in split_files(job.source))
    metadata -= sum(gguf.GGUFWriter.ggml_pad(tensor.source_bytes, gguf.GGUF_DEFAULT_ALIGNMENT) for tensor in tensors)
    return SizePrediction(
        type=chosen,
        bytes=metadata + sum(gguf.GGUFWriter.ggml_pad(size, gguf.GGUF_DEFAULT_ALIGNMENT) for size in sizes),
        bits_per_weight=8 * sum(sizes) / weights,
        needs_imatrix=process.log.wants_imatrix,
        fallbacks=process.log.fallbacks,
        tensors=tuple(tensors),
    )


def check_plan(plan: SizePrediction, options: Options) -> None:
    """Refuse what llama.cpp would pass over in silence or die of."""
    for tensor in plan.tensors:
        if tensor.shape[0] % tensor.made.block_size:
            raise QuantizeError(
                f"{tensor.name} has {tensor.shape[0]} columns, and {tensor.made.name} packs {tensor.made.block_size} at"
                " a time; choose another type for it."
            )
    if options.tensor_types and plan.type.name in {"F32", "F16", "BF16"}:
        raise QuantizeError(
            f"--tensor-type has no effect with --type {plan.type.name};"
            " choose a quantised type and give single tensors another one."
        )
    for pattern, target in options.tensor_types.items():
        matched = [tensor for tensor in plan.tensors if re.search(_lower(pattern), tensor.name)]
        if not matched:
            kinds = sorted({re.sub(r"^blk\.\d+\.", "", tensor.name) for tensor in plan.tensors})
            raise QuantizeError(
                f"--tensor-type: no tensor of this model matches {pattern!r}; its tensors are {', '.join(kinds)}."
            )
        if not any(len(tensor.shape) > 1 and math.prod(tensor.shape[1:]) > 1 for tensor in matched):
            raise QuantizeError(
                f"--tensor-type {pattern}={target}: llama.cpp never quantises {matched[0].name};"
                " choose a matrix, such as ffn_down or attn_qkv."
            )
    if options.imatrix is not None:
        _check_imatrix(options.importance, plan, options.imatrix)
    for tensor in plan.tensors:
        # For these ggml fails an assertion, whatever llama.cpp thinks of the file as a whole.
        demanding = tensor.made.needs_imatrix and tensor.made != tensor.source
        if demanding and tensor.name not in options.importance:
            lack = "an importance matrix" if options.imatrix is None else f"a row in {options.imatrix}"
            raise QuantizeError(
                f"{tensor.name} cannot become {tensor.made.name} without {lack}; give it a type of its own"
                " (--token-embedding-type, --output-tensor-type or --tensor-type) or a matrix that has it."
            )


def _run(process: QuantizerProcess, job: Job) -> Iterator[TensorPlan]:
    try:
        yield from process.run(job)
    except QuantizerError as error:
        raise _explain(error, job.source) from error


def _explain(error: QuantizerError, source: Path) -> QuantizeError:
    """Turn llama.cpp's own words into a sentence about the file that a person gave."""
    words = str(error)
    if "not within the file bounds" in words or "failed to read" in words:
        return QuantizeError(f"{source} is cut short; download or convert it again. llama.cpp says: {words}.")
    if match := re.search(r"Missing importance matrix for tensor (\S+)", words):
        return QuantizeError(
            f"The importance matrix has nothing for {match[1]}, which needs it at so few bits;"
            " make one with `edge-phi3 imatrix` from this very model."
        )
    if "iostream" in words:
        return QuantizeError("The output could not be written to its end; the disk may be full.")
    if match := re.search(r"tensor '(\S+)' has invalid data", words):
        return QuantizeError(f"{source} holds NaN or infinite weights in {match[1]}; convert the checkpoint again.")
    if "quantized data validation failed" in words:
        return QuantizeError(f"{source} holds weights that overflow when quantised; convert the checkpoint again.")
    return QuantizeError(f"llama.cpp could not quantise {source}: {words}.")


def _lower(pattern: str) -> str:
    r"""Lower the letters of a pattern, as llama-quantize does, but not those of escapes: ``\D`` is not ``\d``."""
    return re.sub(r"\\.|[A-Z]", lambda match: match[0] if match[0][0] == "\\" else match[0].lower(), pattern)


def _check_imatrix(importance: Mapping[str, NDArray[np.float32]], plan: SizePrediction, path: Path) -> None:
    if not any(tensor.name in importance for tensor in plan.tensors):
        raise QuantizeError(
            f"The importance matrix {path} names no tensor of this model; make one with `edge-phi3 imatrix`."
        )
    for tensor in plan.tensors:
        values = importance.get(tensor.name)
        if values is not None and values.size != tensor.shape[0] * math.prod(tensor.shape[2:]):
            raise QuantizeError(
                f"The importance matrix {path} is of another model: it has {values.size} values for"
                f" {tensor.name}, which has {tensor.shape[0]} columns."
            )
