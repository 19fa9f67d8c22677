"""What the quantiser refuses, with a sentence for a person, and that nothing is left of it."""

from __future__ import annotations

import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest

from edge_phi3.conversion.quantization_types import UnknownQuantizationError
from edge_phi3.conversion.quantize import QuantizeError, quantize
from edge_phi3.files import DiskFullError, OutputExistsError
from tests.conversion.random_gguf import write_random


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
    assert gguf.GGUFReader(output).tensors


UNKNOWN = [
    ({"type": "Q4"}, r"'Q4' is not a quantisation type; close to it are"),
    (
        {"tensor_types": {"ffn_down": "q8"}},
        r"--tensor-type ffn_down: 'q8' is not .*; close to it are.*q8_0",
    ),
    ({"output_tensor_type": "q8_1"}, r"--output-tensor-type: 'q8_1' is not"),
    ({"token_embedding_type": "i32"}, r"--token-embedding-type: 'i32' is not"),
]
UNFIT = [
    ({"type": "IQ2_XS"}, r"IQ2_XS needs an importance matrix.*--imatrix.* such as Q2_K\."),
    (
        {"tensor_types": {"ffn_gate": "q8_0"}},
        r"matches 'ffn_gate'; its tensors are attn_norm.*ffn_up\.weight",
    ),
    ({"tensor_types": {"attn_norm": "q8_0"}}, r"llama\.cpp never quantises blk\.0\.attn_norm\.weight"),
    ({"tensor_types": {"ffn_(": "q8_0"}}, r"'ffn_\(' is not a regular expression"),
    ({"type": "F16", "tensor_types": {"ffn_down": "q8_0"}}, r"--tensor-type has no effect with --type F16"),
    ({"token_embedding_type": "iq2_xxs"}, r"token_embd\.weight cannot become iq2_xxs without an importance matrix"),
]


@pytest.mark.parametrize(
    ("error", "options", "words"),
    [(UnknownQuantizationError, *case) for case in UNKNOWN] + [(QuantizeError, *case) for case in UNFIT],
)
def test_what_cannot_be_made_is_refused_in_a_sentence(
    source: Path, tmp_path: Path, error: type[Exception], options: dict, words: str
) -> None:
    with pytest.raises(error, match=words):
        quantize(source, tmp_path / "out.gguf", **({"type": "Q4_K_M"} | options))
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


def test_too_little_free_space_is_told_before_the_work_begins(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(DiskFullError, match=r"out\.gguf will take about \d\.\d MB, .* has 1\.0 kB left"):
        quantize(source, tmp_path / "out.gguf", type="Q8_0")
    assert list(tmp_path.iterdir()) == []
