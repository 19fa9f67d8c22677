"""GGUF -> smaller GGUF: llama.cpp's quantiser, with progress and output that is whole or absent."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from edge_phi3.conversion.quantization_types import QUANTIZATION_TYPES, QuantizationType, quantization_type
from edge_phi3.conversion.quantize_plan import (
    Options,
    QuantizeError,
    SizePrediction,
    TensorPlan,
    check_plan,
    check_source,
    explain,
    make_job,
    make_plan,
    predict_size,
    predict_sizes,
)
from edge_phi3.files import atomic_output, require_space
from edge_phi3.llama import QuantizerError
from edge_phi3.llama.quantizer import Job, LogReader, QuantizerProcess, TensorStarted

__all__ = [
    "QUANTIZATION_TYPES",
    "QuantizationType",
    "QuantizeError",
    "QuantizeResult",
    "SizePrediction",
    "TensorPlan",
    "predict_size",
    "predict_sizes",
    "quantization_type",
    "quantize",
]

_METADATA_SLACK = 4096
_TENSOR_SLACK = 64
"""Bytes by which the real size may differ: keys added to the metadata, a source with another alignment."""


@dataclass(frozen=True, slots=True)
class QuantizeResult:
    """A finished quantisation.

    Attributes:
        path: the file.
        type: its file type.
        bytes: its size.
        bits_per_weight: of all tensors together, metadata not counted.
        fallbacks: tensors that got another type than planned because their columns do not fill whole blocks.
        seconds: how long it took.
    """

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
    imatrix: Path | None = None,
    tensor_types: Mapping[str, str] | None = None,
    output_tensor_type: str | None = None,
    token_embedding_type: str | None = None,
    pure: bool = False,
    threads: int | None = None,
    allow_requantize: bool = False,
    force: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> QuantizeResult:
    """Quantise a GGUF model, with the tensors that ``llama-quantize`` gives for the same arguments.

    The file is written under a temporary name and renamed when it is whole. llama.cpp runs in a child process,
    so that Ctrl-C (or any exception out of `progress`) ends it at once and a crash becomes an error.

    Args:
        source: a GGUF file, F32, F16 or BF16; the first file of a split model stands for all of it.
        output: where the quantised file will be.
        type: a name of `QUANTIZATION_TYPES` or of `ALIASES`, in any case.
        imatrix: an importance matrix, GGUF or older format.
        tensor_types: pattern (a regular expression searched in tensor names) to tensor type; the first that
            matches a tensor counts.
        output_tensor_type: tensor type of ``output.weight``.
        token_embedding_type: tensor type of ``token_embd.weight``.
        pure: give every tensor the file type's base type, instead of more bits to those that matter.
        threads: how many to use; by default as many as the process may run on.
        allow_requantize: quantise tensors that are quantised already, at a loss.
        force: replace `output` when it exists.
        progress: called when each tensor begins and once at the end, with the bytes of the source's tensors that are
            done, those of all, and the tensor's name.

    Raises:
        OutputExistsError: `output` exists and `force` is false.
        UnknownQuantizationError: a type that llama.cpp does not have.
        ImatrixFileError: `imatrix` cannot be read.
        DiskFullError: the disk has no room for `output`.
        QuantizeError: anything else; the message says what to do.
    """
    chosen = quantization_type(type)
    options = Options(imatrix, tensor_types or {}, output_tensor_type, token_embedding_type, pure, threads)
    check_source(source)
    started = time.monotonic()
    with atomic_output(output, force=force) as temporary, QuantizerProcess() as process:
        job = make_job(process, source, chosen, options)
        plan = make_plan(process, job, chosen)
        _check_permission(process, plan, source, imatrix=imatrix, allow_requantize=allow_requantize)
        check_plan(process, plan, options)
        require_space(temporary.parent, plan.bytes, str(output))
        job = msgspec.structs.replace(job, output=str(temporary.absolute()), allow_requantize=allow_requantize)
        _execute(process, job, plan, progress)
        size = temporary.stat().st_size
        # A write that failed without a word shows here: only a few keys of the metadata may differ.
        if abs(size - plan.bytes) > _METADATA_SLACK + _TENSOR_SLACK * len(plan.tensors):
            raise QuantizeError(
                f"llama.cpp wrote {size:,} bytes where {plan.bytes:,} belong, and {output} was not made;"
                " check the disk and try again."
            )
    seconds = time.monotonic() - started
    return QuantizeResult(output, chosen, size, plan.bits_per_weight, plan.fallbacks, seconds)


def _check_permission(
    process: QuantizerProcess,
    plan: SizePrediction,
    source: Path,
    *,
    imatrix: Path | None,
    allow_requantize: bool,
) -> None:
    quantized = [tensor for tensor in plan.tensors if process.types[tensor.source_type.lower()].quantized]
    if quantized and not allow_requantize:
        raise QuantizeError(
            f"{source} is quantised already ({quantized[0].name} is {quantized[0].source_type}), and each time"
            " loses more; quantise from F16, BF16 or F32, or accept the loss with --allow-requantize."
        )
    if plan.needs_imatrix and imatrix is None:
        raise QuantizeError(
            f"{plan.type.name} needs an importance matrix: make one with `edge-phi3 imatrix` and give it with"
            f" --imatrix, or choose a type that does without, such as {_without_imatrix(plan)}."
        )


def _without_imatrix(plan: SizePrediction) -> str:
    """Name the file type nearest in size that does without an importance matrix."""
    rivals = [type_ for type_ in QUANTIZATION_TYPES.values() if not (type_.needs_imatrix or type_.special)]
    return min(rivals, key=lambda type_: abs(type_.bits_per_weight - plan.bits_per_weight)).name


def _execute(
    process: QuantizerProcess,
    job: Job,
    plan: SizePrediction,
    progress: Callable[[int, int, str], None] | None,
) -> None:
    total = sum(tensor.source_bytes for tensor in plan.tensors)
    done = 0
    # llama.cpp makes the tensors in the order in which its dry run told of them.
    remaining = iter(plan.tensors)
    try:
        for step in process.run(job, LogReader()):
            if isinstance(step, TensorStarted) and (tensor := next(remaining, None)) is not None:
                if progress is not None:
                    progress(done, total, step.name)
                done += tensor.source_bytes
    except QuantizerError as error:
        raise explain(error, Path(job.source)) from error
    if progress is not None:
        progress(total, total, plan.tensors[-1].name)
