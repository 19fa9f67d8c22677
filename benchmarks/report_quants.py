"""The report's sections on quantisations: what to take, how types compare, and whether llama-perplexity agrees."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.perplexity_parity import Record
from benchmarks.report_tables import machine_line, number, table
from edge_phi3.bench.quant_report import Measurement, QuantReport, mean_divergence, on_front
from edge_phi3.conversion.quantization_types import QUANTIZATION_TYPES

_HIDDEN, _FEED_FORWARD, _LAYERS, _VOCABULARY = 3072, 8192, 32, 32064
_LAYER = 4 * _HIDDEN**2 + 3 * _HIDDEN * _FEED_FORWARD + 2 * _HIDDEN
PHI3_MINI_WEIGHTS = 2 * _VOCABULARY * _HIDDEN + _LAYERS * _LAYER + _HIDDEN
"""Embedding and output matrices, layers of attention (4 square matrices) and feed-forward (3), and norms."""

KV_BYTES_PER_TOKEN = 2 * _LAYERS * _HIDDEN * 2
"""Keys and values of all layers in F16."""

CONTEXT = 4096
SPARE = 2**29
"""Bytes set aside for llama.cpp's buffers and the GPU's driver: a rule of thumb, which the page calls so."""

BUDGETS = (4, 5, 6, 8, 10, 12)
"""GiB of memory to choose for."""

SHARES = (0.99, 0.98, 0.95, 0.9, 0.75)
"""Shares of equal most likely tokens that the reasons name."""


def needed_bytes(kind: str) -> float:
    """Give what Phi-3-mini takes in a type: its weights, an F16 KV cache of `CONTEXT` tokens, and what is spared."""
    return PHI3_MINI_WEIGHTS * QUANTIZATION_TYPES[kind].bits_per_weight / 8 + CONTEXT * KV_BYTES_PER_TOKEN + SPARE


def choose(measurements: Sequence[Measurement], budget: float) -> Measurement | None:
    """Give the type that fits `budget` bytes with the least measured divergence; None when none fits."""
    fitting = [item for item in measurements if needed_bytes(item.type) <= budget]
    return min(fitting, key=lambda item: (mean_divergence(item), item.bytes), default=None)


def recommendation(report: QuantReport) -> str:
    """Say which file to take for which memory."""
    rows = []
    for budget in BUDGETS:
        best = choose(report.measurements, budget * 2**30)
        if best is not None:
            rows.append([f"{budget} GiB", best.type, f"{needed_bytes(best.type) / 2**30:.2f} GiB", *_loss(best)])
        else:
            rows.append([f"{budget} GiB", "none: shorten the context", "", "", "", ""])
    return "\n".join([
        "## Which file for which memory",
        "",
        f"Phi-3-mini has {PHI3_MINI_WEIGHTS / 1e9:.2f} billion weights, and its KV cache takes"
        f" {KV_BYTES_PER_TOKEN // 1024} KiB a token in F16. Each row names the type that fits with"
        f" {CONTEXT} tokens of cache and diverged least in the measurements below. What it needs is computed from its"
        f" bits per weight, with {SPARE / 2**20:.0f} MiB for llama.cpp's buffers and the driver, a rule of thumb."
        " Requests that run at the same time share the cache; a longer one needs more memory.",
        "",
        *table(
            ["Memory", "Take", "It needs", "Mean KL divergence", "99th percentile", "Same top token"], rows, words=2
        ),
        "",
        *_reasons(report.measurements),
        "",
        "The divergences are those of the demo model, which has five hundred times fewer weights than Phi-3-mini and"
        " need not lose as much or as little. Measure your own:"
        " `edge-phi3 bench quants phi-3-mini-4k-f16.gguf --type Q4_K_M --type Q8_0`; `edge-phi3 fit` tells what fits a"
        " machine with all its buffers.",
        "",
    ])  # fmt: skip


def _reasons(measurements: Sequence[Measurement]) -> list[str]:
    """Derive sentences from the figures."""
    quantised = [item for item in measurements if QUANTIZATION_TYPES[item.type].bits_per_weight < 16]
    lines = []
    for share in SHARES:
        enough = [item for item in quantised if item.quality.divergence and item.quality.divergence.same_top >= share]
        if enough:
            least = min(enough, key=lambda item: QUANTIZATION_TYPES[item.type].bits_per_weight)
            lines.append(
                f"- The smallest type that found the same most likely token as {measurements[0].type} at"
                f" {100 * share:g} % of the positions is {least.type}, of"
                f" {QUANTIZATION_TYPES[least.type].bits_per_weight:g} bits a weight in Phi-3-mini."
            )
    beaten = [f"{item.type} (by {better.type})" for item in quantised if (better := beaten_by(item, quantised))]
    if beaten:
        lines.append(
            "- Not worth taking, since a type that is no larger diverged less by more than twice the standard error of"
            f" the difference: {', '.join(beaten)}."
        )
    return lines


def beaten_by(item: Measurement, others: Sequence[Measurement]) -> Measurement | None:
    """Give the best type that is no larger, in Phi-3-mini as here, and clearly diverges less; None without one."""
    own = item.quality.divergence
    assert own is not None
    better = []
    for other in others:
        divergence = other.quality.divergence
        sizes = [(one.bytes, QUANTIZATION_TYPES[one.type].bits_per_weight) for one in (other, item)]
        if divergence is not None and sizes[0][0] <= sizes[1][0] and sizes[0][1] <= sizes[1][1]:
            margin = 2 * (own.error**2 + divergence.error**2) ** 0.5
            if divergence.mean < own.mean - margin:
                better.append(other)
    return min(better, key=mean_divergence, default=None)


def _loss(item: Measurement) -> tuple[str, str, str]:
    divergence = item.quality.divergence
    if divergence is None:
        return "0", "0", "100 %"
    return number(divergence.mean), number(divergence.p99), f"{100 * divergence.same_top:.2f} %"


def comparison(report: QuantReport, plots: Sequence[str]) -> str:
    """Give the full table of quantisations and its plots."""
    reference = report.measurements[0]
    speed, quality = reference.speed, reference.quality
    rows = [
        [
            f"{item.type}{' *' if best else ''}",
            f"{item.bytes / 1e6:.2f}",
            f"{item.bits_per_weight:.2f}",
            f"{item.quality.perplexity:.4f} ± {item.quality.perplexity_error:.4f}",
            *(_loss(item) if item.quality.divergence else ("", "", "")),
            number(item.speed.prompt_per_second),
            number(item.speed.generated_per_second),
            number(item.speed.first_token * 1e3),
            f"{item.memory_peak / 1e6:.0f}",
            number(item.load_seconds * 1e3),
        ]
        for item, best in zip(report.measurements, on_front(report.measurements), strict=True)
    ]
    heads = [
        "Type", "Size (MB)", "Bits per weight", "Perplexity", "Mean KL", "99th percentile", "Same top token",
        "Prompt tokens/s", "Generated tokens/s", "First token (ms)", "Memory (MB)", "Load (ms)",
    ]  # fmt: skip
    return "\n".join([
        "## Every quantisation of the demo model",
        "",
        f"The bundled model of 7 million weights; {quality.positions:,} tokens of {report.text} in {quality.chunks}"
        " chunks of"
        f" {report.ctx_size}. A star marks the Pareto front: no other type is as small and diverges as little."
        " Types of fewer"
        " than 8 bits were made with an importance matrix of the packaged calibration text. Divergence is from"
        f" {reference.type}, in nats. Speed is that of one sequence without HTTP: {speed.prompt_tokens} tokens of"
        " prompt,"
        f" {speed.generated_tokens} generated, medians of {len(speed.turns)}. Memory is the peak of a fresh"
        " process, of which"
        f" {reference.memory_before / 1e6:.0f} MB are there before the model; files were read from the system's cache.",
        "",
        machine_line(reference.machine, report.command),
        _loads(report.measurements),
        "",
        *table(heads, rows),
        "",
        *(f"![{plot.removesuffix('.svg').replace('-', ': ')}](images/{plot})\n" for plot in plots),
    ])  # fmt: skip


def _loads(measurements: Sequence[Measurement]) -> str:
    """Say how busy the machine was meanwhile: speeds of a shared one are those of its neighbours as well."""
    loads = [item.machine.load for item in measurements if item.machine.load is not None]
    if not loads:
        return ""
    return (
        f"The load (mean number of busy processes) lay between {min(loads):g} and {max(loads):g} while the types were"
        " measured one after another: read small differences of speed as none."
    )


def parity(record: Record) -> str:
    """Say how far our figures are from llama-perplexity's."""
    names = {
        "perplexity": "perplexity", "perplexity_error": "its error", "mean": "mean KL divergence", "error": "its error",
        "p99": "99th percentile of KL", "same_top": "same top token",
    }  # fmt: skip
    rows = [
        [row.type, "tokens" if row.special_tokens else "characters", names[row.figure], f"{row.ours:.6f}",
         f"{row.theirs:.6f}", "yes" if row.agrees else "no"]
        for row in record.rows
        if row.figure in {"perplexity", "mean", "p99", "same_top"}
    ]  # fmt: skip
    agreeing = sum(row.agrees for row in record.rows)
    return "\n".join([
        "## Perplexity and divergence against llama-perplexity",
        "",
        "The same files, text and chunks through `llama-perplexity --kl-divergence`, with `<|user|>` read as"
        " characters (each"
        " program with its own file of F16's log-probabilities) and as a token (llama-perplexity with the file that"
        " ours"
        f" wrote). {agreeing} of {len(record.rows)} figures agree in their first three digits, standard errors,"
        " medians and"
        " log ratios included, which the table leaves out. The text is the packaged one; the demo model recites"
        " docstrings and"
        " is at a loss with it, hence its perplexities.",
        "",
        machine_line(record.machine, record.command),
        "",
        *table(["Type", "Special tokens are", "Figure", "Ours", "llama-perplexity's", "Agrees"], rows, words=3),
        "",
    ])  # fmt: skip
