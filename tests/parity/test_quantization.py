"""`edge-phi3 quantize` and llama-quantize write the same tensors: of the demo model, and at Phi-3's real widths.

With PARITY_RECORD=1, what llama-quantize made of the demo model becomes ``tests/golden/quantized.json``.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edge_phi3.conversion.quantize import quantize
from edge_phi3.llama.options import usable_cores
from tests.golden.gguf_digests import QUANTIZED, QUANTIZED_TYPES, digest, write_matrix, write_quantizer_inputs
from tests.parity.conftest import RECORDING, Peers
from tests.support.models import model_path

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module", params=["demo", "wide"])
def inputs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path]:
    """Name, BF16 file and importance matrix of a model."""
    folder = tmp_path_factory.mktemp("inputs")
    if request.param == "demo":
        return "demo", *write_quantizer_inputs(folder)
    model = model_path(request.param, kind="BF16")
    return request.param, model, write_matrix(folder / "imatrix.gguf", model)


@pytest.mark.parametrize("kind", QUANTIZED_TYPES)
def test_both_quantisers_write_the_same_tensors(
    inputs: tuple[str, Path, Path], kind: str, peers: Peers, tmp_path: Path
) -> None:
    name, model, matrix = inputs
    guided = QUANTIZED_TYPES[kind]
    theirs = tmp_path / "theirs.gguf"
    peers.run(
        "llama-quantize", *(("--imatrix", matrix) if guided else ()), model, theirs, kind, str(usable_cores())
    )  # fmt: skip
    ours = quantize(model, tmp_path / "ours.gguf", type=kind, imatrix=matrix if guided else None).path
    expected = digest(theirs)
    if RECORDING and name == "demo":
        record = json.loads(QUANTIZED.read_text("utf-8")) | {kind: expected}
        QUANTIZED.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    assert digest(ours) == expected
