"""Tensors equal llama-quantize's, as `tests/parity/test_quantization.py` records them."""

from __future__ import annotations

import json
import platform
from pathlib import Path

import pytest

from edge_phi3.conversion.quantize import quantize
from tests.golden.quantized import CASES, RECORD, digest, write_inputs

RECORDED = json.loads(RECORD.read_text("utf-8"))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def test_every_case_is_recorded() -> None:
    assert RECORDED.keys() == CASES.keys()
    assert len(set(RECORDED.values())) == len(CASES)


# Where a processor's plain instructions include a fused multiplication and addition, compilers make use of it, and a
# weight between two steps may be rounded to the other. x86-64 has none, whatever the processor.
@pytest.mark.skipif(platform.machine() not in {"x86_64", "AMD64"}, reason="recorded on x86-64")
@pytest.mark.parametrize("kind", CASES)
def test_the_tensors_are_llama_quantizes(inputs: tuple[Path, Path], tmp_path: Path, kind: str) -> None:
    model, matrix = inputs
    made = quantize(model, tmp_path / "out.gguf", type=kind, imatrix=matrix if CASES[kind] else None)
    assert digest(made.path) == RECORDED[kind]
