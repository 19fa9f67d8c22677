"""transformers' recorded answers on this machine: all decoding modes, the sliding window, the long context.

The checkpoints are the small ones of ``tests/golden``, as F32 GGUFs, with all layers on the GPU where there is one.
With an F32 KV cache every token must be transformers'; with F16 the answers that differ are counted.
"""

import argparse
import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edge_phi3.conversion.convert import convert
from edge_phi3.llama.backend import supports_gpu_offload
from tests.golden import attention
from tests.golden.generation_data import read_answers, write_engine_model
from tests.golden.requests import MODES
from tests.support.engines import ask, compared, running_engine

_SMALL_OF_EACH_MODE = 2
_SMALL_CASES = ("4k-2030+48", "128k-100+24")
_SCORES = re.compile(r"sequences_scores |scores\[|logprobs\[")


def compared_requests(folder: Path, *, small: bool, **options: Any) -> Iterator[tuple[str, str]]:
    """Ask the recorded requests of all modes at once, so that they share batches; yield how each answer differs."""
    recorded = read_answers("engine")
    if small:
        of_mode = {mode: [pair for pair in recorded if pair[0].mode == mode] for mode in MODES}
        recorded = [pair for pairs in of_mode.values() for pair in pairs[:_SMALL_OF_EACH_MODE]]
    path = convert(write_engine_model(folder / "requests"), folder / "requests.gguf", outtype="f32").path
    with running_engine(path, ctx_size=4096, parallel=16, max_queue=len(recorded), **options) as engine:
        for number, each in enumerate(compared(engine, recorded)):
            yield f"{each.request.mode} {number}", "; ".join(each.differences)


def compared_attention(folder: Path, *, small: bool, **options: Any) -> Iterator[tuple[str, str]]:
    """Ask what crosses the sliding window and the original context; yield how each answer differs."""
    for variant, cells in (("4k", 4096), ("128k", 16384)):
        checkpoint = attention.write_model(folder / variant, variant)
        path = convert(checkpoint, folder / f"{variant}.gguf", outtype="f32").path
        with running_engine(path, ctx_size=cells, parallel=4, **options) as engine:
            for case in attention.CASES:
                if case.model == variant and (not small or case.name in _SMALL_CASES):
                    (tokens,) = ask(engine, case.prompt(), max_new_tokens=case.new_tokens, eos_token_id=[])
                    expected = attention.recorded()[case.name]
                    yield case.name, "" if tokens == expected else f"{tokens} instead of {expected}"


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
    options: dict[str, Any] = {"kv_cache_type": arguments.kv, "threads": arguments.threads, "small": arguments.small}
    options["n_gpu_layers"] = -1 if on_gpu else 0
    with tempfile.TemporaryDirectory() as folder:
        found = [*compared_requests(Path(folder), **options), *compared_attention(Path(folder), **options)]
    differing = [(name, what[:300]) for name, what in found if what]
    # `differences` compares scores only where all tokens are the same.
    apart = {name: what for name, what in differing if _SCORES.match(what)}
    different = {name: what for name, what in differing if name not in apart}
    told = {"asked": len(found), "different": different, "scores_apart": apart}
    print(json.dumps({"kv_cache_type": arguments.kv, "gpu": on_gpu} | told))


if __name__ == "__main__":
    main()
