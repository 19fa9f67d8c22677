"""The report: every figure with the machine it is from, and each goal met, not met or not measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.gpu.device import gpu
from benchmarks.gpu.figures import throughput
from benchmarks.gpu.goals import Verdict, judge
from benchmarks.gpu.options import Options
from benchmarks.gpu.steps import NotMeasured, Record
from edge_phi3.bench.machine import Machine
from edge_phi3.files import atomic_output


def write_report(records: Mapping[str, Record], options: Options) -> list[Verdict]:
    """Write ``report.json`` and ``report.md`` into the output folder, and give the goals' verdicts."""
    try:
        device = None if options.cpu else gpu()
    except NotMeasured:
        device = None
    verdicts = judge(records, gpu=device is not None)
    content = {
        "machine": Machine.here(),
        "gpu": device,
        "small": options.small,
        "goals": verdicts,
        "throughput": throughput(records),
        "steps": records,
    }
    lines = _markdown(records, options, verdicts, device.name if device else None)
    _write(options.out / "report.json", msgspec.json.format(msgspec.json.encode(content), indent=1))
    _write(options.out / "report.md", ("\n".join(lines) + "\n").encode())
    return verdicts


def _write(path: Path, data: bytes) -> None:
    with atomic_output(path, force=True) as temporary:
        temporary.write_bytes(data)


def _markdown(
    records: Mapping[str, Record], options: Options, verdicts: Sequence[Verdict], device: str | None
) -> Iterable[str]:
    machine = Machine.here()
    yield f"# edge-phi3 {machine.edge_phi3} on {device or machine.cpu}"
    yield ""
    yield f"{machine.date}, {machine.cores} cores of {machine.cpu}, llama-cpp-python {machine.llama_cpp}."
    if options.small:
        yield "**The model is tiny: these figures show that the measurement works, and say nothing of Phi-3.**"
    yield from _section(
        "Goals",
        ("goal", "wanted", "found", "", "from"),
        [(v.goal, v.wanted, _number(v.found), v.met, v.note) for v in verdicts],
    )
    yield from _section(
        "Tokens per second",
        ("type", "mode", "clients", "ours", "llama-server", "ratio", "min to max", "batched-bench",
         "of the memory's limit"),
        [
            (
                row.kind, row.mode, str(row.clients), _number(row.ours), _number(row.theirs), _number(row.ratio),
                "-" if row.low is None else f"{row.low:.2f} to {row.high:.2f}", _number(row.batched_bench),
                "-" if row.share is None else f"{row.share:.0%}",
            )
            for row in throughput(records)
        ],
    )  # fmt: skip
    yield from _section("One stream", ("type", "ours", "llama-bench", "ratio"), list(_streams(records)))
    yield from _section("Latency and caches", ("what", "ours", "other", "ratio"), list(_latencies(records)))
    yield from _section("GPU memory (GB)", ("step", "ours", "other"), list(_memory(records)))
    yield from _section(
        "Exactness",
        ("step", "answers", "other tokens than transformers", "scores more than 1e-3 apart"),
        [
            (name, str(r["asked"]), str(len(r["different"])), str(len(r["scores_apart"])))
            for name, r in _done(records, "exactness.")
        ],
    )
    yield from _section(
        "Models", ("step", "MB", "seconds"),
        [(name, f"{r['bytes'] / 1e6:.0f}", f"{records[name].seconds:.1f}") for name, r in _done(records, "models.")],
    )  # fmt: skip
    yield from _section(
        "Where a step's time goes (ms, in the engine's process)",
        ("rows", "mode", "step", "decode", "choose", "rest", "event loop", "a token over HTTP"),
        [
            (
                str(s["rows"]), s["mode"], *(_number(s[part]) for part in ("step", "decode", "choose", "rest", "loop")),
                _number(s["over_http"]),
            )
            for _, r in _done(records, "profile.step")
            for s in r["splits"]
        ],
    )  # fmt: skip
    yield from _section(
        "Choosing tokens in llama.cpp's graph instead of NumPy (ms a step)",
        ("rows", "mode", "NumPy", "graph", "ratio", "5th to 95th percentile", "same tokens"),
        [
            (
                str(s["rows"]), s["mode"], _number(s["numpy"]), _number(s["offloaded"]), _number(s["ratio"]),
                f"{s['low']:.2f} to {s['high']:.2f}", {None: "-", True: "yes", False: "no"}[s["same_tokens"]],
            )
            for _, r in _done(records, "profile.sampling")
            for s in r["rows"]
        ],
    )  # fmt: skip
    yield from _section(
        "GPU kernels", ("kernel", "share", "total ms"),
        [
            (str(row["Name"])[:90], f"{row['Time (%)']} %", f"{row['Total Time (ns)'] / 1e6:.2f}")
            for _, r in _done(records, "profile.kernels")
            for row in r["kernels"]
        ],
    )  # fmt: skip
    yield from _section(
        "Not measured, or failed",
        ("step", "why"),
        [(r.name, _one_line(r.missing or r.failure or "")) for r in records.values() if not r.done],
    )


def _done(records: Mapping[str, Record], prefix: str) -> list[tuple[str, Any]]:
    return [(name, record.result) for name, record in records.items() if name.startswith(prefix) and record.done]


def _streams(records: Mapping[str, Record]) -> Iterable[Sequence[str]]:
    for _, result in _done(records, "speed.stream."):
        yield result["kind"], _number(result["ours"]), _number(result["theirs"]), _number(result["ratio"])


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
        found = r.get("memory", r if name.startswith("speed.memory.") else None)
        if found is not None and found["ours"] is not None:
            yield name, _number(found["ours"] / 1e9), _number(found["theirs"] and found["theirs"] / 1e9)


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


def _one_line(text: str) -> str:
    return " ".join(text.split())[:300]
