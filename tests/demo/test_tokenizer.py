"""The demo model's tokenizer follows Phi-3's rules, checked against the real vocabulary where that says something."""

import json
from pathlib import Path

import gguf
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from edge_phi3.conversion.sentencepiece import ModelType, PieceType, read_sentencepiece
from edge_phi3.demo import DEMO_CHECKPOINT

REAL = Path(__file__).parents[1] / "data" / "ggml-vocab-phi-3.gguf"
REAL_PIECES = 32000
SPECIALS = 11
FAST = Tokenizer.from_file(str(DEMO_CHECKPOINT / "tokenizer.json"))
STORED = json.loads((DEMO_CHECKPOINT / "tokenizer.json").read_text("utf-8"))
CONFIG = json.loads((DEMO_CHECKPOINT / "tokenizer_config.json").read_text("utf-8"))
ADDED = json.loads((DEMO_CHECKPOINT / "added_tokens.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def sentencepiece():
    return read_sentencepiece(DEMO_CHECKPOINT / "tokenizer.model")


@pytest.fixture(scope="module")
def real():
    """Texts and GGUF token types of the real Phi-3-mini vocabulary."""
    fields = gguf.GGUFReader(REAL).fields
    return fields["tokenizer.ggml.tokens"].contents(), fields["tokenizer.ggml.token_type"].contents()


def test_both_files_hold_the_same_vocabulary(sentencepiece):
    assert sentencepiece.model_type is ModelType.BPE
    assert {piece.text: number for number, piece in enumerate(sentencepiece.pieces)} == STORED["model"]["vocab"]


def test_pieces_begin_as_llamas_do_with_control_tokens_and_every_byte(sentencepiece, real):
    texts, _ = real
    assert [piece.text for piece in sentencepiece.pieces[:259]] == texts[:259]
    assert {piece.type for piece in sentencepiece.pieces[3:259]} == {PieceType.BYTE}
    assert {piece.type for piece in sentencepiece.pieces[259:]} == {PieceType.NORMAL}


def test_merges_follow_the_order_of_the_pieces(sentencepiece):
    scores = {piece.text: piece.score for piece in sentencepiece.pieces}
    ranks = [scores["".join(pair)] for pair in STORED["model"]["merges"]]
    assert ranks == sorted(ranks, reverse=True)


def test_special_tokens_have_phi_3s_names_order_and_kind(sentencepiece, real):
    texts, types = real
    first = len(sentencepiece.pieces)
    assert sorted(ADDED, key=ADDED.get) == texts[REAL_PIECES : REAL_PIECES + SPECIALS]
    assert sorted(ADDED.values()) == list(range(first, first + SPECIALS))
    for token in STORED["added_tokens"]:
        number = token["id"] if token["id"] < first else token["id"] - first + REAL_PIECES
        assert token["content"] == texts[number]
        assert token["special"] == (types[number] == gguf.TokenType.CONTROL)


def test_white_space_vanishes_after_the_tokens_that_phi_3_says(sentencepiece):
    strips = {token["content"] for token in STORED["added_tokens"] if token["rstrip"]}
    assert strips == {*ADDED, "</s>"} - {"<|endoftext|>"}
    assert not any(token["lstrip"] or token["normalized"] or token["single_word"] for token in STORED["added_tokens"])


def test_the_files_agree_about_the_added_tokens():
    stored = {str(token.pop("id")): token for token in json.loads(json.dumps(STORED["added_tokens"]))}
    assert stored == CONFIG["added_tokens_decoder"]
    roles = json.loads((DEMO_CHECKPOINT / "special_tokens_map.json").read_text("utf-8"))
    assert {role: token["content"] for role, token in roles.items()} == {role: CONFIG[role] for role in roles}
    assert {token["content"]: int(number) for number, token in stored.items() if int(number) > 2} == ADDED


def test_tokenizer_json_has_phi_3s_structure():
    assert STORED["normalizer"] == {
        "type": "Sequence",
        "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ],
    }
    assert STORED["pre_tokenizer"] is None
    assert [step["type"] for step in STORED["decoder"]["decoders"]] == ["Replace", "ByteFallback", "Fuse", "Strip"]
    assert STORED["model"]["type"] == "BPE"
    assert STORED["model"]["byte_fallback"]
    assert STORED["model"]["fuse_unk"]
    assert CONFIG["tokenizer_class"] == "LlamaTokenizer"
    assert CONFIG["add_bos_token"] is False
    assert "<|assistant|>" in CONFIG["chat_template"]


@pytest.mark.parametrize("gap", ["\n", " ", "", "\n\n  "])
def test_white_space_around_the_turns_changes_nothing(gap):
    ids = FAST.encode(f"<|user|>{gap}What does len do?<|end|>{gap}<|assistant|>{gap}").ids
    middle = FAST.encode("What does len do?").ids
    assert ids == [ADDED["<|user|>"], *middle, ADDED["<|end|>"], ADDED["<|assistant|>"]]


def test_unknown_characters_become_bytes():
    tokens = FAST.encode("🤗").tokens
    assert tokens == ["▁", "<0xF0>", "<0x9F>", "<0xA4>", "<0x97>"]


def test_each_digit_is_a_token():
    assert FAST.encode("2047").tokens == ["▁", "2", "0", "4", "7"]


@given(st.text(st.characters(exclude_characters="▁", exclude_categories=["Cs"]), max_size=80))
def test_any_text_comes_back(text):
    if any(token["content"] in text for token in STORED["added_tokens"]):
        return
    assert FAST.decode(FAST.encode(text).ids, skip_special_tokens=False) == text
