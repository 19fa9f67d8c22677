"""What the quantiser makes, and what it refuses: against gguf's own NumPy quantisers and llama-quantize's record."""

import contextlib
import json
import platform
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import llama_cpp
import numpy as np
import pytest

from edge_phi3.conversion.phi3 import ARCHITECTURE, read_phi3
from edge_phi3.conversion.quantization_types import (
    ALIASES,
    QUANTIZATION_TYPES,
    UnknownQuantizationError,
    quantization_type,
)
from edge_phi3.conversion.quantize import QuantizeError, SizePrediction, predict_size, predict_sizes, quantize
from edge_phi3.files import DiskFullError
from edge_phi3.llama import QuantizerError
from edge_phi3.llama.quantizer import Job, QuantizerProcess
from edge_phi3.planning.gguf_layout import write_base
from tests.conversion.conftest import fields_of, tensors_of, write_model
from tests.golden.gguf_digests import QUANTIZED, QUANTIZED_TYPES, digest, write_quantizer_inputs
from tests.support.cases import cases
from tests.support.models import split
from tests.test_cli import edge_phi3

WITHOUT_MATRIX = [type_.name for type_ in QUANTIZATION_TYPES.values() if not type_.needs_imatrix]


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
    planned = {tensor.name: tensor.made.name.upper() for tensor in predicted.tensors}
    if name == "Q2_0":
        # Newer than the gguf package: llama.cpp's own reader tells what is in the file.
        made = {tensor.name: tensor.source.name.upper() for tensor in predict_size(output, type="F32").tensors}
    else:
        made = {tensor.name: tensor.tensor_type.name for tensor in tensors_of(output).values()}
        assert fields_of(output)["general.file_type"] == QUANTIZATION_TYPES[name].ftype
    assert made == planned


@pytest.mark.parametrize("name", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_the_bytes_are_those_of_ggufs_numpy_quantisers(source: Path, tmp_path: Path, name: str) -> None:
    made = tensors_of(quantize(source, tmp_path / "out.gguf", type=name, pure=True).path)
    for tensor in tensors_of(source).values():
        expected = np.array(tensor.data)
        if len(tensor.shape) > 1:
            expected = gguf.quants.quantize(expected.astype(np.float32), gguf.GGMLQuantizationType[name])
        assert made[tensor.name].data.tobytes() == expected.tobytes(), tensor.name


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
    overrides = {r"BLK\.\d\.ffn_down": "q8_0", "ffn_": "iq4_nl"}
    others: dict[str, Any] = {"output_tensor_type": "F16", "token_embedding_type": "Q5_1"}
    quantize(source, output, type="Q4_K_M", tensor_types=overrides, **others)
    types = {tensor.name: tensor.tensor_type.name for tensor in tensors_of(output).values()}
    assert types["output.weight"] == "F16"
    assert types["token_embd.weight"] == "Q5_1"
    for layer in (0, 1):
        assert types[f"blk.{layer}.ffn_down.weight"] == "Q8_0"
        assert types[f"blk.{layer}.ffn_up.weight"] == "IQ4_NL"
        assert types[f"blk.{layer}.ffn_norm.weight"] == "F32"


def test_columns_that_do_not_fill_blocks_fall_back_and_are_counted(tmp_path: Path) -> None:
    source = write_model(tmp_path / "narrow.gguf", hidden_size=96, heads=2, intermediate_size=160)
    result = quantize(source, tmp_path / "out.gguf", type="Q4_K_M")
    types = {tensor.tensor_type.name for tensor in tensors_of(tmp_path / "out.gguf").values()}
    assert types <= {"F32", "Q5_0", "Q8_0"}
    assert result.fallbacks > 0
    assert predict_size(source, type="Q4_K_M").bytes == pytest.approx(result.bytes, rel=0.001)
    with pytest.raises(QuantizeError, match=r"output\.weight has 96 columns, and q6_K packs 256 at a time"):
        quantize(source, tmp_path / "out.gguf", type="Q8_0", output_tensor_type="Q6_K", force=True)


def test_a_split_model_becomes_one_file(source: Path, tmp_path: Path) -> None:
    parts = split(source, tmp_path)
    assert len(parts) == 3
    result = quantize(parts[0], tmp_path / "out.gguf", type="Q4_K_M")
    quantize(source, tmp_path / "whole.gguf", type="Q4_K_M", threads=1)
    assert digest(tmp_path / "out.gguf") == digest(tmp_path / "whole.gguf")
    quantize(source, tmp_path / "three.gguf", type="Q4_K_M", threads=3)
    assert (tmp_path / "whole.gguf").read_bytes() == (tmp_path / "three.gguf").read_bytes(), "threads change no byte"
    assert predict_size(parts[0], type="Q4_K_M").bytes == pytest.approx(result.bytes, rel=0.01)


RECORDED = json.loads(QUANTIZED.read_text("utf-8"))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_quantizer_inputs(tmp_path_factory.mktemp("inputs"))


# Where a processor's plain instructions include a fused multiplication and addition, compilers make use of it, and a
# weight between two steps may be rounded to the other. x86-64 has none, whatever the processor.
@pytest.mark.skipif(platform.machine() not in {"x86_64", "AMD64"}, reason="recorded on x86-64")
@pytest.mark.parametrize("kind", QUANTIZED_TYPES)
def test_the_tensors_are_llama_quantizes(inputs: tuple[Path, Path], tmp_path: Path, kind: str) -> None:
    model, matrix = inputs
    made = quantize(model, tmp_path / "out.gguf", type=kind, imatrix=matrix if QUANTIZED_TYPES[kind] else None)
    assert digest(made.path) == RECORDED[kind]


def test_the_table_has_every_type_that_llama_cpp_accepts(source: Path) -> None:
    numbers = {
        value
        for name, value in vars(llama_cpp).items()
        if name.startswith("LLAMA_FTYPE_") and name != "LLAMA_FTYPE_GUESSED"
    }
    accepted = set()
    with QuantizerProcess() as process:
        for number in numbers:
            with contextlib.suppress(QuantizerError):
                list(process.run(Job(source=source, output=None, ftype=number, threads=1)))
                accepted.add(number)
    assert accepted == {type_.ftype for type_ in QUANTIZATION_TYPES.values()}


def test_bits_per_weight_and_the_need_of_a_matrix_are_those_of_phi_3_mini(tmp_path: Path) -> None:
    source = write_base(tmp_path / "phi-3-mini-shapes.gguf", read_phi3({"architectures": [ARCHITECTURE]})).path
    found = {
        plan.type.name: (round(plan.bits_per_weight, 2), plan.needs_imatrix)
        for plan in predict_sizes(source, QUANTIZATION_TYPES)
    }
    assert found == {type_.name: (type_.bits_per_weight, type_.needs_imatrix) for type_ in QUANTIZATION_TYPES.values()}


def test_the_list_shows_every_type_from_large_to_small_with_the_special_ones_last_and_each_is_found() -> None:
    order = [(type_.special, -type_.bits_per_weight) for type_ in QUANTIZATION_TYPES.values()]
    assert order == sorted(order)
    lines = edge_phi3("quantize", "--list").stdout.splitlines()[1:]
    shown = {line.split()[0]: " needed " in line for line in lines if line.split()[0] in QUANTIZATION_TYPES}
    assert shown == {name: type_.needs_imatrix for name, type_ in QUANTIZATION_TYPES.items()}
    assert {quantization_type(name).name for name in ("q4_k_m", "Q4_K_M", " Q4_K ", "q4_k")} == {"Q4_K_M"}
    assert {quantization_type(alias).name for alias in ALIASES} == set(ALIASES.values())
    with pytest.raises(UnknownQuantizationError, match=r"'q4km' is not a quantisation type.*Q4_K_M.*--list"):
        quantization_type("q4km")


def test_the_command_tells_the_size_beforehand_and_what_is_missing(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "small.gguf"
    told = edge_phi3("quantize", str(source), "-o", str(output), "--type", "Q4_K_M", "--dry-run")
    assert told.returncode == 0, told.stderr
    assert not output.exists()
    assert int(told.stdout) == pytest.approx(quantize(source, output, type="Q4_K_M").bytes, rel=0.01)
    needy = edge_phi3("quantize", str(source), "--type", "Q2_K_S", "--dry-run")
    assert "Q2_K_S needs an importance matrix: --imatrix." in needy.stderr
    nowhere = edge_phi3("quantize", str(source))
    assert nowhere.returncode == 2
    assert "-o: give the GGUF file to write" in nowhere.stderr


def test_requantising_is_refused_until_asked_for(source: Path, tmp_path: Path) -> None:
    quantize(source, tmp_path / "q8.gguf", type="Q8_0")
    with pytest.raises(QuantizeError, match=r"q8\.gguf is quantised already .*--allow-requantize"):
        quantize(tmp_path / "q8.gguf", tmp_path / "q4.gguf", type="Q4_K_M")
    assert not (tmp_path / "q4.gguf").exists()
    result = quantize(tmp_path / "q8.gguf", tmp_path / "q4.gguf", type="Q4_K_M", allow_requantize=True)
    assert result.bytes < (tmp_path / "q8.gguf").stat().st_size


@cases
def test_what_cannot_be_made_is_refused_in_a_sentence(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], words: str
) -> None:
    if "about" in words:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises((QuantizeError, UnknownQuantizationError, DiskFullError), match=words):
        quantize(source, tmp_path / "out.gguf", **({"type": "Q4_K_M"} | options))
    assert list(tmp_path.iterdir()) == []


@cases
def test_a_bad_source_is_refused_in_a_sentence(source: Path, tmp_path: Path, kind: str, words: str) -> None:
    bad = tmp_path / f"{kind}.gguf"
    whole = source.read_bytes()
    if kind == "folder":
        bad.mkdir()
    elif kind == "other-architecture":
        bad.write_bytes(whole.replace(b"\x04\0\0\0\0\0\0\0phi3", b"\x05\0\0\0\0\0\0\0phi99", 1))
    elif kind == "nan":
        shutil.copy(source, bad)
        reader = gguf.GGUFReader(bad, "r+")
        next(t for t in reader.tensors if t.name == "blk.1.ffn_up.weight").data[3, 5] = np.nan
        reader.data.flush()
    elif kind != "absent":
        bad.write_bytes({"empty": b"", "cut-header": whole[:600], "cut-weights": whole[:-1000]}[kind])
    before = sorted(tmp_path.iterdir())
    with pytest.raises(QuantizeError, match=words):
        quantize(bad, tmp_path / "out.gguf", type="Q4_K_M")
    assert sorted(tmp_path.iterdir()) == before
