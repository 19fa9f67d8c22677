"""Record the logits that transformers gives on small random checkpoints: ``logits/<case>.npz``.

Each file holds, for each prompt length n of the case, ``logits_n``: float32, shape (positions, vocabulary), the logits
at the prompt's last positions, computed in one pass in float32.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from tests.golden.cases import LOGITS_CASES, prompt_of, write_logits_case

OUTPUT = Path(__file__).parent / "logits"
POSITIONS = 4


def main() -> None:
    """Record every case."""
    OUTPUT.mkdir(exist_ok=True)
    for name, (_, lengths) in LOGITS_CASES.items():
        with tempfile.TemporaryDirectory() as work:
            folder = write_logits_case(Path(work), name)
            model = AutoModelForCausalLM.from_pretrained(
                folder, torch_dtype=torch.float32, attn_implementation="eager", local_files_only=True
            )
            recorded = {}
            for length in lengths:
                prompt = torch.tensor([prompt_of(length, model.config.vocab_size)])
                with torch.no_grad():
                    recorded[f"logits_{length}"] = model(prompt).logits[0, -POSITIONS:].numpy()
            np.savez_compressed(OUTPUT / f"{name}.npz", **recorded)


if __name__ == "__main__":
    main()
