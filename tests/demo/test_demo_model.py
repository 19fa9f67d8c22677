"""The bundled checkpoint is small and a Phi-3 in all but size, and its trainer's corpus is prose.

That the checkpoint's files agree, its tensors are those of its configuration, and it answers the questions, `convert`
and ``tests/e2e`` say.
"""

import contextlib
import json
import textwrap
from pathlib import Path
from typing import Any

import gguf
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from edge_phi3.conversion.phi3 import read_phi3
from edge_phi3.conversion.vocabulary import read_vocabulary
from edge_phi3.demo import DEMO_CHECKPOINT
from scripts.demo_model import corpus
from scripts.demo_model.card import render_card
from scripts.demo_model.folder import whole_folder
from tests.golden.vocabularies import VOCABULARY_GGUF
from tests.support.cases import cases

FAST = Tokenizer.from_file(str(DEMO_CHECKPOINT / "tokenizer.json"))


def read(name: str) -> Any:
    return json.loads((DEMO_CHECKPOINT / name).read_text("utf-8"))


CONFIG, STORED, SETTINGS, ADDED = map(
    read, ("config.json", "tokenizer.json", "tokenizer_config.json", "added_tokens.json")
)


def test_the_card_is_the_one_that_the_recorded_run_gives_and_the_folder_suits_a_wheel() -> None:
    sizes = {file.name: file.stat().st_size for file in DEMO_CHECKPOINT.iterdir()}
    assert sum(sizes.values()) <= 16_000_000
    assert sizes["loss.svg"] <= 60_000
    card = render_card(read("training.json"), CONFIG, sum(sizes.values()) - sizes["README.md"])
    assert (DEMO_CHECKPOINT / "README.md").read_text("utf-8") == card


def test_the_ten_questions_are_the_ones_fixed_before_training() -> None:
    questions, answers = read("questions.json"), read("training.json")["answers"]
    assert tuple(entry["question"] for entry in questions) == corpus.QUESTIONS
    assert [(a["question"], a["expected"]) for a in answers] == [(q["question"], q["answer"]) for q in questions]
    assert all(12 <= len(entry["answer"]) <= corpus.LONGEST_ANSWER for entry in questions)


def test_configuration_is_phi_3_mini_4k_in_all_but_size() -> None:
    sizes = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size")
    mini = {"architectures": ["Phi3ForCausalLM"], "sliding_window": 2047} | {name: CONFIG[name] for name in sizes}
    assert read_phi3(CONFIG | {"num_key_value_heads": None}) == read_phi3(mini), "absent entries are those of mini-4k"
    assert CONFIG["num_key_value_heads"] == CONFIG["num_attention_heads"]
    assert (CONFIG["model_type"], CONFIG["torch_dtype"]) == ("phi3", "bfloat16")
    assert CONFIG["hidden_size"] % 256 == CONFIG["intermediate_size"] % 256 == 0, "rows suit k-quants"


def test_generation_ends_where_phi_3_ends() -> None:
    generation, end = read("generation_config.json"), ADDED["<|endoftext|>"]
    assert generation["eos_token_id"] == [end, ADDED["<|assistant|>"], ADDED["<|end|>"]]
    assert generation["pad_token_id"] == CONFIG["pad_token_id"] == CONFIG["eos_token_id"] == end
    assert generation["bos_token_id"] == CONFIG["bos_token_id"] == 1


def test_pieces_and_special_tokens_are_those_of_phi_3() -> None:
    fields = gguf.GGUFReader(VOCABULARY_GGUF).fields
    texts, types = (fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "token_type"))
    made = read_vocabulary(DEMO_CHECKPOINT, CONFIG["vocab_size"])
    first, last = min(ADDED.values()), max(ADDED.values()) + 1
    assert len(STORED["model"]["vocab"]) == first
    assert made.tokens[:259] == texts[:259], "control tokens and every byte"
    assert made.types[3:first] == [gguf.TokenType.BYTE] * 256 + [gguf.TokenType.NORMAL] * (first - 259)
    assert made.tokens[first:last] == texts[32000 : 32000 + len(ADDED)]
    assert made.types[:3] + made.types[first:last] == types[:3] + types[32000 : 32000 + len(ADDED)]
    strips = {token.content for token in made.added.values() if token.rstrip}
    assert strips == {*ADDED, "</s>"} - {"<|endoftext|>"}


def test_the_files_agree_about_the_added_tokens() -> None:
    stored = {str(token.pop("id")): token for token in read("tokenizer.json")["added_tokens"]}
    assert stored == SETTINGS["added_tokens_decoder"]
    assert {token["content"]: int(number) for number, token in stored.items() if int(number) > 2} == ADDED
    roles = read("special_tokens_map.json")
    assert {role: token["content"] for role, token in roles.items()} == {role: SETTINGS[role] for role in roles}
    assert "<|assistant|>" in SETTINGS["chat_template"]


@pytest.mark.parametrize("gap", ["\n", " ", "", "\n\n  "])
def test_white_space_around_the_turns_changes_nothing_and_odd_characters_become_bytes(gap: str) -> None:
    ids = FAST.encode(f"<|user|>{gap}What does len do?<|end|>{gap}<|assistant|>{gap}").ids
    middle = FAST.encode("What does len do?").ids
    assert ids == [ADDED["<|user|>"], *middle, ADDED["<|end|>"], ADDED["<|assistant|>"]]
    assert FAST.encode("🤗2047").tokens == ["▁", "<0xF0>", "<0x9F>", "<0xA4>", "<0x97>", "2", "0", "4", "7"]


@given(st.text(st.characters(exclude_characters="▁", exclude_categories=["Cs"]), max_size=80))
def test_any_text_comes_back(text: str) -> None:
    if not any(token["content"] in text for token in STORED["added_tokens"]):
        assert FAST.decode(FAST.encode(text).ids, skip_special_tokens=False) == text


@pytest.fixture(scope="module")
def items() -> list[corpus.Item]:
    return corpus.read_corpus()


@cases
def test_first_paragraph(docstring: str, answer: str | None) -> None:
    assert corpus.first_paragraph(docstring.replace("LONG", "Long " * 60)) == answer


def test_names_and_shared_texts_come_once_and_answers_are_prose_of_limited_length(items: list[corpus.Item]) -> None:
    assert len(items) > 1000
    assert all(12 <= len(item.answer) <= corpus.LONGEST_ANSWER for item in items)
    assert all(item.answer == " ".join(item.answer.split()) for item in items)
    names = {item.name for item in items}
    assert len(names) == len(items)
    ordinary = [item.answer for item in items if not item.emphasised]
    assert len(ordinary) == len(set(ordinary))
    for question in corpus.QUESTIONS:
        assert corpus.question_name(question) in names & corpus.EMPHASISED
        assert corpus.expected_answer(question, items)


def test_what_this_process_patches_does_not_count(items: list[corpus.Item], monkeypatch: pytest.MonkeyPatch) -> None:
    def warn_often() -> None:
        """Warn more often than the library does."""

    warn_often.__module__ = "textwrap"
    monkeypatch.setattr(textwrap, "__all__", [*textwrap.__all__, "warn_often"])
    monkeypatch.setattr(textwrap, "warn_often", warn_often, raising=False)
    assert corpus.read_corpus() == items


def test_held_out_items_are_ordinary_and_never_trained(items: list[corpus.Item]) -> None:
    split = corpus.split_corpus(items, seed=3, share=0.05)
    assert len(split.held_out) == round(0.05 * len(items))
    assert not any(item.emphasised for item in split.held_out)
    assert not set(split.trained) & set(split.held_out)
    assert set(split.trained) | set(split.held_out) == set(items)
    assert corpus.split_corpus(items, seed=3, share=0.05) == split
    assert corpus.split_corpus(items, seed=4, share=0.05) != split


def test_questions_come_with_and_without_backticks_and_a_module_is_no_call() -> None:
    chance = corpus.dice(0)
    asked = {corpus.Item("len", "Length.").ask(chance) for _ in range(300)}
    assert {"What does len do?", "What does `len` do?", "What does len() do?", "What is len?"} <= asked
    modules = {corpus.Item("json", "JSON.", module=True).ask(chance) for _ in range(300)}
    assert "What does json do?" in modules
    assert not any("()" in question for question in modules)


def test_a_folder_is_replaced_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    target, left = tmp_path / "made", tmp_path / ".made.partial"

    def files() -> list[str]:
        return sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*"))

    for folder in (target, left):
        folder.mkdir()
        (folder / "stale").touch()
    with contextlib.suppress(KeyboardInterrupt), whole_folder(target) as folder:
        (folder / "half").touch()
        raise KeyboardInterrupt
    assert files() == ["made", "made/stale"]
    with whole_folder(target) as folder:
        (folder / "fresh").touch()
        assert (target / "stale").exists()
    assert files() == ["made", "made/fresh"]
