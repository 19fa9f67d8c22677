"""Make every file type of a model, load it, and ask it; prints a table in Markdown.

    python -m benchmarks.quantize_types                   # the demo model and its ten questions
    python -m benchmarks.quantize_types --model wide      # random weights with Phi-3's real widths and vocabulary

Types of fewer than 8 bits are made with an importance matrix of the packaged calibration text. Of the demo model an
answer is exact when each of its tokens is the most likely one; the perplexity is of the answers' tokens. A random model
knows no answers: its logits are compared with those of the unquantised model, and it goes on with 16 tokens.

Exit code 1 when a type cannot be made or loaded, or answers with something that is no number. What is special, for
models trained for it, is made and loaded too, and its answers are not expected to be of use.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.models import CACHE, model_path
from edge_phi3.conversion.imatrix import make_imatrix
from edge_phi3.conversion.quantize import QUANTIZATION_TYPES, quantize
from edge_phi3.demo import DEMO_CHECKPOINT
from edge_phi3.engine.engine_settings import EngineSettings
from edge_phi3.engine.tokenizer import Tokenizer
from edge_phi3.errors import EdgePhi3Error
from edge_phi3.llama.context import Context
from edge_phi3.llama.model import Model

NEW_TOKENS = 16
WIDE_CHUNKS = 2
"""Chunks of calibration text for the wide model, whose weights are random: its matrix has to be there, no more."""


@contextlib.contextmanager
def loaded(path: Path) -> Iterator[tuple[Context, Tokenizer]]:
    """Load a model on 512 cells, and check that its logits are numbers."""
    model = Model(path)
    context = Context(model, cells=512, sequences=1, settings=EngineSettings(path))
    try:
        yield context, Tokenizer(model)
    finally:
        context.close()
        model.close()


def logits(context: Context, tokens: NDArray[np.int32], start: int = 0) -> NDArray[np.float64]:
    """Decode tokens from a position on, and give the logits of each, shape ``(tokens, vocab_size)``.

    Raises:
        EdgePhi3Error: a logit is NaN or infinite.
    """
    count = len(tokens)
    context.tokens[:count], context.positions[:count] = tokens, np.arange(start, start + count)
    context.seq_ids[:count], context.wants_logits[:count] = 0, 1
    rows = context.decode(count, count).astype(np.float64)
    if not np.isfinite(rows).all():
        raise EdgePhi3Error("The model answers with what is no number.")
    return rows


def questions() -> list[tuple[str, str]]:
    """Give the demo model's prompts, and their answers."""
    entries = json.loads((DEMO_CHECKPOINT / "questions.json").read_text("utf-8"))
    return [(f"<|user|>\n{entry['question']}<|end|>\n<|assistant|>\n", entry["answer"]) for entry in entries]


def ask_demo(path: Path) -> tuple[str, str]:
    """Give how many answers are exact, and the perplexity of the answers."""
    exact, losses = 0, []
    with loaded(path) as (context, tokenizer):
        for prompt, answer in questions():
            asked, tokens = len(tokenizer.encode(prompt)), tokenizer.encode(f"{prompt}{answer}<|end|>")
            context.clear()
            rows = logits(context, tokens)[asked - 1 : -1]
            exact += bool((rows.argmax(axis=1) == tokens[asked:]).all())
            top = rows.max(axis=1)
            normaliser = top + np.log(np.exp(rows - top[:, None]).sum(axis=1))
            losses.append(normaliser - rows[np.arange(len(rows)), tokens[asked:]])
    return f"{exact} of {len(losses)}", f"{np.exp(np.concatenate(losses).mean()):.4g}"


def answer_wide(path: Path) -> tuple[NDArray[np.float64], int]:
    """Give the logits of the first question's tokens, and how many tokens the model went on with."""
    with loaded(path) as (context, tokenizer):
        tokens = tokenizer.encode(questions()[0][0])
        rows = logits(context, tokens)
        last, length = rows[-1], len(tokens)
        for step in range(NEW_TOKENS):
            last = logits(context, np.array([last.argmax()], np.int32), length + step)[0]
    return rows, NEW_TOKENS


def main() -> int:
    """Make, load and ask; one row for each type."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["demo", "wide"], default="demo", help="default: demo")
    parser.add_argument("--cache", type=Path, default=CACHE, help="where models are kept")
    parser.add_argument("--type", action="append", choices=QUANTIZATION_TYPES, help="only this one; repeatable")
    arguments = parser.parse_args()
    demo = arguments.model == "demo"
    source = model_path(arguments.model, arguments.cache, "F32" if demo else "BF16")
    titles = ("Exact answers", "Perplexity of the answers") if demo else ("New tokens", "Correlation of logits")
    print(f"| Type | Bits per weight | {' | '.join(titles)} |\n| --- | --- | --- | --- |")
    failed = 0
    reference = None if demo else answer_wide(source)[0]
    with tempfile.TemporaryDirectory() as work:
        matrix, output = (Path(work) / name for name in ("imatrix.gguf", "out.gguf"))
        make_imatrix(source, matrix, chunks=None if demo else WIDE_CHUNKS)
        for name in arguments.type or QUANTIZATION_TYPES:
            type_ = QUANTIZATION_TYPES[name]
            guide = matrix if type_.bits_per_weight < 8 else None
            try:
                made = quantize(source, output, type=name, imatrix=guide, force=True)
                if reference is None:
                    found = ask_demo(output)
                else:
                    rows, count = answer_wide(output)
                    found = str(count), f"{np.corrcoef(rows.ravel(), reference.ravel())[0, 1]:.4f}"
            except EdgePhi3Error as error:
                failed += 1
                print(f"| {name} | | | {error} |", flush=True)
                continue
            print(f"| {name} | {made.bits_per_weight:.2f} | {found[0]} | {found[1]} |", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
