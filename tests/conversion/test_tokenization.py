"""A converted model tokenises every text exactly as the checkpoint's own tokenizer.json."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from pathlib import Path

import gguf
import pytest
from tokenizers import Tokenizer as Library

from edge_phi3.conversion.convert import convert
from edge_phi3.engine.added_tokens import WHITE_SPACE
from edge_phi3.engine.tokenizer import Tokenizer
from edge_phi3.llama.model import Model
from tests.conversion import llama
from tests.golden.checkpoints import write_checkpoint
from tests.golden.vocabularies import VOCABULARY_GGUF, phi3_vocabulary

DATA = VOCABULARY_GGUF.parent

# The prompts of the API's documentation.
PROMPTS = (
    "<|user|>\nQuestion<|end|>\n<|assistant|>",
    "<|user|>\nHow to explain Internet for a medieval knight?<|end|>\n<|assistant|>\n",
    "<|user|> How to explain Internet for a medieval knight?<|end|><|assistant|>",
    "YOUR_PROMPT_HERE",
    "<|user|>\nI am going to Paris, what should I see?<|end|>\n<|assistant|>\nParis, the capital of France, is known "
    "for its art museums. Here are some:\n\n1. The Eiffel Tower: The iconic Eiffel Tower\n2. The Louvre Museum, the "
    "world's largest\n\nIt's no wonder<|end|>\n<|user|>\nWhat is so great about #1?<|end|>\n<|assistant|>\n",
)

SPECIAL = [token.text for token in phi3_vocabulary().added]
FRAGMENTS = [
    *SPECIAL, *WHITE_SPACE, "\x1c", "\x1f", "\u200b", "\ufeff", "\x00", "\u2581", "\u2581\u2581", " \u2581",
    "<|", "|>", "<", ">", "Hello", " world", "the", "1234", "don't", "\u00e9\u00e0", "\u65e5\u672c\u8a9e",
    "\u0645\u0631\u062d\u0628\u0627", "\U0001f600", "e\u0301", "\U0001f468\u200d\U0001f469", "<0x0A>", "[PAD32012]",
    "aaa", "aaaaaaa", "nnn", "....", "=====", "\n\n\n", "\r\n",
    *(space * length for space in " \u2581" for length in (1, 2, 3, 5, 15, 16, 17, 33, 64, 100, 257)),
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with the whole Phi-3 vocabulary, and its GGUF."""
    whole = tmp_path_factory.mktemp("whole") / "phi-3-whole"
    write_checkpoint(
        whole, layers=1, hidden_size=8, heads=1, intermediate_size=8, vocabulary=phi3_vocabulary(), vocab_size=32064
    )
    convert(whole, whole / "model.gguf")
    return whole


@pytest.fixture(scope="module")
def alone(folder: Path) -> Iterator[llama.Vocabulary]:
    with llama.loaded(folder / "model.gguf") as model:
        yield llama.Vocabulary(model)


@pytest.fixture(scope="module")
def model(folder: Path) -> Iterator[Model]:
    model = Model(folder / "model.gguf")
    yield model
    model.close()


@pytest.fixture(scope="module")
def ours(model: Model) -> Tokenizer:
    return Tokenizer(model)


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Library:
    return Library.from_file(str(folder / "tokenizer.json"))


def test_the_vocabulary_is_that_of_llama_cpps_test_data(folder: Path) -> None:
    # The published one was made when unused ids still had the type of unknown tokens.
    published, made = (gguf.GGUFReader(path).fields for path in (VOCABULARY_GGUF, folder / "model.gguf"))
    for key in ("tokens", "scores"):
        assert made[f"tokenizer.ggml.{key}"].contents() == published[f"tokenizer.ggml.{key}"].contents()
    types = [fields["tokenizer.ggml.token_type"].contents() for fields in (published, made)]
    assert types[0][:32011] == types[1][:32011]
    for role in ("bos", "eos", "unknown", "padding"):
        key = f"tokenizer.ggml.{role}_token_id"
        assert made[key].contents() == published[key].contents()


def test_llama_cpps_own_vectors(ours: Tokenizer, alone: llama.Vocabulary, theirs: Library) -> None:
    texts = (DATA / "ggml-vocab-phi-3.gguf.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    rows = (DATA / "ggml-vocab-phi-3.gguf.out").read_text(encoding="utf-8").split("\n")
    assert len(texts) == len(rows) == 47
    for text, row in zip(texts, rows, strict=True):
        expected = [int(token) for token in row.split()]
        assert ours.encode(text).tolist() == alone.tokenize(text) == expected
        assert theirs.encode(text).ids == expected


def test_prompts_of_the_documentation(ours: Tokenizer, alone: llama.Vocabulary, theirs: Library) -> None:
    for prompt in PROMPTS:
        assert ours.encode(prompt).tolist() == alone.tokenize(prompt) == theirs.encode(prompt).ids
    # No stray tokens.
    expected = [32010, 1128, 304, 5649, 4685, 363, 263, 27690, 889, 523, 29973, 32007, 32001]
    assert alone.tokenize(PROMPTS[1], add_special=True) == expected


def random_text(generator: random.Random) -> str:
    """Return a text of one of several kinds, odd characters and special tokens included."""
    kind = generator.randrange(5)
    if kind == 0:
        codes = (generator.choice([0x80, 0x800, 0x10000, 0x110000]) for _ in range(generator.randrange(1, 20)))
        return "".join(chr(generator.randrange(limit)) for limit in codes).encode(errors="ignore").decode()
    if kind == 1:
        return "".join(generator.choices(SPECIAL + list(WHITE_SPACE), k=generator.randrange(1, 12)))
    if kind == 2:
        return "".join(generator.choices("ab \n▁n.=-", k=generator.randrange(1, 80)))
    if kind == 3:
        return " ".join(generator.choices(FRAGMENTS, k=generator.randrange(1, 20)))
    return "".join(generator.choices(FRAGMENTS, k=generator.randrange(1, 25)))


def test_thousands_of_generated_texts(ours: Tokenizer, theirs: Library) -> None:
    generator = random.Random(20240423)
    texts = [random_text(generator) for _ in range(6000)]
    encoded = theirs.encode_batch(texts)
    different = [text for text, known in zip(texts, encoded, strict=True) if ours.encode(text).tolist() != known.ids]
    assert different == []


def test_llama_cpp_alone_differs_only_in_unicode_white_space_after_a_special_token(
    alone: llama.Vocabulary, theirs: Library
) -> None:
    generator = random.Random(7)
    for text in (random_text(generator) for _ in range(3000)):
        if not any(character in text for character in set(WHITE_SPACE) - set(" \t\n\v\f\r")):
            assert alone.tokenize(text) == theirs.encode(text).ids
    assert alone.tokenize("<|end|>\u00a0") != theirs.encode("<|end|>\u00a0").ids, "llama.cpp has mended this"


def test_flags_other_than_llama_cpps_rule(tmp_path: Path) -> None:
    """Added tokens with any flags, of which the model's name tells llama.cpp nothing."""
    plain = phi3_vocabulary(merges=300)
    flags = [(False, False), (True, False), (False, True), (True, True)]
    added = tuple(
        dataclasses.replace(token, lstrip=flags[i % 4][0], rstrip=flags[i % 4][1])
        for i, token in enumerate(plain.added)
    )
    checkpoint = write_checkpoint(tmp_path / "phi-3", layers=1, vocabulary=dataclasses.replace(plain, added=added))
    convert(checkpoint, tmp_path / "out.gguf")
    theirs = Library.from_file(str(checkpoint / "tokenizer.json"))
    generator = random.Random(1)
    choices = SPECIAL + list(WHITE_SPACE) + ["hello", " a", "  "]
    model = Model(tmp_path / "out.gguf")
    ours = Tokenizer(model)
    for _ in range(1500):
        text = "".join(generator.choices(choices, k=generator.randrange(1, 12)))
        assert ours.encode(text).tolist() == theirs.encode(text).ids
    model.close()
