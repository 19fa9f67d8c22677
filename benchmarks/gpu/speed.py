"""How fast and how large: our service, llama-server, llama-batched-bench and transformers, on one machine and model.

Both servers hold the GPU alone in turns, with the same requests, and take turns in going first. A turn of each type is
one step, so that a run can stop after any of them.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gguf import GGUFReader

from benchmarks.gpu.build import find_peers
from benchmarks.gpu.checkpoints import checkpoint, model
from benchmarks.gpu.device import Bandwidth, MemoryWatch, cpu_bandwidth, gpu, gpu_bandwidth
from benchmarks.gpu.options import Options
from benchmarks.gpu.steps import NotMeasured, Steps
from benchmarks.peers import Peers
from benchmarks.servers import llama_server, original, ours
from edge_phi3.bench.load import Level
from edge_phi3.bench.serve import ServeBench, run
from edge_phi3.bench.summary import Summary
from edge_phi3.bench.workload import Workload
from edge_phi3.llama.options import usable_cores

KINDS = ("Q4_K_M", "Q8_0", "F16")
MAIN_KIND = "Q4_K_M"
_CELLS_PER_CLIENT = 256
_LONG_CONTEXT = 2304
_EACH_LEVEL_SECONDS = 60.0

Serving = Callable[..., contextlib.AbstractContextManager[str]]


def _threads(options: Options) -> int:
    return options.threads or usable_cores()


class Plan:
    """What is asked, in its full and its small extent.

    Args:
        options: of the run.
    """

    def __init__(self, options: Options) -> None:
        small = options.small
        self.clients = (1, 8) if small else (1, 8, 32, 64, 128)
        self.sampled_clients = (8,) if small else (1, 32)
        self.requests = 4 if small else 8
        self.tokens = 8 if small else 64
        self.long_prompt = 500 if small else 2000
        self.longest_prompt = 1000 if small else 6000
        self.prefix = 300 if small else 1000
        self.repeats = 2 if small else 6

    def greedy(self, **more: Any) -> Workload:
        """Prompts and answers of `tokens` tokens, streamed."""
        return Workload(**{"prompt_tokens": str(self.tokens), "output_tokens": str(self.tokens)} | more)

    def level(self, clients: int) -> Level:
        """Give a level of two requests for each client at least, begun within a minute."""
        return Level(clients=clients, sessions=max(self.requests, 2 * clients), duration=_EACH_LEVEL_SECONDS, warmup=2)


def measure_speed(steps: Steps, options: Options) -> None:
    """Run all steps of this part."""
    plan = Plan(options)
    steps.run("speed.bandwidth", lambda: _bandwidth(options))
    for kind in KINDS:
        for number in range(options.rounds):
            name = f"speed.throughput.{kind}.{number + 1}"
            steps.run(name, lambda k=kind, n=number: _throughput(options, plan, k, n))
        steps.run(f"speed.stream.{kind}", lambda k=kind: _stream(options, plan, k))
        steps.run(f"speed.batched-bench.{kind}", lambda k=kind: _batched_bench(options, plan, k))
    steps.run("speed.prefix", lambda: _prefix(options, plan))
    for variant, tokens, cells in (("4k", plan.long_prompt, 4096), ("128k", plan.longest_prompt, 8192)):
        steps.run(
            f"speed.long-prompt.{variant}",
            lambda v=variant, t=tokens, c=cells: _long_prompt(options, plan, variant=v, tokens=t, cells=c),
        )
    steps.run("speed.memory.four-f16", lambda: _memory(options, plan, contexts=4, kv="f16"))
    steps.run("speed.memory.one-q8_0", lambda: _memory(options, plan, contexts=1, kv="q8_0"))
    steps.run("speed.transformers", lambda: _transformers(options, plan))


def _bandwidth(options: Options) -> Bandwidth:
    if options.cpu:
        return cpu_bandwidth(64 << 20) if options.small else cpu_bandwidth()
    return gpu_bandwidth(options.work, options.architecture or gpu().architecture)


def traffic(options: Options, kind: str) -> dict[str, int]:
    """Give the bytes that a decode step reads: all weights but the embedding's, and an F16 KV cache for each token."""
    reader = GGUFReader(model(options, "4k", kind))
    weights = sum(int(tensor.n_bytes) for tensor in reader.tensors if tensor.name != "token_embd.weight")

    def value(name: str) -> int:
        return int(reader.fields[f"phi3.{name}"].contents())

    width = value("embedding_length") * value("attention.head_count_kv") // value("attention.head_count")
    return {"weights": weights, "kv_per_token": 2 * 2 * value("block_count") * width}


# -- servers


def serving(
    options: Options, kind: str, *, parallel: int, cells: int, more: Sequence[str] = (), variant: str = "4k"
) -> Any:
    """Serve a model with edge-phi3."""
    layers = ["--n-gpu-layers", "0"] if options.cpu else []
    path = model(options, variant, kind)
    return ours(path, threads=_threads(options), parallel=parallel, ctx_size=cells, options=[*layers, *more])


def _peer_serving(
    options: Options,
    peers: Peers,
    kind: str,
    *,
    parallel: int,
    cells: int,
    more: Sequence[str] = (),
    variant: str = "4k",
) -> Any:
    """Serve the same with llama-server."""
    layers = ["--n-gpu-layers", "0" if options.cpu else "99"]
    path = model(options, variant, kind)
    return llama_server(
        peers, path, threads=_threads(options), parallel=parallel, ctx_size=cells, options=[*layers, *more]
    )


def _peers_or_reason(options: Options) -> tuple[Peers | None, str | None]:
    try:
        return find_peers(options), None
    except NotMeasured as reason:
        return None, str(reason)


def _load(url: str, api: str, workload: Workload, levels: Sequence[Level]) -> list[Summary]:
    """Put load on a server.

    Raises:
        RuntimeError: a request failed.
    """
    report = run(ServeBench(url, levels, workload, api=api))
    for level in report.levels:
        if level.failed:
            raise RuntimeError(f"{api}: {level.failed} requests failed: {next(iter(level.errors))}")
    return report.levels


def _first_token(level: Summary) -> float | None:
    return None if level.first_token is None else level.first_token.p50


# -- steps


def _throughput(options: Options, plan: Plan, kind: str, number: int) -> dict[str, Any]:
    """Let each server run all levels once; whoever began the last turn is second in this one."""
    most = max(plan.clients)
    shape = {"parallel": most, "cells": most * _CELLS_PER_CLIENT}
    peers, reason = _peers_or_reason(options)
    sampling = {"temperature": 1.0, "top_k": 10}
    modes = (
        ("greedy", plan.greedy(seed=number), plan.clients),
        ("sampled", plan.greedy(seed=number, **sampling), plan.sampled_clients),
    )

    def turn(server: contextlib.AbstractContextManager[str], api: str) -> tuple[list[Summary], int | None]:
        found: list[Summary] = []
        with MemoryWatch().watching() as memory, server as url:
            for _, workload, clients in modes:
                found += _load(url, api, workload, [plan.level(count) for count in clients])
        return found, memory.peak

    turns: dict[str, tuple[list[Summary], int | None]] = {}
    for who in ("chat", "llama-server") if number % 2 == 0 else ("llama-server", "chat"):
        if who == "chat":
            turns[who] = turn(serving(options, kind, **shape), who)
        elif peers is not None:
            turns[who] = turn(_peer_serving(options, peers, kind, **shape), who)
    mine, memory = turns["chat"]
    others, their_memory = turns.get("llama-server", (None, None))
    levels = []
    labels = [(mode, count) for mode, _, clients in modes for count in clients]
    for place, (mode, clients) in enumerate(labels):
        other = others[place] if others else None
        levels.append(
            {
                "mode": mode,
                "clients": clients,
                "ours": mine[place].tokens_per_second,
                "theirs": other and other.tokens_per_second,
                "ratio": other and mine[place].tokens_per_second / other.tokens_per_second,
                "ours_first_token": _first_token(mine[place]),
                "theirs_first_token": other and _first_token(other),
                "ours_generator_cores": mine[place].generator_cores,
            }
        )
    return {
        "kind": kind,
        "levels": levels,
        "tokens": plan.tokens,
        "memory": {"ours": memory, "theirs": their_memory},
        "traffic": traffic(options, kind),
        "peer_missing": reason,
    }


def _stream(options: Options, plan: Plan, kind: str) -> dict[str, Any]:
    """Compare tokens per second of one stream while it decodes with llama-bench's at the same depth."""
    peers = find_peers(options)
    layers = "0" if options.cpu else "99"
    turns = []
    with serving(options, kind, parallel=16, cells=16 * _CELLS_PER_CLIENT) as url:
        for number in range(options.rounds):
            level = Level(clients=1, sessions=plan.repeats, warmup=1)
            (summary,) = _load(url, "chat", plan.greedy(seed=number), [level])
            if summary.per_token is None:
                raise RuntimeError("no answer had two tokens")
            output = peers.run(
                "llama-bench", "-m", model(options, "4k", kind), "-t", str(_threads(options)), "-ngl", layers,
                "-p", "0", "-n", str(plan.tokens), "-d", str(plan.tokens), "-r", "3", "-o", "json",
            )  # fmt: skip
            turns.append((1 / summary.per_token.p50, float(json.loads(output)[0]["avg_ts"])))
    return {"kind": kind, **_median_ratio(turns)}


def _median_ratio(turns: Sequence[tuple[float, float]], *, low_is_good: bool = False) -> dict[str, Any]:
    ratios = [(mine / other) ** (-1 if low_is_good else 1) for mine, other in turns]
    return {
        "ours": statistics.median(mine for mine, _ in turns),
        "theirs": statistics.median(other for _, other in turns),
        "ratio": statistics.median(ratios),
        "low": min(ratios),
        "high": max(ratios),
        "turns": list(turns),
    }


def _batched_bench(options: Options, plan: Plan, kind: str) -> dict[str, Any]:
    """Decode as many sequences as there are clients, without HTTP and without choosing tokens."""
    peers = find_peers(options)
    output = peers.run(
        "llama-batched-bench", "-m", model(options, "4k", kind), "-t", str(_threads(options)),
        "-ngl", "0" if options.cpu else "99", "-c", str(max(plan.clients) * 2 * plan.tokens), "-npp", str(plan.tokens),
        "-ntg", str(plan.tokens), "-npl", ",".join(map(str, plan.clients)), "--output-format", "jsonl",
    )  # fmt: skip
    rows = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    if not rows:
        raise RuntimeError(f"llama-batched-bench printed no figures: {output[-300:]}")
    return {
        "kind": kind,
        "levels": [
            {"clients": row["pl"], "decode": row["speed_tg"], "prefill": row["speed_pp"], "both": row["speed"]}
            for row in rows
        ],
    }


def _prefix(options: Options, plan: Plan) -> dict[str, Any]:
    """Compare the time to the first token behind a shared prefix with the prefix cache's and without it."""
    shape = {"parallel": 4, "cells": 4 * _LONG_CONTEXT}
    level = Level(clients=1, sessions=plan.repeats, warmup=1)
    turns = []
    with (
        serving(options, MAIN_KIND, **shape) as warm,
        serving(options, MAIN_KIND, **shape, more=["--no-prefix-cache"]) as cold,
    ):
        for number in range(options.rounds):
            workload = Workload(shared_prefix=plan.prefix, prompt_tokens="24", output_tokens="4", seed=number)
            times = [_first_token(_load(url, "chat", workload, [level])[0]) for url in (warm, cold)]
            if times[0] is None or times[1] is None:
                raise RuntimeError("no answer was streamed")
            turns.append((times[0], times[1]))
    return {"prefix": plan.prefix, **_median_ratio(turns, low_is_good=True)}


def _long_prompt(options: Options, plan: Plan, *, variant: str, tokens: int, cells: int) -> dict[str, Any]:
    """Measure the time to the first token of a long prompt, alone on the server."""
    peers, reason = _peers_or_reason(options)
    shape: dict[str, Any] = {"parallel": 1, "cells": cells, "variant": variant}
    servers = [("chat", serving(options, MAIN_KIND, **shape))]
    if peers is not None:
        servers.append(("llama-server", _peer_serving(options, peers, MAIN_KIND, **shape)))
    workload = Workload(prompt_tokens=str(tokens), output_tokens="4")
    level = Level(clients=1, sessions=plan.repeats, warmup=1)
    times: dict[str, float | None] = {}
    for api, server in servers:
        with server as url:
            times[api] = _first_token(_load(url, api, workload, [level])[0])
    return {
        "variant": variant,
        "prompt_tokens": tokens,
        "ours": times["chat"],
        "theirs": times.get("llama-server"),
        "peer_missing": reason,
    }


def _memory(options: Options, plan: Plan, *, contexts: int, kv: str) -> dict[str, Any]:
    """Measure the GPU memory that each server takes with so many full contexts, CUDA's own included."""
    if options.cpu:
        raise NotMeasured("it is about GPU memory")
    shape = {"parallel": contexts, "cells": contexts * 4096}
    peers, reason = _peers_or_reason(options)
    servers = [("chat", serving(options, MAIN_KIND, **shape, more=["--kv-cache-type", kv]))]
    if peers is not None:
        more = ["--cache-type-k", kv, "--cache-type-v", kv]
        servers.append(("llama-server", _peer_serving(options, peers, MAIN_KIND, **shape, more=more)))
    workload = Workload(prompt_tokens=str(plan.long_prompt), output_tokens="32")
    peaks: dict[str, int] = {}
    for api, server in servers:
        with MemoryWatch().watching() as memory, server as url:
            _load(url, api, workload, [Level(clients=contexts, sessions=2 * contexts)])
        if memory.peak is None:
            raise NotMeasured("the driver tells no memory")
        peaks[api] = memory.peak
    return {
        "contexts": contexts,
        "kv": kv,
        "ours": peaks["chat"],
        "theirs": peaks.get("llama-server"),
        "peer_missing": reason,
    }


def _transformers(options: Options, plan: Plan) -> dict[str, Any]:
    """Compare with transformers in bfloat16, the way the original service runs it."""
    python = options.torch_python or sys.executable
    probe = subprocess.run([python, "-c", "import torch, transformers"], capture_output=True, check=False)
    if probe.returncode != 0:
        raise NotMeasured("torch and transformers are not there; name a Python that has them with --torch-python")
    counts = (1, 8) if options.small else (1, 32)
    levels = [Level(clients=count, sessions=max(2, count)) for count in counts]
    workload = plan.greedy(stream=False)
    with (
        MemoryWatch().watching() as their_memory,
        original(Path(python), checkpoint(options, "4k"), threads=options.threads or 0) as url,
    ):
        theirs = _load(url, "chat", workload, levels)
    shape = {"parallel": max(counts), "cells": max(counts) * _CELLS_PER_CLIENT}
    with MemoryWatch().watching() as memory, serving(options, MAIN_KIND, **shape) as url:
        mine = _load(url, "chat", workload, levels)
    rows = [
        {"clients": count, "ours": a.tokens_per_second, "theirs": b.tokens_per_second,
         "ratio": a.tokens_per_second / b.tokens_per_second}
        for count, a, b in zip(counts, mine, theirs, strict=True)
    ]  # fmt: skip
    return {
        "kind": MAIN_KIND,
        "levels": rows,
        "memory": {"ours": memory.peak, "theirs": their_memory.peak},
    }
