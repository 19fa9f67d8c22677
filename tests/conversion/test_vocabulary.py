"""The tokenizer files become a vocabulary that splits every text as tokenizer.json does, or are refused."""

import contextlib
import dataclasses
import json
import os
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
from tests.support.cases import cases
from tests.support.models import write_random_checkpoint
from tests.support.odd_texts import random_text

ROWS = 672


@pytest.mark.parametrize("left", ["tokenizer.json", "tokenizer_config.json", "added_tokens.json"])
def test_any_one_of_the_files_with_added_tokens_may_be_absent(checkpoint: Path, left: str) -> None:
    full = read_vocabulary(checkpoint, ROWS)
    (checkpoint / left).unlink()
    without = read_vocabulary(checkpoint, ROWS)
    assert without == (full if left != "tokenizer_config.json" else without)
    assert without.tokens == full.tokens


def test_the_configuration_decides_on_the_beginning_token(checkpoint: Path, tmp_path: Path) -> None:
    # transformers makes its post-processor of add_bos_token, whatever tokenizer.json says.
    template = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    edit(checkpoint / "tokenizer.json", post_processor={"type": "TemplateProcessing", "single": template, "pair": []})
    for stated, expected in ((False, False), (True, True), (..., True)):
        edit(checkpoint / "tokenizer_config.json", add_bos_token=stated)
        convert(checkpoint, tmp_path / "out.gguf", force=True)
        assert fields_of(tmp_path / "out.gguf")["tokenizer.ggml.add_bos_token"] is expected


@cases
def test_files_that_make_no_vocabulary(
    checkpoint: Path, file: str, entries: dict[str, Any], error: str, sentence: str
) -> None:
    edit(checkpoint / file, **json.loads(json.dumps(entries).replace("SURROGATE", "\\ud800")))
    output = checkpoint.parent / "output" / "out.gguf"
    with pytest.raises(ConversionError, match=sentence) as caught:
        convert(checkpoint, output)
    assert type(caught.value).__name__ == error
    assert not output.parent.exists() or list(output.parent.iterdir()) == []


def test_added_tokens_json_alone_gives_tokens_that_are_not_special_and_tokenizer_model_alone_is_too_little(
    checkpoint: Path,
) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (checkpoint / name).unlink()
    vocabulary = read_vocabulary(checkpoint, ROWS)
    assert vocabulary.types[vocabulary.tokens.index("<|end|>")] == 4
    assert vocabulary.types[:3] == [2, 3, 3]
    (checkpoint / "added_tokens.json").unlink()
    with pytest.raises(CheckpointError, match=r"The vocabulary lacks <\|endoftext\|>, which every Phi-3 model has"):
        read_vocabulary(checkpoint, ROWS)
    # A unigram model is what a model without the field is.
    (checkpoint / "tokenizer.model").write_bytes(message(PIECE))
    with pytest.raises(UnsupportedModelError, match=r"tokenizer.model is a unigram model"):
        read_vocabulary(checkpoint, ROWS)


@settings(max_examples=60, deadline=None)
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


@cases
def test_a_damaged_model_is_refused_in_a_sentence(content: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=sentence):
        read(tmp_path, content.encode("latin-1"))


def test_absent_fields_have_their_defaults_and_an_absent_or_enormous_file_is_not_read(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        read_sentencepiece(tmp_path / "tokenizer.model")
    unknown = b"\x78\x01" + b"\x79" + bytes(8) + b"\x7d" + bytes(4) + b"\x7a\x02xy"
    assert read(tmp_path, unknown + message(PIECE, unknown)) == [("abc", 0.0, 1)], "what is unknown is skipped"
    os.truncate(tmp_path / "tokenizer.model", MAX_BYTES + 1)
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
    return write_random_checkpoint(tmp_path_factory.mktemp("whole") / "phi-3-whole", "tiny")


@pytest.fixture(scope="module")
def whole(folder: Path) -> Iterator[tuple[Encode, Encode, Encode]]:
    with encoders(folder) as found:
        yield found


@pytest.mark.usefixtures("whole")
def test_the_vocabulary_is_that_of_llama_cpps_test_data(folder: Path) -> None:
    # The published one was made when unused ids still had the type of unknown tokens.
    published, made = fields_of(VOCABULARY_GGUF), fields_of(folder / "model.gguf")
    for key in ("tokens", "scores", *(f"{role}_token_id" for role in ("bos", "eos", "unknown", "padding"))):
        assert made[f"tokenizer.ggml.{key}"] == published[f"tokenizer.ggml.{key}"]
    assert made["tokenizer.ggml.token_type"][:32011] == published["tokenizer.ggml.token_type"][:32011]


def test_llama_cpps_own_vectors(whole: tuple[Encode, Encode, Encode]) -> None:
    texts = VOCABULARY_GGUF.with_suffix(".gguf.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    rows = VOCABULARY_GGUF.with_suffix(".gguf.out").read_text(encoding="utf-8").split("\n")
    assert len(texts) == len(rows) == 47
    for text, row in zip(texts, rows, strict=True):
        assert [encode(text) for encode in whole] == 3 * [[int(token) for token in row.split()]]


def test_llama_cpp_alone_differs_only_in_unicode_white_space_after_a_special_token_and_we_in_nothing(
    whole: tuple[Encode, Encode, Encode],
) -> None:
    ours, alone, theirs = whole
    generator = random.Random(20240423)
    texts = [random_text(generator, SPECIAL) for _ in range(3000)]
    assert [text for text in texts if ours(text) != theirs(text)] == []
    odd = set(WHITE_SPACE) - set(" \t\n\v\f\r")
    assert [text for text in texts[:1500] if odd.isdisjoint(text) and alone(text) != theirs(text)] == []
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
