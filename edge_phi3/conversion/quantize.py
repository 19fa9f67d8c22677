"""GGUF -> smaller GGUF: llama.cpp's quantiser, with progress and output that is whole or absent."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from edge_phi3.conversion.quantization_types import QUANTIZATION_TYPES, QuantizationType, quantization_type
from edge_phi3.conversion.quantize_plan import (
    Options,
    QuantizeError,
    SizePrediction,
    check_plan,
    check_source,
    explain,
    make_job,
    make_plan,
)
from edge_phi3.files import atomic_output, require_space
from edge_phi3.llama import QuantizerError
from edge_phi3.llama.quantizer import Job, QuantizerProcess

_METADATA_SLACK = 4096
_TENSOR_SLACK = 64
"""Bytes by which the real size may differ: keys added to the metadata, a source with another alignment."""


@dataclass(frozen=True, slots=True)
class QuantizeResult:
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

    The file is written under a temporary name and renamed when it is whole. llama.cpp runs in a child process,
    so that Ctrl-C (or any exception out of `progress`) ends it at once and a crash becomes an error.

    The first file of a split model stands for all of it; `type` is a name of `QUANTIZATION_TYPES` or of `ALIASES`, in
    any case. `progress` is called when each tensor begins and once at the end, with the bytes of the source's tensors
    that are done, those of all, and the tensor's name. The other options are those of `Options`.

    Raises:
        OutputExistsError: `output` exists and `force` is false.
        UnknownQuantizationError: a type that llama.cpp does not have.
        ImatrixFileError: `imatrix` cannot be read.
        DiskFullError: the disk has no room for `output`.
        QuantizeError: anything else; the message says what to do.
    """
    chosen, given = quantization_type(type), Options(**options)
    check_source(source)
    started = time.monotonic()
    with atomic_output(output, force=force) as temporary, QuantizerProcess() as process:
        job = make_job(process, source, chosen, given, threads)
        plan = make_plan(process, job, chosen)
        _check_permission(plan, source, given, allow_requantize=allow_requantize)
        check_plan(plan, given)
        require_space(temporary.parent, plan.bytes, str(output))
        job = msgspec.structs.replace(job, output=temporary.absolute(), allow_requantize=allow_requantize)
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


def _check_permission(plan: SizePrediction, source: Path, options: Options, *, allow_requantize: bool) -> None:
    quantized = [tensor for tensor in plan.tensors if tensor.source.quantized]
    if quantized and not allow_requantize:
        raise QuantizeError(
            f"{source} is quantised already ({quantized[0].name} is {quantized[0].source.name}), and each time"
            " loses more; quantise from F16, BF16 or F32, or accept the loss with --allow-requantize."
        )
    if plan.needs_imatrix and options.imatrix is None:
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
    # llama.cpp makes the tensors in the order in which its dry run listed them.
    remaining = iter(plan.tensors)
    try:
        for step in process.run(job):
            if step.target is None and (tensor := next(remaining, None)) is not None:
                if progress is not None:
                    progress(done, total, step.name)
                done += tensor.source_bytes
    except QuantizerError as error:
        raise explain(error, job.source) from error
    if progress is not None:
        progress(total, total, plan.tensors[-1].name)
