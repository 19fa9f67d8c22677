"""Byte-level vocabularies: texts become the tokens that tokenizer.json makes of them, and tokens those texts."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import gguf
import pytest
from tokenizers import Tokenizer as Library

from edge_phi3.conversion.convert import convert
from edge_phi3.engine.tokenizer import StreamDecoder, Tokenizer
from edge_phi3.llama import ModelLoadError
from edge_phi3.llama.model import Model, tokenize
from tests.golden.byte_level import reference_tokenizer
from tests.golden.family import FAMILY, write_member
from tests.support.engines import rules_of
from tests.support.odd_texts import random_text

RENAMED = (b"edge_phi3.tokenizer.added_tokens", b"edge_phi3.generation.config")


class Member(NamedTuple):
    name: str
    model: Model
    tokenizer: Tokenizer
    library: Library
    special: list[str]


@pytest.fixture(scope="module", params=["phi-4-mini-instruct", "phi-4"])
def member(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Member]:
    folder = write_member(tmp_path_factory.mktemp("byte-level"), request.param, layers=1)
    model = Model(convert(folder, folder / "model.gguf").path)
    library = reference_tokenizer(folder)
    special = [token.content for token in library.get_added_tokens_decoder().values()]
    yield Member(request.param, model, Tokenizer(model), library, special)
    model.close()


def test_thousands_of_texts(member: Member) -> None:
    chance = random.Random(20250227)
    texts = [random_text(chance, member.special) for _ in range(2500)]
    different = [text for text in texts if member.tokenizer.encode(text).tolist() != member.library.encode(text).ids]
    assert different == []
    # Without their meaning, special tokens are the characters that they are.
    plain = random_text(random.Random(1), []) + member.special[-1]
    expected = member.library.encode(member.special[-1] + " ").ids
    assert member.tokenizer.encode(plain, parse_special=False).tolist()[-1] not in expected


def test_llama_cpps_own_rules_are_not_those_of_phi_4_mini(member: Member) -> None:
    """What is to be seen as long as texts are not encoded by llama.cpp."""
    texts = ["schöÜn", "größe ÇA", "e\u0301te\u0301"]
    alone = [tokenize(member.model._vocab, text).tolist() for text in texts]
    equal = alone == [member.library.encode(text).ids for text in texts]
    assert equal is (member.name == "phi-4"), "llama.cpp has mended this"


def test_a_word_of_any_length_is_encoded(member: Member) -> None:
    # llama.cpp's regular expressions overflow the stack.
    for text in ("a" * 60_000, "\u0301" * 40_000, "😀" * 20_000, "\n" * 60_000, "1" * 60_000):
        assert member.tokenizer.encode(text).tolist() == member.library.encode(text).ids
    assert member.tokenizer.encode("\udfffa").tolist() == member.library.encode("?a").ids


@pytest.mark.parametrize("skip", [True, False])
def test_any_tokens_decode_as_in_the_library_whole_and_as_they_come(member: Member, skip: bool) -> None:
    chance = random.Random(3)
    for _ in range(1500):
        ends = (256, member.tokenizer.vocab_size)
        tokens = [chance.randrange(chance.choice(ends)) for _ in range(chance.randrange(1, 14))]
        expected = member.library.decode(tokens, skip_special_tokens=skip)
        assert member.tokenizer.decode(tokens, skip_special_tokens=skip) == expected
        stream = StreamDecoder(member.tokenizer, skip_special_tokens=skip)
        pieces = [stream.push([token]) for token in tokens]
        assert "".join(pieces) + stream.finish() == expected


def test_a_vocabulary_that_cannot_be_used_is_refused_when_it_is_loaded(tmp_path: Path) -> None:
    model = convert(write_member(tmp_path, "phi-4-mini-instruct", layers=1), tmp_path / "model.gguf").path
    data = model.read_bytes()
    for old, new, sentence in (
        ("gpt-4o", "viking", "its pre-tokenizer is 'viking', and gpt-4o, dbrx, gpt-2 are known"),
        ("Ġ h", "Ġ \x7f", "its merges and words do not fit its vocabulary"),
    ):
        model.write_bytes(data.replace(old.encode(), new.encode()))
        with pytest.raises(ModelLoadError, match=sentence):
            Model(model)


@pytest.mark.parametrize("name", FAMILY)
def test_a_file_of_llama_cpps_converter_has_the_members_own_rules(name: str, tmp_path: Path) -> None:
    """Without our keys, as `tests/parity` finds files of that converter itself."""
    folder = write_member(tmp_path, name, layers=1)
    ours = convert(folder, tmp_path / "ours.gguf", outtype="f32").path
    data, theirs = ours.read_bytes(), tmp_path / "theirs.gguf"
    for key in [*RENAMED, *([b"general.name"] if name == "phi-3-mini-4k-instruct" else [])]:
        assert data.count(key) == 1
        data = data.replace(key, b"x" * len(key))
    theirs.write_bytes(data)
    special = [token.content for token in reference_tokenizer(folder).get_added_tokens_decoder().values()]
    chance = random.Random(1)
    texts = ["<|user|>\n\u00a0Hi </s> <|end|>\n<|endoftext|> <|assistant|>\n"]
    texts += [random_text(chance, special) for _ in range(200)]
    assert rules_of(ours, texts) == rules_of(theirs, texts)


@pytest.mark.parametrize("called", ["my-phi3-tune", "Phi-3-like"])
def test_llama_cpp_loads_it_whatever_it_is_called(called: str, tmp_path: Path) -> None:
    """llama.cpp looks for Phi-3's tokens in what is called Phi-3."""
    folder = write_member(tmp_path, "phi-4", layers=1).rename(tmp_path / called)
    edit = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    edit.pop("_name_or_path", None)
    (folder / "config.json").write_text(json.dumps(edit), encoding="utf-8")
    model = convert(folder, tmp_path / "model.gguf").path
    name = gguf.GGUFReader(model).fields["general.name"].contents()
    assert name == called.replace("phi3", "Phi 3").replace("Phi-3", "Phi 3")
    other = name.replace("Phi 3", "phi-3")
    model.write_bytes(model.read_bytes().replace(name.encode(), other.encode().ljust(len(name.encode()))))
    Model(model).close()
