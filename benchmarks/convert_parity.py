"""Compare `edge-phi3 convert` with llama.cpp's convert_hf_to_gguf.py, tensor by tensor and key by key.

It needs llama.cpp's source and an interpreter with torch, transformers and sentencepiece:

    pip download --no-deps --no-binary :all: llama-cpp-python==0.3.36
    tar xf llama_cpp_python-0.3.36.tar.gz
    python -m benchmarks.convert_parity --llama-cpp llama_cpp_python-0.3.36/vendor/llama.cpp

Without checkpoints named, it makes a small random one of each kind: 4k, 128k (every spelling of the rope scaling),
grouped-query attention, shards, float16, float32. `--record` keeps what llama.cpp wrote, in digests, for the tests that
run without torch.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from edge_phi3.conversion.convert import convert
from tests.golden.cases import CONVERTER_CASES, write_converter_case
from tests.golden.describe import Description, describe, differences

OUTTYPES = ("f32", "f16", "bf16", "q8_0")

# One process for all conversions: importing torch takes longer than converting a small checkpoint.
_REFERENCE = """
import json, os, runpy, sys
script, jobs = sys.argv[1], json.loads(sys.argv[2])
sys.path[0] = os.path.dirname(script)
for checkpoint, outtype, output in jobs:
    sys.argv = [script, checkpoint, "--outtype", outtype, "--outfile", output]
    runpy.run_path(script, run_name="__main__")
"""


def main() -> int:
    """Convert with both, compare, print one line for each conversion; exit code 1 when anything differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="*", type=Path, help="checkpoint folders; default: random ones")
    parser.add_argument("--llama-cpp", type=Path, required=True, help="folder of llama.cpp's source")
    parser.add_argument("--python", default=sys.executable, help="interpreter with torch; default: this one")
    parser.add_argument("--outtype", nargs="*", choices=OUTTYPES, default=OUTTYPES)
    parser.add_argument("--record", type=Path, help="write what llama.cpp wrote, in digests, to this file")
    arguments = parser.parse_args()
    record: dict[str, dict[str, Description]] = {}
    different = 0
    with tempfile.TemporaryDirectory() as work:
        checkpoints = arguments.checkpoints or [write_converter_case(Path(work), name) for name in CONVERTER_CASES]
        pairs = [(checkpoint, outtype) for checkpoint in checkpoints for outtype in arguments.outtype]
        for checkpoint, outtype, theirs in convert_with_llama_cpp(
            pairs, Path(work), llama_cpp=arguments.llama_cpp, python=arguments.python
        ):
            ours = Path(work) / "ours.gguf"
            convert(checkpoint, ours, outtype=outtype, force=True)
            expected, found = describe(theirs), describe(ours)
            record.setdefault(checkpoint.name, {})[outtype] = expected
            names = differences(expected, found)
            different += len(names)
            counts = f"{len(expected['tensors']):3} tensors, {len(expected['metadata'])} metadata keys"
            print(f"{checkpoint.name:24} {outtype:5} {counts}, {len(names)} different", *names, sep="\n    ")
            theirs.unlink()
    if arguments.record:
        arguments.record.write_text(json.dumps(record, indent=0, sort_keys=True) + "\n", encoding="utf-8")
    print(f"{different} differences" if different else "no differences")
    return 1 if different else 0


def convert_with_llama_cpp(
    pairs: list[tuple[Path, str]], work: Path, *, llama_cpp: Path, python: str
) -> list[tuple[Path, str, Path]]:
    """Convert each (checkpoint, outtype) with llama.cpp's converter; give them with the GGUFs, which lie in `work`."""
    jobs = [(checkpoint, outtype, work / f"{i}.gguf") for i, (checkpoint, outtype) in enumerate(pairs)]
    script = llama_cpp / "convert_hf_to_gguf.py"
    encoded = json.dumps([[str(part) for part in job] for job in jobs])
    finished = subprocess.run([python, "-c", _REFERENCE, script, encoded], capture_output=True, text=True, check=False)
    if finished.returncode != 0:
        sys.exit(f"llama.cpp's converter failed:\n{finished.stderr[-2000:]}")
    return jobs


if __name__ == "__main__":
    sys.exit(main())
