"""Make docs/benchmarks.md and its plots from what lies in benchmarks/results, and from nothing else.

    python -m benchmarks.report            # writes the page and its plots
    python -m benchmarks.report --check    # exit code 1 when they are not what the recorded results give

A result file that is not there leaves no trace in the page.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from benchmarks import report_quants, request_rate
from benchmarks.engine_ratios import Record as EngineRecord
from benchmarks.perplexity_parity import Record as ParityRecord
from benchmarks.record import SUITES, SuiteRecord
from benchmarks.report_tables import machine_line, number, table
from benchmarks.request_rate import Record as RateRecord
from edge_phi3.bench.machine import Machine
from edge_phi3.bench.quant_plots import digest_of, plot_quality, plot_speed
from edge_phi3.bench.quant_report import QuantReport
from edge_phi3.engine.engine_settings import EngineSettings
from edge_phi3.files import atomic_output

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DOCS = ROOT / "docs"
PAGE = "benchmarks.md"
IMAGES = "images"
PLOTS = {"quantizations-quality.svg": plot_quality, "quantizations-speed.svg": plot_speed}

_INTRODUCTION = """\
# Benchmarks

Made by `make report` from the files in `benchmarks/results`: every figure was measured, on the machine and by the
command that stand above it. Machines differ and are shared; figures of one table can be compared, those of two tables
on different machines cannot. [benchmarks/README.md](../benchmarks/README.md) says how to measure again.
"""


_T = TypeVar("_T")


def render(results: Path = RESULTS) -> str:
    """Give the page that a folder of results makes."""
    parts = [_INTRODUCTION]
    if (quants := quant_report(results)) is not None:
        parts += [report_quants.recommendation(quants), report_quants.comparison(quants, list(PLOTS))]
    if (parity := _read(results / "perplexity_parity.json", ParityRecord)) is not None:
        parts.append(report_quants.parity(parity))
    if (engine := _read(results / "engine.json", list[EngineRecord])) is not None:
        parts.append(_engine(engine))
    if (rate := _read(results / "request_rate.json", RateRecord)) is not None:
        parts.append(_request_rate(rate))
    for name, section in _SECTIONS.items():
        if (results / name).is_file():
            parts.append(section(msgspec.json.decode((results / name).read_bytes())))
    for suite in SUITES.values():
        if (record := _read(results / f"{suite.name}.json", SuiteRecord)) is not None:
            parts.append(_suite(suite.title, suite.about, record))
    return "\n".join(parts)


def quant_report(results: Path = RESULTS) -> QuantReport | None:
    """Give the recorded quantisations, or None when there are none."""
    return _read(results / "quantizations.json", QuantReport)


def is_current(results: Path = RESULTS, docs: Path = DOCS) -> list[str]:
    """Name what the recorded results no longer give: the page, or a plot of other figures."""
    stale, page = [], docs / PAGE
    if not page.is_file() or page.read_text("utf-8") != render(results):
        stale.append(PAGE)
    if (quants := quant_report(results)) is not None:
        digest = digest_of(quants.measurements)
        for name in PLOTS:
            path = docs / IMAGES / name
            if not path.is_file() or digest not in path.read_text("utf-8"):
                stale.append(name)
    return stale


def write(results: Path = RESULTS, docs: Path = DOCS) -> None:
    """Write the page that a folder of results makes, and its plots."""
    if (quants := quant_report(results)) is not None:
        (docs / IMAGES).mkdir(parents=True, exist_ok=True)
        for name, draw in PLOTS.items():
            draw(quants.measurements, docs / IMAGES / name)
    with atomic_output(docs / PAGE, force=True) as temporary:
        temporary.write_text(render(results), encoding="utf-8")


def _read(path: Path, kind: type[_T]) -> _T | None:
    return msgspec.json.decode(path.read_bytes(), type=kind) if path.is_file() else None


def _engine(records: list[EngineRecord]) -> str:
    results = [result for record in records for result in record.results]
    missed = [result for result in results if result.met is False]
    rows = [
        [
            result.part, result.model, result.case, number(result.ours), number(result.theirs), result.unit,
            f"{result.ratio:.2f}", f"{result.low:.2f} to {result.high:.2f}",
            "" if result.goal is None else f"{result.goal:g}",
            {None: "", True: "yes", False: "no"}[result.met],
        ]
        for result in results
    ]  # fmt: skip
    goals = sum(result.goal is not None for result in results)
    return "\n".join([
        "## The engine against llama.cpp's server",
        "",
        "The same GGUF, threads and requests, on the same libraries of llama.cpp, turn by turn. A ratio is"
        " the median of the turns' ratios and above 1 when ours is better; the range is that of the turns."
        " \"18m\" and \"0.65b\" are random models with Phi-3's vocabulary (`benchmarks/models.py`). Answers are"
        " streamed: llama-server sends each token by itself, ours those of a tenth of a second together"
        " (`--stream-interval`). For health checks the goal is our milliseconds.",
        "",
        *(machine_line(it.machine, f"python -m benchmarks.engine_ratios {' '.join(it.command)}") for it in records),
        "",
        f"{goals - len(missed)} of {goals} goals are reached.",
        "",
        *table(
            ["Part", "Model", "Case", "Ours", "Theirs", "Unit", "Ratio", "Range", "Goal", "Reached"], rows, words=3
        ),
        "",
    ])  # fmt: skip


def _suite(title: str, about: str, record: SuiteRecord) -> str:
    columns = list(dict.fromkeys(key for entry in record.results for key in entry.figures))
    rows = [
        [entry.name, number(entry.median * 1e3), number(entry.least * 1e3)]
        + [_figure(entry.figures.get(column)) for column in columns]
        for entry in record.results
    ]
    heads = ["", "Milliseconds, median", "Milliseconds, least", *(column.replace("_", " ") for column in columns)]
    return "\n".join([
        f"## {title}", "", about, "", machine_line(record.machine, record.command), "", *table(heads, rows), ""
    ])  # fmt: skip


def _figure(value: float | str | None) -> str:
    return "" if value is None else value if isinstance(value, str) else number(value)


def _fit(record: dict[str, Any]) -> str:
    rows = [
        [
            row["type"],
            ", ".join(f"--{name.replace('_', '-')} {value}" for name, value in row["options"].items())
            or "the defaults",
            *(f"{sum(row[side].values()) / 1e6:,.1f}" for side in ("planned", "allocated")),
            f"{100 * row['difference']:+.4f} %",
        ]
        for row in record["rows"]
    ]
    return "\n".join([
        "## What `edge-phi3 fit` plans",
        "",
        "The memory that it computes for a model, and the sum of the buffers that llama.cpp allocates for it, with"
        " the model"
        f" \"{record['model']}\" of `benchmarks/models.py`: weights, KV cache, compute buffers and outputs.",
        "",
        machine_line(msgspec.convert(record["machine"], Machine), record["command"]),
        "",
        *table(["Type", "Options", "Planned (MB)", "Allocated (MB)", "Difference"], rows, words=2),
        "",
    ])  # fmt: skip


def _window(record: dict[str, Any]) -> str:
    rows = [
        [
            str(row["chunk"] or "no window"),
            number(row["seconds"]),
            number(row["speed"]),
            f"{row['kl']:.1e}",
            f"{row['kl_p99']:.1e}",
            f"{100 * row['same_top']:.1f} %",
        ]
        for row in record["rows"]
        if row["model"] == "demo"
    ]
    command = f"python -m benchmarks.window_chunk {' '.join(record['options'])}"
    return "\n".join([
        "## What `--window-chunk` costs and changes",
        "",
        "A prompt of 3,000 tokens on the demo model, whose attention reaches back 2,047: seconds to the first token,"
        " and how far the distributions of the first token and of a forced continuation are from those of one token"
        " at a time, which is exact: Kullback-Leibler divergence in nats, its mean and 99th percentile, and how often"
        f" the likeliest token is the same. The default is {EngineSettings(Path()).window_chunk}. Without a window, as"
        " llama.cpp does by itself, the model answers otherwise.",
        "",
        machine_line(msgspec.convert(record["machine"], Machine), command),
        "",
        *table(["Chunk", "Seconds", "Tokens/s", "Mean KL", "99 % KL", "Same top token"], rows, words=1),
        "",
    ])  # fmt: skip


def _request_rate(record: RateRecord) -> str:
    rows = [
        [
            str(case.tokens),
            *(number(request_rate.median(turns)) for turns in (case.bench, case.wrk)),
            f"{case.ratio:.3f}",
            f"{100 * case.noise:.1f} %",
            case.verdict,
            *(f"{max(turn.generator_cores for turn in turns):.3f}" for turns in (case.bench, case.wrk)),
        ]
        for case in record.cases
    ]
    heads = ["Tokens of an answer", "`bench serve`, requests/s", "wrk, requests/s", "Ratio", "Noise", "Agree"]
    return "\n".join([
        "## The load generator against wrk",
        "",
        f"The same request on `/chat`, in a closed loop of {record.clients} clients on one server, by `edge-phi3 bench"
        f" serve` and by wrk in alternating turns of {record.seconds} s, {len(record.cases[0].wrk)} of each: medians"
        " and their ratio. Noise is how far apart the turns of one and the same tool lie, in parts of its median; the"
        " tools agree when their medians are no further apart, and more than"
        f" {100 * request_rate.MOST_NOISE:.0f} % are too much to tell. Both tools share the machine with the server.",
        "",
        machine_line(record.machine, record.command),
        "",
        *table([*heads, "Cores that `bench serve` took", "Cores that wrk took"], rows),
        "",
    ])  # fmt: skip


_SECTIONS: dict[str, Callable[[dict[str, Any]], str]] = {
    "window_chunk.json": _window,
    "fit_parity.json": _fit,
}

SHOWN = {
    "quantizations.json",
    "perplexity_parity.json",
    "engine.json",
    "request_rate.json",
    *_SECTIONS,
    *(f"{name}.json" for name in SUITES),
}
"""The result files that the page knows; any other is left out."""


def main() -> int:
    """Write the page and its plots, or compare them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail when something is out of date")
    if parser.parse_args().check:
        stale = is_current()
        print("Out of date, say `make report`: " + ", ".join(stale) if stale else "Up to date.")
        return int(bool(stale))
    write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
