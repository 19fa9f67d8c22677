"""Make docs/benchmarks.md and its plots from what lies in benchmarks/results, and from nothing else.

    python -m benchmarks.report            # writes the page and its plots
    python -m benchmarks.report --check    # exit code 1 when they are not what the recorded results give

A result file that is not there leaves no trace on the page.
"""

import argparse
import hashlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.engine_ratios import Record as EngineRecord
from benchmarks.measure import DOCS, PARTS, RESULTS, Part, SuiteRecord
from benchmarks.memory import MemoryRecord
from edge_phi3.bench.machine import Machine
from edge_phi3.bench.plots import plot_quality, plot_speed
from edge_phi3.bench.quants import Measurement, QuantReport, on_front
from edge_phi3.files import atomic_output
from edge_phi3.planning.fit import BEST_FIRST

PAGE = "benchmarks.md"
IMAGES = "images"
PLOTS = {"quantizations-quality.svg": plot_quality, "quantizations-speed.svg": plot_speed}

BUDGETS = (3, 4, 5, 6)
"""GiB of GPU memory to choose for."""

_INTRODUCTION = """\
# Benchmarks

Made by `make report` from the files in `benchmarks/results`: every figure was measured or computed on the machine that
is named above its table. Compare figures of one table; those of two tables may come from different machines, or from
one that was busy. [benchmarks/README.md](../benchmarks/README.md) says how to measure again.
"""


def render(results: Path = RESULTS) -> str:
    """Return the page that a folder of results makes."""
    sections = [_INTRODUCTION]
    for part in PARTS:
        path = results / f"{part.name}.json"
        if path.is_file():
            kind, section = _SECTIONS.get(part.name, (SuiteRecord, _suite))
            record = msgspec.json.decode(path.read_bytes(), type=kind)
            sections.append("\n".join([f"## {part.title}", "", *section(part, record), ""]))
    return "\n".join(sections)


def stale(results: Path = RESULTS, docs: Path = DOCS) -> list[str]:
    """Return the names of what the recorded results no longer give: the page, or a plot of other figures."""
    page = docs / PAGE
    found = [] if page.is_file() and page.read_text("utf-8") == render(results) else [PAGE]
    if (measurements := _measurements(results)) is not None:
        digest = _digest(measurements)
        for name in PLOTS:
            path = docs / IMAGES / name
            if not path.is_file() or digest not in path.read_text("utf-8"):
                found.append(name)
    return found


def write(results: Path = RESULTS, docs: Path = DOCS) -> None:
    """Write the page that a folder of results makes, and its plots."""
    if (measurements := _measurements(results)) is not None:
        (docs / IMAGES).mkdir(parents=True, exist_ok=True)
        for name, draw in PLOTS.items():
            path = docs / IMAGES / name
            draw(measurements, path)
            path.write_text(f"{path.read_text('utf-8')}<!-- {_digest(measurements)} -->\n", encoding="utf-8")
    with atomic_output(docs / PAGE, force=True) as temporary:
        temporary.write_text(render(results), encoding="utf-8")


def _measurements(results: Path) -> list[Measurement] | None:
    path = results / "quantizations.json"
    return msgspec.json.decode(path.read_bytes(), type=QuantReport).measurements if path.is_file() else None


def _digest(measurements: Sequence[Measurement]) -> str:
    """Return the digest of drawn figures that a picture carries at its end, so that a stale one can be told."""
    return hashlib.sha256(msgspec.json.encode(list(measurements))).hexdigest()


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], *, words: int = 1) -> list[str]:
    """Return the lines of a table: the first `words` columns to the left, the others, figures, to the right."""
    marks = ["---" if index < words else "---:" for index in range(len(heads))]
    return [f"| {' | '.join(line)} |" for line in (heads, marks, *rows)]


def _number(value: float) -> str:
    """Return a figure with three digits, and no exponent unless it is tiny."""
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) >= 1e-4 else f"{value:.1e}"


def _origin(part: Part, machine: Machine) -> str:
    """Return where, when, with which versions and by which command figures were measured."""
    load = "" if machine.load is None else f", at a load of {machine.load:g} before"
    return (
        f"{machine.date[:10]}; {machine.cpu}, {machine.cores} cores, {machine.memory / 2**30:.0f} GiB{load};"
        f" {machine.system}, Python {machine.python}, edge-phi3 {machine.edge_phi3}, llama-cpp-python"
        f" {machine.llama_cpp}.\nTo measure again: `python -m benchmarks.measure --only {part.name}`."
    )


def _memory(part: Part, record: MemoryRecord) -> list[str]:
    def gib(value: float) -> str:
        return f"{value / 2**30:.2f}"

    rows = [
        [
            row.type,
            f"{row.bits_per_weight:.2f}",
            *(gib(size + record.reserve) for size in row.gpu.values()),
            gib(row.main_memory),
        ]
        for row in record.rows
    ]
    taken = {row.type: row.gpu for row in record.rows}
    choices = [
        [f"{budget} GiB"]
        + [
            next((kind for kind in BEST_FIRST if taken[kind][kv] + record.reserve <= budget * 2**30), "none")
            for kv in record.kv_cache
        ]
        for budget in BUDGETS
    ]
    caches = [f"{kv.upper()} cache" for kv in record.kv_cache]
    buffers = "" if record.gpu_asked else " The buffers are those of llama.cpp's CPU backend, an estimate of a GPU's."
    return [
        f"{part.about} All layers lie on the GPU; {record.reserve >> 20} MiB are left free for the driver and for"
        f" working space of kernels, as `edge-phi3 fit` leaves them. {record.cells:,} tokens of KV cache take"
        f" {' and '.join(f'{gib(size)} GiB as {kv.upper()}' for kv, size in record.kv_cache.items())}; requests that"
        f" run at the same time share them, and longer ones need more.{buffers}",
        "",
        "Take the first that fits of those that `edge-phi3 fit` recommends, from large to small. Q8_0 is the largest of"
        " them; more memory is better spent on more or longer requests.",
        "",
        *_table(["GPU memory", *caches], choices, words=1 + len(caches)),
        "",
        "`edge-phi3 fit MODEL --device gpu --memory 8GiB` plans for your model, memory and context. How much a type"
        " loses depends on the model and on what it is asked; this measures it on yours, against F16:",
        "",
        "    edge-phi3 bench quants my-model-f16.gguf --type Q8_0 --type Q4_K_M --text my-texts.txt",
        "",
        _origin(part, record.machine),
        "",
        *_table(["Type", "Bits per weight", *(f"GiB with {cache}" for cache in caches), "Main memory (GiB)"], rows),
    ]


def _quantizations(part: Part, report: QuantReport) -> list[str]:
    reference = report.measurements[0]
    speed, quality = reference.speed, reference.quality
    loads = [item.machine.load for item in report.measurements if item.machine.load is not None]
    rows = [
        [
            f"{item.type}{' *' if best else ''}",
            f"{item.bytes / 1e6:.2f}",
            f"{item.bits_per_weight:.2f}",
            f"{item.quality.perplexity:.4f} ± {item.quality.perplexity_error:.4f}",
            *_loss(item),
            _number(item.speed.prompt_per_second),
            _number(item.speed.generated_per_second),
            _number(item.speed.first_token * 1e3),
            f"{item.memory_peak / 1e6:.0f}",
            _number(item.load_seconds * 1e3),
        ]
        for item, best in zip(report.measurements, on_front(report.measurements), strict=True)
    ]
    heads = [
        "Type", "Size (MB)", "Bits per weight", "Perplexity", "Mean KL", "99th percentile", "Same top token",
        "Prompt tokens/s", "Generated tokens/s", "First token (ms)", "Memory (MB)", "Load (ms)",
    ]  # fmt: skip
    return [
        f"{part.about} It has 7 million weights, five hundred times fewer than Phi-3-mini: compare the types with each"
        " other, but do not expect a larger model to lose as much, or as little. The text is"
        f" {quality.positions:,} tokens of {report.text} in {quality.chunks} chunks of {report.ctx_size}. A star marks"
        " the Pareto front: no other type is as small and diverges as little. Types of fewer than 8 bits were made with"
        f" an importance matrix of the packaged calibration text. Divergence is from {reference.type}, in nats. Speed"
        f" is that of one sequence without HTTP: {speed.prompt_tokens} tokens of prompt, {speed.generated_tokens}"
        f" generated, medians of {len(speed.turns)}. Memory is the peak of a fresh process, of which"
        f" {reference.memory_before / 1e6:.0f} MB are there before the model; files were read from the system's cache.",
        "",
        _origin(part, reference.machine),
        f"The load (mean number of busy processes) lay between {min(loads, default=0):g} and {max(loads, default=0):g}"
        " while the types were measured one after another: read small differences of speed as none.",
        "",
        *_table(heads, rows),
        "",
        *(f"![{plot.removesuffix('.svg').replace('-', ': ')}]({IMAGES}/{plot})\n" for plot in PLOTS),
    ]


def _loss(item: Measurement) -> tuple[str, str, str]:
    divergence = item.quality.divergence
    if divergence is None:
        return "", "", ""
    return _number(divergence.mean), _number(divergence.p99), f"{100 * divergence.same_top:.2f} %"


def _engine(part: Part, record: EngineRecord) -> list[str]:
    rows = [
        [
            result.part, result.model, result.case, _number(result.ours), _number(result.theirs), result.unit,
            f"{result.ratio:.2f}", f"{result.low:.2f} to {result.high:.2f}",
        ]
        for result in record.results
    ]  # fmt: skip
    heads = ["Part", "Model", "Case", "Ours", "Theirs", "Unit", "Ratio", "Range of the turns"]
    return [part.about, "", _origin(part, record.machine), "", *_table(heads, rows, words=3)]


def _suite(part: Part, record: SuiteRecord) -> list[str]:
    columns = list(dict.fromkeys(key for entry in record.results for key in entry.figures))
    rows = [
        [entry.name, _number(entry.median * 1e3), _number(entry.least * 1e3)]
        + [_figure(entry.figures.get(column)) for column in columns]
        for entry in record.results
    ]
    heads = ["", "Milliseconds, median", "Milliseconds, least", *(column.replace("_", " ") for column in columns)]
    return [part.about, "", _origin(part, record.machine), "", *_table(heads, rows)]


def _figure(value: float | str | None) -> str:
    return "" if value is None else value if isinstance(value, str) else _number(value)


_SECTIONS: dict[str, tuple[type[Any], Callable[[Part, Any], list[str]]]] = {
    "memory": (MemoryRecord, _memory),
    "quantizations": (QuantReport, _quantizations),
    "engine": (EngineRecord, _engine),
    "transformers": (EngineRecord, _engine),
}
"""Parts whose results are not those of a suite: what they hold, and how it is shown."""


def main() -> int:
    """Write the page and its plots, or compare them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail when something is out of date")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder of the page")
    arguments = parser.parse_args()
    if not arguments.check:
        write(arguments.results, arguments.docs)
        return 0
    found = stale(arguments.results, arguments.docs)
    print("Out of date, say `make report`: " + ", ".join(found) if found else "Up to date.")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
