"""Importance matrices from Python: what is summed, chunks, merging and resuming, and answers to bad input."""

from __future__ import annotations

import importlib
import inspect
import random
from pathlib import Path

import gguf
import msgspec
import numpy as np
import pytest

from edge_phi3.bench.quant_worker import Job, measure
from edge_phi3.conversion.convert import convert
from edge_phi3.conversion.imatrix import CALIBRATION_NAME, calibration_text, collect_imatrix, make_imatrix
from edge_phi3.conversion.imatrix_file import (
    Imatrix,
    ImatrixEntry,
    ImatrixFileError,
    merge_imatrices,
    read_imatrix,
    write_imatrix,
)
from edge_phi3.conversion.quantize import quantize
from edge_phi3.demo import DEMO_CHECKPOINT
from edge_phi3.files import OutputExistsError
from edge_phi3.llama import ImatrixError, ModelLoadError
from edge_phi3.llama.model import Model
from tests.test_cli import edge_phi3

LAYERS, HIDDEN, FEED_FORWARD = 6, 256, 768
TEXT = calibration_text()[:3000]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model in F32: quick on any CPU."""
    path = tmp_path_factory.mktemp("demo") / "demo-f32.gguf"
    return convert(DEMO_CHECKPOINT, path, outtype="f32").path


@pytest.fixture(scope="module")
def matrix(demo: Path) -> Imatrix:
    return collect_imatrix(demo, TEXT, ctx_size=64, chunks=4)


def assert_equal(left: Imatrix, right: Imatrix) -> None:
    assert left.entries.keys() == right.entries.keys()
    for name, entry in left.entries.items():
        np.testing.assert_array_equal(entry.counts, right.entries[name].counts)
        np.testing.assert_allclose(entry.sums, right.entries[name].sums, rtol=1e-5)


def test_every_matrix_of_every_layer_has_its_columns_and_all_tokens(matrix: Imatrix) -> None:
    columns = {"attn_qkv": HIDDEN, "attn_output": HIDDEN, "ffn_up": HIDDEN, "ffn_down": FEED_FORWARD}
    names = {f"blk.{layer}.{kind}.weight": size for layer in range(LAYERS) for kind, size in columns.items()}
    assert {name: entry.sums.shape for name, entry in matrix.entries.items()} == {
        name: (1, size) for name, size in names.items()
    }
    assert all(entry.counts == [4 * 64] for entry in matrix.entries.values())
    assert all((entry.sums >= 0).all() and entry.sums.max() > 0 for entry in matrix.entries.values())
    assert (matrix.chunk_count, matrix.chunk_size, matrix.datasets) == (4, 64, [CALIBRATION_NAME])


def test_the_sums_are_those_of_the_first_layers_normalised_embeddings(demo: Path) -> None:
    """The first matrix sees RMS norm of the embeddings: computed here from the file itself, in float64."""
    seen = collect_imatrix(demo, TEXT, ctx_size=64, chunks=2, parse_special=False)
    tensors = {tensor.name: np.array(tensor.data, np.float64) for tensor in gguf.GGUFReader(demo).tensors}
    model = Model(demo)
    tokens = model.tokenize(TEXT)[:128]
    model.close()
    rows = tensors["token_embd.weight"][tokens]
    rows /= np.sqrt((rows**2).mean(axis=1, keepdims=True) + 1e-5)
    rows *= tensors["blk.0.attn_norm.weight"]
    np.testing.assert_allclose(seen.entries["blk.0.attn_qkv.weight"].sums[0], (rows**2).sum(axis=0), rtol=1e-4)


def test_special_tokens_are_tokens_only_when_asked_for(demo: Path) -> None:
    chunks = [
        collect_imatrix(demo, TEXT, ctx_size=64, parse_special=parse_special).chunk_count
        for parse_special in (True, False)
    ]
    assert chunks[0] < chunks[1]


def test_a_collection_goes_on_from_another(demo: Path, matrix: Imatrix, tmp_path: Path) -> None:
    whole = make_imatrix(demo, tmp_path / "m.gguf", ctx_size=64, chunks=4, save_every=2, parse_special=True)
    part = read_imatrix(tmp_path / "m-at-2.gguf")
    assert part.chunk_count == 2
    resumed = collect_imatrix(demo, calibration_text(), ctx_size=64, chunks=2, from_chunk=2, earlier=[part])
    assert_equal(resumed, whole)
    assert_equal(whole, matrix)
    assert resumed.chunk_count == 4
    assert resumed.datasets == [CALIBRATION_NAME, CALIBRATION_NAME]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m-at-2.gguf", "m-at-4.gguf", "m.gguf"]


def test_older_files_count_chunks_and_merge_as_tokens() -> None:
    new = Imatrix({"w": ImatrixEntry(np.full((1, 2), 640, np.float32), np.array([64], np.float32))}, ["a"], 1, 64)
    old = Imatrix({"w": ImatrixEntry(np.full((1, 2), 30, np.float32), np.array([3], np.float32))}, ["b"], 3)
    merged = merge_imatrices([new, old], 64)
    np.testing.assert_array_equal(merged.entries["w"].sums, [[640 + 30 * 64] * 2])
    assert (merged.entries["w"].counts.tolist(), merged.chunk_count, merged.datasets) == ([256], 4, ["a", "b"])
    np.testing.assert_allclose(merged.importance()["w"], 10)


def test_matrices_of_different_models_do_not_merge(demo: Path) -> None:
    other = Imatrix({"blk.0.attn_qkv.weight": ImatrixEntry(np.ones((1, 8), np.float32), np.ones(1, np.float32))})
    with pytest.raises(ImatrixFileError, match="8 columns in one and 256 in another"):
        collect_imatrix(demo, TEXT, ctx_size=64, chunks=1, earlier=[other])


def test_an_interruption_leaves_nothing_and_the_next_collection_works(demo: Path, tmp_path: Path) -> None:
    def interrupt(done: int, _total: int, _detail: str) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_imatrix(demo, tmp_path / "m.gguf", ctx_size=64, chunks=3, progress=interrupt)
    assert not list(tmp_path.iterdir())
    assert make_imatrix(demo, tmp_path / "m.gguf", ctx_size=64, chunks=1).chunk_count == 1
    with pytest.raises(OutputExistsError, match="--force"):
        make_imatrix(demo, tmp_path / "m.gguf", ctx_size=64, chunks=1)


def test_bad_input_is_a_sentence(demo: Path, tmp_path: Path) -> None:
    with pytest.raises(ImatrixError, match=r"The text has \d+ tokens, and 1 chunks of 4096 are needed"):
        collect_imatrix(demo, TEXT, ctx_size=4096)
    with pytest.raises(ModelLoadError, match="There is no model file"):
        collect_imatrix(tmp_path / "absent.gguf", TEXT)
    (tmp_path / "cut.gguf").write_bytes(demo.read_bytes()[:100_000])
    with pytest.raises(ModelLoadError, match=r"llama\.cpp cannot load"):
        collect_imatrix(tmp_path / "cut.gguf", TEXT)
    (tmp_path / "latin1.txt").write_bytes("Käse ".encode("latin-1") * 100)
    with pytest.raises(ImatrixError, match="is not UTF-8"):
        make_imatrix(demo, tmp_path / "m.gguf", text=tmp_path / "latin1.txt")
    with pytest.raises(ImatrixError, match="cannot be read: No such file"):
        make_imatrix(demo, tmp_path / "m.gguf", text=tmp_path / "absent.txt")


def test_the_command_prints_the_path_and_its_file_quantises(demo: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    output = tmp_path / "m.gguf"
    arguments = ("-f", str(tmp_path / "text.txt"), "-o", str(output), "--ctx-size", "64", "--chunks", "2")
    finished = edge_phi3("imatrix", str(demo), *arguments)
    assert (finished.returncode, finished.stdout) == (0, f"{output}\n"), finished.stderr
    assert "24 matrices, 2 chunks of 64 tokens" in finished.stderr
    assert quantize(demo, tmp_path / "small.gguf", type="IQ2_XS", imatrix=output).bits_per_weight < 4


DOCUMENTED = ("json", "shutil", "random", "math", "textwrap", "statistics", "heapq", "shlex", "operator", "calendar")


def _questions() -> list[str]:
    """Ask for docstrings of the standard library, as the demo model was trained to answer."""
    texts = []
    for module_name in DOCUMENTED:
        for name, thing in sorted(vars(importlib.import_module(module_name)).items()):
            lines = (inspect.getdoc(thing) or "").split("\n\n")[0].split() if callable(thing) else []
            answer = " ".join(lines)
            if not name.startswith("_") and 20 < len(answer) <= 240 and answer.endswith("."):
                question = f"<|user|>\nWhat does {module_name}.{name} do?<|end|>\n<|assistant|>\n"
                texts.append(f"{question}{answer}<|end|>")
    random.Random(0).shuffle(texts)
    return texts


def test_below_3_bits_the_matrix_lowers_the_perplexity_of_texts_it_has_not_seen(demo: Path, tmp_path: Path) -> None:
    texts = _questions()
    held_out, calibration = "\n".join(texts[:30]), "\n".join(texts[30:])
    write_imatrix(tmp_path / "m.gguf", collect_imatrix(demo, calibration, ctx_size=128, chunks=16))
    plain = quantize(demo, tmp_path / "plain.gguf", type="Q2_K", pure=True)
    guided = quantize(demo, tmp_path / "guided.gguf", type="Q2_K", pure=True, imatrix=tmp_path / "m.gguf")
    assert plain.bits_per_weight == guided.bits_per_weight < 3
    job = Job(model=str(demo), text=held_out, logits=str(tmp_path / "logits"), reference=True, ctx_size=128)
    others = [msgspec.structs.replace(job, model=str(made.path), reference=False) for made in (guided, plain)]
    original, with_matrix, without = (measure(one).quality.perplexity for one in (job, *others))
    assert original < with_matrix < without
