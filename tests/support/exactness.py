"""transformers' recorded answers on this machine: all decoding modes, the sliding window, the long context.

    python -m tests.support.exactness --kv f32

The checkpoints are the small ones of ``tests/golden``, as F32 GGUFs, with all layers on the GPU where there is one.
With an F32 KV cache every token must be transformers'; with F16 the answers that differ are counted.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from edge_phi3.conversion.convert import convert
from edge_phi3.engine.engine import Engine
from edge_phi3.engine.engine_settings import EngineSettings
from edge_phi3.generation import API_DEFAULTS
from edge_phi3.llama.backend import supports_gpu_offload
from tests.golden import attention
from tests.golden.asked import Asked
from tests.golden.generation_data import differences, read_answers, write_engine_model

_SMALL_OF_EACH_MODE = 2
_SMALL_CASES = ("4k-2030+48", "128k-100+24")
_PATIENCE = 600.0
_SCORES = re.compile(r"sequences_scores |scores\[|logprobs\[")


class Exactness(msgspec.Struct, kw_only=True):
    """What was asked, and what came out differently.

    Attributes:
        kv_cache_type: element type of keys and values.
        gpu: whether layers were on a GPU.
        asked: number of answers compared.
        different: for each answer with another token, what it is called and how it differs.
        scores_apart: for each answer of the same tokens whose scores differ by more than 1e-3, likewise.
    """

    kv_cache_type: str
    gpu: bool
    asked: int
    different: dict[str, str]
    scores_apart: dict[str, str]


def compare(kv: str, *, threads: int, small: bool, cpu: bool) -> Exactness:
    """Ask everything, and compare.

    Args:
        kv: element type of keys and values.
        threads: threads of the CPU backend.
        small: ask a part only.
        cpu: keep all layers off the GPU.

    Raises:
        RuntimeError: a GPU is wanted, and this build of llama.cpp knows none.
    """
    on_gpu = supports_gpu_offload() and not cpu
    if not on_gpu and not cpu:
        raise RuntimeError("this build of llama.cpp knows no GPU")
    found = Exactness(kv_cache_type=kv, gpu=on_gpu, asked=0, different={}, scores_apart={})
    options = {"threads": threads, "kv_cache_type": kv, "window_chunk": 1, "n_gpu_layers": -1 if on_gpu else 0}
    with tempfile.TemporaryDirectory() as folder:
        _compare_requests(found, Path(folder), options, most=_SMALL_OF_EACH_MODE if small else None)
        _compare_attention(found, Path(folder), options, _SMALL_CASES if small else None)
    return found


def _compare_requests(found: Exactness, folder: Path, options: dict[str, Any], *, most: int | None) -> None:
    """Ask the recorded requests of all modes at once, so that they share batches."""
    recorded = read_answers("engine")
    if most is not None:
        modes = sorted({request.mode for request, _ in recorded})
        recorded = [pair for mode in modes for pair in [one for one in recorded if one[0].mode == mode][:most]]
    path = convert(write_engine_model(folder / "requests"), folder / "requests.gguf", outtype="f32").path
    scored: dict[str, Any] = {"output_scores": True, "return_dict_in_generate": True}
    with _engine(path, ctx_size=4096, parallel=16, max_queue=len(recorded), **options) as engine:
        asked = [
            Asked(engine, request.prompt, **dict(API_DEFAULTS) | request.kwargs | scored) for request, _ in recorded
        ]
        pad = engine.model.defaults.pad_token_id
        for number, ((request, expected), running) in enumerate(zip(recorded, asked, strict=True)):
            result = running.finished(_PATIENCE).result
            differing = differences(result, request, expected, request.kwargs.get("pad_token_id", pad))
            _note(found, f"{request.mode} {number}", "; ".join(differing))


def _compare_attention(found: Exactness, folder: Path, options: dict[str, Any], names: tuple[str, ...] | None) -> None:
    """Ask what crosses the sliding window and the original context."""
    recorded = attention.recorded()
    for variant, cells in (("4k", 4096), ("128k", 16384)):
        checkpoint = attention.write_model(folder / variant, variant)
        path = convert(checkpoint, folder / f"{variant}.gguf", outtype="f32").path
        with _engine(path, ctx_size=cells, parallel=4, **options) as engine:
            for case in attention.CASES:
                if case.model != variant or (names is not None and case.name not in names):
                    continue
                wanted: dict[str, Any] = {"max_new_tokens": case.new_tokens, "eos_token_id": []}
                result = Asked(engine, case.prompt(), **wanted).finished(_PATIENCE).result
                tokens = result.sequences[0][case.prompt_length :].tolist()
                expected = recorded[case.name]
                _note(found, case.name, "" if tokens == expected else f"{tokens} instead of {expected}")


def _note(found: Exactness, name: str, differing: str) -> None:
    found.asked += 1
    if differing:
        # `differences` compares scores only where all tokens are the same.
        kind = found.scores_apart if _SCORES.match(differing) else found.different
        kind[name] = differing[:300]


@contextmanager
def _engine(path: Path, **options: Any) -> Iterator[Engine]:
    engine = Engine(EngineSettings(path, **options))
    engine.load()
    try:
        yield engine
    finally:
        engine.close()


def main() -> None:
    """Compare with one kind of KV cache, and print what was found as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kv", choices=["f32", "f16"], default="f32")
    parser.add_argument("--threads", type=int, default=0, help="of the CPU backend; default: one on each core")
    parser.add_argument("--small", action="store_true", help="a part of the requests")
    parser.add_argument("--cpu", action="store_true", help="no layer on the GPU")
    arguments = parser.parse_args()
    found = compare(arguments.kv, threads=arguments.threads, small=arguments.small, cpu=arguments.cpu)
    print(msgspec.json.encode(found).decode())


if __name__ == "__main__":
    main()
