"""Compare `edge-phi3 bench quants` with llama-perplexity: perplexity and KL divergence of the demo model's types.

    python -m benchmarks.perplexity_parity             # builds llama-perplexity the first time, see benchmarks.peers
    python -m benchmarks.perplexity_parity --record    # writes results/perplexity_parity.json

Twice for each type. With special tokens read as characters, as llama-perplexity does, each program makes and reads its
own file of the F16 model's log-probabilities. With special tokens read as tokens, as `bench quants` does by default,
llama-perplexity reads the file that ours wrote, tokens included.

Exit code 1 when a figure differs in its first three digits, or by more than the last digit that llama-perplexity
prints.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np

from benchmarks.models import model_path
from benchmarks.peers import Peers, add_arguments, build_peers
from edge_phi3.bench.logits_file import LogitsFile
from edge_phi3.bench.machine import Machine
from edge_phi3.bench.quality import Quality
from edge_phi3.bench.quant_worker import Job, measure
from edge_phi3.bench.quants import evaluation_text
from edge_phi3.conversion.imatrix import make_imatrix
from edge_phi3.conversion.quantize import quantize
from edge_phi3.llama.options import usable_cores

RECORD = Path(__file__).parent / "results" / "perplexity_parity.json"

TYPES = ("F16", "Q8_0", "Q6_K", "Q4_K_M", "Q4_0", "IQ4_XS", "Q3_K_M", "IQ2_XS")
"""Of each family one; F16 compares the reference with its own rounded file."""

LEAST = 5e-4
"""Relative difference below which the first three digits are the same but for rounding."""

_ATTEMPTS = 20
_NUMBER = r"\s*(-?[\d.]+)"
_PATTERNS = {
    "perplexity": (rf"Mean PPL\(Q\)\s*:{_NUMBER} ±", 1e-6),
    "perplexity_error": (rf"Mean PPL\(Q\)\s*:{_NUMBER} ±{_NUMBER}", 1e-6),
    "log_ratio": (rf"Mean ln\(PPL\(Q\)/PPL\(base\)\)\s*:{_NUMBER} ±", 1e-6),
    "log_ratio_error": (rf"Mean ln\(PPL\(Q\)/PPL\(base\)\)\s*:{_NUMBER} ±{_NUMBER}", 1e-6),
    "mean": (rf"Mean\s+KLD:{_NUMBER} ±", 1e-6),
    "error": (rf"Mean\s+KLD:{_NUMBER} ±{_NUMBER}", 1e-6),
    "median": (rf"Median\s+KLD:{_NUMBER}", 1e-6),
    "p99": (rf"99\.0%\s+KLD:{_NUMBER}", 1e-6),
    "same_top": (rf"Same top p:{_NUMBER} ±", 1e-5),
}
"""What llama-perplexity prints under our names, and the last digit that it prints."""


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One figure of one type: ours, theirs, and whether they agree."""

    type: str
    special_tokens: bool
    figure: str
    ours: float
    theirs: float
    agrees: bool


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """What was compared, where, and how."""

    machine: Machine
    command: str
    model: str
    ctx_size: int
    chunks: int | None
    positions: int
    rows: list[Row]


def agrees(ours: float, theirs: float, last_digit: float) -> bool:
    """Tell whether two figures are the same in their first three digits, as far as they are printed."""
    return abs(ours - theirs) <= max(LEAST * abs(theirs), last_digit)


def job(model: Path, logits: Path, arguments: argparse.Namespace, *, text: str | None, special: bool) -> Job:
    """Give the job that measures our side; its speed does not matter here."""
    return Job(
        model=str(model),
        logits=str(logits),
        text=text,
        parse_special=special,
        ctx_size=arguments.ctx_size,
        chunks=arguments.chunks,
        threads=arguments.threads,
        n_gpu_layers=0,
        prompt_tokens=1,
        generated_tokens=1,
        repetitions=1,
    )


def llama_perplexity(peers: Peers, model: Path, logits: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """Have llama-perplexity compare a model with a file of log-probabilities; give its figures under our names."""
    # It ends without waiting for the thread that writes its log, and on a busy machine the end is lost.
    for _ in range(_ATTEMPTS):
        output = peers.run(
            "llama-perplexity", "-m", model, "--kl-divergence", "--kl-divergence-base", logits,
            "-c", str(arguments.ctx_size), "-t", str(arguments.threads), "-ngl", "0",
        )  # fmt: skip
        matches = {name: re.search(pattern, output) for name, (pattern, _) in _PATTERNS.items()}
        if all(matches.values()):
            break
    else:
        sys.exit(f"llama-perplexity did not print all figures:\n{output[-2000:]}")
    found = {name: float(match.groups()[-1]) for name, match in matches.items() if match}
    found["same_top"] /= 100
    return found


def compared(kind: str, quality: Quality, theirs: dict[str, float], *, special: bool) -> Iterator[Row]:
    """Give the rows of one type."""
    assert quality.divergence is not None
    for name, (_, last_digit) in _PATTERNS.items():
        holder = quality if hasattr(quality, name) else quality.divergence
        ours = float(getattr(holder, name))
        yield Row(
            type=kind,
            special_tokens=special,
            figure=name,
            ours=ours,
            theirs=theirs[name],
            agrees=agrees(ours, theirs[name], last_digit),
        )


def same_file(ours: Path, theirs: Path) -> bool:
    """Tell whether both programs wrote the same tokens, and log-probabilities that differ by rounding only."""
    mine, other = LogitsFile.open(ours), LogitsFile.open(theirs)
    if mine.vocab_size != other.vocab_size or not np.array_equal(mine.tokens, other.tokens):
        return False
    count = len(mine.tokens) * (mine.tokens.shape[1] - 1 - mine.tokens.shape[1] // 2)
    left, right = mine.rows(0, count), other.rows(0, count)
    likely = np.maximum(left, right) > -10
    return bool(np.abs(left - right)[likely].max() < 0.05)


def _extra(arguments: argparse.Namespace) -> str:
    """Give the options that decide on the figures, as they were given."""
    chunks = "" if arguments.chunks is None else f" --chunks {arguments.chunks}"
    return f"{chunks} --ctx-size {arguments.ctx_size} --threads {arguments.threads}"


def main() -> int:
    """Compare, print each figure, and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ctx-size", type=int, default=512)
    parser.add_argument("--chunks", type=int, help="evaluate so many chunks at most")
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--record", type=Path, nargs="?", const=RECORD, help=f"write {RECORD.name}, or the file named")
    add_arguments(parser)
    arguments = parser.parse_args()
    machine, peers = Machine.here(), build_peers(arguments.cache, arguments.source)
    base = model_path("demo", arguments.cache, "F16")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        text, matrix, output = work / "text.txt", work / "imatrix.gguf", work / "model.gguf"
        text.write_text(evaluation_text(), encoding="utf-8")
        make_imatrix(base, matrix)
        theirs = work / "theirs.logits"
        options = ["-c", str(arguments.ctx_size), "-t", str(arguments.threads), "-ngl", "0"]
        options += [] if arguments.chunks is None else ["--chunks", str(arguments.chunks)]
        peers.run("llama-perplexity", "-m", base, "-f", text, "--kl-divergence-base", theirs, *options)
        files = {special: work / f"ours-{special}.logits" for special in (False, True)}
        positions = 0
        for special, path in files.items():
            reference = measure(job(base, path, arguments, text=evaluation_text(), special=special))
            positions = reference.quality.positions
        good = same_file(files[False], theirs)
        print(f"F16's log-probabilities, tokens included: {'equal up to rounding' if good else 'DIFFERENT'}")
        for kind in TYPES:
            model = base
            if kind != "F16":
                model = quantize(base, output, type=kind, imatrix=matrix if kind != "Q8_0" else None, force=True).path
            for special, path in files.items():
                quality = measure(job(model, path, arguments, text=None, special=special)).quality
                found = llama_perplexity(peers, model, path if special else theirs, arguments)
                rows += compared(kind, quality, found, special=special)
                for row in rows[-len(_PATTERNS) :]:
                    verdict = "" if row.agrees else "  DIFFERENT"
                    print(f"{kind:7} {'tokens    ' if special else 'characters'} {row.figure:16}"
                          f" {row.ours:14.6f} {row.theirs:14.6f}{verdict}", flush=True)  # fmt: skip
    record = Record(
        machine=machine,
        command=f"python -m benchmarks.perplexity_parity --record{_extra(arguments)}",
        model="the demo model",
        ctx_size=arguments.ctx_size,
        chunks=arguments.chunks,
        positions=positions,
        rows=rows,
    )
    if arguments.record:
        arguments.record.write_bytes(msgspec.json.format(msgspec.json.encode(record), indent=1) + b"\n")
    return int(not good or not all(row.agrees for row in rows))


if __name__ == "__main__":
    sys.exit(main())
