"""Model files that would end the process, or never come back: a sentence at load; and files that change."""

import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from edge_phi3.gguf_file import GgufError, read_gguf
from edge_phi3.llama import ModelLoadError
from edge_phi3.llama.model_file import read_model_file
from edge_phi3.llama.options import ContextOptions
from edge_phi3.llama.proof import prove
from tests.support.cases import cases
from tests.support.engines import MakeModel
from tests.support.services import PATIENCE, serving, wait_for


def text(content: bytes) -> bytes:
    return struct.pack("<Q", len(content)) + content


def encoded(part: Any) -> bytes:
    """Return the bytes of a part of a header: of a magic, a text with its length, or numbers behind their format."""
    if isinstance(part, str):
        return part.encode("latin-1") if part == "GGUF" else text(part.encode("latin-1"))
    form, *numbers = part
    return struct.pack(f"<{form}", *numbers) if isinstance(form, str) else b"".join(map(encoded, part[1:])) * form


@cases
def test_a_header_is_read_within_bounds(parts: list[Any], sentence: str, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"".join(map(encoded, parts)))
    with pytest.raises(GgufError, match=sentence):
        read_gguf(tmp_path / "x.gguf")


def changed(content: bytes, key: str, value: Any) -> bytes:
    """Put a number in place of the one under a key, or a text in place of another."""
    if isinstance(value, str):
        return content.replace(key.encode(), value.encode(), 1)
    at = content.index(text(key.encode())) + 8 + len(key) + 4
    return content[:at] + struct.pack("<f" if isinstance(value, float) else "<I", value) + content[at + 4 :]


@cases
def test_a_model_that_makes_no_sense_is_refused_before_it_is_loaded(
    key: str, value: Any, sentence: str, make_model: MakeModel, tmp_path: Path
) -> None:
    content = make_model("4k").read_bytes()
    (tmp_path / "x.gguf").write_bytes(other := changed(content, key, value))
    assert other != content
    with pytest.raises(ModelLoadError, match=sentence):
        prove(read_model_file(tmp_path / "x.gguf"), [(64, 4)], ContextOptions(threads=1))


def cut(path: Path) -> None:
    os.truncate(path, 1 << 16)


def overwrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(1 << 16)
        file.write(bytes(99))


def replace(path: Path) -> None:
    shutil.copy(path, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


CHANGES: dict[str, Callable[[Path], None]] = {"cut": cut, "overwrite": overwrite, "replace": replace}


@cases
def test_a_model_that_changes_while_it_is_served(
    change: str, options: list[str], sentence: str, make_model: MakeModel, tmp_path: Path
) -> None:
    model = Path(shutil.copy(make_model("4k"), tmp_path / "x.gguf"))
    with serving(tmp_path, str(model), *options) as server:
        CHANGES[change](model)
        if not sentence:
            body = {"prompt": "a", "generate_kwargs": {"max_new_tokens": 1}}
            assert httpx.post(f"{server.url}/chat", json=body, timeout=PATIENCE).status_code == 200
            assert server.stop()[0] == 0
            return
        assert wait_for(lambda: server.process.poll() is not None)
        assert server.process.returncode == 1
        assert sentence in server.log.read_text()
