"""Quantising with an importance matrix, in both of its file formats, and what a bad one is answered with."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest

from edge_phi3.conversion.imatrix_file import Imatrix, ImatrixEntry, ImatrixFileError, read_imatrix, write_imatrix
from edge_phi3.conversion.quantization_types import QUANTIZATION_TYPES
from edge_phi3.conversion.quantize import quantize
from edge_phi3.conversion.quantize_plan import QuantizeError, predict_size
from tests.conversion.random_gguf import small_phi3, write_random

SIZES = {"layers": 1, "hidden": 256, "feed_forward": 256, "vocabulary": 64}
CALLS = 7


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "model-f16.gguf"
    write_random(path, **SIZES)
    return path


def random_sums(**changes: int) -> dict[str, np.ndarray]:
    """Return sums of squares, far from uniform, for each matrix that llama.cpp collects them for."""
    random = np.random.default_rng(0)
    return {
        spec.name: random.gamma(0.3, size=spec.shape[1]).astype(np.float32) * CALLS
        for spec in small_phi3(**(SIZES | changes)).tensors().values()
        if len(spec.shape) == 2 and spec.name.startswith("blk.")
    }


def write_gguf(path: Path, sums: dict[str, np.ndarray]) -> Path:
    counts = np.array([CALLS], dtype=np.float32)
    entries = {name: ImatrixEntry(values.reshape(1, -1), counts) for name, values in sums.items()}
    write_imatrix(path, Imatrix(entries, ["calibration.txt"], 3, 512))
    return path


def write_legacy(path: Path, sums: dict[str, np.ndarray]) -> Path:
    content = struct.pack("<i", len(sums))
    for name, values in sums.items():
        content += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", CALLS, values.size)
        content += values.tobytes()
    dataset = b"calibration.txt"
    path.write_bytes(content + struct.pack("<ii", 3, len(dataset)) + dataset)
    return path


def data_of(path: Path) -> dict[str, tuple[str, bytes]]:
    return {t.name: (t.tensor_type.name, t.data.tobytes()) for t in gguf.GGUFReader(path).tensors}


# One of each grid that ggml builds, for seconds, when it meets a type.
@pytest.mark.parametrize("name", ["IQ3_XXS", "Q2_K_S", "IQ2_XS", "IQ1_S"])
def test_types_that_need_a_matrix_are_made_with_one(source: Path, tmp_path: Path, name: str) -> None:
    assert QUANTIZATION_TYPES[name].needs_imatrix
    imatrix = write_gguf(tmp_path / "imatrix.gguf", random_sums())
    result = quantize(source, tmp_path / "out.gguf", type=name, imatrix=imatrix)
    assert predict_size(source, type=name, imatrix=imatrix).bytes == pytest.approx(result.bytes, rel=0.01)


def test_the_matrix_lowers_the_error_where_it_says_that_it_matters(source: Path, tmp_path: Path) -> None:
    sums = random_sums()
    imatrix = write_gguf(tmp_path / "imatrix.gguf", sums)
    quantize(source, tmp_path / "plain.gguf", type="Q2_K", pure=True)
    quantize(source, tmp_path / "guided.gguf", type="Q2_K", pure=True, imatrix=imatrix)
    original = {t.name: np.array(t.data, dtype=np.float32) for t in gguf.GGUFReader(source).tensors}

    def weighted_errors(path: Path) -> np.ndarray:
        made = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(path).tensors}
        return np.array([float(((made[n] - original[n]) ** 2 @ w).sum()) for n, w in sums.items()])

    assert (weighted_errors(tmp_path / "guided.gguf") < weighted_errors(tmp_path / "plain.gguf")).all()


def test_both_formats_give_the_same_model_and_its_origin_is_recorded(source: Path, tmp_path: Path) -> None:
    sums = random_sums()
    new = write_gguf(tmp_path / "imatrix.gguf", sums)
    old = write_legacy(tmp_path / "imatrix.dat", sums)
    quantize(source, tmp_path / "new.gguf", type="IQ3_XXS", imatrix=new)
    quantize(source, tmp_path / "old.gguf", type="IQ3_XXS", imatrix=old)
    assert data_of(tmp_path / "new.gguf") == data_of(tmp_path / "old.gguf")
    fields = {name: field.contents() for name, field in gguf.GGUFReader(tmp_path / "new.gguf").fields.items()}
    assert fields["quantize.imatrix.file"] == "imatrix.gguf"
    assert fields["quantize.imatrix.dataset"] == "calibration.txt"
    assert fields["quantize.imatrix.entries_count"] == len(sums)
    assert fields["quantize.imatrix.chunks_count"] == 3


@pytest.mark.parametrize("write", [write_gguf, write_legacy])
def test_what_was_written_is_read(tmp_path: Path, write: object) -> None:
    sums = random_sums()
    matrix = read_imatrix(write(tmp_path / "imatrix", sums))  # type: ignore[operator]  # either writer
    assert matrix.entries.keys() == sums.keys()
    for name, values in sums.items():
        np.testing.assert_array_equal(matrix.entries[name].sums, values.reshape(1, -1))
        assert matrix.entries[name].counts == [CALLS]
    assert (matrix.datasets, matrix.chunk_count) == (["calibration.txt"], 3)
    unseen = ImatrixEntry(np.array([[2, 4], [9, 9]], dtype=np.float32), np.array([2, 0], dtype=np.float32))
    np.testing.assert_array_equal(Imatrix({"ffn": unseen}).importance()["ffn"], [1, 2, 1, 1])


def test_a_matrix_of_another_model_is_refused(source: Path, tmp_path: Path) -> None:
    imatrix = write_gguf(tmp_path / "imatrix.gguf", random_sums(hidden=512))
    with pytest.raises(QuantizeError, match=r"is of another model: it has 512 values for .*, which has 256 columns"):
        quantize(source, tmp_path / "out.gguf", type="Q4_K_M", imatrix=imatrix)
    imatrix = write_gguf(tmp_path / "other.gguf", {"model.layers.0": np.ones(256, dtype=np.float32)})
    with pytest.raises(QuantizeError, match="names no tensor of this model"):
        quantize(source, tmp_path / "out.gguf", type="Q4_K_M", imatrix=imatrix)
    assert not (tmp_path / "out.gguf").exists()


def test_a_matrix_that_lacks_a_tensor_is_refused_when_the_tensor_needs_it(source: Path, tmp_path: Path) -> None:
    sums = random_sums()
    del sums["blk.0.ffn_up.weight"]
    imatrix = write_gguf(tmp_path / "imatrix.gguf", sums)
    with pytest.raises(QuantizeError, match=r"blk\.0\.ffn_up\.weight cannot become iq2_xs without a row in"):
        quantize(source, tmp_path / "out.gguf", type="IQ2_XS", imatrix=imatrix)
    # llama.cpp itself notices this one, while it works.
    with pytest.raises(QuantizeError, match=r"importance matrix has nothing for blk\.0\.ffn_up\.weight"):
        quantize(source, tmp_path / "out.gguf", type="Q2_K_S", imatrix=imatrix)
    assert not (tmp_path / "out.gguf").exists()
    quantize(source, tmp_path / "out.gguf", type="Q4_K_M", imatrix=imatrix)


def _bad_matrix(kind: str, path: Path) -> None:
    sums = random_sums()
    if kind == "other-gguf":
        write_random(path)
    elif kind == "wrong-type":
        path.write_bytes(write_gguf(path, sums).read_bytes().replace(b"\0imatrix", b"\0adapter", 1))
    elif kind == "nan":
        sums["blk.0.ffn_up.weight"][4] = np.nan
        write_gguf(path, sums)
    elif kind.startswith("cut-gguf"):
        write_gguf(path, sums)
        path.write_bytes(path.read_bytes()[: -300 if kind == "cut-gguf-data" else 60])
    elif kind == "cut-legacy":
        write_legacy(path, sums)
        path.write_bytes(path.read_bytes()[:-1200])
    elif kind == "empty":
        path.write_bytes(b"")


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("absent", "cannot be read: No such file"),
        ("empty", "it ends early, or is another kind of file"),
        ("cut-legacy", "it ends early, or is another kind of file"),
        ("cut-gguf-header", "not a whole importance matrix"),
        ("cut-gguf-data", "not a whole importance matrix"),
        ("other-gguf", r"no tensor whose name ends with \.in_sum2"),
        ("wrong-type", "it is a GGUF of type 'adapter', not 'imatrix'"),
        ("nan", r"holds NaN or infinite values for blk\.0\.ffn_up\.weight"),
    ],
)
def test_a_bad_matrix_is_refused_in_a_sentence(source: Path, tmp_path: Path, kind: str, words: str) -> None:
    path = tmp_path / "imatrix.file"
    _bad_matrix(kind, path)
    with pytest.raises(ImatrixFileError, match=words):
        quantize(source, tmp_path / "out.gguf", type="Q4_K_M", imatrix=path)
    assert not (tmp_path / "out.gguf").exists()
