"""What a JSON schema costs: tokens per second of sampled answers with one over the same load without.

    python -m benchmarks.structured_output [--rounds 10]

The model has Phi-3's widths and 0.65 billion weights (Q4_K_M), and is random: its answers are long texts in a schema
of ten fields. Three comparisons, in alternating turns: 16 clients with the schema over 16 without, 8 clients without
beside 8 with over 8 beside 8 without, and 16 clients with it over llama-server's 16 with it, where that takes it.
"""

import argparse
import concurrent.futures
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.engine_ratios import Record, Result, compare
from benchmarks.servers import complete, llama_server, ours
from edge_phi3.bench.machine import Machine
from edge_phi3.bench.workload import WORDS
from tests.support.models import model_path
from tests.support.peers import build_peers

_NEW = 64
_TYPES: tuple[dict[str, Any], ...] = (
    {"type": "string"},
    {"type": "integer"},
    {"enum": ["low", "middle", "high"]},
    {"type": "array", "items": {"type": "string"}},
    {"type": "boolean"},
)
_NAMES = ("title", "year", "level", "authors", "known", "place", "pages", "state", "words", "lent")
SCHEMA = {
    "type": "object",
    "properties": {name: _TYPES[number % len(_TYPES)] for number, name in enumerate(_NAMES)},
    "required": list(_NAMES),
    "additionalProperties": False,
}
WITH = {"response_format": {"type": "json_schema", "json_schema": {"name": "book", "schema": SCHEMA}}}


def bodies(clients: int, extra: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a request for each client, with another prompt each, sampled, of at most so many tokens."""
    asked = [" ".join(WORDS[number * 40 : number * 40 + 40]) for number in range(clients)]
    common = {"max_tokens": _NEW, "temperature": 1.0, "top_k": 50} | extra
    return [common | {"messages": [{"role": "user", "content": text}]} for text in asked]


def speed(url: str, asked: Sequence[dict[str, Any]]) -> float:
    """Return the tokens per second of the answers to some requests that come at once."""
    started = time.perf_counter()
    answers = complete(url, asked, "/v1/chat/completions")
    seconds = time.perf_counter() - started
    return float(sum(answer["usage"]["completion_tokens"] for answer in answers) / seconds)


def speed_beside(url: str, asked: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]]) -> float:
    """Return the tokens per second of some requests, while others are answered again and again."""
    done = False

    def keep_asking(body: dict[str, Any]) -> None:
        while not done:
            complete(url, [body], "/v1/chat/completions")

    with concurrent.futures.ThreadPoolExecutor(len(others)) as pool:
        running = [pool.submit(keep_asking, body) for body in others]
        try:
            return speed(url, asked)
        finally:
            done = True
            for each in running:
                each.result()


def run(rounds: int, threads: int) -> Iterator[Result]:
    """Yield a result for each comparison."""
    model = model_path("0.65b", kind="Q4_K_M")
    options: dict[str, Any] = {"threads": threads, "parallel": 16, "ctx_size": 16 * 512}

    def turns(one: Callable[[], float], other: Callable[[], float]) -> list[tuple[float, float]]:
        found = []
        for number in range(-1, rounds):
            pair = (one(), other()) if number % 2 else (other(), one())[::-1]
            if number >= 0:
                found.append(pair)
        return found

    with ours(model, **options) as url:
        plain, held = bodies(16, {"ignore_eos": True}), bodies(16, WITH)
        pairs = turns(lambda: speed(url, held), lambda: speed(url, plain))
        yield compare("structured output", model.name, "16 clients, with a schema over without", pairs, unit="tokens/s")
        pairs = turns(lambda: speed_beside(url, plain[:8], held[8:]), lambda: speed_beside(url, plain[:8], plain[8:]))
        yield compare(
            "structured output", model.name, "8 clients, beside 8 with over 8 without", pairs, unit="tokens/s"
        )
        try:
            with llama_server(build_peers(), model, **options) as theirs:
                pairs = turns(lambda: speed(url, held), lambda: speed(theirs, held))
        except RuntimeError as error:
            print(f"llama-server: {error}", file=sys.stderr)
        else:
            case = "16 clients with a schema, over llama-server"
            yield compare("structured output", model.name, case, pairs, unit="tokens/s")


def main() -> int:
    """Compare, and print a line for each comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--output", type=Path, help="write the results to this file")
    arguments = parser.parse_args()
    results = []
    for result in run(arguments.rounds, arguments.threads):
        results.append(result)
        print(f"{result.case}: {result.ours:.1f} and {result.theirs:.1f}, {result.ratio:.3f}", end="", flush=True)
        print(f" ({result.low:.2f} to {result.high:.2f})", flush=True)
    if arguments.output:
        record = Record(Machine.here(), results)
        arguments.output.write_bytes(msgspec.json.format(msgspec.json.encode(record), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
