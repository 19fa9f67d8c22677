"""`convert` writes what llama.cpp's converter writes, which answers as the checkpoint does, or nothing at all."""

import errno
import json
import math
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from gguf import GGMLQuantizationType as GgmlType
from gguf import quants
from numpy.typing import NDArray

from edge_phi3.conversion import ConversionError
from edge_phi3.conversion.convert import convert
from edge_phi3.conversion.plan import encode
from edge_phi3.files import DiskFullError, OutputExistsError
from tests.conversion.conftest import edit, tensors_of
from tests.golden import attention
from tests.golden.checkpoints import phi3_tensors, write_checkpoint
from tests.golden.gguf_digests import CONVERTED, CONVERTER_CASES, describe, differences, write_converter_case
from tests.support.engines import ask, running_engine

RECORD = json.loads(CONVERTED.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", CONVERTER_CASES)
def test_every_byte_and_key_is_that_of_llama_cpps_converter(name: str, tmp_path: Path) -> None:
    checkpoint = write_converter_case(tmp_path, name)
    output = tmp_path / "out.gguf"
    for outtype in ("f32", "f16", "bf16", "q8_0"):
        convert(checkpoint, output, outtype=outtype, force=True)
        assert differences(RECORD[name][outtype], describe(output)) == []


@pytest.mark.parametrize("name", ["gqa", "tied"])
def test_the_model_goes_on_as_in_transformers(name: str, tmp_path: Path) -> None:
    (case,) = (case for case in attention.CASES if case.model == name)
    path = convert(attention.write_model(tmp_path, name), tmp_path / "model.gguf", outtype="f32").path
    with running_engine(path) as engine:
        found = ask(engine, case.prompt(), max_new_tokens=case.new_tokens, eos_token_id=[])
    assert found == [attention.recorded()[case.name]]


@pytest.mark.parametrize(("dtype", "outtype"), [("bfloat16", "bf16"), ("float16", "f16"), ("float32", "f32")])
def test_auto_keeps_the_checkpoints_own_type(dtype: str, outtype: str, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", layers=1, dtype=dtype)
    auto = convert(checkpoint, tmp_path / "auto.gguf")
    assert auto.outtype == outtype
    assert auto.path.read_bytes() == convert(checkpoint, tmp_path / "named.gguf", outtype=outtype).path.read_bytes()


def test_the_result_and_the_progress_tell_what_happened(pristine: Path, tmp_path: Path) -> None:
    steps: list[tuple[int, int, str]] = []
    output = tmp_path / "new folder" / "out.gguf"
    result = convert(pristine, output, outtype="f16", progress=lambda *step: steps.append(step))
    tensors = tensors_of(output)
    assert (result.path, result.outtype, result.size) == (output, "f16", output.stat().st_size)
    assert result.tensors == len(tensors)
    done, totals, names = zip(*steps, strict=True)
    assert set(totals) == {sum(int(tensor.n_bytes) for tensor in tensors.values())}
    assert list(done) == sorted(set(done))
    assert done[-1] == totals[-1]
    assert set(names) == tensors.keys()


def test_an_output_that_cannot_be_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    shard = checkpoint / "model-00001-of-00002.safetensors"
    before = shard.read_bytes()
    with pytest.raises(ConversionError, match="is a file of the checkpoint itself"):
        convert(checkpoint, shard, force=True)
    assert shard.read_bytes() == before
    with pytest.raises(ConversionError, match="'q4_0' does not exist; choose one of f32, f16, bf16, q8_0, auto"):
        convert(checkpoint, tmp_path / "out.gguf", outtype="q4_0")
    with pytest.raises(OutputExistsError, match="is a folder; give the name of a file to write"):
        convert(checkpoint, tmp_path, force=True)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConversionError, match=r"file/out.gguf cannot be written: "):
        convert(checkpoint, tmp_path / "file" / "out.gguf")


def test_a_disk_without_room_is_refused_first_and_one_that_fills_up_and_an_interruption_leave_nothing(
    pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "output" / "out.gguf"
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with mock.patch.object(os, "fdatasync", side_effect=full):
        words = "written: No space left on device. Free some space or choose another"
        with pytest.raises(ConversionError, match=words):
            convert(pristine, output)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=1000))
    with pytest.raises(DiskFullError, match=r"out\.gguf will take about [\d.]+ .B, .* has 1\.0 kB left"):
        convert(pristine, output)
    assert list(output.parent.iterdir()) == []
    monkeypatch.undo()
    left: list[int] = []

    def interrupt(*_: object) -> None:
        left.append(len(list(output.parent.iterdir())))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(pristine, output, progress=interrupt)
    assert left == [1], "the unfinished file was there, under its temporary name"
    assert list(output.parent.iterdir()) == []


def test_memory_does_not_grow_with_the_size_of_a_tensor(tmp_path: Path) -> None:
    # One matrix alone has 470 MB; the whole process, libraries and mapped pages included, stays below 400 MB.
    checkpoint = write_checkpoint(tmp_path / "checkpoint", layers=1)
    edit(checkpoint / "config.json", hidden_size=2048, intermediate_size=28672)
    header: dict[str, object] = {}
    offset = 0
    for tensor in phi3_tensors(2048, 28672, 1, heads=4, kv_heads=4, rows=672, gain=1.0):
        end = offset + 4 * math.prod(tensor.shape)
        header[tensor.name] = {"dtype": "F32", "shape": tensor.shape, "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    with (checkpoint / "model.safetensors").open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.truncate(8 + len(encoded) + offset)  # zeros, which take no room on the disk
    program = (
        "import sys; from pathlib import Path; from edge_phi3.conversion.convert import convert\n"
        "convert(Path(sys.argv[1]), Path(sys.argv[2]), outtype='q8_0')\n"
        "print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1])\n"
    )
    command = [sys.executable, "-c", program, str(checkpoint), str(tmp_path / "out.gguf")]
    finished = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(finished.stdout) * 1024 < 400e6


MATRIX_TYPES = (GgmlType.F32, GgmlType.F16, GgmlType.BF16, GgmlType.Q8_0)


def reference(values: NDArray[np.float32], target: GgmlType) -> bytes:
    with np.errstate(all="ignore"):
        data: bytes = quants.quantize(values.reshape(1, -1), target).tobytes()
    return data


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
@pytest.mark.parametrize("target", MATRIX_TYPES)
def test_every_16_bit_value_is_encoded_as_by_the_reference(dtype: str, target: GgmlType) -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    values = quants.dequantize(bits.view(np.uint8), GgmlType[dtype])
    finite = np.flatnonzero(np.abs(values) < {GgmlType.F16: 65520.0, GgmlType.Q8_0: 127 * 65504.0}.get(target, np.inf))
    whole_blocks = finite[: finite.size // 32 * 32]
    assert encode(bits[whole_blocks], dtype, target, name="x").tobytes() == reference(values[whole_blocks], target)


@pytest.mark.parametrize("target", MATRIX_TYPES)
def test_float32_values_are_encoded_as_by_the_reference(target: GgmlType) -> None:
    generator = np.random.default_rng(0)
    scales = 10.0 ** generator.integers(-8, 4, 200_000 // 32).repeat(32)
    values = (generator.standard_normal(200_000) * scales).astype(np.float32)
    values[::97] = 0.0
    values[:32] = 0.0
    values[32:64] = [127.0] + [k + 0.5 for k in range(31)]  # ties of Q8_0
    assert encode(values, "F32", target, name="x").tobytes() == reference(values, target)


BAD = [("F32", np.nan), ("F32", -np.inf), ("F16", 0x7C00), ("F16", 0xFE01), ("BF16", 0xFF80), ("BF16", 0x7FC1)]
LARGE = [("F32", 65520.0, "F16"), ("BF16", 0x4780, "F16"), ("F32", 1e7, "Q8_0"), ("BF16", 0xFF7F, "Q8_0")]


@pytest.mark.parametrize("target", MATRIX_TYPES)
def test_a_value_that_no_file_can_hold_is_refused(target: GgmlType) -> None:
    refused = [(*bad, "NaN or infinite values") for bad in BAD]
    words = f"values too large for {target.name.lower()}; convert to bf16"
    refused += [(dtype, value, words) for dtype, value, name in LARGE if name == target.name]
    for dtype, value, sentence in refused:
        values: NDArray[Any] = np.zeros(70_016, np.float32 if dtype == "F32" else np.uint16)
        values[70_000] = value
        with pytest.raises(ConversionError, match=rf"blk\.weight has {sentence}"):
            encode(values, dtype, target, name="blk.weight")
