"""Compare `edge-phi3 convert` with llama.cpp's convert_hf_to_gguf.py, tensor by tensor and key by key.

It needs llama.cpp's source and an interpreter with torch, transformers and sentencepiece:

    pip download --no-deps --no-binary llama-cpp-python llama-cpp-python==0.3.36 && tar xf
    llama_cpp_python-*.tar.gz python -m benchmarks.convert_parity --llama-cpp
    llama_cpp_python-0.3.36/vendor/llama.cpp --python .venv-torch/bin/python

Without checkpoints named, it makes a small random one of each kind: 4k, 128k (every spelling of the rope
scaling), grouped-query attention, shards, float16, float32. `--record` keeps the digests of llama.cpp's
tensors, and its metadata, for the tests that run without torch.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from gguf import GGUFReader

from edge_phi3.conversion.convert import convert
from tests.golden.cases import CONVERTER_CASES, write_converter_case

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

_OURS_ALONE = ("edge_phi3.", "tokenizer.ggml.eom_token_id", "tokenizer.ggml.eot_token_id")


def main() -> int:
    """Convert with both, compare, print one line for each conversion; exit code 1 when anything differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="*", type=Path, help="checkpoint folders; default: random ones")
    parser.add_argument("--llama-cpp", type=Path, required=True, help="folder of llama.cpp's source")
    parser.add_argument("--python", default=sys.executable, help="interpreter with torch; default: this one")
    parser.add_argument("--outtype", nargs="*", choices=OUTTYPES, default=OUTTYPES)
    parser.add_argument("--record", type=Path, help="write digests and metadata of llama.cpp's output here")
    arguments = parser.parse_args()
    record: dict[str, dict[str, Any]] = {}
    different = 0
    with tempfile.TemporaryDirectory() as work:
        checkpoints = arguments.checkpoints or [write_converter_case(Path(work), name) for name in CONVERTER_CASES]
        pairs = [(checkpoint, outtype) for checkpoint in checkpoints for outtype in arguments.outtype]
        for checkpoint, outtype, theirs in _reference_conversions(arguments, pairs, Path(work)):
            ours = Path(work) / "ours.gguf"
            convert(checkpoint, ours, outtype=outtype, force=True)
            expected, found = describe(theirs), describe(ours)
            record.setdefault(checkpoint.name, {})[outtype] = expected
            tensors, keys = compare(expected, found)
            different += len(tensors) + len(keys)
            print(
                f"{checkpoint.name:24} {outtype:5} {len(expected['tensors']):4} tensors, "
                f"{len(tensors)} different; {len(expected['metadata'])} keys, {len(keys)} different"
            )
            for name in (*tensors, *keys):
                print(f"    {name}")
            theirs.unlink()
    if arguments.record:
        arguments.record.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    print(f"{different} differences" if different else "no differences")
    return 1 if different else 0


def describe(path: Path) -> dict[str, Any]:
    """Give the tensors of a GGUF (type, shape, SHA-256 of the bytes) and its metadata but for ``general.*``.

    Long metadata values are given as digests.
    """
    reader = GGUFReader(path)
    tensors = {
        tensor.name: [
            tensor.tensor_type.name,
            [int(length) for length in tensor.shape],
            hashlib.sha256(tensor.data.tobytes()).hexdigest(),
        ]
        for tensor in reader.tensors
    }
    metadata = {}
    for key, field in reader.fields.items():
        if not key.startswith(("general.", "GGUF.")):
            text = json.dumps([[int(kind) for kind in field.types], field.contents()])
            metadata[key] = text if len(text) < 100 else hashlib.sha256(text.encode()).hexdigest()
    return {"tensors": tensors, "metadata": metadata}


def compare(expected: dict[str, Any], found: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Give the names of tensors, and metadata keys, in which two descriptions differ."""
    names = expected["tensors"].keys() | found["tensors"].keys()
    tensors = [name for name in sorted(names) if expected["tensors"].get(name) != found["tensors"].get(name)]
    ours = {key: value for key, value in found["metadata"].items() if not key.startswith(_OURS_ALONE)}
    names = expected["metadata"].keys() | ours.keys()
    return tensors, [key for key in sorted(names) if expected["metadata"].get(key) != ours.get(key)]


def _reference_conversions(
    arguments: argparse.Namespace, pairs: list[tuple[Path, str]], work: Path
) -> list[tuple[Path, str, Path]]:
    jobs = [(checkpoint, outtype, work / f"{i}.gguf") for i, (checkpoint, outtype) in enumerate(pairs)]
    script = arguments.llama_cpp / "convert_hf_to_gguf.py"
    encoded = json.dumps([[str(part) for part in job] for job in jobs])
    finished = subprocess.run(
        [arguments.python, "-c", _REFERENCE, script, encoded], capture_output=True, text=True, check=False
    )
    if finished.returncode != 0:
        sys.exit(f"llama.cpp's converter failed:\n{finished.stderr[-2000:]}")
    return jobs


if __name__ == "__main__":
    sys.exit(main())
