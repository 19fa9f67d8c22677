"""`edge-phi3 bench quants` and llama-perplexity find the same perplexities and divergences of the demo model's types.

Special tokens in the text are read as characters, as llama-perplexity does. Each program makes and reads its own file
of the F16 model's log-probabilities, rounded to the same steps.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest

from edge_phi3.bench.quant_worker import Job, measure
from edge_phi3.bench.quants import evaluation_text
from edge_phi3.conversion.imatrix import make_imatrix
from edge_phi3.conversion.quantize import quantize
from tests.parity.conftest import Peers
from tests.support.models import model_path

pytestmark = pytest.mark.parity

TYPES = ("Q8_0", "Q6_K", "Q4_K_M", "Q4_0", "IQ4_XS", "Q3_K_M", "IQ2_XS")
"""Of each family one."""

SIZE, CHUNKS, THREADS = 512, 4, 1
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

OPTIONS = ("-c", str(SIZE), "-t", str(THREADS), "-ngl", "0")


class Files(NamedTuple):
    """The demo model in F16, its importance matrix, the job that measures it, llama-perplexity's file of it."""

    base: Path
    matrix: Path
    job: Job
    theirs: Path


@pytest.fixture(scope="module")
def files(peers: Peers, tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder, base = tmp_path_factory.mktemp("perplexity"), model_path("demo", kind="F16")
    text, theirs = folder / "text.txt", folder / "theirs.logits"
    text.write_text(evaluation_text(), encoding="utf-8")
    options = (*OPTIONS, "--chunks", str(CHUNKS))
    peers.run("llama-perplexity", "-m", base, "-f", text, "--kl-divergence-base", theirs, *options)
    job = Job(
        model=base, text=evaluation_text(), logits=folder / "ours.npy", reference=True, parse_special=False,
        ctx_size=SIZE, chunks=CHUNKS, threads=THREADS, n_gpu_layers=0, prompt_tokens=1, generated_tokens=1,
        repetitions=1,
    )  # fmt: skip
    measure(job)
    make_imatrix(base, folder / "imatrix.gguf")
    return Files(base, folder / "imatrix.gguf", job, theirs)


def llama_perplexity(peers: Peers, model: Path, logits: Path) -> dict[str, float]:
    """Have llama-perplexity compare a model with a file of log-probabilities; return its figures under our names."""
    # It ends without waiting for the thread that writes its log, and on a busy machine the end is lost.
    for _ in range(_ATTEMPTS):
        output = peers.run(
            "llama-perplexity", "-m", model, "--kl-divergence", "--kl-divergence-base", logits, *OPTIONS
        )  # fmt: skip
        matches = {name: re.search(pattern, output) for name, (pattern, _) in _PATTERNS.items()}
        if all(matches.values()):
            found = {name: float(match.groups()[-1]) for name, match in matches.items() if match}
            return found | {"same_top": found["same_top"] / 100}
    pytest.fail(f"llama-perplexity did not print all figures:\n{output[-2000:]}")


@pytest.mark.parametrize("kind", TYPES)
def test_both_print_the_same_figures(kind: str, peers: Peers, files: Files, tmp_path: Path) -> None:
    """The same in their first three digits, or as far as llama-perplexity's file tells them apart."""
    guide = files.matrix if kind != "Q8_0" else None
    model = quantize(files.base, tmp_path / "model.gguf", type=kind, imatrix=guide).path
    quality = measure(msgspec.structs.replace(files.job, model=model, reference=False)).quality
    expected = llama_perplexity(peers, model, files.theirs)
    for name, (_, tolerance) in _PATTERNS.items():
        found = float(getattr(quality if hasattr(quality, name) else quality.divergence, name))
        assert abs(found - expected[name]) <= max(LEAST * abs(expected[name]), tolerance), (name, found, expected)
