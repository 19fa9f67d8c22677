"""What a quantisation would make of each tensor: llama.cpp's dry run, read tensor by tensor, and checked."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_phi3.conversion.imatrix_file import read_imatrix
from edge_phi3.conversion.quantization_types import QuantizationType, quantization_type, tensor_type_number
from edge_phi3.errors import EdgePhi3Error
from edge_phi3.files import read_start
from edge_phi3.gguf_file import split_files
from edge_phi3.llama import QuantizerError
from edge_phi3.llama.quantizer import Job, QuantizerProcess, TensorPlan
from edge_phi3.system_resources import usable_cores

_ALIGNMENT = 32
_UNQUANTIZED = frozenset({"F32", "F16", "BF16"})


class QuantizeError(EdgePhi3Error):
    """A model that cannot be quantised as requested."""


@dataclass(frozen=True, slots=True)
class SizePrediction:
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

    Attributes:
        imatrix: an importance matrix, GGUF or older format.
        tensor_types: pattern (a regular expression searched in tensor names) to tensor type; the first that
            matches a tensor counts.
        output_tensor_type: tensor type of ``output.weight``.
        token_embedding_type: tensor type of ``token_embd.weight``.
        pure: give every tensor the file type's base type, instead of more bits to those that matter.
        metadata: what the file is to say of the matrix, under the keys of llama-quantize.
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


def predict_size(source: Path, *, type: str, **options: Any) -> SizePrediction:  # noqa: A002 (as in quantize)
    """Return the size of what `quantize` would write with the same `Options`, without reading the weights."""
    (plan,) = predict_sizes(source, [type], **options)
    check_plan(plan, Options(**options))
    return plan


def predict_sizes(source: Path, types: Iterable[str], **options: Any) -> list[SizePrediction]:
    """Return what each of several file types would give; types that lack a matrix are not refused."""
    chosen, given = [quantization_type(name) for name in types], Options(**options)
    check_source(source)
    with QuantizerProcess() as process:
        return [make_plan(process, make_job(process, source, type_, given), type_) for type_ in chosen]


def check_source(source: Path) -> None:
    """Refuse what does not begin as a GGUF does."""
    try:
        magic = read_start(source)
    except OSError as error:
        raise QuantizeError(f"{source} cannot be read: {error.strerror}.") from error
    if magic != b"GGUF":
        raise QuantizeError(
            f"{source} is not a GGUF file (it begins with {magic!r});"
            " make one of a checkpoint with `edge-phi3 convert`."
        )


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
    try:
        tensors = [step for step in process.run(job) if step.target is not None]
    except QuantizerError as error:
        raise explain(error, job.source) from error
    if not tensors or len(tensors) != process.log.count:
        raise QuantizeError(
            f"llama.cpp planned {process.log.count} tensors of {job.source} and its log lists {len(tensors)};"
            " install the version of llama-cpp-python that edge-phi3 asks for."
        )
    weights = sum(math.prod(tensor.shape) for tensor in tensors)
    sizes = [tensor.made.bytes_of(tensor.shape) for tensor in tensors]
    # All that is not tensors is copied from the source, but for a key or two.
    metadata = sum(part.stat().st_size for part in split_files(job.source))
    metadata -= sum(_padded(tensor.source_bytes) for tensor in tensors)
    return SizePrediction(
        type=chosen,
        bytes=metadata + sum(map(_padded, sizes)),
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
    if options.tensor_types and plan.type.name in _UNQUANTIZED:
        raise QuantizeError(
            f"--tensor-type has no effect with --type {plan.type.name};"
            " choose a quantised type and give single tensors another one."
        )
    for pattern, target in options.tensor_types.items():
        _check_pattern(pattern, target, plan)
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


def explain(error: QuantizerError, source: Path) -> QuantizeError:
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


def _check_pattern(pattern: str, target: str, plan: SizePrediction) -> None:
    matched = [tensor for tensor in plan.tensors if re.search(_lower(pattern), tensor.name)]
    if not matched:
        kinds = sorted({re.sub(r"^blk\.\d+\.", "", tensor.name) for tensor in plan.tensors})
        raise QuantizeError(
            f"--tensor-type: no tensor of this model matches {pattern!r}; its tensors are {', '.join(kinds)}."
        )
    quantisable = [tensor for tensor in matched if len(tensor.shape) > 1 and math.prod(tensor.shape[1:]) > 1]
    if not quantisable:
        raise QuantizeError(
            f"--tensor-type {pattern}={target}: llama.cpp never quantises {matched[0].name};"
            " choose a matrix, such as ffn_down or attn_qkv."
        )


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


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
