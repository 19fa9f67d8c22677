"""Measure every quantisation of the demo model on what it knows, and record the figures for the report.

    python -m benchmarks.quantizations --output benchmarks/results/quantizations.json

The text is made of docstrings that the demo model was trained on, in chat format, as its corpus script reads them from
this interpreter's standard library; on other texts a model that recites is at a loss in every type. Chunks are short
because the model was trained on one or two short turns at a time.
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from edge_phi3.bench.quants import REPORT_NAME, QuantBench, run, table
from edge_phi3.demo import DEMO_CHECKPOINT
from edge_phi3.progress import stderr_progress
from scripts.demo_model.corpus import dice, read_corpus

TEXT_NAME = "the demo model's docstrings"
CTX_SIZE = 128


def demo_text(limit: int = 240) -> str:
    """Return conversations about well-known names of the standard library, each a question and its trained answer."""
    items = sorted((item for item in read_corpus() if item.emphasised), key=lambda item: item.name)
    chance = dice("benchmark")
    chance.shuffle(items)
    return "".join(
        f"<|user|>\n{item.ask(chance)}<|end|>\n<|assistant|>\n{item.answer}<|end|>\n" for item in items[:limit]
    )


def main() -> int:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--type", dest="types", action="append", help="a type instead of all; repeatable")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, stderr_progress() as progress:
        text, results = Path(folder) / TEXT_NAME, Path(folder) / "results"
        text.write_text(demo_text(), encoding="utf-8")
        bench = QuantBench(
            DEMO_CHECKPOINT,
            results,
            types=arguments.types or ["all"],
            text=text,
            ctx_size=CTX_SIZE,
            threads=arguments.threads,
            repetitions=arguments.repetitions,
            command="python -m benchmarks.quantizations",
        )
        report = run(bench, progress=progress)
        shutil.copyfile(results / REPORT_NAME, arguments.output)
    Console(width=150).print(table(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
