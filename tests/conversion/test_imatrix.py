"""Importance matrices: what is summed, merged and resumed, both file formats, quantising with one, and bad input."""

import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from edge_phi3.bench.quant_worker import Job, measure
from edge_phi3.conversion.imatrix import CALIBRATION_NAME, calibration_text, collect_imatrix, make_imatrix
from edge_phi3.conversion.imatrix_file import (
    Imatrix,
    ImatrixEntry,
    ImatrixFileError,
    merge_imatrices,
    read_imatrix,
    write_imatrix,
)
from edge_phi3.conversion.quantization_types import QUANTIZATION_TYPES
from edge_phi3.conversion.quantize import QuantizeError, predict_size, quantize
from edge_phi3.files import OutputExistsError
from edge_phi3.llama import ImatrixError, ModelLoadError
from edge_phi3.llama.model import Model, tokenize
from scripts.demo_model.corpus import read_corpus
from tests.conversion.conftest import fields_of, tensors_of
from tests.support.cases import cases
from tests.test_cli import edge_phi3

TEXT = calibration_text()[:3000]


@pytest.fixture(scope="module")
def demo(model_file: Callable[[str, str], Path]) -> Path:
    """The demo model in F32: quick on any CPU."""
    return model_file("demo", "F32")


@pytest.fixture(scope="module")
def matrix(demo: Path) -> Imatrix:
    return collect_imatrix(demo, TEXT, ctx_size=64, chunks=4)


def test_every_matrix_of_every_layer_has_its_columns_and_all_tokens(matrix: Imatrix) -> None:
    columns = {"attn_qkv": 256, "attn_output": 256, "ffn_up": 256, "ffn_down": 768}
    shapes = {f"blk.{layer}.{kind}.weight": (1, size) for layer in range(6) for kind, size in columns.items()}
    assert {name: entry.sums.shape for name, entry in matrix.entries.items()} == shapes
    assert all(entry.counts == [4 * 64] for entry in matrix.entries.values())
    assert all((entry.sums >= 0).all() and entry.sums.max() > 0 for entry in matrix.entries.values())
    assert (matrix.chunk_count, matrix.chunk_size, matrix.datasets) == (4, 64, [CALIBRATION_NAME])


def test_the_sums_are_those_of_the_first_layers_normalised_embeddings(demo: Path) -> None:
    """The first matrix sees RMS norm of the embeddings: computed here from the file itself, in float64."""
    seen = collect_imatrix(demo, TEXT, ctx_size=64, chunks=2, parse_special=False)
    tensors = tensors_of(demo)
    model = Model(demo)
    rows = tensors["token_embd.weight"].data[tokenize(model._vocab, TEXT)[:128]].astype(np.float64)
    model.close()
    rows /= np.sqrt((rows**2).mean(axis=1, keepdims=True) + 1e-5)
    rows *= tensors["blk.0.attn_norm.weight"].data
    np.testing.assert_allclose(seen.entries["blk.0.attn_qkv.weight"].sums[0], (rows**2).sum(axis=0), rtol=1e-4)
    # Special tokens are tokens only when asked for.
    read, unread = (collect_imatrix(demo, TEXT[:1000], ctx_size=64, parse_special=parse) for parse in (True, False))
    assert read.chunk_count < unread.chunk_count


def test_a_collection_goes_on_from_another(demo: Path, matrix: Imatrix, tmp_path: Path) -> None:
    whole = make_imatrix(demo, tmp_path / "m.gguf", ctx_size=64, chunks=4, save_every=2, parse_special=True)
    part = read_imatrix(tmp_path / "m-at-2.gguf")
    assert part.chunk_count == 2
    resumed = collect_imatrix(demo, calibration_text(), ctx_size=64, chunks=2, from_chunk=2, earlier=[part])
    for other in (resumed, matrix):
        assert other.entries.keys() == whole.entries.keys()
        for name, entry in whole.entries.items():
            np.testing.assert_array_equal(other.entries[name].counts, entry.counts)
            np.testing.assert_allclose(other.entries[name].sums, entry.sums, rtol=1e-5)
    assert (resumed.chunk_count, resumed.datasets) == (4, [CALIBRATION_NAME, CALIBRATION_NAME])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m-at-2.gguf", "m-at-4.gguf", "m.gguf"]


def test_older_files_count_chunks_and_merge_as_tokens_and_those_of_other_models_do_not() -> None:
    def entry(value: float, calls: int, columns: int = 2) -> ImatrixEntry:
        return ImatrixEntry(np.full((1, columns), value, np.float32), np.array([calls], np.float32))

    new, old = Imatrix({"w": entry(640, 64)}, ["a"], 1, 64), Imatrix({"w": entry(30, 3)}, ["b"], 3)
    merged = merge_imatrices([new, old], 64)
    np.testing.assert_array_equal(merged.entries["w"].sums, [[640 + 30 * 64] * 2])
    assert (merged.entries["w"].counts.tolist(), merged.chunk_count, merged.datasets) == ([256], 4, ["a", "b"])
    np.testing.assert_allclose(merged.importance()["w"], 10)
    with pytest.raises(ImatrixFileError, match="8 columns in one and 2 in another"):
        merge_imatrices([Imatrix({"w": entry(1, 1, columns=8)}), new], 64)


def test_an_interruption_leaves_nothing_and_the_next_collection_works(demo: Path, tmp_path: Path) -> None:
    def interrupt(done: int, _total: int, _detail: str) -> None:
        if done:
            raise KeyboardInterrupt

    options: dict[str, Any] = {"ctx_size": 64, "chunks": 2}
    with pytest.raises(KeyboardInterrupt):
        make_imatrix(demo, tmp_path / "m.gguf", progress=interrupt, **options)
    assert not list(tmp_path.iterdir())
    assert make_imatrix(demo, tmp_path / "m.gguf", **options).chunk_count == 2
    with pytest.raises(OutputExistsError, match="--force"):
        make_imatrix(demo, tmp_path / "m.gguf", **options)


def test_bad_input_is_a_sentence(demo: Path, tmp_path: Path) -> None:
    cut, latin1, lacking = tmp_path / "cut.gguf", tmp_path / "latin1.txt", tmp_path / "lacking.gguf"
    cut.write_bytes(demo.read_bytes()[:100_000])
    lacking.write_bytes(demo.read_bytes().replace(b"<0x90>", b"<0x9O>", 1))
    latin1.write_bytes("Käse ".encode("latin-1") * 100)
    cases: list[tuple[Path, dict[str, Any], type[Exception], str]] = [
        (demo, {"ctx_size": 1 << 20}, ImatrixError, r"The text has \d+ tokens, and 1 chunks of 1048576 are needed"),
        (tmp_path / "absent.gguf", {}, ModelLoadError, "There is no model file"),
        (cut, {}, ModelLoadError, r"llama\.cpp cannot load"),
        (lacking, {}, ImatrixError, "its vocabulary lacks <0x90>"),
        (demo, {"text": latin1}, ImatrixError, "is not UTF-8"),
        (demo, {"text": tmp_path / "absent.txt"}, ImatrixError, "cannot be read: No such file"),
    ]
    for model, options, error, words in cases:
        with pytest.raises(error, match=words):
            make_imatrix(model, tmp_path / "m.gguf", **options)


def test_the_command_prints_the_path_and_its_file_quantises(demo: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    output = tmp_path / "m.gguf"
    arguments = ("-f", str(tmp_path / "text.txt"), "-o", str(output), "--ctx-size", "64", "--chunks", "2")
    finished = edge_phi3("imatrix", str(demo), *arguments)
    assert (finished.returncode, finished.stdout) == (0, f"{output}\n"), finished.stderr
    assert "24 matrices, 2 chunks of 64 tokens" in finished.stderr
    assert quantize(demo, tmp_path / "small.gguf", type="Q2_K_S", imatrix=output).bits_per_weight < 4


def test_below_3_bits_the_matrix_lowers_the_perplexity_of_texts_it_has_not_seen(demo: Path, tmp_path: Path) -> None:
    # Docstrings, as the demo model was trained to answer.
    asked = "<|user|>\nWhat does {0.name} do?<|end|>\n<|assistant|>\n{0.answer}<|end|>"
    known = [item for item in read_corpus() if item.emphasised]
    texts = [asked.format(item) for item in random.Random(0).sample(known, 300)]
    held_out, calibration = "\n".join(texts[:30]), "\n".join(texts[30:])
    write_imatrix(tmp_path / "m.gguf", collect_imatrix(demo, calibration, ctx_size=128, chunks=16))
    plain = quantize(demo, tmp_path / "plain.gguf", type="Q2_K", pure=True)
    guided = quantize(demo, tmp_path / "guided.gguf", type="Q2_K", pure=True, imatrix=tmp_path / "m.gguf")
    assert plain.bits_per_weight == guided.bits_per_weight < 3
    job = Job(model=demo, text=held_out, logits=tmp_path / "logits", reference=True, ctx_size=128)
    others = [msgspec.structs.replace(job, model=made.path, reference=False) for made in (guided, plain)]
    original, with_matrix, without = (measure(one).quality.perplexity for one in (job, *others))
    assert original < with_matrix < without


CALLS = 7
UP = "blk.0.ffn_up.weight"
Sums = dict[str, np.ndarray]


@pytest.fixture
def sums(source: Path) -> Sums:
    """Sums of squares, far from uniform, for each matrix that llama.cpp collects them for."""
    random = np.random.default_rng(0)
    return {
        tensor.name: random.gamma(0.3, size=tensor.shape[0]).astype(np.float32) * CALLS
        for tensor in tensors_of(source).values()
        if len(tensor.shape) == 2 and tensor.name.startswith("blk.")
    }


def write_gguf(path: Path, sums: Sums) -> Path:
    counts = np.array([CALLS], dtype=np.float32)
    entries = {name: ImatrixEntry(values.reshape(1, -1), counts) for name, values in sums.items()}
    write_imatrix(path, Imatrix(entries, ["calibration.txt"], 3, 512))
    return path


def write_legacy(path: Path, sums: Sums) -> Path:
    content = struct.pack("<i", len(sums))
    for name, values in sums.items():
        content += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", CALLS, values.size)
        content += values.tobytes()
    dataset = b"calibration.txt"
    path.write_bytes(content + struct.pack("<ii", 3, len(dataset)) + dataset)
    return path


@cases
def test_types_that_need_a_matrix_are_made_and_name_it(source: Path, tmp_path: Path, sums: Sums, name: str) -> None:
    assert QUANTIZATION_TYPES[name].needs_imatrix
    imatrix = write_legacy(tmp_path / "imatrix.dat", sums)
    result = quantize(source, tmp_path / "out.gguf", type=name, imatrix=imatrix)
    assert predict_size(source, type=name, imatrix=imatrix).bytes == pytest.approx(result.bytes, rel=0.01)
    recorded = {key: value for key, value in fields_of(result.path).items() if key.startswith("quantize.imatrix.")}
    assert list(recorded.values()) == ["imatrix.dat", "calibration.txt", len(sums), 3]


@pytest.mark.parametrize("write", [write_gguf, write_legacy])
def test_what_was_written_is_read(tmp_path: Path, sums: Sums, write: Callable[[Path, Sums], Path]) -> None:
    matrix = read_imatrix(write(tmp_path / "imatrix", sums))
    assert matrix.entries.keys() == sums.keys()
    for name, values in sums.items():
        np.testing.assert_array_equal(matrix.entries[name].sums, values.reshape(1, -1))
        assert matrix.entries[name].counts == [CALLS]
    assert (matrix.datasets, matrix.chunk_count) == (["calibration.txt"], 3)
    unseen = ImatrixEntry(np.array([[2, 4], [9, 9]], dtype=np.float32), np.array([2, 0], dtype=np.float32))
    np.testing.assert_array_equal(Imatrix({"ffn": unseen}).importance()["ffn"], [1, 2, 1, 1])


def test_a_matrix_of_another_model_and_one_that_lacks_what_is_needed_are_refused(
    source: Path, tmp_path: Path, sums: Sums
) -> None:
    output, lacking = tmp_path / "out.gguf", {name: values for name, values in sums.items() if name != UP}
    for kind, given, words in (
        ("Q4_K_M", sums | {UP: np.ones(512, np.float32)}, "model: it has 512 values for .*, which has 256 columns"),
        ("Q4_K_M", {"model.layers.0": np.ones(256, np.float32)}, "names no tensor of this model"),
        ("IQ2_XS", lacking, rf"{UP} cannot become iq2_xs without a row in"),
        # llama.cpp itself notices this one, while it works.
        ("Q2_K_S", lacking, rf"importance matrix has nothing for {UP}"),
    ):
        imatrix = write_legacy(tmp_path / "imatrix.dat", given)
        with pytest.raises(QuantizeError, match=words):
            quantize(source, output, type=kind, imatrix=imatrix)
        assert not output.exists()
    quantize(source, output, type="Q4_K_M", imatrix=imatrix)


@cases
def test_a_bad_matrix_is_refused_in_a_sentence(source: Path, tmp_path: Path, sums: Sums, kind: str, words: str) -> None:
    if kind == "nan":
        sums[UP][4] = np.nan
    new, old = (write(tmp_path / write.__name__, sums).read_bytes() for write in (write_gguf, write_legacy))
    contents = {"empty": b"", "cut-legacy": old[:-1200], "cut-gguf-header": new[:60], "cut-gguf-data": new[:-300]}
    contents |= {"no-sums": new.replace(b".in_sum2", b".in_sumX"), "nan": new}
    contents["wrong-type"] = new.replace(b"\0imatrix", b"\0adapter", 1)
    path = tmp_path / "imatrix.file"
    if kind in contents:
        path.write_bytes(contents[kind])
    with pytest.raises(ImatrixFileError, match=words):
        quantize(source, tmp_path / "out.gguf", type="Q4_K_M", imatrix=path)
    assert not (tmp_path / "out.gguf").exists()
