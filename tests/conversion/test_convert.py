"""`convert` writes what llama.cpp's converter writes, which answers as the checkpoint does, or nothing at all."""

from __future__ import annotations

import errno
import json
import math
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as GgmlType
from gguf import quants
from numpy.typing import NDArray

from edge_phi3.conversion.convert import convert
from edge_phi3.conversion.encode import encode, tensor_type
from edge_phi3.conversion.errors import CheckpointError, ConversionError
from edge_phi3.files import DiskFullError, OutputExistsError
from edge_phi3.llama.model import Model
from tests.conversion import llama
from tests.golden.cases import CONVERTER_CASES, LOGITS_CASES, prompt_of, write_converter_case, write_logits_case
from tests.golden.checkpoints import Tensor, phi3_tensors, write_checkpoint, write_weights
from tests.golden.describe import describe, differences

GOLDEN = Path(__file__).parent.parent / "golden"
RECORD = json.loads((GOLDEN / "converter.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", CONVERTER_CASES)
def test_every_byte_and_key_is_that_of_llama_cpps_converter(name: str, tmp_path: Path) -> None:
    checkpoint = write_converter_case(tmp_path, name)
    output = tmp_path / "out.gguf"
    for outtype in ("f32", "f16", "bf16", "q8_0"):
        convert(checkpoint, output, outtype=outtype, force=True)
        assert differences(RECORD[name][outtype], describe(output)) == []


@pytest.mark.parametrize("name", LOGITS_CASES)
def test_logits_equal_those_of_transformers(name: str, tmp_path: Path) -> None:
    convert(write_logits_case(tmp_path, name), tmp_path / "model.gguf", outtype="f32")
    recorded = np.load(GOLDEN / "logits" / f"{name}.npz")
    _, lengths = LOGITS_CASES[name]
    model = Model(tmp_path / "model.gguf")
    for length in lengths:
        expected = recorded[f"logits_{length}"]
        # llama.cpp takes the short rope factors in a context of at most the original length, 256 in these cases.
        cells = 256 if length <= 256 else 1024 if length <= 1024 else 2048
        found = llama.logits(model, prompt_of(length, expected.shape[1]), context_length=cells, last=len(expected))
        assert expected.std() > 1, "flat logits would prove nothing"
        # Processors sum in different orders: 2e-5 apart where it was tried, and a wrong factor is off by 1 or more.
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    model.close()


@pytest.mark.parametrize(("dtype", "outtype"), [("bfloat16", "bf16"), ("float16", "f16"), ("float32", "f32")])
def test_auto_keeps_the_checkpoints_own_type(dtype: str, outtype: str, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", layers=1, dtype=dtype)
    result = convert(checkpoint, tmp_path / "auto.gguf")
    assert result.outtype == outtype
    convert(checkpoint, tmp_path / "named.gguf", outtype=outtype)
    assert (tmp_path / "auto.gguf").read_bytes() == (tmp_path / "named.gguf").read_bytes()


def test_stored_rotary_frequencies_are_ignored(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", layers=1)
    convert(checkpoint, tmp_path / "without.gguf")
    rows = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    tensors = list(phi3_tensors(64, 160, 1, heads=4, kv_heads=4, rows=rows, gain=1.5))
    tensors.append(Tensor("model.layers.0.self_attn.rotary_emb.inv_freq", (8,), 1.0))
    write_weights(checkpoint, tensors, seed=0, dtype="float32")
    convert(checkpoint, tmp_path / "with.gguf")
    assert (tmp_path / "with.gguf").read_bytes() == (tmp_path / "without.gguf").read_bytes()


def test_the_result_and_the_progress_tell_what_happened(pristine: Path, tmp_path: Path) -> None:
    steps: list[tuple[int, int, str]] = []
    output = tmp_path / "new folder" / "out.gguf"
    result = convert(pristine, output, outtype="f16", progress=lambda *step: steps.append(step))
    reader = gguf.GGUFReader(output)
    assert (result.path, result.outtype, result.size) == (output, "f16", output.stat().st_size)
    assert result.tensors == len(reader.tensors)
    done, totals, names = zip(*steps, strict=True)
    assert set(totals) == {sum(int(tensor.n_bytes) for tensor in reader.tensors)}
    assert list(done) == sorted(set(done))
    assert done[-1] == totals[-1]
    assert set(names) == {tensor.name for tensor in reader.tensors}


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


def test_an_interruption_leaves_nothing(pristine: Path, tmp_path: Path) -> None:
    output = tmp_path / "output" / "out.gguf"
    program = (
        "import signal, sys, time; from pathlib import Path; from edge_phi3.conversion.convert import convert\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background jobs inherit it ignored
        "def stay(done, total, tensor): print(done, flush=True); time.sleep(3600)\n"
        "convert(Path(sys.argv[1]), Path(sys.argv[2]), progress=stay)\n"
    )
    arguments = [sys.executable, "-c", program, str(pristine), str(output)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        assert int(process.stdout.readline()) > 0
        assert len(list(output.parent.iterdir())) == 1, "the unfinished file is there, under its temporary name"
        process.send_signal(signal.SIGINT)
        process.wait(timeout=300)
    assert process.returncode != 0
    assert list(output.parent.iterdir()) == []


FAIL = (
    "import sys; from pathlib import Path; from edge_phi3.conversion.convert import *\n"
    "from edge_phi3.conversion.errors import ConversionError\n"
    "try: convert(Path(sys.argv[1]), Path(sys.argv[2]))\n"
    "except ConversionError as error: print(error, *Path(sys.argv[2]).parent.iterdir())\n"
)
"""A conversion that prints why it failed, and what it left."""


def test_a_write_that_fails_leaves_nothing(pristine: Path, tmp_path: Path) -> None:
    output = tmp_path / "output" / "out.gguf"
    finished = subprocess.run(
        [sys.executable, "-c", FAIL, str(pristine), str(output)], capture_output=True, text=True, check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
    )  # fmt: skip
    assert finished.stdout == f"{output} cannot be written: File too large.\n"


def test_a_disk_that_fills_up_meanwhile_leaves_nothing(
    pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fdatasync", full)
    with pytest.raises(ConversionError, match=r"written: No space left on device. Free some space or choose another"):
        convert(pristine, tmp_path / "output" / "out.gguf")
    assert list((tmp_path / "output").iterdir()) == []


def test_a_disk_without_room_is_refused_before_writing(tmp_path: Path) -> None:
    # A sparse file of zeros stands for weights that are larger than the disk.
    checkpoint = write_checkpoint(tmp_path / "checkpoint", layers=1)
    disk = os.statvfs(tmp_path)
    _write_sparse(checkpoint, intermediate_size=disk.f_frsize * disk.f_blocks // (3 * 4 * 2048))
    with pytest.raises(DiskFullError, match=r"out\.gguf will take about [\d.]+ .B, .* has [\d.]+ .B left"):
        convert(checkpoint, tmp_path / "output" / "out.gguf", outtype="f32")
    assert list((tmp_path / "output").iterdir()) == []


def test_memory_does_not_grow_with_the_size_of_a_tensor(tmp_path: Path) -> None:
    # One matrix alone has 470 MB; the whole process, libraries and mapped pages included, stays below 400 MB.
    checkpoint = write_checkpoint(tmp_path / "checkpoint", layers=1)
    _write_sparse(checkpoint, intermediate_size=28672)
    program = (
        "import sys; from pathlib import Path; from edge_phi3.conversion.convert import convert\n"
        "convert(Path(sys.argv[1]), Path(sys.argv[2]), outtype='q8_0')\n"
        "print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1])\n"
    )
    finished = subprocess.run(
        [sys.executable, "-c", program, str(checkpoint), str(tmp_path / "out.gguf")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert int(finished.stdout) * 1024 < 400e6


def _write_sparse(checkpoint: Path, *, intermediate_size: int) -> None:
    """Replace the weights by zeros of a wider model, which take no room on the disk."""
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    config |= {"hidden_size": 2048, "intermediate_size": intermediate_size}
    (checkpoint / "config.json").write_text(json.dumps(config), encoding="utf-8")
    header: dict[str, object] = {}
    offset = 0
    for tensor in phi3_tensors(2048, intermediate_size, 1, heads=4, kv_heads=4, rows=config["vocab_size"], gain=1.0):
        end = offset + 4 * math.prod(tensor.shape)
        header[tensor.name] = {"dtype": "F32", "shape": tensor.shape, "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    with (checkpoint / "model.safetensors").open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.truncate(8 + len(encoded) + offset)


def test_shards_may_be_named_in_any_order(checkpoint: Path, tmp_path: Path, edit: Callable[..., None]) -> None:
    convert(checkpoint, tmp_path / "before.gguf")
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text(encoding="utf-8"))
    edit(checkpoint / "model.safetensors.index.json", weight_map=dict(reversed(index["weight_map"].items())))
    convert(checkpoint, tmp_path / "after.gguf")
    assert (tmp_path / "before.gguf").read_bytes() == (tmp_path / "after.gguf").read_bytes()


MATRIX_TYPES = (GgmlType.F32, GgmlType.F16, GgmlType.BF16, GgmlType.Q8_0)


def every_finite(dtype: str, below: float = np.inf) -> tuple[NDArray[np.uint16], NDArray[np.float32]]:
    """Every 16-bit value that is finite and smaller than `below`: its bits, and the values as float32."""
    bits = np.arange(1 << 16, dtype=np.uint16)
    values = (
        bits.view(np.float16).astype(np.float32)
        if dtype == "F16"
        else (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    )
    kept = np.isfinite(values) & (np.abs(values) < below)
    count = int(kept.sum()) // 32 * 32
    return bits[kept][:count], values[kept][:count]


def reference(values: NDArray[np.float32], target: GgmlType) -> bytes:
    with np.errstate(all="ignore"):
        data: bytes = quants.quantize(values.reshape(1, -1), target).tobytes()
    return data


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
@pytest.mark.parametrize("target", MATRIX_TYPES)
def test_every_16_bit_value_is_encoded_as_by_the_reference(dtype: str, target: GgmlType) -> None:
    largest = {GgmlType.F16: 65520.0, GgmlType.Q8_0: 127 * 65504.0}.get(target, np.inf)
    bits, values = every_finite(dtype, largest)
    assert encode(bits, dtype, target, name="x").tobytes() == reference(values, target)


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


@pytest.mark.parametrize("target", MATRIX_TYPES)
@pytest.mark.parametrize(("dtype", "bad"), BAD)
def test_nan_and_infinity_are_refused(dtype: str, bad: float, target: GgmlType) -> None:
    values: NDArray[Any] = np.zeros(70_016, np.float32 if dtype == "F32" else np.uint16)
    values[70_000] = bad
    with pytest.raises(CheckpointError, match=r"blk\.weight has NaN or infinite values"):
        encode(values, dtype, target, name="blk.weight")


@pytest.mark.parametrize(
    ("dtype", "large", "target"),
    [
        ("F32", 65520.0, GgmlType.F16),
        ("BF16", 0x4780, GgmlType.F16),
        ("F32", 1e7, GgmlType.Q8_0),
        ("BF16", 0xFF7F, GgmlType.Q8_0),
    ],
)
def test_a_value_too_large_for_the_type_is_refused(dtype: str, large: float, target: GgmlType) -> None:
    values: NDArray[Any] = np.zeros(64, np.float32 if dtype == "F32" else np.uint16)
    values[3] = large
    with pytest.raises(ConversionError, match=f"x has values too large for {target.name.lower()}; convert to bf16"):
        encode(values, dtype, target, name="x")


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("blk.0.attn_qkv.weight", (96, 64), GgmlType.Q8_0),
        ("blk.0.ffn_down.weight", (64, 72), GgmlType.F16),
        ("blk.0.attn_norm.weight", (64,), GgmlType.F32),
        ("output_norm.weight", (64,), GgmlType.F32),
        ("rope_factors_long.weight", (8,), GgmlType.F32),
        ("token_embd.weight", (672, 64), GgmlType.Q8_0),
    ],
)
def test_vectors_stay_float32_and_rows_of_no_whole_blocks_become_float16(
    name: str, shape: tuple[int, ...], expected: GgmlType
) -> None:
    assert tensor_type(name, shape, GgmlType.Q8_0) == expected
