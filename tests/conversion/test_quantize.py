"""What the quantiser makes: against gguf's own NumPy quantisers, at predicted sizes, with options and overrides."""

from __future__ import annotations

import json
import platform
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType

from edge_phi3.conversion.quantize import (
    QUANTIZATION_TYPES,
    SizePrediction,
    predict_size,
    predict_sizes,
    quantize,
)
from tests.conversion.random_gguf import write_random
from tests.golden.quantized import CASES, RECORD, digest, write_inputs

WITHOUT_MATRIX = [type_.name for type_ in QUANTIZATION_TYPES.values() if not type_.needs_imatrix]


def tensors_of(path: Path) -> dict[str, gguf.ReaderTensor]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def fields_of(path: Path) -> dict[str, object]:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


@pytest.fixture(scope="module")
def predictions(source: Path) -> dict[str, SizePrediction]:
    return {prediction.type.name: prediction for prediction in predict_sizes(source, WITHOUT_MATRIX)}


@pytest.mark.parametrize("name", WITHOUT_MATRIX)
def test_each_type_is_made_at_the_predicted_size(
    source: Path, predictions: dict[str, SizePrediction], tmp_path: Path, name: str
) -> None:
    output = tmp_path / "out.gguf"
    result = quantize(source, output, type=name)
    assert result.bytes == output.stat().st_size
    predicted = predictions[name]
    assert predicted.bytes == pytest.approx(result.bytes, rel=0.001)
    planned = {tensor.name: tensor.target_type.upper() for tensor in predicted.tensors}
    if name == "Q2_0":
        # Newer than the gguf package: llama.cpp's own reader tells what is in the file.
        made = {tensor.name: tensor.source_type.upper() for tensor in predict_size(output, type="F32").tensors}
    else:
        made = {tensor.name: tensor.tensor_type.name for tensor in tensors_of(output).values()}
        assert fields_of(output)["general.file_type"] == QUANTIZATION_TYPES[name].ftype
    assert made == planned


@pytest.mark.parametrize("name", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_the_bytes_are_those_of_ggufs_numpy_quantisers(source: Path, tmp_path: Path, name: str) -> None:
    output = tmp_path / "out.gguf"
    quantize(source, output, type=name, pure=True)
    type_ = GGMLQuantizationType[name]
    made = tensors_of(output)
    for tensor in gguf.GGUFReader(source).tensors:
        if len(tensor.shape) < 2:
            expected = np.array(tensor.data)
        else:
            expected = gguf.quants.quantize(np.array(tensor.data, dtype=np.float32), type_)
        assert made[tensor.name].data.tobytes() == expected.tobytes(), tensor.name


def test_more_bits_keep_more_of_the_weights(source: Path, tmp_path: Path) -> None:
    original = np.array(tensors_of(source)["blk.1.ffn_up.weight"].data, dtype=np.float32)
    errors = []
    for name in ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M", "Q2_K"):
        output = tmp_path / f"{name}.gguf"
        quantize(source, output, type=name)
        tensor = tensors_of(output)["blk.1.ffn_up.weight"]
        errors.append(float(np.abs(gguf.quants.dequantize(tensor.data, tensor.tensor_type) - original).mean()))
    assert errors == sorted(errors)
    assert errors[-1] > 4 * errors[0]


def test_progress_names_each_tensor_once_and_reaches_the_end(source: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    quantize(source, tmp_path / "out.gguf", type="Q4_K_M", progress=lambda *step: seen.append(step))
    sizes = {tensor.name: int(tensor.n_bytes) for tensor in tensors_of(source).values()}
    names = [name for _, _, name in seen]
    assert sorted(names[:-1]) == sorted(sizes)
    assert names[-1] == names[-2]
    assert [done for done, _, _ in seen] == [sum(sizes[name] for name in names[:i]) for i in range(len(names))]
    assert {total for _, total, _ in seen} == {sum(sizes.values())}


def test_overrides_reach_the_tensors_they_name(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.gguf"
    quantize(
        source,
        output,
        type="Q4_K_M",
        tensor_types={r"BLK\.\d\.ffn_down": "q8_0", "ffn_": "iq4_nl"},
        output_tensor_type="F16",
        token_embedding_type="Q5_1",
    )
    types = {tensor.name: tensor.tensor_type.name for tensor in tensors_of(output).values()}
    assert types["output.weight"] == "F16"
    assert types["token_embd.weight"] == "Q5_1"
    for layer in (0, 1):
        assert types[f"blk.{layer}.ffn_down.weight"] == "Q8_0"
        assert types[f"blk.{layer}.ffn_up.weight"] == "IQ4_NL"
        assert types[f"blk.{layer}.ffn_norm.weight"] == "F32"


def test_pure_gives_every_matrix_the_same_type(source: Path, tmp_path: Path) -> None:
    quantize(source, tmp_path / "out.gguf", type="Q4_K_M", pure=True)
    matrices = [tensor for tensor in tensors_of(tmp_path / "out.gguf").values() if len(tensor.shape) > 1]
    assert {tensor.tensor_type.name for tensor in matrices} == {"Q4_K"}


def test_the_number_of_threads_does_not_change_a_byte(source: Path, tmp_path: Path) -> None:
    quantize(source, tmp_path / "one.gguf", type="Q4_K_M", threads=1)
    quantize(source, tmp_path / "three.gguf", type="Q4_K_M", threads=3)
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "three.gguf").read_bytes()


def test_columns_that_do_not_fill_blocks_fall_back_and_are_counted(tmp_path: Path) -> None:
    source = tmp_path / "narrow.gguf"
    write_random(source, hidden=96, heads=2, feed_forward=160)
    result = quantize(source, tmp_path / "out.gguf", type="Q4_K_M")
    types = {tensor.tensor_type.name for tensor in tensors_of(tmp_path / "out.gguf").values()}
    assert types <= {"F32", "Q5_0", "Q8_0"}
    assert result.fallbacks > 0
    assert predict_size(source, type="Q4_K_M").bytes == pytest.approx(result.bytes, rel=0.001)


def test_a_split_model_becomes_one_file(source: Path, tmp_path: Path) -> None:
    write_random(tmp_path / "model.gguf", split_max_tensors=5)
    parts = sorted(tmp_path.glob("model-*.gguf"))
    assert len(parts) == 3
    result = quantize(parts[0], tmp_path / "out.gguf", type="Q4_K_M")
    quantize(source, tmp_path / "whole.gguf", type="Q4_K_M")
    joined, whole = tensors_of(tmp_path / "out.gguf"), tensors_of(tmp_path / "whole.gguf")
    assert joined.keys() == whole.keys()
    assert all(joined[name].data.tobytes() == whole[name].data.tobytes() for name in whole)
    assert predict_size(parts[0], type="Q4_K_M").bytes == pytest.approx(result.bytes, rel=0.01)


RECORDED = json.loads(RECORD.read_text("utf-8"))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def test_every_case_of_llama_quantize_is_recorded() -> None:
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
