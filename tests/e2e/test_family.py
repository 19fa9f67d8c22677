"""Each member of the family goes the whole way: converted, measured, quantised, planned, served, compared."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import httpx
import pytest

from edge_phi3.conversion.quantization_types import QUANTIZATION_TYPES
from edge_phi3.conversion.quantize import quantize
from tests.golden.family import FAMILY, write_member
from tests.support.services import serving
from tests.test_cli import edge_phi3

HEADER = {
    "phi-3": "<|user|>\nHi<|end|>\n<|assistant|>\n",
    "phi-4-mini": "<|user|>Hi<|end|><|assistant|>",
    "phi-4": "<|im_start|>user<|im_sep|>Hi<|im_end|><|im_start|>assistant<|im_sep|>",
}
"""How a question is put to the members of each part of the family."""


def run(*words: str | Path) -> str:
    result = edge_phi3(*map(str, words))
    assert result.returncode == 0, result.stderr
    return result.stdout


def header_of(name: str) -> str:
    part = next(part for part in ("phi-4-mini", "phi-4", "phi-3") if name.startswith(part))
    reasoning = "<|system|>Your name is Phi, an AI math expert developed by Microsoft.<|end|>"
    return (reasoning if name.endswith("reasoning") else "") + HEADER[
        part if name != "phi-3.5-mini-instruct" else "phi-3"
    ]


@pytest.mark.parametrize("name", FAMILY)
def test_a_member_goes_the_whole_way(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint = write_member(tmp_path, name, layers=1, dtype="bfloat16")
    model, matrix = tmp_path / "model.gguf", tmp_path / "matrix.gguf"
    run("convert", checkpoint, "-o", model)
    run("imatrix", model, "-o", matrix, "--ctx-size", "64", "--chunks", "2")
    for kind in QUANTIZATION_TYPES:
        made = quantize(model, tmp_path / f"{kind}.gguf", type=kind, imatrix=matrix).path
        assert len(gguf.GGUFReader(made).tensors) == len(gguf.GGUFReader(model).tensors)
    planned = json.loads(run("fit", checkpoint, "--memory", "4GiB", "--ctx-size", "512", "--json"))
    assert planned["recommended"]["type"] == "Q8_0"
    quick = ("--ctx-size", "32", "--chunks", "2", "--threads", "1", "--repetitions", "1", "--imatrix", "none")
    quick += ("--prompt-tokens", "8", "--generate-tokens", "2", "--type", "Q4_K_M")
    run("bench", "quants", model, *quick, "--output-dir", tmp_path / "results")
    rows = json.loads((tmp_path / "results" / "results.json").read_text(encoding="utf-8"))["measurements"]
    assert [row["type"] for row in rows] == ["BF16", "Q4_K_M"]
    with serving(tmp_path, str(tmp_path / "Q4_K_M.gguf"), "--ctx-size", "512", store=tmp_path / "store") as server:
        body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, "temperature": 0}
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=600).json()
        asked = httpx.post(f"{server.url}/tokenize", json={"text": header_of(name)}, timeout=600).json()
        assert answer["usage"]["prompt_tokens"] == len(asked["tokens"])
        assert answer["usage"]["completion_tokens"] >= 1
