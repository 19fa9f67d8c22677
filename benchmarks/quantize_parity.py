"""Record what llama-quantize makes of the demo model, and compare `edge-phi3 quantize` with it.

    python -m benchmarks.quantize_parity --record         # builds llama-quantize the first time, see benchmarks.peers

`--record` writes tests/golden/quantized.json, which the tests compare with on machines without llama-quantize. Exit
code 1 when any tensor differs.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from benchmarks.peers import add_arguments, build_peers
from edge_phi3.conversion.quantize import quantize
from edge_phi3.engine.settings import usable_cores
from tests.golden.quantized import CASES, RECORD, digest, write_inputs


def main() -> int:
    """Quantise with both, compare, print one line for each type."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help=f"write {RECORD.name}")
    add_arguments(parser)
    arguments = parser.parse_args()
    peers = build_peers(arguments.cache, arguments.source)
    record: dict[str, str] = {}
    different = 0
    with tempfile.TemporaryDirectory() as work:
        model, matrix = write_inputs(Path(work))
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
        RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return int(different > 0)


if __name__ == "__main__":
    sys.exit(main())
