"""The bundled checkpoint is whole, small, and a Phi-3 in all but size; its card says what the recorded run says.

That its tensors are those of its configuration, finite and answer the questions, `convert` and ``tests/e2e`` say.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from edge_phi3.conversion.sentencepiece import ModelType, PieceType, read_sentencepiece
from edge_phi3.demo import DEMO_CHECKPOINT
from scripts.demo_model.card import render_card
from scripts.demo_model.corpus import EMPHASISED, LONGEST_ANSWER, QUESTIONS, question_name

FILES = {
    "README.md",
    "added_tokens.json",
    "config.json",
    "generation_config.json",
    "loss.svg",
    "model.safetensors",
    "questions.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "training.json",
}


def read(name: str) -> Any:
    return json.loads((DEMO_CHECKPOINT / name).read_text("utf-8"))


REAL = Path(__file__).parents[1] / "data" / "ggml-vocab-phi-3.gguf"
REAL_PIECES = 32000
FAST = Tokenizer.from_file(str(DEMO_CHECKPOINT / "tokenizer.json"))
STORED, SETTINGS, ADDED = read("tokenizer.json"), read("tokenizer_config.json"), read("added_tokens.json")


def test_the_folder_holds_these_files_and_is_small_enough_for_the_wheel() -> None:
    assert {file.name for file in DEMO_CHECKPOINT.iterdir()} == FILES
    assert sum(file.stat().st_size for file in DEMO_CHECKPOINT.iterdir()) <= 16_000_000
    assert (DEMO_CHECKPOINT / "loss.svg").stat().st_size <= 60_000


def test_the_card_is_the_one_that_the_recorded_run_gives() -> None:
    size = sum(file.stat().st_size for file in DEMO_CHECKPOINT.iterdir() if file.name != "README.md")
    card = render_card(read("training.json"), read("config.json"), size)
    assert (DEMO_CHECKPOINT / "README.md").read_text("utf-8") == card


def test_the_ten_questions_are_the_ones_fixed_before_training() -> None:
    questions, answers = read("questions.json"), read("training.json")["answers"]
    assert tuple(entry["question"] for entry in questions) == QUESTIONS
    assert [(a["question"], a["expected"]) for a in answers] == [(q["question"], q["answer"]) for q in questions]
    assert {question_name(question) for question in QUESTIONS} <= EMPHASISED
    assert all(12 <= len(entry["answer"]) <= LONGEST_ANSWER for entry in questions)


def test_configuration_is_phi_3_mini_4k_in_all_but_size() -> None:
    config = read("config.json")
    expected = {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "torch_dtype": "bfloat16",
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "sliding_window": 2047,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "num_key_value_heads": config["num_attention_heads"],
        "tie_word_embeddings": False,
    }
    assert {name: config[name] for name in expected} == expected
    assert config["hidden_size"] % 256 == config["intermediate_size"] % 256 == 0, "rows suit k-quants"


def test_generation_ends_where_phi_3_ends() -> None:
    config, generation = read("config.json"), read("generation_config.json")
    end = ADDED["<|endoftext|>"]
    assert generation["eos_token_id"] == [end, ADDED["<|assistant|>"], ADDED["<|end|>"]]
    assert generation["pad_token_id"] == config["pad_token_id"] == config["eos_token_id"] == end
    assert generation["bos_token_id"] == config["bos_token_id"] == 1


def test_pieces_and_special_tokens_are_those_of_phi_3_in_both_files() -> None:
    fields = gguf.GGUFReader(REAL).fields
    texts, types = fields["tokenizer.ggml.tokens"].contents(), fields["tokenizer.ggml.token_type"].contents()
    model = read_sentencepiece(DEMO_CHECKPOINT / "tokenizer.model")
    first = len(model.pieces)
    assert model.model_type is ModelType.BPE
    assert {piece.text: number for number, piece in enumerate(model.pieces)} == STORED["model"]["vocab"]
    assert [piece.text for piece in model.pieces[:259]] == texts[:259], "control tokens and every byte"
    assert {piece.type for piece in model.pieces[3:259]} == {PieceType.BYTE}
    assert {piece.type for piece in model.pieces[259:]} == {PieceType.NORMAL}
    assert sorted(ADDED, key=ADDED.__getitem__) == texts[REAL_PIECES : REAL_PIECES + len(ADDED)]
    assert sorted(ADDED.values()) == list(range(first, first + len(ADDED)))
    for token in STORED["added_tokens"]:
        number = token["id"] if token["id"] < first else token["id"] - first + REAL_PIECES
        assert token["content"] == texts[number]
        assert token["special"] == (types[number] == gguf.TokenType.CONTROL)


def test_the_files_agree_about_the_added_tokens() -> None:
    stored = {str(token["id"]): {k: v for k, v in token.items() if k != "id"} for token in STORED["added_tokens"]}
    assert stored == SETTINGS["added_tokens_decoder"]
    roles = read("special_tokens_map.json")
    assert {role: token["content"] for role, token in roles.items()} == {role: SETTINGS[role] for role in roles}
    assert {token["content"]: int(number) for number, token in stored.items() if int(number) > 2} == ADDED
    strips = {token["content"] for token in stored.values() if token["rstrip"]}
    assert strips == {*ADDED, "</s>"} - {"<|endoftext|>"}
    assert "<|assistant|>" in SETTINGS["chat_template"]


@pytest.mark.parametrize("gap", ["\n", " ", "", "\n\n  "])
def test_white_space_around_the_turns_changes_nothing(gap: str) -> None:
    ids = FAST.encode(f"<|user|>{gap}What does len do?<|end|>{gap}<|assistant|>{gap}").ids
    middle = FAST.encode("What does len do?").ids
    assert ids == [ADDED["<|user|>"], *middle, ADDED["<|end|>"], ADDED["<|assistant|>"]]


def test_unknown_characters_become_bytes_and_each_digit_is_a_token() -> None:
    assert FAST.encode("🤗2047").tokens == ["▁", "<0xF0>", "<0x9F>", "<0xA4>", "<0x97>", "2", "0", "4", "7"]


@given(st.text(st.characters(exclude_characters="▁", exclude_categories=["Cs"]), max_size=80))
def test_any_text_comes_back(text: str) -> None:
    if not any(token["content"] in text for token in STORED["added_tokens"]):
        assert FAST.decode(FAST.encode(text).ids, skip_special_tokens=False) == text
