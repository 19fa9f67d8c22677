"""Make every file type of the demo model, load it, and ask it its ten questions; prints a table in Markdown.

    python -m benchmarks.quantize_types

Types of fewer than 8 bits are made with an importance matrix of the packaged calibration text. An answer is exact when
each of its tokens is the most likely one; the perplexity is of the answers' tokens. Exit code 1 when a type cannot be
made or loaded. What is special, for models trained for it, is made and loaded too, and its answers are not expected to
be of use.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import numpy as np

from edge_phi3.conversion.convert import convert
from edge_phi3.conversion.imatrix import make_imatrix
from edge_phi3.conversion.quantize import QUANTIZATION_TYPES, quantize
from edge_phi3.demo import DEMO_CHECKPOINT
from edge_phi3.engine.runtime import Context, Model
from edge_phi3.engine.settings import EngineSettings
from edge_phi3.engine.tokenizer import Tokenizer
from edge_phi3.errors import EdgePhi3Error


def ask(path: Path) -> tuple[int, int, float]:
    """Give how many answers are exact, of how many, and the perplexity of the answers."""
    questions = json.loads((DEMO_CHECKPOINT / "questions.json").read_text("utf-8"))
    model = Model(path)
    tokenizer = Tokenizer(model)
    context = Context(model, cells=512, sequences=1, unified=True, settings=EngineSettings(path))
    exact, losses = 0, []
    for entry in questions:
        prompt = f"<|user|>\n{entry['question']}<|end|>\n<|assistant|>\n"
        asked, tokens = len(tokenizer.encode(prompt)), tokenizer.encode(f"{prompt}{entry['answer']}<|end|>")
        count = len(tokens)
        context.tokens[:count], context.positions[:count] = tokens, np.arange(count)
        context.seq_ids[:count], context.wants_logits[:count] = 0, 1
        context.clear()
        rows = context.decode(count)[asked - 1 : -1].astype(np.float64)
        exact += bool((rows.argmax(axis=1) == tokens[asked:]).all())
        top = rows.max(axis=1)
        normaliser = top + np.log(np.exp(rows - top[:, None]).sum(axis=1))
        losses.append(normaliser - rows[np.arange(len(rows)), tokens[asked:]])
    context.close()
    model.close()
    return exact, len(questions), float(np.exp(np.concatenate(losses).mean()))


def main() -> int:
    """Make, load and ask; one row for each type."""
    failed = 0
    print("| Type | Bits per weight | Exact answers | Perplexity of the answers |\n| --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as work:
        source, matrix, output = (Path(work) / name for name in ("source.gguf", "imatrix.gguf", "out.gguf"))
        convert(DEMO_CHECKPOINT, source)
        make_imatrix(source, matrix)
        for name, type_ in QUANTIZATION_TYPES.items():
            guide = matrix if type_.bits_per_weight < 8 else None
            try:
                made = quantize(source, output, type=name, imatrix=guide, force=True)
                exact, count, perplexity = ask(output)
            except EdgePhi3Error as error:
                failed += 1
                print(f"| {name} | | | {error} |", flush=True)
                continue
            print(f"| {name} | {made.bits_per_weight:.2f} | {exact} of {count} | {perplexity:.4g} |", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
