"""Records ``pipeline.json``: texts of transformers' text-generation pipeline, called as the original service calls it.

Run ``python -m tests.golden.make_pipeline`` where torch and transformers 4.49.0 are installed.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from tests.golden.pipeline import GOLDEN, cases, write_model


def texts(generate: Any, case: dict[str, Any]) -> list[str]:
    """Give the texts of one call."""
    options = {name: value for name, value in case.items() if name not in ("prompt", "messages", "kwargs")}
    options.setdefault("clean_up_tokenization_spaces", False)
    # The original always passes min_length, and max_length too, but that makes the pipeline cut the prompt's end off at
    # max_length tokens even where max_new_tokens is given: a trap that the service does not copy.
    kwargs = {"min_length": 0} | case["kwargs"]
    results = generate(case.get("prompt") or case["messages"], do_sample=False, **options, **kwargs)
    return [result["generated_text"] for result in results]


def main() -> None:
    """Record every case."""
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder))
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.model_max_length = 192
        model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32)
        generate = pipeline("text-generation", model=model, tokenizer=tokenizer)
        recorded = [texts(generate, case) for case in cases()]
    lines = ",\n".join(json.dumps(entry, ensure_ascii=True) for entry in recorded)
    GOLDEN.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
