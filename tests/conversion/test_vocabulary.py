"""The tokenizer files become the vocabulary that llama.cpp's converter makes of them, or are refused."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_phi3.conversion.convert import convert
from edge_phi3.conversion.errors import CheckpointError, ConversionError, UnsupportedModelError
from edge_phi3.conversion.sentencepiece import MAX_BYTES, ModelType, read_sentencepiece
from edge_phi3.conversion.vocabulary import ADDED_TOKENS_KEY, read_vocabulary
from tests.golden.vocabularies import Piece, Vocabulary, phi3_vocabulary, sentencepiece_model

ROWS = 672
TOKEN = {"id": 9, "content": "x"}
Edit = Callable[..., None]


def metadata(path: Path) -> dict[str, Any]:
    return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}


def test_the_added_tokens_are_kept_with_their_flags(pristine: Path, tmp_path: Path) -> None:
    convert(pristine, tmp_path / "out.gguf")
    assert json.loads(metadata(tmp_path / "out.gguf")[ADDED_TOKENS_KEY]) == [
        {"id": t.id, "content": t.text, "special": t.special, "lstrip": t.lstrip, "rstrip": t.rstrip}
        for t in phi3_vocabulary(merges=300).added
    ]


@pytest.mark.parametrize("left", ["tokenizer.json", "tokenizer_config.json", "added_tokens.json"])
def test_any_one_of_the_files_with_added_tokens_may_be_absent(checkpoint: Path, left: str) -> None:
    full = read_vocabulary(checkpoint, ROWS)
    (checkpoint / left).unlink()
    without = read_vocabulary(checkpoint, ROWS)
    assert without == (full if left != "tokenizer_config.json" else without)
    assert without.tokens == full.tokens


def test_added_tokens_json_alone_gives_tokens_that_are_not_special(checkpoint: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (checkpoint / name).unlink()
    vocabulary = read_vocabulary(checkpoint, ROWS)
    end = vocabulary.tokens.index("<|end|>")
    assert vocabulary.types[end] == 4
    assert vocabulary.types[:3] == [2, 3, 3]


def test_the_configuration_decides_on_the_beginning_token(checkpoint: Path, tmp_path: Path, edit: Edit) -> None:
    # transformers makes its post-processor of add_bos_token, whatever tokenizer.json says.
    template = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    edit(checkpoint / "tokenizer.json", post_processor={"type": "TemplateProcessing", "single": template, "pair": []})
    for stated, expected in ((False, False), (True, True), (..., True)):
        edit(checkpoint / "tokenizer_config.json", add_bos_token=stated)
        convert(checkpoint, tmp_path / "out.gguf", force=True)
        assert metadata(tmp_path / "out.gguf")["tokenizer.ggml.add_bos_token"] is expected


def test_a_chat_template_in_a_file_of_its_own(checkpoint: Path, tmp_path: Path, edit: Edit) -> None:
    edit(checkpoint / "tokenizer_config.json", chat_template=...)
    (checkpoint / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    convert(checkpoint, tmp_path / "out.gguf")
    assert metadata(tmp_path / "out.gguf")["tokenizer.chat_template"] == "{{ messages }}"


UNFIT: list[tuple[str, dict[str, Any], type[ConversionError], str]] = [
    ("tokenizer_config.json", {"tokenizer_class": "GPT2Tokenizer"}, UnsupportedModelError, "as in Phi-4"),
    ("tokenizer.json", {"model": {"type": "Unigram"}}, UnsupportedModelError, "is not byte-pair encoding"),
    ("tokenizer.json", {"model": {"type": "BPE", "vocab": {"x": 5}}}, CheckpointError, r"disagree on 'x' \(id 5\)"),
    ("tokenizer.json", {"model": {"type": "BPE", "vocab": {"x": -1}}}, CheckpointError, r"disagree on 'x' \(id -1"),
    ("tokenizer.json", {"normalizer": None}, UnsupportedModelError, "normalizer or pre_tokenizer differs from"),
    ("tokenizer.json", {"pre_tokenizer": {"type": "Metaspace"}}, UnsupportedModelError, "normalizer or pre_tok"),
    ("tokenizer.json", {"added_tokens": [{"id": 1}]}, CheckpointError, r"json: added_tokens\[0\]: .*`content`"),
    ("tokenizer.json", {"added_tokens": [{"content": "x"}]}, CheckpointError, r"added_tokens\[0\]: .* field `id`"),
    ("tokenizer.json", {"added_tokens": 7}, CheckpointError, "tokenizer.json: added_tokens: expected `array | null`"),
    ("tokenizer.json", {"added_tokens": [TOKEN | {"single_word": True}]}, UnsupportedModelError, "'x' is a single_"),
    ("tokenizer.json", {"added_tokens": [TOKEN | {"normalized": True}]}, UnsupportedModelError, "'x' is a normal"),
    ("tokenizer.json", {"added_tokens": [TOKEN, TOKEN | {"id": 8}]}, CheckpointError, "has the token 'x' twice"),
    ("tokenizer.json", {"post_processor": [1]}, CheckpointError, "make no sense"),
    ("tokenizer_config.json", {"added_tokens_decoder": {"x": {}}}, CheckpointError, "decoder.*: expected `int`"),
    ("tokenizer_config.json", {"chat_template": "\ud800"}, ConversionError, "half a character"),
    ("added_tokens.json", {"x": "1"}, CheckpointError, r"added_tokens.json: \[\.\.\.\]: expected `int`, got `str`"),
    ("added_tokens.json", {"x": ROWS}, CheckpointError, f"'x' has the id {ROWS}, but the model's vocab_size is"),
    ("added_tokens.json", {"x": -1}, CheckpointError, "'x' has the id -1"),
    ("generation_config.json", {"eos_token_id": [5, ROWS]}, CheckpointError, f"eos_token_id holds {ROWS}, but"),
    ("generation_config.json", {"pad_token_id": "5"}, CheckpointError, "pad_token_id holds '5'"),
    ("generation_config.json", {"bos_token_id": -1}, CheckpointError, "bos_token_id holds -1"),
]


@pytest.mark.parametrize("case", UNFIT)
def test_files_that_make_no_vocabulary(
    case: tuple[str, dict[str, Any], type[ConversionError], str], checkpoint: Path, tmp_path: Path, edit: Edit
) -> None:
    file, entries, error, sentence = case
    edit(checkpoint / file, **entries)
    with pytest.raises(error, match=sentence):
        convert(checkpoint, tmp_path / "output" / "out.gguf")
    assert not (tmp_path / "output").exists() or list((tmp_path / "output").iterdir()) == []


def test_a_unigram_model_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    content = (checkpoint / "tokenizer.model").read_bytes()
    assert content.count(b"\x18\x02\x20") == 1, "model_type, then vocab_size, of the trainer's part"
    (checkpoint / "tokenizer.model").write_bytes(content.replace(b"\x18\x02\x20", b"\x18\x01\x20"))
    with pytest.raises(UnsupportedModelError, match=r"tokenizer.model is a unigram model"):
        convert(checkpoint, tmp_path / "out.gguf")


def test_a_vocabulary_without_a_token_that_llama_cpp_needs(checkpoint: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "added_tokens.json"):
        (checkpoint / name).unlink()
    with pytest.raises(CheckpointError, match=r"The vocabulary lacks <\|endoftext\|>, which every Phi-3 model has"):
        convert(checkpoint, tmp_path / "out.gguf")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=3) | st.sampled_from(["id", "content", "type", "7"]), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_no_entry_of_the_json_files_makes_it_fail_in_another_way(
    data: st.DataObject, pristine: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = data.draw(
        st.sampled_from(["tokenizer.json", "tokenizer_config.json", "added_tokens.json", "generation_config.json"])
    )
    content = json.loads((pristine / file).read_text(encoding="utf-8"))
    name = data.draw(st.sampled_from(sorted(content)) | st.text(max_size=3))
    folder = tmp_path_factory.mktemp("fuzz")
    for path in pristine.iterdir():
        (folder / path.name).symlink_to(path)
    (folder / file).unlink()
    (folder / file).write_text(json.dumps(content | {name: data.draw(JSON)}), encoding="utf-8")
    with contextlib.suppress(ConversionError):
        assert convert(folder, folder / "out.gguf").tensors == 9


PIECE = b"\x0a\x03abc"
"""The field of a piece's text."""


def message(*fields: bytes) -> bytes:
    """A model with one piece, of these fields."""
    body = b"".join(fields)
    return b"\x0a" + bytes([len(body)]) + body


def read(tmp_path: Path, content: bytes) -> list[tuple[str, float, int]]:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    return [(piece.text, piece.score, int(piece.type)) for piece in read_sentencepiece(path).pieces]


def test_the_whole_phi3_vocabulary_comes_back(tmp_path: Path) -> None:
    vocabulary = phi3_vocabulary()
    pieces = read(tmp_path, sentencepiece_model(vocabulary))
    assert pieces == [(piece.text, piece.score, piece.type) for piece in vocabulary.pieces]
    assert read_sentencepiece(tmp_path / "tokenizer.model").model_type is ModelType.BPE


def test_absent_fields_have_their_defaults_and_unknown_ones_are_skipped(tmp_path: Path) -> None:
    unknown = b"\x78\x01" + b"\x79" + bytes(8) + b"\x7d" + bytes(4) + b"\x7a\x02xy"
    assert read(tmp_path, unknown + message(PIECE, unknown)) == [("abc", 0.0, 1)]
    assert read_sentencepiece(tmp_path / "tokenizer.model").model_type is ModelType.UNIGRAM


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "it has no pieces"),
        (b"\x0a\x05\x0a\x03ab", "Error parsing message"),
        (message(b"\x15\x00\x00\x80\x3f"), "piece 0 is empty"),
        (message(PIECE, b"\x15\x00\x00\xc0\x7f"), "piece 0 has the score nan"),
        (message(PIECE, b"\x18\x09"), "9 is not a valid PieceType"),
        (message(b"\x0a\x02\xff\xfe"), "can't decode"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 499723\n", "is not a sound SentencePiece"),
    ],
)
def test_a_damaged_model_is_refused_in_a_sentence(content: bytes, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=sentence):
        read(tmp_path, content)


def test_an_absent_or_enormous_file_is_not_read(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        read_sentencepiece(tmp_path / "tokenizer.model")
    with (tmp_path / "tokenizer.model").open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(CheckpointError, match="larger than 64 MiB"):
        read_sentencepiece(tmp_path / "tokenizer.model")


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_no_change_of_bytes_makes_the_reader_fail_in_another_way(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = bytearray(sentencepiece_model(Vocabulary((Piece("▁a", -1.0), Piece("b", -2.5, 4)), ())))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    folder = tmp_path_factory.mktemp("fuzz")
    try:
        pieces = read(folder, bytes(content[: data.draw(st.integers(0, len(content)))]))
    except CheckpointError:
        return
    assert pieces
