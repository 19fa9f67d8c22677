"""Importance matrices: how much each column of each weight matrix matters, measured on calibration text.

Follows llama.cpp's ``tools/imatrix``: the same chunks, the same tensors, sums and counts that are not divided until a
quantiser reads them.
"""

from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from edge_phi3.conversion.imatrix_file import Imatrix, ImatrixEntry, merge_imatrices, write_imatrix
from edge_phi3.conversion.json_files import MAX_BYTES
from edge_phi3.files import read_bounded, refuse_existing
from edge_phi3.llama import ImatrixError
from edge_phi3.llama.activations import SMALLEST_BATCH, ActivationCollector, collecting

CALIBRATION_NAME = "edge-phi3 calibration.txt"
"""The dataset's name in matrices made from the packaged text."""
DEFAULT_CHUNK = 512
"""Tokens evaluated together, as in llama-imatrix."""


def calibration_text() -> str:
    """Return the packaged calibration text: conversations in Phi-3's chat format."""
    return files("edge_phi3.conversion").joinpath("data/calibration.txt").read_text("utf-8")


def collect_imatrix(
    model: Path,
    text: str,
    *,
    dataset: str = CALIBRATION_NAME,
    ctx_size: int = DEFAULT_CHUNK,
    chunks: int | None = None,
    from_chunk: int = 0,
    parse_special: bool = True,
    process_output: bool = False,
    earlier: Sequence[Imatrix] = (),
    threads: int | None = None,
    n_gpu_layers: int = -1,
    progress: Callable[[int, int], None] | None = None,
    snapshot: Callable[[Imatrix, int], None] | None = None,
) -> Imatrix:
    """Evaluate a text and collect the importance matrix of every weight matrix it passes.

    The text, which the matrix calls `dataset`, is cut into chunks of `ctx_size` tokens, each evaluated for itself, but
    for a rest that fills none; all of them, or `chunks` at most, after the first `from_chunk`, which `earlier` matrices
    hold. With `process_output` the output matrix is among the others, and with `parse_special` ``<|user|>`` is read as
    the token. `progress` is called before the first and after each chunk with the chunks that are done and those of
    all, `snapshot` after each with the matrix so far and the number of chunks in it.

    Raises:
        ModelLoadError, ImatrixError: the model cannot be loaded or evaluated, or the text is too short.
        ImatrixFileError: `earlier` is of another model.
    """
    if ctx_size < SMALLEST_BATCH:
        raise ImatrixError(f"--ctx-size {ctx_size} is too small; give {SMALLEST_BATCH} tokens at least.")
    report = progress or (lambda _done, _total: None)
    with collecting(model, cells=ctx_size, process_output=process_output, n_gpu_layers=n_gpu_layers) as collector:
        tokens = collector.tokenize(text, parse_special=parse_special)
        available = len(tokens) // ctx_size - from_chunk
        count = available if chunks is None else min(chunks, available)
        if count < 1:
            raise ImatrixError(
                f"The text has {len(tokens)} tokens, and {from_chunk + 1} chunks of {ctx_size} are needed at least;"
                " give a longer text or a smaller --ctx-size."
            )
        with collector.context(ctx_size, threads):
            report(0, count)
            for done in range(1, count + 1):
                end = (from_chunk + done) * ctx_size
                collector.evaluate(tokens[end - ctx_size : end])
                if snapshot is not None:
                    snapshot(_merged(earlier, collector, dataset, ctx_size), from_chunk + done)
                report(done, count)
    return _merged(earlier, collector, dataset, ctx_size)


def _merged(earlier: Sequence[Imatrix], collector: ActivationCollector, dataset: str, chunk_size: int) -> Imatrix:
    entries = {
        name: ImatrixEntry(sums.astype(np.float32).reshape(1, -1), np.array([collector.counts[name]], np.float32))
        for name, sums in sorted(collector.sums.items())
    }
    return merge_imatrices([*earlier, Imatrix(entries, [dataset], 0, chunk_size)], chunk_size)


def make_imatrix(
    model: Path,
    output: Path,
    *,
    text: Path | None = None,
    force: bool = False,
    save_every: int | None = None,
    parse_special: bool | None = None,
    progress: Callable[[int, int, str], None] | None = None,
    **options: Any,
) -> Imatrix:
    """Collect an importance matrix and write it in llama.cpp's GGUF format, whole or not at all.

    Without a `text`, in UTF-8, the packaged one is taken. A `parse_special` of None reads special tokens in that one
    only, as llama-imatrix reads none in a text of a person's own by default. After every `save_every` chunks, what
    there is so far is written as ``NAME-at-CHUNKS.gguf``. `progress` is called as that of `collect_imatrix`, but with
    bytes of the text, and the number of the chunk. The other options are those of `collect_imatrix`.
    """
    refuse_existing(output, force=force)

    def snapshot(matrix: Imatrix, done: int) -> None:
        if save_every and done % save_every == 0:
            write_imatrix(output.with_name(f"{output.stem}-at-{done}{output.suffix}"), matrix, force=True)

    try:
        content = calibration_text() if text is None else read_bounded(text, MAX_BYTES, regular=False).decode()
    except OSError as error:
        raise ImatrixError(f"The calibration text {text} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ImatrixError(f"The calibration text {text} is not UTF-8: {error.reason}.") from error
    size = len(content.encode())

    def report(done: int, total: int) -> None:
        if progress is not None:
            progress(size * done // total, size, f"chunk {done} of {total}")

    matrix = collect_imatrix(
        model,
        content,
        dataset=CALIBRATION_NAME if text is None else text.name,
        parse_special=text is None if parse_special is None else parse_special,
        snapshot=snapshot if save_every else None,
        progress=report,
        **options,
    )
    write_imatrix(output, matrix, force=force)
    return matrix
