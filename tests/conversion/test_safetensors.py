"""The safetensors reader gives the bytes as they lie in the file, and refuses files that are not sound."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_phi3.conversion.errors import CheckpointError
from edge_phi3.conversion.safetensors import SafetensorsFile

Header = dict[str, Any]


def write(path: Path, header: Header | bytes, data: bytes = b"", *, length: int | None = None) -> Path:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(encoded) if length is None else length).to_bytes(8, "little") + encoded + data)
    return path


def entry(begin: int, end: int, shape: list[Any], dtype: str = "F32") -> Header:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_tensors_are_read_as_they_lie_in_the_file(tmp_path: Path) -> None:
    wide, bits = np.arange(6, dtype="<f4"), np.arange(100, 104, dtype="<u2")
    # Values of other sizes lie between; a header of odd length moves all of them off alignment.
    header = {"b": entry(36, 44, [4], "BF16"), "a": entry(1, 25, [2, 3]), "mask": entry(0, 1, [1], "BOOL")}
    header |= {"ids": entry(25, 33, [1], "I64"), "small": entry(33, 36, [3, 1], "F8_E4M3"), "none": entry(25, 25, [0])}
    encoded = json.dumps({"__metadata__": {"format": "pt"}} | header).encode()
    encoded += b" " * (1 - len(encoded) % 2)
    data = b"\1" + wide.tobytes() + bytes(11) + bits.tobytes()
    file = SafetensorsFile(write(tmp_path / "x.safetensors", encoded, data))
    assert list(file.tensors) == ["mask", "a", "none", "ids", "small", "b"], "in the order of their bytes"
    a, b = file.tensors["a"], file.tensors["b"]
    assert (a.dtype, a.shape, a.size) == ("F32", (2, 3), 6)
    np.testing.assert_array_equal(a.read(0, 6), wide)
    np.testing.assert_array_equal(a.read(2, 5), wide[2:5])
    a.drop(0, 6)
    np.testing.assert_array_equal(a.read(0, 6), wide, "dropped pages can be read again")
    np.testing.assert_array_equal(b.read(1, 3), bits[1:3])
    assert not b.read(0, 4).flags.writeable


@pytest.mark.parametrize(
    ("header", "data", "length"),
    [
        ({}, b"", 1 << 40),
        (b"{nonsense", b"", None),
        (b"[" * 5000, b"", None),
        ({"a": entry(0, 4, [1], "F31")}, b"1234", None),
        ({"a": entry(0, 4, [-1, -1])}, b"1234", None),
        ({"a": entry(4, 0, [1])}, b"1234", None),
        ({"a": entry(0, 4, [2**62, 2**62])}, b"1234", None),
        ({"a": entry(0, 8, [2]), "b": entry(4, 8, [1])}, bytes(8), None),
        ({"a": entry(0, 4, [1]), "b": entry(8, 12, [1])}, bytes(12), None),
        ({"a": entry(0, 8, [2])}, bytes(5), None),
        ({"a": entry(0, 4, [1])}, bytes(9), None),
    ],
)
def test_a_damaged_file_is_refused_in_a_sentence(
    header: Header | bytes, data: bytes, length: int | None, tmp_path: Path
) -> None:
    path = write(tmp_path / "x.safetensors", header, data, length=length)
    with pytest.raises(CheckpointError) as caught:
        SafetensorsFile(path)
    assert str(caught.value).startswith(f"{path} is not a sound safetensors file (")
    assert str(caught.value).endswith("). Download it again.")


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
        assert tensor.begin + tensor.nbytes <= path.stat().st_size
