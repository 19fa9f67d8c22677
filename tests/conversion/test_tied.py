"""An output matrix beside tied embeddings: one of its own is kept and told, the embedding once more is left out."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from edge_phi3.conversion import plan
from edge_phi3.conversion.convert import convert
from edge_phi3.conversion.encode import to_float32
from edge_phi3.conversion.errors import CheckpointError
from edge_phi3.conversion.journey import Journey
from edge_phi3.conversion.safetensors import SafetensorsFile
from edge_phi3.planning.source import find_base
from edge_phi3.progress import SilentProgress
from tests.golden.checkpoints import write_checkpoint

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TIED: dict[str, Any] = {"tie_word_embeddings": True}

Bits = NDArray[Any]


@pytest.fixture(params=["bfloat16", "float16", "float32"])
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A checkpoint of one file with tied embeddings, stored once."""
    return write_checkpoint(tmp_path / "phi-3-tied", layers=1, dtype=request.param, config=TIED)


def read(checkpoint: Path, name: str) -> tuple[str, Bits]:
    """Return a stored tensor: its dtype, and its bits."""
    tensor = SafetensorsFile(checkpoint / "model.safetensors").tensors[name]
    bits = tensor.read(0, tensor.size).reshape(tensor.shape).copy()
    return tensor.dtype, bits.view(np.uint32) if tensor.dtype == "F32" else bits


def add_head(checkpoint: Path, dtype: str, bits: Bits) -> None:
    """Store an output matrix as well."""
    path = checkpoint / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    header[HEAD] = {"dtype": dtype, "shape": bits.shape, "data_offsets": [len(data), len(data) + bits.nbytes]}
    encoded = json.dumps(header).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data + bits.tobytes())


def widened(dtype: str, bits: Bits) -> NDArray[np.float32]:
    """Return the values in float32."""
    return to_float32(bits.view(np.float32) if dtype == "F32" else bits, dtype)


def converted(checkpoint: Path, name: str, **options: Any) -> bytes:
    return convert(checkpoint, checkpoint.parent / f"{name}.gguf", **options).path.read_bytes()


@pytest.mark.parametrize("outtype", ["auto", "q8_0"])
def test_a_head_of_its_own_is_kept_and_told(
    checkpoint: Path, edit: Callable[..., None], caplog: pytest.LogCaptureFixture, outtype: str
) -> None:
    dtype, bits = read(checkpoint, EMBEDDING)
    add_head(checkpoint, dtype, bits[::-1])
    kept = converted(checkpoint, "kept", outtype=outtype)
    (told,) = caplog.messages
    assert told == (
        "config.json: tie_word_embeddings is true, but lm_head.weight is stored and differs from "
        "model.embed_tokens.weight; both are kept, as in transformers 5."
    )
    caplog.clear()
    edit(checkpoint / "config.json", tie_word_embeddings=False)
    assert kept == converted(checkpoint, "untied", outtype=outtype)
    assert caplog.messages == []


def test_one_value_is_difference_enough_wherever_it_lies(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(plan, "_CHUNK", 1000)  # the matrix is compared in many pieces, the last of them short
    dtype, bits = read(checkpoint, EMBEDDING)
    changed = bits.copy()
    changed[-1, -1] ^= 1
    add_head(checkpoint, dtype, changed)
    convert(checkpoint, checkpoint.parent / "out.gguf")
    assert len(caplog.messages) == 1
    found = {tensor.name: tensor.data for tensor in gguf.GGUFReader(checkpoint.parent / "out.gguf").tensors}
    assert {"output.weight", "token_embd.weight"} <= found.keys()
    assert np.flatnonzero(found["output.weight"] != found["token_embd.weight"]).size > 0


@pytest.mark.parametrize("stored", ["the same", "with a negative zero", "in float32"])
def test_the_embedding_once_more_is_left_out(checkpoint: Path, caplog: pytest.LogCaptureFixture, stored: str) -> None:
    once = converted(checkpoint, "once")
    dtype, bits = read(checkpoint, EMBEDDING)
    if stored == "with a negative zero":
        sign = bits.dtype.type(1 << 8 * bits.itemsize - 1)
        zeros = bits.copy()
        zeros[0] = 0
        replace(checkpoint, zeros)
        once = converted(checkpoint, "zeros")
        bits = zeros.copy()
        bits[0] = sign
    if stored == "in float32":
        dtype, bits = "F32", widened(dtype, bits).view(np.uint32)
    add_head(checkpoint, dtype, bits)
    assert converted(checkpoint, "twice") == once
    assert caplog.messages == []
    names = {tensor.name for tensor in gguf.GGUFReader(checkpoint.parent / "twice.gguf").tensors}
    assert "token_embd.weight" in names
    assert "output.weight" not in names


def replace(checkpoint: Path, bits: Bits) -> None:
    """Replace the values of the embedding."""
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(read(checkpoint, EMBEDDING)[1].tobytes(), bits.tobytes()))


def test_a_head_of_its_own_may_have_another_dtype(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "phi-3-tied", layers=1, dtype="bfloat16", config=TIED)
    _, bits = read(checkpoint, EMBEDDING)
    values = (bits.astype(np.uint32) << 16).view(np.float32) * np.float32(1.0001)
    add_head(checkpoint, "F32", values.view(np.uint32))
    convert(checkpoint, tmp_path / "out.gguf", outtype="f32")
    found = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
    np.testing.assert_array_equal(found["output.weight"], values)


def test_what_is_no_head_is_refused_by_name(checkpoint: Path) -> None:
    dtype, bits = read(checkpoint, EMBEDDING)
    original = (checkpoint / "model.safetensors").read_bytes()
    nan = bits.copy()
    nan[3, 3] = np.float32(np.nan).view(np.uint32) >> (16 if dtype == "BF16" else 0) if dtype != "F16" else 0x7E00
    for kind, head, sentence in (
        (dtype, bits[1:], r"lm_head.weight has the shape \[\d+, 64\]"),
        (dtype, nan, "lm_head.weight has NaN or infinite values"),
        ("I8", bits.view(np.int8)[:, :64], "lm_head.weight has the dtype I8"),
    ):
        (checkpoint / "model.safetensors").write_bytes(original)
        add_head(checkpoint, kind, head)
        with pytest.raises(CheckpointError, match=sentence):
            convert(checkpoint, checkpoint.parent / "out.gguf")


def test_the_journey_and_the_plan_count_it(checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def planned() -> bool:
        return find_base(str(checkpoint), tmp_path, store=None, progress=SilentProgress()).tied

    assert planned()
    dtype, bits = read(checkpoint, EMBEDDING)
    add_head(checkpoint, dtype, bits[::-1])
    assert not planned()
    with caplog.at_level(logging.WARNING):
        stop = Journey(tmp_path, "tied").convert(checkpoint)
    assert len(caplog.messages) == 1
    names = {tensor.name for tensor in gguf.GGUFReader(stop.path).tensors}
    assert "output.weight" in names
    (checkpoint / "model.safetensors").unlink()
    assert planned(), "without weights the config alone counts"
