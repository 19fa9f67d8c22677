"""The trainer's corpus, first paragraphs of docstrings as prose, and its folder, which appears whole or not at all."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from scripts.demo_model.corpus import (
    EMPHASISED,
    LONGEST_ANSWER,
    QUESTIONS,
    Item,
    dice,
    expected_answer,
    first_paragraph,
    question_name,
    read_corpus,
    split_corpus,
)
from scripts.demo_model.folder import whole_folder


@pytest.fixture(scope="module")
def items() -> list[Item]:
    return read_corpus()


@pytest.mark.parametrize(
    ("docstring", "answer"),
    [
        ("Return the sum of x and y.", "Return the sum of x and y."),
        ("Wrapped over\n    two lines.\n\n    More.", "Wrapped over two lines."),
        ("f(x) -> y\n\nReturn y for x.", "Return y for x."),
        ("f(x[, y]) -> z\nf(x) -> z\n\nReturn z for x.", "Return z for x."),
        ("f(x) -> Return y for x.", "Return y for x."),
        ("D.copy() -> a shallow copy of D", "a shallow copy of D"),
        ("First sentence. " + "Long " * 60 + "second.", "First sentence."),
        ("Do it very well. For example:\n\n    f()", "Do it very well."),
        ("Long " * 60 + "only.", None),
        (">>> f(1) is an example", None),
        ("f(x)", None),
        ("", None),
        ("Short.", None),
    ],
)
def test_first_paragraph(docstring: str, answer: str | None) -> None:
    assert first_paragraph(docstring) == answer


def test_names_and_shared_texts_come_once_and_answers_are_prose_of_limited_length(items: list[Item]) -> None:
    assert len(items) > 1000
    assert all(12 <= len(item.answer) <= LONGEST_ANSWER for item in items)
    assert all(item.answer == " ".join(item.answer.split()) for item in items)
    assert len({item.name for item in items}) == len(items)
    ordinary = [item.answer for item in items if not item.emphasised]
    assert len(ordinary) == len(set(ordinary))


def test_every_question_of_the_card_has_an_answer(items: list[Item]) -> None:
    names = {item.name for item in items}
    for question in QUESTIONS:
        assert question_name(question) in names & EMPHASISED
        assert expected_answer(question, items)


def test_what_this_process_patches_does_not_count(items: list[Item], monkeypatch: pytest.MonkeyPatch) -> None:
    def warn_often() -> None:
        """Warn more often than the library does."""

    warn_often.__module__ = "textwrap"
    monkeypatch.setattr(textwrap, "__all__", [*textwrap.__all__, "warn_often"])
    monkeypatch.setattr(textwrap, "warn_often", warn_often, raising=False)
    assert read_corpus() == items


def test_held_out_items_are_ordinary_and_never_trained(items: list[Item]) -> None:
    split = split_corpus(items, seed=3, share=0.05)
    assert len(split.held_out) == round(0.05 * len(items))
    assert not any(item.emphasised for item in split.held_out)
    assert not set(split.trained) & set(split.held_out)
    assert set(split.trained) | set(split.held_out) == set(items)
    assert split_corpus(items, seed=3, share=0.05) == split
    assert split_corpus(items, seed=4, share=0.05) != split


def test_questions_come_with_and_without_backticks_and_a_module_is_no_call() -> None:
    chance = dice(0)
    asked = {Item("len", "Length.").ask(chance) for _ in range(300)}
    assert {"What does len do?", "What does `len` do?", "What does len() do?", "What is len?"} <= asked
    modules = {Item("json", "JSON.", module=True).ask(chance) for _ in range(300)}
    assert "What does json do?" in modules
    assert not any("()" in question for question in modules)


def files_of(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_is_replaced_as_a_whole_and_what_a_crash_left_is_cleared(tmp_path: Path) -> None:
    target, left = tmp_path / "made", tmp_path / ".made.partial"
    for folder in (target, left):
        folder.mkdir()
        (folder / "stale").touch()
    with whole_folder(target) as folder:
        (folder / "fresh").touch()
        assert files_of(target) == ["stale"]
    assert (files_of(tmp_path), files_of(target)) == (["made"], ["fresh"])


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, OSError])
def test_an_interrupted_run_leaves_the_old_folder_and_nothing_else(tmp_path: Path, error: type[BaseException]) -> None:
    target = tmp_path / "made"
    target.mkdir()
    (target / "old").touch()

    def interrupted() -> None:
        with whole_folder(target) as folder:
            (folder / "half").touch()
            raise error

    with pytest.raises(error):
        interrupted()
    assert (files_of(tmp_path), files_of(target)) == (["made"], ["old"])
