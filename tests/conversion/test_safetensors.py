"""The safetensors reader believes nothing that the file does not bear out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_phi3.conversion.errors import CheckpointError
from edge_phi3.conversion.safetensors import MAX_HEADER_BYTES, SafetensorsFile

Header = dict[str, Any]


def write(path: Path, header: Header | bytes, data: bytes = b"", *, length: int | None = None) -> Path:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(encoded) if length is None else length).to_bytes(8, "little") + encoded + data)
    return path


def entry(begin: int, end: int, shape: list[Any], dtype: str = "F32") -> Header:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_tensors_are_read_as_they_lie_in_the_file(tmp_path: Path) -> None:
    wide = np.arange(6, dtype="<f4")
    bits = np.arange(100, 104, dtype="<u2")
    header = {"__metadata__": {"format": "pt"}, "b": entry(24, 32, [4], "BF16"), "a": entry(0, 24, [2, 3])}
    file = SafetensorsFile(write(tmp_path / "x.safetensors", header, wide.tobytes() + bits.tobytes()))
    assert list(file.tensors) == ["a", "b"], "in the order of their bytes"
    a, b = file.tensors["a"], file.tensors["b"]
    assert (a.dtype, a.shape, a.size) == ("F32", (2, 3), 6)
    np.testing.assert_array_equal(a.read(0, 6), wide)
    np.testing.assert_array_equal(a.read(2, 5), wide[2:5])
    a.drop(0, 6)
    np.testing.assert_array_equal(a.read(0, 6), wide, "dropped pages can be read again")
    np.testing.assert_array_equal(b.read(1, 3), bits[1:3])
    assert not b.read(0, 4).flags.writeable


def test_a_header_of_an_odd_length_moves_the_data_off_alignment(tmp_path: Path) -> None:
    values = np.arange(3, dtype="<f4")
    encoded = json.dumps({"a": entry(0, 12, [3])}).encode()
    encoded += b" " * (1 - len(encoded) % 2)
    file = SafetensorsFile(write(tmp_path / "x.safetensors", encoded, values.tobytes()))
    np.testing.assert_array_equal(file.tensors["a"].read(0, 3), values)


@pytest.mark.parametrize(
    ("header", "data", "length", "sentence"),
    [
        ({}, b"", 1 << 40, "its header should be 1,099,511,627,776 bytes long, but the whole file has 10"),
        ({}, b"", 0, "a header of 0 bytes is impossible"),
        (b"", b"", 2, "its header should be 2 bytes long, but the whole file has 8"),
        (b"{nonsense", b"", None, "its header is not valid JSON"),
        (b"[" * 5000, b"", None, "its header is not valid JSON"),
        (b"\xff\xfe{}", b"", None, "its header is not valid JSON"),
        (b"[]", b"", None, "its header is not a JSON object"),
        (b'{"a": 1, "a": 2}', b"", None, "a name occurs twice"),
        ({"a": 3}, b"", None, "the entry of a lacks its dtype, shape or data_offsets"),
        ({"a": {"dtype": "F32", "shape": [1]}}, b"1234", None, "the entry of a lacks"),
        ({"a": entry(0, 4, [1], "F31")}, b"1234", None, "a has the unknown dtype 'F31'"),
        ({"a": entry(0, 4, [-1, -1])}, b"1234", None, r"a has the impossible shape \[-1, -1\]"),
        ({"a": entry(0, 4, [1.0])}, b"1234", None, r"a has the impossible shape \[1.0\]"),
        ({"a": entry(4, 0, [1])}, b"1234", None, "a has the impossible offsets 4 to 0"),
        ({"a": entry(-4, 0, [1])}, b"1234", None, "a has the impossible offsets -4 to 0"),
        ({"a": entry(0, 4, [2])}, b"1234", None, r"a takes 4 bytes, but F32 values of shape \[2\] take 8"),
        ({"a": entry(0, 4, [2**62, 2**62])}, b"1234", None, "a takes 4 bytes, but F32"),
        ({"a": entry(0, 8, [2]), "b": entry(4, 8, [1])}, bytes(8), None, "the bytes of a and b overlap"),
        ({"a": entry(0, 4, [1]), "b": entry(0, 4, [1])}, bytes(4), None, "the bytes of a and b overlap"),
        ({"a": entry(0, 4, [1]), "b": entry(8, 12, [1])}, bytes(12), None, "a and b leave a gap between them"),
        ({"a": entry(4, 8, [1])}, bytes(8), None, "its first tensor, a, does not begin where the header ends"),
        ({"a": entry(0, 8, [2])}, bytes(5), None, "it is truncated"),
        ({"a": entry(0, 4, [1])}, bytes(9), None, "5 bytes at its end belong to no tensor"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_refused_in_a_sentence(
    header: Header | bytes, data: bytes, length: int | None, sentence: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "x.safetensors", header, data, length=length)
    with pytest.raises(CheckpointError, match=sentence) as caught:
        SafetensorsFile(path)
    assert str(caught.value).startswith(f"{path} is not a sound safetensors file: ")


def test_a_header_longer_than_any_model_needs_is_not_even_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write((MAX_HEADER_BYTES + 1).to_bytes(8, "little"))
        file.truncate(MAX_HEADER_BYTES + 100)
    with pytest.raises(CheckpointError, match="a header of 100,000,001 bytes is impossible"):
        SafetensorsFile(path)


def test_a_file_that_is_not_there_or_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"absent.safetensors cannot be read: No such file"):
        SafetensorsFile(tmp_path / "absent.safetensors")
    with pytest.raises(CheckpointError, match="cannot be read: Is a directory"):
        SafetensorsFile(tmp_path)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_no_change_of_bytes_makes_the_reader_fail_in_another_way(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    header = {"a": entry(0, 8, [2]), "b": entry(8, 12, [2], "BF16")}
    path = write(tmp_path_factory.mktemp("fuzz") / "x.safetensors", header, bytes(12))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        file = SafetensorsFile(path)
    except CheckpointError:
        return
    for tensor in file.tensors.values():
        assert len(tensor.read(0, tensor.size)) == tensor.size
