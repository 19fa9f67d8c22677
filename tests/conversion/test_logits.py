"""A converted model answers like the checkpoint: its logits are those that transformers recorded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edge_phi3.conversion.convert import convert
from tests.conversion import llama
from tests.golden.cases import LOGITS_CASES, prompt_of, write_logits_case

GOLDEN = Path(__file__).parent.parent / "golden" / "logits"


@pytest.mark.parametrize("name", LOGITS_CASES)
def test_logits_equal_those_of_transformers(name: str, tmp_path: Path) -> None:
    gguf = tmp_path / "model.gguf"
    convert(write_logits_case(tmp_path, name), gguf, outtype="f32")
    recorded = np.load(GOLDEN / f"{name}.npz")
    _, lengths = LOGITS_CASES[name]
    with llama.loaded(gguf) as model:
        for length in lengths:
            expected = recorded[f"logits_{length}"]
            # llama.cpp takes the short rope factors in a context of at most the original length, 256 in these cases.
            cells = 256 if length <= 256 else 1024 if length <= 1024 else 2048
            prompt = prompt_of(length, expected.shape[1])
            found = llama.logits(model, prompt, context_length=cells, last=len(expected))
            assert expected.std() > 1, "flat logits would prove nothing"
            # Processors sum in different orders: 2e-5 apart where it was tried, and a wrong factor is off by 1 or more.
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
