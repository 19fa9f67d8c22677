"""The quantiser against gguf's own NumPy quantisers, its predicted sizes, and its whole-or-absent output."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import psutil
import pytest
from gguf import GGMLQuantizationType

from edge_phi3.conversion import quantize as module
from edge_phi3.conversion.quantization_types import UnknownQuantizationError
from edge_phi3.conversion.quantize import (
    QUANTIZATION_TYPES,
    QuantizeError,
    QuantizeProgress,
    SizePrediction,
    predict_size,
    predict_sizes,
    quantize,
)
from edge_phi3.conversion.quantize_process import LogReader, TensorFinished, TensorStarted
from edge_phi3.files import OutputExistsError
from tests.conversion.random_gguf import write_random

WITHOUT_MATRIX = [type_.name for type_ in QUANTIZATION_TYPES.values() if not type_.needs_imatrix]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "model-f16.gguf"
    write_random(path)
    return path


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
    seen: list[QuantizeProgress] = []
    quantize(source, tmp_path / "out.gguf", type="Q4_K_M", progress=seen.append)
    sizes = {tensor.name: int(tensor.n_bytes) for tensor in tensors_of(source).values()}
    *steps, end = seen
    assert sorted(step.tensor for step in steps) == sorted(sizes)
    assert [step.index for step in steps] == list(range(1, len(sizes) + 1))
    assert {step.count for step in seen} == {len(sizes)}
    done = 0
    for step in steps:
        assert step.done_bytes == done
        done += sizes[step.tensor]
    assert end.done_bytes == end.total_bytes == done
    made = tensors_of(tmp_path / "out.gguf")
    assert all(step.target_type.upper() == made[step.tensor].tensor_type.name for step in seen)


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


def test_requantising_is_refused_until_asked_for(source: Path, tmp_path: Path) -> None:
    quantize(source, tmp_path / "q8.gguf", type="Q8_0")
    with pytest.raises(QuantizeError, match=r"q8\.gguf is quantised already .*--allow-requantize"):
        quantize(tmp_path / "q8.gguf", tmp_path / "q4.gguf", type="Q4_K_M")
    assert not (tmp_path / "q4.gguf").exists()
    result = quantize(tmp_path / "q8.gguf", tmp_path / "q4.gguf", type="Q4_K_M", allow_requantize=True)
    assert result.bytes < (tmp_path / "q8.gguf").stat().st_size


def test_an_output_that_exists_is_kept_without_force(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.gguf"
    output.write_bytes(b"precious")
    with pytest.raises(OutputExistsError, match="--force"):
        quantize(source, output, type="Q8_0")
    assert output.read_bytes() == b"precious"
    quantize(source, output, type="Q8_0", force=True)
    assert tensors_of(output)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"type": "Q4"}, UnknownQuantizationError, r"'Q4' is not a quantisation type; close to it are"),
        ({"type": "IQ2_XS"}, QuantizeError, r"IQ2_XS needs an importance matrix.*--imatrix.* such as Q2_K\."),
        (
            {"type": "Q4_K_M", "tensor_types": {"ffn_down": "q8"}},
            UnknownQuantizationError,
            r"--tensor-type ffn_down: 'q8' is not a tensor type that llama.cpp writes; close to it are.*q8_0",
        ),
        (
            {"type": "Q4_K_M", "output_tensor_type": "q8_1"},
            UnknownQuantizationError,
            r"--output-tensor-type: 'q8_1' is not",
        ),
        (
            {"type": "Q4_K_M", "token_embedding_type": "i32"},
            UnknownQuantizationError,
            r"--token-embedding-type: 'i32' is not",
        ),
        (
            {"type": "Q4_K_M", "tensor_types": {"ffn_gate": "q8_0"}},
            QuantizeError,
            r"no tensor of this model matches 'ffn_gate'; its tensors are attn_norm\.weight, .*ffn_up\.weight",
        ),
        (
            {"type": "Q4_K_M", "tensor_types": {"attn_norm": "q8_0"}},
            QuantizeError,
            r"llama\.cpp never quantises blk\.0\.attn_norm\.weight",
        ),
        (
            {"type": "Q4_K_M", "tensor_types": {"ffn_(": "q8_0"}},
            QuantizeError,
            r"'ffn_\(' is not a regular expression",
        ),
        (
            {"type": "F16", "tensor_types": {"ffn_down": "q8_0"}},
            QuantizeError,
            r"--tensor-type has no effect with --type F16",
        ),
        (
            {"type": "Q4_K_M", "token_embedding_type": "iq2_xxs"},
            QuantizeError,
            r"token_embd\.weight cannot become iq2_xxs without an importance matrix",
        ),
    ],
)
def test_what_cannot_be_made_is_refused_in_a_sentence(
    source: Path, tmp_path: Path, options: dict, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        quantize(source, tmp_path / "out.gguf", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_single_type_that_does_not_fit_the_columns_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "narrow.gguf"
    write_random(source, hidden=96, heads=2, feed_forward=160)
    with pytest.raises(QuantizeError, match=r"output\.weight has 96 columns, and q6_K packs 256 at a time"):
        quantize(source, tmp_path / "out.gguf", type="Q8_0", output_tensor_type="Q6_K")


def _bad_sources() -> list[tuple[str, str]]:
    return [
        ("absent", r"absent\.gguf cannot be read: No such file"),
        ("folder", r"folder\.gguf cannot be read: Is a directory"),
        ("empty", r"empty\.gguf is not a GGUF file"),
        ("text", r"text\.gguf is not a GGUF file \(it begins with b'PK"),
        ("header-only", r"header-only\.gguf"),
        ("cut-header", r"cut-header\.gguf"),
        ("cut-weights", r"cut-weights\.gguf is cut short; download or convert it again"),
        ("other-architecture", r"other-architecture\.gguf: .*unknown model architecture: 'phi99'"),
        ("nan", r"nan\.gguf holds NaN or infinite weights in blk\.1\.ffn_up\.weight"),
    ]


@pytest.mark.parametrize(("kind", "words"), _bad_sources())
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
        content = {
            "empty": b"",
            "text": b"PK\x03\x04 not a model",
            "header-only": whole[:24],
            "cut-header": whole[:600],
            "cut-weights": whole[:-1000],
        }
        bad.write_bytes(content[kind])
    before = sorted(tmp_path.iterdir())
    with pytest.raises(QuantizeError, match=words):
        quantize(bad, tmp_path / "out.gguf", type="Q4_K_M")
    assert sorted(tmp_path.iterdir()) == before


def test_nothing_of_llama_cpps_log_is_printed(source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    quantize(source, tmp_path / "out.gguf", type="Q4_K_M")
    with pytest.raises(QuantizeError):
        quantize(tmp_path / "out.gguf", tmp_path / "again.gguf", type="Q2_K")
    assert capfd.readouterr() == ("", "")


def test_ctrl_c_leaves_no_file_and_no_process(source: Path, tmp_path: Path) -> None:
    def interrupt(step: QuantizeProgress) -> None:
        if step.index == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(source, tmp_path / "out.gguf", type="Q4_K_M", progress=interrupt)
    assert list(tmp_path.iterdir()) == []
    workers = [child for child in psutil.Process().children() if "quantize_worker" in " ".join(child.cmdline())]
    assert workers == []


def test_a_killed_parent_takes_the_quantiser_with_it(tmp_path: Path) -> None:
    source = tmp_path / "model.gguf"
    write_random(source, layers=4, hidden=1024, feed_forward=4096)
    script = (
        "import sys; from pathlib import Path; from edge_phi3.conversion.quantize import quantize\n"
        "quantize(Path(sys.argv[1]), Path(sys.argv[2]), type='Q4_K_M', threads=1,"
        " progress=lambda step: print(step.index, flush=True))"
    )
    output = tmp_path / "out.gguf"
    with subprocess.Popen(
        [sys.executable, "-c", script, str(source), str(output)], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "1\n"
        (worker,) = psutil.Process(parent.pid).children()
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    worker.wait(timeout=10)
    assert not output.exists()


def test_a_disk_that_fills_up_is_told_and_leaves_nothing(source: Path, tmp_path: Path) -> None:
    # A limit on file sizes makes write() fail half way, as a full disk does.
    script = (
        "import resource, sys; from pathlib import Path\n"
        "from edge_phi3.conversion.quantize import quantize, QuantizeError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))\n"
        "try:\n    quantize(Path(sys.argv[1]), Path(sys.argv[2]), type='Q8_0')\n"
        "except QuantizeError as error:\n    print(error)"
    )
    finished = subprocess.run(
        [sys.executable, "-c", script, str(source), str(tmp_path / "out.gguf")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "the disk may be full" in finished.stdout
    assert list(tmp_path.iterdir()) == []


def test_too_little_free_space_is_told_before_the_work_begins(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(QuantizeError, match=r"out\.gguf needs \d\.\d MB and its disk has 1\.0 kB left"):
        quantize(source, tmp_path / "out.gguf", type="Q8_0")
    assert list(tmp_path.iterdir()) == []


def test_a_crash_of_the_quantiser_becomes_a_sentence(source: Path, tmp_path: Path) -> None:
    def kill_the_child(step: QuantizeProgress) -> None:
        if step.index == 3:
            for child in psutil.Process().children():
                if "quantize_worker" in " ".join(child.cmdline()):
                    os.kill(child.pid, signal.SIGKILL)

    with pytest.raises(QuantizeError, match=r"quantiser died at the tensor .*: exit code -9"):
        quantize(source, tmp_path / "out.gguf", type="Q4_K_M", progress=kill_the_child)
    assert list(tmp_path.iterdir()) == []


LOG = (
    "llama_model_loader: loaded meta data\n"
    "[   1/   3] token_embd.weight                    - [   256,    384,      1,      1], type =    f16, "
    "size =     0.19 MiB ->     0.05 MiB (q4_K)\n"
    "[   2/   3] a_name_that_is_longer_than_its_column_is_wide - [   256,      1,      1,      1], type =    f32, "
    "something new size =    0.001 MiB\n"
    "one more line that nobody knows\n"
    "[   3/   3] blk.0.ffn_up.weight                  - [   256,   1024,      1,      1], type =    f16, "
    "converting to q4_K .. size =     0.50 MiB ->     0.14 MiB\n"
    "llama_model_quantize_impl: WARNING: 2 of 3 tensor(s) required fallback quantization\n"
)


@pytest.mark.parametrize("piece", [1, 7, 64, 10_000])
def test_the_log_is_read_however_it_is_cut(piece: int) -> None:
    log = LogReader()
    steps = [step for start in range(0, len(LOG), piece) for step in log.feed(LOG[start : start + piece])]
    assert [(step.name, step.shape[0]) for step in steps if isinstance(step, TensorStarted)] == [
        ("token_embd.weight", 256),
        ("a_name_that_is_longer_than_its_column_is_wide", 256),
        ("blk.0.ffn_up.weight", 256),
    ]
    assert [step.target_type for step in steps if isinstance(step, TensorFinished)] == ["q4_K", "f32", "q4_K"]
    assert log.fallbacks == 2
    assert not log.error


def test_a_failure_in_the_middle_of_a_line_is_found() -> None:
    log = LogReader()
    list(log.feed("[   1/   1] x - [ 256, 4], type = f16, llama_model_quantize: failed to quantize: disk\n"))
    assert log.error == "disk"
