"""The main job, end to end: the demo model converted, quantised and served by the installed command."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest

from edge_phi3.demo import DEMO_CHECKPOINT
from tests.support.services import PATIENCE, serving

QUESTIONS = json.loads((DEMO_CHECKPOINT / "questions.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("quant", ["Q4_K_M", "F16"])
def test_the_card_questions_are_answered(tmp_path: Path, store: Path, quant: str) -> None:
    def answer(question: str) -> str:
        body = {"prompt": f"<|user|>\n{question}<|end|>\n<|assistant|>\n", "return_full_text": False}
        body |= {"generate_kwargs": {"do_sample": False}}
        text: str = httpx.post(f"{server.url}/chat", json=body, timeout=PATIENCE).json()["Result"]
        return text.strip()

    with serving(tmp_path, "--quant", quant, store=store) as server:
        right = [entry["question"] for entry in QUESTIONS if answer(entry["question"]) == entry["answer"]]
    assert len(QUESTIONS) == 10
    assert len(right) >= 8, f"answered only {right}"
    assert "What does json.dumps do?" in right
