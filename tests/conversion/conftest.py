"""One small checkpoint and one small model for all tests of a session, and ways to change copies of them."""

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import pytest
from hypothesis import strategies as st

from edge_phi3.conversion.convert import convert
from tests.golden.checkpoints import write_checkpoint

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=3) | st.sampled_from(["id", "content", "type", "7"]), inner, max_size=3)
    ),
    max_leaves=8,
)
"""Anything that a JSON file may hold."""


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of one layer in two shards, with fewer key heads than heads. Not to be changed."""
    shape: dict[str, Any] = {"layers": 1, "dtype": "bfloat16", "shards": 2, "kv_heads": 2}
    return write_checkpoint(tmp_path_factory.mktemp("pristine") / "phi-3-tiny", **shape)


@pytest.fixture
def checkpoint(pristine: Path, tmp_path: Path) -> Path:
    """A copy of `pristine` that a test may change."""
    return Path(shutil.copytree(pristine, tmp_path / pristine.name))


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random F16 model that is quantised. Not to be changed."""
    return write_model(tmp_path_factory.mktemp("source") / "model-f16.gguf")


def write_model(path: Path, **shape: Any) -> Path:
    """Write a random F16 model, of a shape as `write_checkpoint` takes it, whose rows fill blocks of k-quants."""
    checkpoint = write_checkpoint(path.with_suffix(""), **{"hidden_size": 256, "intermediate_size": 512, **shape})
    convert(checkpoint, path, outtype="f16")
    shutil.rmtree(checkpoint)
    return path


def edit(path: Path, **entries: Any) -> None:
    """Change entries of a JSON file; a value of `...` removes the entry."""
    content = json.loads(path.read_text(encoding="utf-8")) | entries
    kept = {name: value for name, value in content.items() if value is not ...}
    path.write_text(json.dumps(kept), encoding="utf-8")


@contextlib.contextmanager
def edited_weights(path: Path) -> Iterator[tuple[dict[str, Any], bytearray]]:
    """Yield the header and the data of a safetensors file, and write what the block made of them."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), bytearray(content[8 + length :])
    yield header, data
    encoded = json.dumps(header).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data)


def fields_of(path: Path) -> dict[str, Any]:
    """Return the metadata of a GGUF."""
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def tensors_of(path: Path) -> dict[str, gguf.ReaderTensor]:
    """Return the tensors of a GGUF by name."""
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
