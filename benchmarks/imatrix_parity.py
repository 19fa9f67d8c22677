"""Compare `edge-phi3 imatrix` with llama-imatrix: same model, same text, same chunks, tensor by tensor.

    python -m benchmarks.imatrix_parity                   # builds llama-imatrix the first time, see benchmarks.peers
    python -m benchmarks.imatrix_parity MODEL.gguf --text TEXT --ctx-size 512

Both read special tokens in the text. Neither file is normalised: sums and counts are compared as they are stored.
llama-imatrix runs twice: chunk by chunk, as edge-phi3 does, when the counts must be equal too; and with its own batch
of 2,048 tokens, when it evaluates several chunks together and may pass over a few rows, since it leaves out products of
fewer than 16.

Also has each program's matrix read by the other's quantiser, and compares what both make of it.
Exit code 1 when a tensor correlates at less than 0.9999, or when the counts or the tensors differ.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import gguf
import numpy as np

from benchmarks.models import model_path
from benchmarks.peers import Peers, add_arguments, build_peers
from edge_phi3.conversion.imatrix import calibration_text, make_imatrix
from edge_phi3.conversion.imatrix_file import Imatrix, read_imatrix
from edge_phi3.conversion.quantize import quantize
from edge_phi3.llama.options import usable_cores

LEAST = 0.9999


def main() -> int:
    """Collect with both, compare, print what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", type=Path, help="GGUF files; default: the demo model in F16")
    parser.add_argument("--text", type=Path, help="calibration text; default: the packaged one")
    parser.add_argument("--ctx-size", type=int, nargs="*", default=[512], help="tokens of a chunk; several are allowed")
    parser.add_argument("--type", default="IQ2_XS", help="what both quantisers make with both matrices")
    add_arguments(parser)
    arguments = parser.parse_args()
    peers = build_peers(arguments.cache, arguments.source)
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        text = arguments.text or work / "calibration.txt"
        if arguments.text is None:
            text.write_text(calibration_text(), encoding="utf-8")
        for model in arguments.models or [model_path("demo", arguments.cache, "F16")]:
            for size in arguments.ctx_size:
                failed |= not compare(model, text, size, peers, work)
            failed |= not exchange(model, arguments.type, peers, work)
    return int(failed)


def compare(model: Path, text: Path, size: int, peers: Peers, work: Path) -> bool:
    """Collect with both; whether they agree. The matrices stay in `work`."""
    ours, theirs = work / "ours.gguf", work / "theirs.gguf"
    started = time.monotonic()
    make_imatrix(model, ours, text=text, ctx_size=size, parse_special=True, threads=usable_cores(), force=True)
    own = time.monotonic() - started
    good = True
    for batch in (size, 2048 // size * size or size):
        theirs.unlink(missing_ok=True)
        options = ("-c", str(size), "-b", str(batch), "-t", str(usable_cores()), "--parse-special", "--no-ppl")
        started = time.monotonic()
        peers.run("llama-imatrix", "-m", model, "-f", text, "-o", theirs, *options)
        other = time.monotonic() - started
        least, same = agreement(read_imatrix(ours), read_imatrix(theirs))
        good &= least >= LEAST and (same or batch != size)
        print(
            f"{model.name}, chunks of {size}: least correlation {least:.8f}, tensors and counts"
            f" {'equal' if same else 'differ'}; {own:.1f} s, llama-imatrix in batches of {batch} {other:.1f} s",
            flush=True,
        )
    return good


def agreement(ours: Imatrix, theirs: Imatrix) -> tuple[float, bool]:
    """Give the least correlation of any tensor's sums, and whether tensors, counts and chunks are the same."""
    same = list(ours.entries) == list(theirs.entries)
    same &= (ours.chunk_count, ours.chunk_size) == (theirs.chunk_count, theirs.chunk_size)
    least = 1.0
    for name in ours.entries.keys() & theirs.entries.keys():
        mine, other = ours.entries[name], theirs.entries[name]
        same &= np.array_equal(mine.counts, other.counts)
        least = min(least, float(np.corrcoef(mine.sums.ravel(), other.sums.ravel())[0, 1]))
    return least, bool(same)


def exchange(model: Path, kind: str, peers: Peers, work: Path) -> bool:
    """Quantise with each other's matrices; whether both quantisers write the same tensors from either."""
    good = True
    for matrix in (work / "ours.gguf", work / "theirs.gguf"):
        outputs = work / "quantized-here.gguf", work / "quantized-there.gguf"
        quantize(model, outputs[0], type=kind, imatrix=matrix, force=True)
        peers.run("llama-quantize", "--imatrix", matrix, model, outputs[1], kind, str(usable_cores()))
        data = [{t.name: t.data.tobytes() for t in gguf.GGUFReader(path).tensors} for path in outputs]
        good &= data[0] == data[1]
        print(f"{model.name}, {kind} with {matrix.stem}: tensors {'equal' if data[0] == data[1] else 'DIFFER'}")
    return good


if __name__ == "__main__":
    sys.exit(main())
