"""`edge-phi3 imatrix` and llama-imatrix collect the same matrix, and both quantisers read the latter's file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edge_phi3.conversion.imatrix import calibration_text, make_imatrix
from edge_phi3.conversion.imatrix_file import read_imatrix
from edge_phi3.conversion.quantize import quantize
from edge_phi3.system_resources import usable_cores
from tests.golden.gguf_digests import digest
from tests.parity.conftest import Peers
from tests.support.models import model_path

pytestmark = pytest.mark.parity

LEAST = 0.9999
"""Correlation of a tensor's sums: both add up the same products, in another order."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The demo model in F16, and the packaged calibration text."""
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text(calibration_text(), encoding="utf-8")
    return model_path("demo", kind="F16"), path


def llama_imatrix(peers: Peers, inputs: tuple[Path, Path], output: Path, *, size: int, batch: int) -> Path:
    model, text = inputs
    peers.run(
        "llama-imatrix", "-m", model, "-f", text, "-o", output, "-c", str(size), "-b", str(batch), "-t",
        str(usable_cores()), "--parse-special", "--no-ppl",
    )  # fmt: skip
    return output


@pytest.mark.parametrize("batch", ["one chunk", "2048 tokens"])
@pytest.mark.parametrize("size", [512, 600])
def test_both_collect_the_same_matrix(
    peers: Peers, inputs: tuple[Path, Path], tmp_path: Path, size: int, batch: str
) -> None:
    """Chunk by chunk, as edge-phi3 does it, the counts are equal too.

    With its own batch of 2,048 tokens llama-imatrix evaluates several chunks together and may pass over a few rows or
    a chunk, since it leaves out products of fewer than 16.
    """
    model, text = inputs
    tokens = size if batch == "one chunk" else 2048 // size * size
    theirs = read_imatrix(llama_imatrix(peers, inputs, tmp_path / "theirs.gguf", size=size, batch=tokens))
    make_imatrix(
        model, tmp_path / "ours.gguf", text=text, ctx_size=size, parse_special=True, threads=usable_cores()
    )  # fmt: skip
    ours = read_imatrix(tmp_path / "ours.gguf")
    assert ours.entries.keys() == theirs.entries.keys()
    for name, mine in ours.entries.items():
        other = theirs.entries[name]
        assert np.corrcoef(mine.sums.ravel(), other.sums.ravel())[0, 1] >= LEAST, name
        if tokens == size:
            assert np.array_equal(mine.counts, other.counts), name
    if tokens == size:
        assert list(ours.entries) == list(theirs.entries)
        assert (ours.chunk_count, ours.chunk_size) == (theirs.chunk_count, theirs.chunk_size)


def test_both_quantisers_read_a_matrix_of_llama_imatrix(
    peers: Peers, inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    model, kind = inputs[0], "IQ2_XS"
    matrix = llama_imatrix(peers, inputs, tmp_path / "matrix.gguf", size=512, batch=512)
    ours = quantize(model, tmp_path / "ours.gguf", type=kind, imatrix=matrix).path
    peers.run("llama-quantize", "--imatrix", matrix, model, tmp_path / "theirs.gguf", kind, str(usable_cores()))
    assert digest(ours) == digest(tmp_path / "theirs.gguf")
