"""Chat templates as they are found: what they make of conversations, and of an assistant's turn that was begun."""

from __future__ import annotations

import datetime as dt
import json
import random
from pathlib import Path
from typing import Any

import pytest

from edge_phi3.engine.added_tokens import SHIELD
from edge_phi3.engine.family import family_of
from edge_phi3.engine.tokenizer import Tokenizer
from edge_phi3.pipeline import PromptError
from edge_phi3.pipeline.chat_template import ChatTemplate

FOUND: dict[str, dict[str, str]] = json.loads(
    (Path(__file__).parents[1] / "data" / "chat_templates.json").read_text(encoding="utf-8")
)
BUILT_IN = family_of({"<|user|>"}).chat_template
FOUND["built in"] = {"template": BUILT_IN, "prompt": FOUND["Phi-3-mini-4k-instruct"]["prompt"]}
ASKED = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
TOKENS = {"bos_token": "<s>", "eos_token": "<|endoftext|>"}
EDGES = ["", " ", "\n", "<", "|", ">", "end", "n", "1. ", "```json\n", "<|end|>", "<|assistant|>\n", "Hello", "<|"]
EDGES += ["\t x \n\n"]


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def texts(tokenizer: Tokenizer, count: int, seed: int) -> list[str]:
    """Return random texts of the vocabulary's tokens, special ones too, of characters, and of both; the edges first."""
    chance = random.Random(seed)
    pieces = [text for text in tokenizer.token_texts if text] + EDGES
    alphabet = " \n\t\r<>|{}%'\"\\aé漢😀\u200b\u3000\ufffd"
    found = list(EDGES)
    while len(found) < count:
        words = chance.choices(pieces, k=chance.randrange(4)) + chance.choices(alphabet, k=chance.randrange(6))
        found.append("".join(chance.sample(words, len(words))))
    return found


@pytest.mark.parametrize("name", FOUND)
def test_a_turn_that_was_begun_is_continued_to_the_letter(tokenizer: Tokenizer, name: str) -> None:
    template = ChatTemplate(FOUND[name]["template"], TOKENS)
    prompt = FOUND[name]["prompt"]
    assert template.render(ASKED) == prompt
    for text in texts(tokenizer, 2000, seed=1):
        assert template.render([*ASKED, turn("assistant", text)]) == prompt + text
    # What was said before spells the same, or more.
    said = template.render([*ASKED, turn("assistant", "1. one<|end|>\n"), turn("user", "1. ")])
    assert template.render(
        [*ASKED, turn("assistant", "1. one<|end|>\n"), turn("user", "1. "), turn("assistant", "1. ")]
    ) == (said + "1. ")


@pytest.mark.parametrize("name", FOUND)
def test_what_users_write_stays_text_where_that_is_wanted(tokenizer: Tokenizer, name: str) -> None:
    template = ChatTemplate(FOUND[name]["template"], TOKENS)
    special = tokenizer.special_ids
    expected = [token for token in tokenizer.encode(FOUND[name]["prompt"]).tolist() if token in special]
    for text in texts(tokenizer, 500, seed=2):
        messages = [turn("system", f"Be{text}brief."), turn("user", f"x{text}y"), turn("assistant", f"a{text}b")]
        plain = template.render(messages)
        shielded = template.render(tokenizer.shield(messages))
        assert shielded.replace(SHIELD, "") == plain
        tokens = tokenizer.encode(shielded).tolist()
        assert [token for token in tokens if token in special] == expected
        # All characters are there, but for the white space that the template's own tokens swallow.
        decoded = tokenizer.decode(tokens, skip_special_tokens=False)
        assert "".join(decoded.split()) == "".join(plain.split())
    dumped = ChatTemplate("{{ tools | tojson }}").render(
        ASKED, kwargs=tokenizer.shield({"tools": {"<|end|>": "<|end|>"}})
    )
    assert dumped.replace(SHIELD, "") == '{"<|end|>": "<|end|>"}'
    assert not special.intersection(tokenizer.encode(dumped).tolist())


@pytest.mark.parametrize(
    ("given", "end"),
    [
        ({}, "Hi"),
        ({"add_generation_prompt": True}, "Hi<|end|>\n<|assistant|>\n"),
        ({"add_generation_prompt": False}, "Hi<|end|>\n<|endoftext|>"),
        ({"continue_final_message": True}, "Hi"),
        ({"continue_final_message": True, "add_generation_prompt": False}, "Hi"),
        ({"continue_final_message": False}, "Hi<|end|>\n<|assistant|>\n"),
    ],
)
def test_what_follows_the_last_message_can_be_said(given: dict[str, Any], end: str) -> None:
    template = ChatTemplate(FOUND["Phi-3-mini-4k-instruct"]["template"], TOKENS)
    rendered = template.render([turn("user", "Hello"), turn("assistant", "Hi")], **given)
    assert rendered == "<|user|>\nHello<|end|>\n<|assistant|>\n" + end


def test_a_users_turn_is_continued_when_asked_for_and_both_wishes_are_refused() -> None:
    template = ChatTemplate(BUILT_IN)
    assert template.render([turn("user", "Hel")], continue_final_message=True) == "<|user|>\nHel"
    with pytest.raises(PromptError, match="`add_generation_prompt` must not be true"):
        template.render(ASKED, add_generation_prompt=True, continue_final_message=True)


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ("s1 u1", "u:s1\nu1"),
        ("s1 s2 a1 u1 u2", "a:a1 u:s1\ns2\nu1 u:u2"),
        ("u1 s1 a1 u2", "u:u1 a:a1 u:s1\nu2"),
        ("s1 a1", "u:s1 a:a1"),
        ("u1 a1 s1 s2", "u:u1 a:a1 u:s1\ns2"),
    ],
)
def test_without_a_system_role_its_words_are_the_users(
    messages: str, expected: str, caplog: pytest.LogCaptureFixture
) -> None:
    template = ChatTemplate(
        "{% for m in messages if m.role != 'system' %}{{ m.role[0] + ':' + m.content + ' ' }}{% endfor %}"
    )
    roles = {"s": "system", "u": "user", "a": "assistant"}
    rendered = template.render([turn(roles[word[0]], word) for word in messages.split()], continue_final_message=False)
    assert rendered.split(" ")[:-1] == expected.split(" ")
    assert "no system role" in caplog.text


def test_a_template_that_refuses_a_system_role_itself_is_taken_at_its_word(caplog: pytest.LogCaptureFixture) -> None:
    template = ChatTemplate("{% if messages[0].role == 'system' %}{{ raise_exception('No system!') }}{% endif %}hi")
    with pytest.raises(PromptError, match="No system!"):
        template.render(ASKED)
    assert template.render(ASKED[1:]) == "hi"
    assert not caplog.text


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ bos_token }}|{{ eos_token }}|{{ pad_token }}|{{ unk_token }}", "<s>|<|endoftext|>||"),
        ("{{ tools is none and documents is none }}", "True"),
        ("{{ strftime_now('%Y') }}", str(dt.datetime.now().year)),  # noqa: DTZ005 - as templates see it
        (
            "{% for m in messages %}{% generation %}{% set x = 1 %}{{ m.content }},"
            "{% endgeneration %}{{ x }}{% endfor %}",
            "Be brief.,Hello,",
        ),
        ("{% for m in messages %}{% if loop.last %}{% continue %}{% endif %}{{ m.content }}{% endfor %}", "Be brief."),
        ("{{ messages[0] | tojson }}", '{"role": "system", "content": "Be brief."}'),
        ("{{ {'a': '<é>'} | tojson(indent=1) }}", '{\n "a": "<é>"\n}'),
        ("{{ enable_thinking }}", "yes"),
    ],
)
def test_what_templates_find(source: str, expected: str) -> None:
    assert ChatTemplate(source, TOKENS).render(ASKED, kwargs={"enable_thinking": "yes", "messages": []}) == expected


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("{{ raise_exception('Roles must alternate.') }}", "refuses them: Roles must alternate"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ messages + 1 }}", "TypeError"),
        ("{{ messages[9]['role'] }}", "refuses them"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ strftime_now(1) }}", "TypeError"),
        ("{% if %}", "cannot be compiled"),
        ("{% nosuchtag %}", "cannot be compiled"),
    ],
)
def test_a_template_that_fails_refuses_the_conversation(source: str, what: str) -> None:
    with pytest.raises(PromptError, match=f"^messages: .*{what}"):
        ChatTemplate(source).render(ASKED)


def test_a_turn_that_a_template_leaves_out_cannot_be_continued() -> None:
    template = ChatTemplate("{% for m in messages if m.role != 'assistant' %}{{ m.content }}{% endfor %}")
    with pytest.raises(PromptError, match="cannot be continued"):
        template.render([*ASKED, turn("assistant", "Hi")])


@pytest.mark.parametrize("tokenizer", ["demo", "real"], indirect=True)
def test_the_tokens_with_a_role_are_the_model_file_s(tokenizer: Tokenizer) -> None:
    assert tokenizer.special_tokens == TOKENS | {"pad_token": "<|endoftext|>", "unk_token": "<unk>"}


def test_roles_are_known() -> None:
    with pytest.raises(PromptError, match="role must be one of system, user, assistant, not 'tool'"):
        ChatTemplate(BUILT_IN).render([turn("tool", "x")])
