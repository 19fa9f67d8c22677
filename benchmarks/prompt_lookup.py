"""Drafts out of a request's own text: tokens per second with `--speculation auto` over off, and over llama-server's.

    python -m benchmarks.prompt_lookup                              # F16, Q8_0 and Q4_K_M; 1, 4 and 16 clients
    python -m benchmarks.prompt_lookup --kinds F16 --clients 1 --rounds 10

Two works on models of Phi-3's widths (0.65 billion weights). "copy" repeats a text of the prompt word by word, on a
model made by hand to do so (`tests.support.models`); "prose" is a random model, in which nothing repeats. Turns
alternate; each client has a prompt of its own, which every server has seen once before. The ratio of a case is the
median of its turns' ratios.
"""

import argparse
import contextlib
import os
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from benchmarks.engine_ratios import Record, Result, compare
from benchmarks.servers import complete, llama_server, ours
from edge_phi3.bench.machine import Machine
from edge_phi3.conversion.convert import convert
from edge_phi3.conversion.quantize import quantize
from tests.golden.vocabularies import phi3_vocabulary
from tests.support.models import PHI3_VOCABULARY_ROWS, SHAPES, model_path, write_copying_checkpoint
from tests.support.peers import CACHE, build_peers

_TEXT, _BEGINNING, _NEW = 200, 4, 128
"""Tokens of a prompt's text, of the beginning that stands behind it once more, and of the answer."""
_NGRAM = ("--spec-type", "ngram-simple", "--spec-ngram-simple-size-n", "4", "--spec-ngram-simple-size-m", "16")
"""llama-server's own speculation, with matches as short as it finds useful here, and drafts as long as ours."""


def copying_model(kind: str, folder: Path = CACHE) -> Path:
    """Return the GGUF of the model that copies, made when it is not there yet."""
    path = folder / f"copying-{kind}.gguf"
    if path.exists():
        return path
    if kind != "F16":
        return quantize(copying_model("F16", folder), path, type=kind).path
    shape: dict[str, Any] = {"vocabulary": phi3_vocabulary(), "vocab_size": PHI3_VOCABULARY_ROWS, **SHAPES["0.65b"]}
    checkpoint = write_copying_checkpoint(folder / "copying", dtype="bfloat16", **shape)
    return convert(checkpoint, path, outtype="f16").path


def prompts(work: str, clients: int) -> list[list[int]]:
    """Return a prompt for each client: a text without repeated tokens, and its beginning where it is to be copied."""
    chance = np.random.default_rng(3)
    texts = [chance.permutation(np.arange(1000, 30000))[:_TEXT].tolist() for _ in range(clients)]
    return [text + text[:_BEGINNING] * (work == "copy") for text in texts]


def speed(url: str, asked: list[list[int]]) -> tuple[float, float]:
    """Ask for an answer to each prompt at once; return tokens per second, and the share of drafts that held."""
    body = {"max_tokens": _NEW, "temperature": 0, "ignore_eos": True}
    started = time.perf_counter()
    usages = [answer["usage"] for answer in complete(url, [body | {"prompt": prompt} for prompt in asked])]
    seconds = time.perf_counter() - started
    details = [usage.get("completion_tokens_details") or {} for usage in usages]
    held = sum(each.get("accepted_prediction_tokens", 0) for each in details)
    drafted = held + sum(each.get("rejected_prediction_tokens", 0) for each in details)
    return sum(usage["completion_tokens"] for usage in usages) / seconds, held / max(1, drafted)


@contextlib.contextmanager
def servers(model: Path, threads: int) -> Iterator[dict[str, str]]:
    """Run our server with `--speculation` auto and off, and llama-server with its own and without."""
    options: dict[str, Any] = {"threads": threads, "parallel": 16, "ctx_size": 16 * 512}
    with contextlib.ExitStack() as stack:
        peers = build_peers()
        yield {
            "auto": stack.enter_context(ours(model, **options)),
            "off": stack.enter_context(ours(model, **options, options=("--speculation", "off"))),
            "llama-server": stack.enter_context(llama_server(peers, model, **options)),
            "llama-server, n-grams": stack.enter_context(llama_server(peers, model, **options, options=_NGRAM)),
        }


def run(arguments: argparse.Namespace) -> Iterator[Result]:
    """Yield a result for each work, kind, number of clients and peer."""
    for work in arguments.works:
        for kind in arguments.kinds:
            model = copying_model(kind) if work == "copy" else model_path("0.65b", kind=kind)
            with servers(model, arguments.threads) as urls:
                for clients in arguments.clients:
                    asked, turns, shares = prompts(work, clients), [], []
                    for number in range(-1, arguments.rounds):
                        order = list(urls) if number % 2 else list(reversed(urls))
                        found = {name: speed(urls[name], asked) for name in order}
                        if number >= 0:
                            turns.append({name: tokens for name, (tokens, _) in found.items()})
                            shares.append(found["auto"][1])
                    for peer in [name for name in urls if name != "auto"]:
                        case = (
                            f"{work}, {kind}, {clients} clients, {statistics.median(shares):.2f} accepted, over {peer}"
                        )
                        pairs = [(turn["auto"], turn[peer]) for turn in turns]
                        yield compare("prompt lookup", model.name, case, pairs, unit="tokens/s")


def main() -> int:
    """Compare, and print a line for each comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--works", type=lambda text: text.split(","), default=["copy", "prose"])
    parser.add_argument("--kinds", type=lambda text: text.split(","), default=["F16", "Q8_0", "Q4_K_M"])
    parser.add_argument("--clients", type=lambda text: [int(each) for each in text.split(",")], default=[1, 4, 16])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--output", type=Path, help="write the results to this file")
    arguments = parser.parse_args()
    machine, results = Machine.here(), []
    for result in run(arguments):
        results.append(result)
        print(f"{result.case}: {result.ours:.1f} and {result.theirs:.1f}, {result.ratio:.2f}", end="", flush=True)
        print(f" ({result.low:.2f} to {result.high:.2f})", flush=True)
    if arguments.output:
        arguments.output.write_bytes(msgspec.json.format(msgspec.json.encode(Record(machine, results)), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
