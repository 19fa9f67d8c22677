"""A checkpoint that cannot be converted: one sentence, and nothing left behind."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_phi3.conversion import CheckpointError, ConversionError, UnsupportedModelError
from edge_phi3.conversion.checkpoint import SafetensorsFile
from edge_phi3.conversion.convert import convert
from tests.conversion.conftest import edit, edited_weights
from tests.conversion.edits import INDEX, NORM, SECOND
from tests.golden.checkpoints import write_checkpoint
from tests.support.cases import cases

HEAD = "lm_head.weight"
ERRORS = {error.__name__: error for error in (CheckpointError, UnsupportedModelError)}


def refused(checkpoint: Path, error: type[ConversionError], sentence: str, *, outtype: str = "f16") -> None:
    """Assert that a conversion fails with this error and sentence, and that the output's folder stays empty."""
    output = checkpoint.parent / "output" / "out.gguf"
    with pytest.raises(error, match=sentence) as caught:
        convert(checkpoint, output, outtype=outtype)
    assert type(caught.value) is error
    assert not output.parent.exists() or list(output.parent.iterdir()) == []


def test_no_checkpoint(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", CheckpointError, "nowhere does not exist; give the folder of a Hugging Face check")
    (tmp_path / "file").write_text("x")
    refused(tmp_path / "file", CheckpointError, "file is not a folder; give the folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", CheckpointError, "has no config.json")
    contents = {"{": "is not valid JSON", "[" * 9999: "is not valid JSON", "[]": "must hold a JSON"}
    for content, sentence in contents.items():
        (tmp_path / "empty" / "config.json").write_text(content)
        refused(tmp_path / "empty", CheckpointError, f"config.json {sentence}")


@cases
def test_a_config_of_another_model_or_of_none(
    checkpoint: Path, error: str, entries: dict[str, Any], sentence: str
) -> None:
    (checkpoint / "generation_config.json").unlink()
    edit(checkpoint / "config.json", **entries)
    refused(checkpoint, ERRORS[error], sentence)


@cases
def test_an_index_without_a_map_of_files_beside_it(checkpoint: Path, wrong: object, sentence: str) -> None:
    edit(checkpoint / INDEX, weight_map=... if wrong == "absent" else wrong)
    refused(checkpoint, CheckpointError, sentence)


def test_damaged_weights_and_those_that_no_file_can_hold(checkpoint: Path) -> None:
    for bits, error, sentence in (
        (0x7FC0, CheckpointError, f"{HEAD} has NaN or infinite values"),
        (0x4880, ConversionError, f"{HEAD} has values too large for f16; convert to bf16 or f32"),
    ):
        with edited_weights(checkpoint / SECOND) as (header, data):
            end = header[HEAD]["data_offsets"][1]
            data[end - 2 : end] = np.uint16(bits).tobytes()
        refused(checkpoint, error, sentence)
    convert(checkpoint, checkpoint.parent / "out.gguf", outtype="bf16")
    with edited_weights(checkpoint / SECOND) as (header, _):
        header[NORM]["dtype"] = "I16"
    refused(checkpoint, CheckpointError, f"{NORM} has the dtype I16; BF16, F16 and F32 can be converted")
    (checkpoint / SECOND).write_bytes((checkpoint / SECOND).read_bytes()[:-1])
    refused(checkpoint, CheckpointError, rf"{SECOND} is not a sound safetensors file \(.*incomplete")
    (checkpoint / "model.safetensors").mkdir()
    refused(checkpoint, CheckpointError, "model.safetensors cannot be read: Is a directory")


def test_more_tensors_than_layers_and_more_tokens_than_rows(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "two", layers=2)
    edit(checkpoint / "config.json", num_hidden_layers=1)
    refused(checkpoint, CheckpointError, r"has model.layers.1.*and 3 more, which a 1-layer Phi-3 lacks")
    checkpoint = write_checkpoint(tmp_path / "narrow", layers=1, vocab_size=600)
    refused(checkpoint, CheckpointError, r"tokenizer.model has \d+ pieces, but the model's vocab_size is 600")
    checkpoint = write_checkpoint(tmp_path / "tight", layers=1, vocab_size=660)
    refused(checkpoint, CheckpointError, r"has the id 66\d, but the model's vocab_size is 660")


def write_safetensors(path: Path, header: dict[str, Any], data: bytes) -> Path:
    encoded = json.dumps(header).encode()
    encoded += b" " * (1 - len(encoded) % 2)  # of odd length: all values lie off alignment
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data)
    return path


def entry(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_tensors_are_read_as_they_lie_in_the_file(tmp_path: Path) -> None:
    wide, bits = np.arange(6, dtype="<f4"), np.arange(100, 104, dtype="<u2")
    # Values of other sizes lie between.
    header = {"b": entry(36, 44, [4], "BF16"), "a": entry(1, 25, [2, 3]), "mask": entry(0, 1, [1], "BOOL")}
    header |= {"ids": entry(25, 33, [1], "I64"), "small": entry(33, 36, [3, 1], "F8_E4M3"), "none": entry(25, 25, [0])}
    data = b"\1" + wide.tobytes() + bytes(11) + bits.tobytes()
    path = write_safetensors(tmp_path / "x.safetensors", {"__metadata__": {"format": "pt"}} | header, data)
    file = SafetensorsFile(path)
    assert list(file.tensors) == ["mask", "a", "none", "ids", "small", "b"], "in the order of their bytes"
    a, b = file.tensors["a"], file.tensors["b"]
    assert (a.dtype, a.shape, a.size) == ("F32", (2, 3), 6)
    np.testing.assert_array_equal(a.read(2, 5), wide[2:5])
    a.drop(0, 6)
    np.testing.assert_array_equal(a.read(0, 6), wide, "dropped pages can be read again")
    np.testing.assert_array_equal(b.read(1, 3), bits[1:3])
    assert not b.read(0, 4).flags.writeable


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_no_change_of_bytes_makes_the_reader_fail_in_another_way(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "x.safetensors"
    write_safetensors(path, {"a": entry(0, 8, [2]), "b": entry(8, 12, [2], "BF16")}, bytes(12))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        file = SafetensorsFile(path)
    except CheckpointError as error:
        assert str(error).startswith(f"{path} is not a sound safetensors file (")  # noqa: PT017 - it may be sound
        return
    for tensor in file.tensors.values():
        assert tensor.begin + tensor.nbytes <= path.stat().st_size
