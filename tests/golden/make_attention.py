"""Records ``attention.json``: greedy continuations by transformers of prompts beyond Phi-3's window and original
context.

Run ``python -m tests.golden.make_attention`` where torch and transformers 4.49.0 are installed.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from tests.golden.attention import CASES, GOLDEN, Case, write_model


def continuation(model: AutoModelForCausalLM, case: Case) -> list[int]:
    """Give the tokens that transformers chooses."""
    tokens = torch.from_numpy(case.prompt().astype("int64"))[None]
    with torch.inference_mode():
        if case.from_scratch:
            for _ in range(case.new_tokens):
                chosen = model(tokens, use_cache=False).logits[:, -1].argmax(-1)
                tokens = torch.cat([tokens, chosen[:, None]], dim=1)
        else:
            tokens = model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                do_sample=False,
                max_new_tokens=case.new_tokens,
                eos_token_id=None,
                pad_token_id=0,
            )
    generated: list[int] = tokens[0, case.prompt_length :].tolist()
    assert len(generated) == case.new_tokens
    return generated


def main() -> None:
    """Record every case."""
    results: dict[str, list[int]] = {}
    for name in sorted({case.model for case in CASES}):
        with tempfile.TemporaryDirectory() as folder:
            write_model(Path(folder), name)
            model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32, attn_implementation="eager")
        for case in CASES:
            if case.model == name:
                results[case.name] = continuation(model, case)
                print(case.name, results[case.name][:8], len(set(results[case.name])), "distinct")
    GOLDEN.write_text(
        json.dumps(results, indent=None, separators=(",", ":")).replace("],", "],\n") + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
