"""The tokenizer files become a vocabulary that splits every text as tokenizer.json does, or are refused."""

import contextlib
import dataclasses
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library

from edge_phi3.conversion import CheckpointError, ConversionError, UnsupportedModelError
from edge_phi3.conversion.convert import convert
from edge_phi3.conversion.pieces import MAX_BYTES, Piece, PieceType, read_sentencepiece
from edge_phi3.conversion.vocabulary import read_vocabulary
from edge_phi3.engine.added_tokens import WHITE_SPACE
from edge_phi3.engine.tokenizer import Tokenizer
from edge_phi3.llama.model import Model, tokenize
from tests.conversion.conftest import JSON, edit, fields_of
from tests.golden.checkpoints import write_checkpoint
from tests.golden.vocabularies import VOCABULARY_GGUF, Vocabulary, phi3_vocabulary, sentencepiece_model
from tests.support.odd_texts import random_text

ROWS = 672
TOKEN = {"id": 9, "content": "x"}


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


def test_the_configuration_decides_on_the_beginning_token(checkpoint: Path, tmp_path: Path) -> None:
    # transformers makes its post-processor of add_bos_token, whatever tokenizer.json says.
    template = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    edit(checkpoint / "tokenizer.json", post_processor={"type": "TemplateProcessing", "single": template, "pair": []})
    for stated, expected in ((False, False), (True, True), (..., True)):
        edit(checkpoint / "tokenizer_config.json", add_bos_token=stated)
        convert(checkpoint, tmp_path / "out.gguf", force=True)
        assert fields_of(tmp_path / "out.gguf")["tokenizer.ggml.add_bos_token"] is expected


UNFIT: list[tuple[str, dict[str, Any], type[ConversionError], str]] = [
    ("tokenizer_config.json", {"tokenizer_class": "GPT2Tokenizer"}, UnsupportedModelError, "as in Phi-4, whose byte"),
    ("tokenizer.json", {"model": {"type": "Unigram"}}, UnsupportedModelError, "is not byte-pair encoding"),
    ("tokenizer.json", {"model": {"type": "BPE", "vocab": {"x": 5}}}, CheckpointError, r"disagree on 'x' \(id 5\)"),
    ("tokenizer.json", {"model": {"type": "BPE", "vocab": {"x": -1}}}, CheckpointError, r"disagree on 'x' \(id -1"),
    ("tokenizer.json", {"normalizer": None}, UnsupportedModelError, "normalizer or pre_tokenizer differs from"),
    ("tokenizer.json", {"pre_tokenizer": {"type": "Metaspace"}}, UnsupportedModelError, "normalizer or pre_tok"),
    ("tokenizer.json", {"added_tokens": [{"id": 1}]}, CheckpointError, r"json: added_tokens\[0\]: .*`content`"),
    ("tokenizer.json", {"added_tokens": [{"content": "x"}]}, CheckpointError, r"added_tokens\[0\]: .* field `id`"),
    ("tokenizer.json", {"added_tokens": 7}, CheckpointError, "tokenizer.json: added_tokens: expected `array | null`"),
    ("tokenizer.json", {"added_tokens": [TOKEN, TOKEN | {"id": 8}]}, CheckpointError, "has the token 'x' twice"),
    ("tokenizer.json", {"added_tokens": [TOKEN, TOKEN | {"content": "y"}]}, CheckpointError, "two added tokens have"),
    ("tokenizer.json", {"post_processor": [1]}, CheckpointError, "make no sense"),
    ("tokenizer_config.json", {"added_tokens_decoder": {"x": {}}}, CheckpointError, "decoder.*: expected `int`"),
    ("tokenizer_config.json", {"chat_template": "\ud800"}, CheckpointError, "not valid JSON .*surrogates not"),
    ("added_tokens.json", {"x": "1"}, CheckpointError, r"added_tokens.json: \[\.\.\.\]: expected `int`, got `str`"),
    ("added_tokens.json", {"x": ROWS}, CheckpointError, f"'x' has the id {ROWS}, .* vocab_size is {ROWS}: resize_"),
    ("added_tokens.json", {"x": -1}, CheckpointError, "'x' has the id -1"),
    ("generation_config.json", {"eos_token_id": [5, ROWS]}, CheckpointError, f"eos_token_id holds {ROWS}, but"),
    ("generation_config.json", {"pad_token_id": "5"}, CheckpointError, "pad_token_id holds '5'"),
    ("generation_config.json", {"bos_token_id": -2}, CheckpointError, "bos_token_id holds -2"),
]


@pytest.mark.parametrize(("file", "entries", "error", "sentence"), UNFIT)
def test_files_that_make_no_vocabulary(
    checkpoint: Path, file: str, entries: dict[str, Any], error: type[ConversionError], sentence: str
) -> None:
    edit(checkpoint / file, **entries)
    output = checkpoint.parent / "output" / "out.gguf"
    with pytest.raises(error, match=sentence):
        convert(checkpoint, output)
    assert not output.parent.exists() or list(output.parent.iterdir()) == []


def test_a_unigram_model_and_a_vocabulary_without_a_token_that_llama_cpp_needs(checkpoint: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "added_tokens.json"):
        (checkpoint / name).unlink()
    with pytest.raises(CheckpointError, match=r"The vocabulary lacks <\|endoftext\|>, which every Phi-3 model has"):
        read_vocabulary(checkpoint, ROWS)
    # It is what a model without the field is.
    (checkpoint / "tokenizer.model").write_bytes(message(PIECE))
    with pytest.raises(UnsupportedModelError, match=r"tokenizer.model is a unigram model"):
        read_vocabulary(checkpoint, ROWS)


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
    return [(piece.text, piece.score, int(piece.type)) for piece in read_sentencepiece(path)[0]]


def test_absent_fields_have_their_defaults_and_unknown_ones_are_skipped(tmp_path: Path) -> None:
    unknown = b"\x78\x01" + b"\x79" + bytes(8) + b"\x7d" + bytes(4) + b"\x7a\x02xy"
    assert read(tmp_path, unknown + message(PIECE, unknown)) == [("abc", 0.0, 1)]


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
    with pytest.raises(CheckpointError, match=r"larger than 67\.1 MB"):
        read_sentencepiece(tmp_path / "tokenizer.model")


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_no_change_of_bytes_makes_the_reader_fail_in_another_way(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    pieces = (Piece("▁a", -1.0, PieceType.NORMAL), Piece("b", -2.5, PieceType.USER_DEFINED))
    content = bytearray(sentencepiece_model(Vocabulary(pieces, ())))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    folder = tmp_path_factory.mktemp("fuzz")
    try:
        assert read(folder, bytes(content[: data.draw(st.integers(0, len(content)))]))
    except CheckpointError:
        return


SPECIAL = [token.content for token in phi3_vocabulary().added]

Encode = Callable[[str], list[int]]


@contextlib.contextmanager
def encoders(checkpoint: Path) -> Iterator[tuple[Encode, Encode, Encode]]:
    """Convert a checkpoint; yield our tokenizer, llama.cpp's by itself, and that of tokenizer.json."""
    model = Model(convert(checkpoint, checkpoint / "model.gguf").path)
    ours, library = Tokenizer(model), Library.from_file(str(checkpoint / "tokenizer.json"))
    yield (
        lambda text: ours.encode(text).tolist(),
        lambda text: tokenize(model._vocab, text, add_special=True, parse_special=True).tolist(),
        lambda text: library.encode(text).ids,
    )
    model.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with the whole Phi-3 vocabulary."""
    shape: dict[str, Any] = {"layers": 1, "hidden_size": 8, "heads": 1, "intermediate_size": 8, "vocab_size": 32064}
    return write_checkpoint(tmp_path_factory.mktemp("whole") / "phi-3-whole", vocabulary=phi3_vocabulary(), **shape)


@pytest.fixture(scope="module")
def whole(folder: Path) -> Iterator[tuple[Encode, Encode, Encode]]:
    with encoders(folder) as found:
        yield found


def test_the_vocabulary_is_that_of_llama_cpps_test_data(folder: Path, tmp_path: Path) -> None:
    # The published one was made when unused ids still had the type of unknown tokens.
    published, made = fields_of(VOCABULARY_GGUF), fields_of(convert(folder, tmp_path / "model.gguf").path)
    for key in ("tokens", "scores", *(f"{role}_token_id" for role in ("bos", "eos", "unknown", "padding"))):
        assert made[f"tokenizer.ggml.{key}"] == published[f"tokenizer.ggml.{key}"]
    assert made["tokenizer.ggml.token_type"][:32011] == published["tokenizer.ggml.token_type"][:32011]


def test_llama_cpps_own_vectors(whole: tuple[Encode, Encode, Encode]) -> None:
    texts = VOCABULARY_GGUF.with_suffix(".gguf.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    rows = VOCABULARY_GGUF.with_suffix(".gguf.out").read_text(encoding="utf-8").split("\n")
    assert len(texts) == len(rows) == 47
    for text, row in zip(texts, rows, strict=True):
        assert [encode(text) for encode in whole] == 3 * [[int(token) for token in row.split()]]


def test_thousands_of_generated_texts(whole: tuple[Encode, Encode, Encode]) -> None:
    ours, _, theirs = whole
    generator = random.Random(20240423)
    texts = [random_text(generator, SPECIAL) for _ in range(6000)]
    assert [text for text in texts if ours(text) != theirs(text)] == []


def test_llama_cpp_alone_differs_only_in_unicode_white_space_after_a_special_token(
    whole: tuple[Encode, Encode, Encode],
) -> None:
    _, alone, theirs = whole
    generator = random.Random(7)
    for text in (random_text(generator, SPECIAL) for _ in range(3000)):
        if not any(character in text for character in set(WHITE_SPACE) - set(" \t\n\v\f\r")):
            assert alone(text) == theirs(text)
    assert alone("<|end|>\u00a0") != theirs("<|end|>\u00a0"), "llama.cpp has mended this"


def test_flags_other_than_llama_cpps_rule(tmp_path: Path) -> None:
    """Added tokens with any flags, of which the model's name tells llama.cpp nothing."""
    plain = phi3_vocabulary(merges=300)
    added = tuple(dataclasses.replace(token, lstrip=i % 2 > 0, rstrip=i % 4 > 1) for i, token in enumerate(plain.added))
    vocabulary = dataclasses.replace(plain, added=added)
    generator = random.Random(1)
    choices = SPECIAL + list(WHITE_SPACE) + ["hello", " a", "  "]
    with encoders(write_checkpoint(tmp_path / "phi-3", layers=1, vocabulary=vocabulary)) as (ours, _, theirs):
        for _ in range(1500):
            text = "".join(generator.choices(choices, k=generator.randrange(1, 12)))
            assert ours(text) == theirs(text)
