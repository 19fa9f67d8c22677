"""Model files that would end the process, or never come back: a sentence at load; and files that change."""

import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from edge_phi3.gguf_file import GgufError, read_gguf
from edge_phi3.llama import ModelLoadError
from edge_phi3.llama.model_file import read_model_file
from edge_phi3.llama.options import ContextOptions
from edge_phi3.llama.proof import prove
from tests.engine.conftest import MakeModel
from tests.support.services import PATIENCE, serving, wait_for


def text(content: bytes) -> bytes:
    return struct.pack("<Q", len(content)) + content


def header(*entries: bytes, keys: int | None = None, tensors: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, len(entries) if keys is None else keys) + b"".join(entries)


def entry(key: bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


NESTED = b"".join(struct.pack("<IQ", 9, 1) for _ in range(5000))
TENSOR = text(b"x") + struct.pack("<IQIQ", 1, 4, 0, 0)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "it is not a GGUF file"),
        (b"GGUF" * 2, "cut short"),
        (header(version=1), "its version is 1"),
        (header(keys=2**63), "claims to have 9223372036854775808 keys"),
        (header(keys=9), "cut short"),
        (header(entry(b"a", 9, struct.pack("<IQ", 8, 2**60))), "cut short"),
        (header(entry(b"a", 9, struct.pack("<IQ", 4, 2**60))), "cut short"),
        (header(entry(b"a", 9, NESTED)), "a is an array of type 9; only texts and numbers"),
        (header(entry(b"a", 8, struct.pack("<Q", 2**60))), "cut short"),
        (header(entry(b"\xff", 8, text(b""))), "is not UTF-8"),
        (header(entry(b"a", 99, b"")), "a value of type 99"),
        (header(entry(b"a", 6, struct.pack("<f", float("nan")))), "a is nan; it must be a finite number"),
        (header(*2 * [entry(b"a", 8, text(b""))]), "the key 'a' twice"),
        (header(entry(b"general.alignment", 4, struct.pack("<I", 1))), "general.alignment is 1; it must be"),
        (header(tensors=2) + 2 * TENSOR, "two tensors of one name"),
        (header(tensors=1) + text(b"x" * 64), "cut short"),
        (header(tensors=1) + text(b"x") + struct.pack("<IQQQQIQ", 4, *[2**40] * 4, 0, 0), "which no machine holds"),
        (header(tensors=1) + text(b"x") + struct.pack("<I", 2**31), "2147483648 dimensions"),
    ],
)  # fmt: skip
def test_a_header_is_read_within_bounds(content: bytes, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(GgufError, match=sentence):
        read_gguf(tmp_path / "x.gguf")


def number(key: bytes, value: float) -> Callable[[bytes], bytes]:
    """Return what puts a number into a model in place of the one under a key."""

    def change(content: bytes) -> bytes:
        at = content.index(text(key)) + 8 + len(key) + 4
        return content[:at] + struct.pack("<f" if isinstance(value, float) else "<I", value) + content[at + 4 :]

    return change


def words(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    return lambda content: content.replace(old, new, 1)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (number(b"phi3.block_count", 0), "block_count is 0, and must be a number from 1 to 512"),
        (number(b"phi3.block_count", 2**31), "block_count is 2147483648, and must"),
        (number(b"phi3.block_count", 1), "wrong number of tensors"),
        (number(b"phi3.attention.layer_norm_rms_epsilon", float("nan")), "epsilon is nan; it must be a finite number"),
        (number(b"phi3.attention.layer_norm_rms_epsilon", -1.0), r"epsilon is -1\.0, and must be"),
        *((number(b"phi3.rope.dimension_count", n), "rope.dimension_count is") for n in (0, 1, 3, 2**31)),
        *((number(b"phi3.context_length", n), "context_length is") for n in (1, 3)),
        (number(b"phi3.attention.sliding_window", 3), "sliding_window is below 8, but not 0"),
        (number(b"phi3.attention.head_count", 3), "attention heads cannot share"),
        (words(text(b"<0xF1>"), text(b"<0xF0>")), "has the token '<0xF0>' twice"),
        (words(b'[{"id"', b'{{"id"'), "added_tokens makes no sense"),
    ],
)  # fmt: skip
def test_a_model_that_makes_no_sense_is_refused_before_it_is_loaded(
    change: Callable[[bytes], bytes], sentence: str, make_model: MakeModel, tmp_path: Path
) -> None:
    content = make_model("4k").read_bytes()
    (tmp_path / "x.gguf").write_bytes(changed := change(content))
    assert changed != content
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


@pytest.mark.parametrize(
    ("change", "options", "sentence"),
    [
        (cut, [], "x.gguf was cut short to 65536 bytes while it was served"),
        (overwrite, [], "x.gguf was overwritten while it was served"),
        (replace, [], ""),
        (cut, ["--no-mmap"], ""),
    ],
)
def test_a_model_that_changes_while_it_is_served(
    change: Callable[[Path], None], options: list[str], sentence: str, make_model: MakeModel, tmp_path: Path
) -> None:
    model = Path(shutil.copy(make_model("4k"), tmp_path / "x.gguf"))
    with serving(tmp_path, str(model), *options) as server:
        change(model)
        if not sentence:
            body = {"prompt": "a", "generate_kwargs": {"max_new_tokens": 1}}
            assert httpx.post(f"{server.url}/chat", json=body, timeout=PATIENCE).status_code == 200
            assert server.stop()[0] == 0
            return
        assert wait_for(lambda: server.process.poll() is not None)
        assert server.process.returncode == 1
        assert sentence in server.log.read_text()
