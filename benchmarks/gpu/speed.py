"""How fast and how large: our service, llama-server, llama-batched-bench and transformers, on one machine and model.

Both servers hold the GPU alone in turns, with the same requests, and take turns in going first. A turn of each type is
one step, so that a run can stop after any of them.
"""

import contextlib
import functools
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import uvloop

from benchmarks.gpu.build import find_peers
from benchmarks.gpu.checkpoints import checkpoint, model
from benchmarks.gpu.device import MemoryWatch
from benchmarks.gpu.options import Options
from benchmarks.gpu.steps import NotMeasured, Steps
from benchmarks.servers import llama_server, original, ours
from edge_phi3.bench import BenchError
from edge_phi3.bench.load import Level, Summary
from edge_phi3.bench.serve import ServeBench, measure
from edge_phi3.bench.workload import Workload
from edge_phi3.system_resources import usable_cores

KINDS = ("Q4_K_M", "Q8_0", "F16")
MAIN_KIND = "Q4_K_M"
_CELLS_PER_CLIENT = 256
_LONG_CONTEXT = 2304
_EACH_LEVEL_SECONDS = 60.0


class Plan:
    """What is asked, in its full and its small extent.

    Args:
        options: of the run.
    """

    def __init__(self, options: Options) -> None:
        small = options.small
        self.kinds = KINDS[:1] if small else KINDS
        self.clients = (1, 8) if small else (1, 8, 32, 64, 128)
        self.sampled_clients = (8,) if small else (1, 32)
        self.requests = 2 if small else 8
        self.tokens = 8 if small else 64
        self.long_prompt = 300 if small else 2000
        self.longest_prompt = 500 if small else 6000
        self.prefix = 100 if small else 1000
        self.repeats = 1 if small else 6

    def greedy(self, **more: Any) -> Workload:
        """Prompts and answers of `tokens` tokens, streamed."""
        return Workload(**{"prompt_tokens": str(self.tokens), "output_tokens": str(self.tokens)} | more)

    def level(self, clients: int) -> Level:
        """Return a level of two requests for each client at least, begun within a minute."""
        return Level(clients=clients, sessions=max(self.requests, 2 * clients), duration=_EACH_LEVEL_SECONDS, warmup=2)


def measure_speed(steps: Steps, options: Options) -> None:
    """Run all steps of this part."""
    plan = Plan(options)
    for kind in plan.kinds:
        for number in range(options.rounds):
            name = f"speed.throughput.{kind}.{number + 1}"
            steps.run(name, functools.partial(_throughput, options, plan, kind, number))
        steps.run(f"speed.stream.{kind}", functools.partial(_stream, options, plan, kind))
        steps.run(f"speed.batched-bench.{kind}", functools.partial(_batched_bench, options, plan, kind))
    steps.run("speed.prefix", lambda: _prefix(options, plan))
    for variant, tokens, cells in (("4k", plan.long_prompt, 4096), ("128k", plan.longest_prompt, 8192)):
        steps.run(
            f"speed.long-prompt.{variant}",
            functools.partial(_long_prompt, options, plan, variant=variant, tokens=tokens, cells=cells),
        )
    steps.run("speed.memory.four-f16", lambda: _memory(options, plan, contexts=4, kv="f16"))
    steps.run("speed.memory.one-q8_0", lambda: _memory(options, plan, contexts=1, kv="q8_0"))
    steps.run("speed.transformers", lambda: _transformers(options, plan))


def _server(options: Options, api: str, path: Path, shape: dict[str, int], more: Sequence[str] = ()) -> Any:
    """Serve a model with edge-phi3, or with llama-server.

    Raises:
        NotMeasured: llama-server is not there.
    """
    shape = {"threads": options.threads or usable_cores(), **shape}
    if api == "chat":
        return ours(path, **shape, options=[*(["--n-gpu-layers", "0"] if options.cpu else []), *more])
    layers = ["--n-gpu-layers", "0" if options.cpu else "99"]
    return llama_server(find_peers(options), path, **shape, options=[*layers, *more])


def _load(url: str, api: str, workload: Workload, levels: Sequence[Level]) -> list[Summary]:
    """Put load on a server.

    Raises:
        RuntimeError: a request failed.
    """
    report = uvloop.run(measure(ServeBench(url, levels, workload, api=api)))
    for level in report.levels:
        if level.failed:
            raise RuntimeError(f"{api}: {level.failed} requests failed: {next(iter(level.errors))}")
    return report.levels


Asked = Sequence[tuple[Workload, Sequence[Level]]]


def _both(
    options: Options,
    path: Path,
    shape: dict[str, int],
    asked: Asked,
    *,
    more: dict[str, list[str]] | None = None,
    theirs_first: bool = False,
) -> tuple[dict[str, list[Summary]], dict[str, int | None], str | None]:
    """Ask our server and llama-server the same, one after the other.

    Returns:
        The figures of all levels, and the GPU memory at most, of "chat" and, where it is there and answers, of
        "llama-server"; and why that is missing, or None.
    """
    found: dict[str, list[Summary]] = {}
    memory: dict[str, int | None] = {}
    missing = None
    for api in ("llama-server", "chat") if theirs_first else ("chat", "llama-server"):
        try:
            server = _server(options, api, path, shape, (more or {}).get(api, ()))
        except NotMeasured as reason:
            missing = str(reason)
            continue
        try:
            with MemoryWatch().watching() as watch, server as url:
                found[api] = [level for workload, levels in asked for level in _load(url, api, workload, levels)]
        except (RuntimeError, BenchError) as error:
            if api == "chat":
                raise
            missing = f"llama-server failed: {error}"  # which is no reason to lose our own figures
            continue
        memory[api] = watch.peak
    return found, memory, missing


def _first_token(level: Summary | None) -> float | None:
    return None if level is None or level.first_token is None else level.first_token.p50


def _throughput(options: Options, plan: Plan, kind: str, number: int) -> dict[str, Any]:
    """Let each server run all levels once; whoever began the last turn is second in this one."""
    most = max(plan.clients)
    modes = {"greedy": plan.clients, "sampled": plan.sampled_clients}
    sampling = {"greedy": {}, "sampled": {"temperature": 1.0, "top_k": 10}}
    asked = [
        (plan.greedy(seed=number, **sampling[mode]), [plan.level(count) for count in clients])
        for mode, clients in modes.items()
    ]
    shape = {"parallel": most, "ctx_size": most * _CELLS_PER_CLIENT}
    found, memory, missing = _both(
        options, model(options, "4k", kind), shape, asked, theirs_first=number % 2 == 1
    )  # fmt: skip
    labels = [(mode, count) for mode, clients in modes.items() for count in clients]
    others = found.get("llama-server", [None] * len(labels))
    levels = [
        {
            "mode": mode,
            "clients": clients,
            "ours": mine.tokens_per_second,
            "theirs": other and other.tokens_per_second,
            "ratio": other and mine.tokens_per_second / other.tokens_per_second,
            "ours_first_token": _first_token(mine),
            "theirs_first_token": _first_token(other),
            "ours_generator_cores": mine.generator_cores,
        }
        for (mode, clients), mine, other in zip(labels, found["chat"], others, strict=True)
    ]
    return {"kind": kind, "levels": levels, "memory": memory, "peer_missing": missing}


def _stream(options: Options, plan: Plan, kind: str) -> dict[str, Any]:
    """Compare tokens per second of one stream while it decodes with llama-bench's at the same depth."""
    peers, path, turns = find_peers(options), model(options, "4k", kind), []
    tokens = str(plan.tokens)
    with _server(options, "chat", path, {"parallel": 16, "ctx_size": 16 * _CELLS_PER_CLIENT}) as url:
        for number in range(options.rounds):
            level = Level(clients=1, sessions=plan.repeats, warmup=1)
            (summary,) = _load(url, "chat", plan.greedy(seed=number), [level])
            if summary.per_token is None:
                raise RuntimeError("no answer had two tokens")
            output = peers.run(
                "llama-bench", "-m", path, "-t", str(options.threads or usable_cores()), "-ngl",
                "0" if options.cpu else "99", "-p", "0", "-n", tokens, "-d", tokens, "-r", "3", "-o", "json",
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
    output = find_peers(options).run(
        "llama-batched-bench", "-m", model(options, "4k", kind), "-t", str(options.threads or usable_cores()),
        "-ngl", "0" if options.cpu else "99", "-c", str(max(plan.clients) * 2 * plan.tokens), "-npp", str(plan.tokens),
        "-ntg", str(plan.tokens), "-npl", ",".join(map(str, plan.clients)), "--output-format", "jsonl",
    )  # fmt: skip
    rows = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    if not rows:
        raise RuntimeError(f"llama-batched-bench printed no figures: {output[-300:]}")
    # "speed" counts prompt tokens as well, which are as many as the generated ones.
    return {"kind": kind, "levels": [{"clients": row["pl"], "tokens": row["speed"] / 2} for row in rows]}


def _prefix(options: Options, plan: Plan) -> dict[str, Any]:
    """Compare the time to the first token behind a shared prefix with the prefix cache and without it."""
    path, shape = model(options, "4k", MAIN_KIND), {"parallel": 4, "ctx_size": 4 * _LONG_CONTEXT}
    level = Level(clients=1, sessions=plan.repeats, warmup=1)
    turns = []
    with (
        _server(options, "chat", path, shape) as warm,
        _server(options, "chat", path, shape, ["--no-prefix-cache"]) as cold,
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
    asked = [
        (Workload(prompt_tokens=str(tokens), output_tokens="4"), [Level(clients=1, sessions=plan.repeats, warmup=1)])
    ]
    found, _, missing = _both(
        options, model(options, variant, MAIN_KIND), {"parallel": 1, "ctx_size": cells}, asked
    )  # fmt: skip
    times = {api: _first_token(levels[0]) for api, levels in found.items()}
    return {
        "variant": variant,
        "prompt_tokens": tokens,
        "ours": times["chat"],
        "theirs": times.get("llama-server"),
        "peer_missing": missing,
    }


def _memory(options: Options, plan: Plan, *, contexts: int, kv: str) -> dict[str, Any]:
    """Measure the GPU memory that each server takes with so many full contexts, CUDA's own included."""
    if options.cpu:
        raise NotMeasured("it is about GPU memory")
    asked = [
        (
            Workload(prompt_tokens=str(plan.long_prompt), output_tokens="32"),
            [Level(clients=contexts, sessions=2 * contexts)],
        )
    ]
    more = {"chat": ["--kv-cache-type", kv], "llama-server": ["--cache-type-k", kv, "--cache-type-v", kv]}
    shape = {"parallel": contexts, "ctx_size": contexts * 4096}
    _, memory, missing = _both(options, model(options, "4k", MAIN_KIND), shape, asked, more=more)
    if memory["chat"] is None:
        raise NotMeasured("the driver tells no memory")
    return {"contexts": contexts, "kv": kv, "memory": memory, "peer_missing": missing}


def _transformers(options: Options, plan: Plan) -> dict[str, Any]:
    """Compare with transformers in bfloat16, the way the original service runs it."""
    python = options.torch_python or sys.executable
    probe = subprocess.run([python, "-c", "import torch, transformers"], capture_output=True, check=False)
    if probe.returncode != 0:
        raise NotMeasured("torch and transformers are not there; name a Python that has them with --torch-python")
    counts = (1, 8) if options.small else (1, 32)
    levels = [Level(clients=count, sessions=max(2, count)) for count in counts]
    shape = {"parallel": max(counts), "ctx_size": max(counts) * _CELLS_PER_CLIENT}
    servers: dict[str, contextlib.AbstractContextManager[str]] = {
        "transformers": original(Path(python), checkpoint(options, "4k"), threads=options.threads or 0),
        "chat": _server(options, "chat", model(options, "4k", MAIN_KIND), shape),
    }
    found: dict[str, list[Summary]] = {}
    memory: dict[str, int | None] = {}
    for name, server in servers.items():
        with MemoryWatch().watching() as watch, server as url:
            found[name] = _load(url, "chat", plan.greedy(stream=False), levels)
        memory[name] = watch.peak
    rows = [
        {"clients": count, "ours": a.tokens_per_second, "theirs": b.tokens_per_second,
         "ratio": a.tokens_per_second / b.tokens_per_second}
        for count, a, b in zip(counts, found["chat"], found["transformers"], strict=True)
    ]  # fmt: skip
    return {"kind": MAIN_KIND, "levels": rows, "memory": memory}
