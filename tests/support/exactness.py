"""transformers' recorded answers on this machine: all decoding modes, the sliding window, the long context.

The checkpoints are the small ones of ``tests/golden``, as F32 GGUFs, with all layers on the GPU where there is one.
With an F32 KV cache every token must be transformers'; with F16 the answers that differ are counted.
"""

import argparse
import re
import tempfile
from pathlib import Path
from typing import Any

import msgspec

from edge_phi3.conversion.convert import convert
from edge_phi3.llama.backend import supports_gpu_offload
from tests.golden import attention
from tests.golden.generation_data import read_answers, write_engine_model
from tests.golden.requests import MODES
from tests.support.engines import ask, compared, running_engine

_SMALL_OF_EACH_MODE = 2
_SMALL_CASES = ("4k-2030+48", "128k-100+24")
_SCORES = re.compile(r"sequences_scores |scores\[|logprobs\[")


class Exactness(msgspec.Struct, kw_only=True):
    """How many answers were compared, and how those differ that have another token, or scores apart by 1e-3."""

    kv_cache_type: str
    gpu: bool
    asked: int = 0
    different: dict[str, str] = {}
    scores_apart: dict[str, str] = {}

    def note(self, name: str, differing: str) -> None:
        self.asked += 1
        if differing:
            # `differences` compares scores only where all tokens are the same.
            kind = self.scores_apart if _SCORES.match(differing) else self.different
            kind[name] = differing[:300]


def compare_requests(found: Exactness, folder: Path, *, small: bool, **options: Any) -> None:
    """Ask the recorded requests of all modes at once, so that they share batches."""
    recorded = read_answers("engine")
    if small:
        of_mode = {mode: [pair for pair in recorded if pair[0].mode == mode] for mode in MODES}
        recorded = [pair for pairs in of_mode.values() for pair in pairs[:_SMALL_OF_EACH_MODE]]
    path = convert(write_engine_model(folder / "requests"), folder / "requests.gguf", outtype="f32").path
    with running_engine(path, ctx_size=4096, parallel=16, max_queue=len(recorded), **options) as engine:
        for number, each in enumerate(compared(engine, recorded)):
            found.note(f"{each.request.mode} {number}", "; ".join(each.differences))


def compare_attention(found: Exactness, folder: Path, *, small: bool, **options: Any) -> None:
    """Ask what crosses the sliding window and the original context."""
    for variant, cells in (("4k", 4096), ("128k", 16384)):
        checkpoint = attention.write_model(folder / variant, variant)
        path = convert(checkpoint, folder / f"{variant}.gguf", outtype="f32").path
        with running_engine(path, ctx_size=cells, parallel=4, **options) as engine:
            for case in attention.CASES:
                if case.model == variant and (not small or case.name in _SMALL_CASES):
                    (tokens,) = ask(engine, case.prompt(), max_new_tokens=case.new_tokens, eos_token_id=[])
                    expected = attention.recorded()[case.name]
                    found.note(case.name, "" if tokens == expected else f"{tokens} instead of {expected}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kv", choices=["f32", "f16"], default="f32")
    parser.add_argument("--threads", type=int, default=0, help="of the CPU backend; default: one on each core")
    parser.add_argument("--small", action="store_true", help="a part of the requests")
    parser.add_argument("--cpu", action="store_true", help="no layer on the GPU")
    arguments = parser.parse_args()
    on_gpu = not arguments.cpu
    if on_gpu and not supports_gpu_offload():
        parser.error("this build of llama.cpp knows no GPU")
    found = Exactness(kv_cache_type=arguments.kv, gpu=on_gpu)
    options = {"kv_cache_type": arguments.kv, "threads": arguments.threads, "n_gpu_layers": -1 if on_gpu else 0}
    with tempfile.TemporaryDirectory() as folder:
        for compare in (compare_requests, compare_attention):
            compare(found, Path(folder), small=arguments.small, **options)
    print(msgspec.json.encode(found).decode())


if __name__ == "__main__":
    main()
