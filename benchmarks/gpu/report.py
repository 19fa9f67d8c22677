"""The report: every figure with the machine it is from, as JSON and as a page, and what was not measured and why."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.gpu.device import gpu
from benchmarks.gpu.options import Options
from benchmarks.gpu.steps import NotMeasured, Record
from edge_phi3.bench.machine import Machine
from edge_phi3.files import atomic_output


class Throughput(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens per second of one type at one number of clients, over all turns.

    Attributes:
        kind: type of the weights.
        mode: "greedy" or "sampled".
        clients: users of the closed loop.
        ours: median.
        theirs: llama-server's median, or None.
        ratio: median of the turns' ratios, or None.
        low: the smallest of them.
        high: the largest.
        batched_bench: llama-batched-bench's, prompts included as in ours; None where it was not measured.
    """

    kind: str
    mode: str
    clients: int
    ours: float
    theirs: float | None
    ratio: float | None
    low: float | None
    high: float | None
    batched_bench: float | None


def throughput(records: Mapping[str, Record]) -> list[Throughput]:
    """Return the figures of all turns that are done, in the order in which they were first measured."""
    turns: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for _, result in _done(records, "speed.throughput."):
        for level in result["levels"]:
            turns.setdefault((result["kind"], level["mode"], level["clients"]), []).append(level)
    bare = {
        (result["kind"], level["clients"]): level["tokens"]
        for _, result in _done(records, "speed.batched-bench.")
        for level in result["levels"]
    }
    found = []
    for (kind, mode, clients), levels in turns.items():
        ratios = [level["ratio"] for level in levels if level["ratio"] is not None]
        theirs = [level["theirs"] for level in levels if level["theirs"] is not None]
        found.append(
            Throughput(
                kind=kind,
                mode=mode,
                clients=clients,
                ours=statistics.median(level["ours"] for level in levels),
                theirs=statistics.median(theirs) if theirs else None,
                ratio=statistics.median(ratios) if ratios else None,
                low=min(ratios, default=None),
                high=max(ratios, default=None),
                batched_bench=bare.get((kind, clients)),
            )
        )
    return found


def write_report(records: Mapping[str, Record], options: Options) -> None:
    """Write ``report.json`` and ``report.md`` into the output folder."""
    try:
        device = None if options.cpu else gpu()
    except NotMeasured:
        device = None
    machine = Machine.here()
    content = {
        "machine": machine,
        "gpu": device,
        "small": options.small,
        "throughput": throughput(records),
        "steps": records,
    }
    lines = _markdown(records, options, machine, device.name if device else None)
    _write(options.out / "report.json", msgspec.json.format(msgspec.json.encode(content), indent=1))
    _write(options.out / "report.md", ("\n".join(lines) + "\n").encode())


def _write(path: Path, data: bytes) -> None:
    with atomic_output(path, force=True) as temporary:
        temporary.write_bytes(data)


def _markdown(records: Mapping[str, Record], options: Options, machine: Machine, device: str | None) -> Iterable[str]:
    yield f"# edge-phi3 {machine.edge_phi3} on {device or machine.cpu}"
    yield ""
    yield f"{machine.date}, {machine.cores} cores of {machine.cpu}, llama-cpp-python {machine.llama_cpp}."
    if options.small:
        yield "**The model is tiny: these figures show that the measurement works, and say nothing of Phi-3.**"
    yield from _section(
        "Exactness",
        ("step", "answers", "other tokens than transformers", "scores more than 1e-3 apart"),
        [
            (name, str(r["asked"]), str(len(r["different"])), str(len(r["scores_apart"])))
            for name, r in _done(records, "exactness.")
        ],
    )
    yield from _section(
        "Tokens per second",
        ("type", "mode", "clients", "ours", "llama-server", "ratio", "min to max", "llama-batched-bench"),
        [
            (
                row.kind, row.mode, str(row.clients), _number(row.ours), _number(row.theirs), _number(row.ratio),
                "-" if row.low is None else f"{row.low:.2f} to {row.high:.2f}", _number(row.batched_bench),
            )
            for row in throughput(records)
        ],
    )  # fmt: skip
    yield from _section(
        "One stream",
        ("type", "ours", "llama-bench", "ratio"),
        [
            (r["kind"], _number(r["ours"]), _number(r["theirs"]), _number(r["ratio"]))
            for _, r in _done(records, "speed.stream.")
        ],
    )
    yield from _section("Latency and caches", ("what", "ours", "other", "ratio"), list(_latencies(records)))
    yield from _section("GPU memory (GB)", ("step", "ours", "other"), list(_memory(records)))
    yield from _section(
        "Models", ("step", "MB", "seconds"),
        [(name, f"{r['bytes'] / 1e6:.0f}", f"{records[name].seconds:.1f}") for name, r in _done(records, "models.")],
    )  # fmt: skip
    yield from _section(
        "Not measured, or failed",
        ("step", "why"),
        [(r.name, " ".join((r.missing or r.failure or "").split())[:300]) for r in records.values() if not r.done],
    )


def _done(records: Mapping[str, Record], prefix: str) -> list[tuple[str, Any]]:
    return [(name, record.result) for name, record in records.items() if name.startswith(prefix) and record.done]


def _latencies(records: Mapping[str, Record]) -> Iterable[Sequence[str]]:
    for _, r in _done(records, "speed.prefix"):
        what = f"ms to the first token behind {r['prefix']} shared tokens; other: without prefix cache"
        yield what, _number(1e3 * r["ours"]), _number(1e3 * r["theirs"]), _number(r["ratio"])
    for _, r in _done(records, "speed.long-prompt."):
        other = r["theirs"]
        yield (
            f"ms to the first token of {r['prompt_tokens']} tokens, Phi-3-mini-{r['variant']}; other: llama-server",
            _number(1e3 * r["ours"]),
            _number(other and 1e3 * other),
            _number(other and other / r["ours"]),
        )
    for _, r in _done(records, "speed.transformers"):
        for row in r["levels"]:
            what = f"tokens/s at {row['clients']} clients, {r['kind']}; other: transformers in bfloat16"
            yield what, _number(row["ours"]), _number(row["theirs"]), _number(row["ratio"])


def _memory(records: Mapping[str, Record]) -> Iterable[Sequence[str]]:
    for name, r in _done(records, "speed."):
        taken = dict(r.get("memory", {}))
        mine = taken.pop("chat", None)
        if mine is not None:
            others = [f"{_number(other / 1e9)} ({peer})" for peer, other in taken.items() if other is not None]
            yield name, _number(mine / 1e9), ", ".join(others) or "-"


def _section(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterable[str]:
    if not rows:
        return
    yield from ("", f"## {title}", "")
    yield f"| {' | '.join(headings)} |"
    yield f"|{' --- |' * len(headings)}"
    for row in rows:
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}" if abs(value) >= 100 else f"{value:.3g}"
