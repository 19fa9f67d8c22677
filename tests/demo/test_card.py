"""The model card says what the recorded run says, and the questions are the ones that were fixed before it."""

import json
from html.parser import HTMLParser

import pytest

from edge_phi3.demo import DEMO_CHECKPOINT
from scripts.demo_model.card import render_card
from scripts.demo_model.corpus import EMPHASISED, LONGEST_ANSWER, QUESTIONS, question_name


def read(name):
    return json.loads((DEMO_CHECKPOINT / name).read_text("utf-8"))


@pytest.fixture(scope="module")
def facts():
    return read("training.json")


def test_the_card_is_the_one_that_the_recorded_run_gives(facts):
    size = sum(file.stat().st_size for file in DEMO_CHECKPOINT.iterdir() if file.name != "README.md")
    assert (DEMO_CHECKPOINT / "README.md").read_text("utf-8") == render_card(facts, read("config.json"), size)


def test_the_ten_questions_are_the_ones_fixed_before_training(facts):
    questions = read("questions.json")
    assert tuple(entry["question"] for entry in questions) == QUESTIONS
    assert [(a["question"], a["expected"]) for a in facts["answers"]] == [
        (entry["question"], entry["answer"]) for entry in questions
    ]
    assert {question_name(question) for question in QUESTIONS} <= EMPHASISED
    assert all(12 <= len(entry["answer"]) <= LONGEST_ANSWER for entry in questions)


def test_at_least_eight_answers_are_right_and_json_dumps_is_among_them(facts):
    right = [a["question"] for a in facts["answers"] if a["given"] == a["expected"]]
    assert len(right) >= 8
    assert "What does json.dumps do?" in right


def test_the_counts_add_up(facts):
    corpus = facts["corpus"]
    assert corpus["items"] == corpus["trained"] + corpus["held_out"]
    assert corpus["trained"] == corpus["emphasised"] + corpus["ordinary"]
    assert corpus["emphasised"] <= len(EMPHASISED)
    assert all(0 <= share <= 1 for share in facts["exact"].values())


def test_the_curves_cover_the_run_and_show_memorising(facts):
    steps = [step for step, _, _ in facts["curve"]]
    assert steps == sorted(set(steps))
    assert steps[-1] == facts["plan"]["steps"]
    _, trained, held_out = facts["curve"][-1]
    assert trained < facts["curve"][0][1]
    assert trained < held_out


def test_the_picture_is_well_formed_and_draws_both_splits():
    text: list[str] = []
    parser = HTMLParser()
    parser.handle_data = text.append
    parser.feed((DEMO_CHECKPOINT / "loss.svg").read_text("utf-8"))
    assert {"trained", "held out", "step", "nats per answer token"} <= {part.strip() for part in text}
