"""Record what llama-quantize makes of a model, and compare `edge-phi3 quantize` with it.

    python -m benchmarks.quantize_parity --record         # builds llama-quantize the first time, see benchmarks.peers
    python -m benchmarks.quantize_parity --model wide --record

The model is the demo, or a random one with Phi-3's real widths and vocabulary. `--record` writes its digests to
tests/golden/quantized.json, which the tests compare with on machines without llama-quantize, or for the wide model,
which takes too long for them, to benchmarks/results/quantized-wide.json. Exit code 1 when any tensor differs.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from benchmarks.models import model_path
from benchmarks.peers import add_arguments, build_peers
from edge_phi3.conversion.quantize import quantize
from edge_phi3.llama.options import usable_cores
from tests.golden.quantized import CASES, RECORD, digest, write_inputs, write_matrix

RECORDS = {"demo": RECORD, "wide": Path(__file__).parent / "results" / "quantized-wide.json"}


def main() -> int:
    """Quantise with both, compare, print one line for each type."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=RECORDS, default="demo", help="what is quantised; default: demo")
    parser.add_argument("--record", action="store_true", help="write the digests")
    add_arguments(parser)
    arguments = parser.parse_args()
    peers = build_peers(arguments.cache, arguments.source)
    record: dict[str, str] = {}
    different = 0
    with tempfile.TemporaryDirectory() as work:
        if arguments.model == "demo":
            model, matrix = write_inputs(Path(work))
        else:
            model = model_path(arguments.model, arguments.cache, "BF16")
            matrix = write_matrix(Path(work) / "imatrix.gguf", model)
        ours, theirs = Path(work) / "ours.gguf", Path(work) / "theirs.gguf"
        for kind, guided in CASES.items():
            guide = ("--imatrix", matrix) if guided else ()
            peers.run("llama-quantize", *guide, model, theirs, kind, str(usable_cores()))
            quantize(model, ours, type=kind, imatrix=matrix if guided else None, force=True)
            record[kind] = digest(theirs)
            same = record[kind] == digest(ours)
            different += not same
            print(f"{kind:8} {record[kind]} {'equal' if same else 'DIFFERENT'}", flush=True)
    if arguments.record:
        RECORDS[arguments.model].write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return int(different > 0)


if __name__ == "__main__":
    sys.exit(main())
