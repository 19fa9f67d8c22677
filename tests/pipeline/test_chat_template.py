"""Chat templates as they are found: what they make of conversations, and of an assistant's turn that was begun."""

import datetime as dt
import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_phi3.engine.added_tokens import SHIELD
from edge_phi3.engine.family import family_of
from edge_phi3.engine.grammars import CALL_TOKENS
from edge_phi3.engine.tokenizer import Tokenizer
from edge_phi3.pipeline import PromptError
from edge_phi3.pipeline.chat_template import ChatTemplate
from edge_phi3.pipeline.tool_calls import BARE_MARKS, CallPart, CallReader
from tests.support.cases import cases

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
    assert not template.foreign, "those of the family are rendered in the process"
    assert template.render(ASKED) == prompt
    for text in texts(tokenizer, 2000, seed=1):
        assert template.render([*ASKED, turn("assistant", text)]) == prompt + text
    # What was said before spells the same, or more.
    before = [*ASKED, turn("assistant", "1. one<|end|>\n"), turn("user", "1. ")]
    assert template.render([*before, turn("assistant", "1. ")]) == template.render(before) + "1. "


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
    shielded = tokenizer.shield({"tools": {"<|end|>": "<|end|>"}})
    dumped = ChatTemplate("{{ tools | tojson }}").render(ASKED, kwargs=shielded)
    assert dumped.replace(SHIELD, "") == '{"<|end|>": "<|end|>"}'
    assert not special.intersection(tokenizer.encode(dumped).tolist())


@cases
def test_what_follows_the_last_message_can_be_said(given: dict[str, Any], end: str) -> None:
    template = ChatTemplate(FOUND["Phi-3-mini-4k-instruct"]["template"], TOKENS)
    rendered = template.render([turn("user", "Hello"), turn("assistant", "Hi")], **given)
    assert rendered == "<|user|>\nHello<|end|>\n<|assistant|>\n" + end


@cases
def test_without_a_system_role_the_user_says_it(messages: str, expected: str, caplog: pytest.LogCaptureFixture) -> None:
    template = ChatTemplate(
        "{% for m in messages if m.role != 'system' %}{{ m.role[0] + ':' + m.content + ' ' }}{% endfor %}"
    )
    roles = {"s": "system", "u": "user", "a": "assistant"}
    rendered = template.render([turn(roles[word[0]], word) for word in messages.split()], continue_final_message=False)
    assert rendered.split(" ")[:-1] == expected.split(" ")
    assert "no system role" in caplog.text
    caplog.clear()
    template = ChatTemplate("{% if messages[0].role == 'system' %}{{ raise_exception('No system!') }}{% endif %}hi")
    with pytest.raises(PromptError, match="No system!"):
        template.render(ASKED)
    assert template.render(ASKED[1:]) == "hi", "one that refuses it itself is taken at its word"
    assert not caplog.text


@cases
def test_what_templates_find(source: str, expected: str) -> None:
    year = dt.datetime.now().strftime("%Y")  # noqa: DTZ005 - as templates see it
    rendered = ChatTemplate(source, TOKENS).render(ASKED, kwargs={"enable_thinking": "yes", "messages": []})
    assert rendered == expected.replace("YEAR", year)


@cases
def test_a_template_that_fails_refuses_the_conversation(source: str, what: str) -> None:
    with pytest.raises(PromptError, match=f"^messages: .*{what}") as refused:
        ChatTemplate(source.replace("DEEP", "(" * 50_000)).render(ASKED)
    assert len(str(refused.value)) < 400


def test_what_cannot_be_rendered_as_asked_is_refused() -> None:
    template = ChatTemplate(BUILT_IN)
    assert template.render([turn("user", "Hel")], continue_final_message=True) == "<|user|>\nHel"
    with pytest.raises(PromptError, match="`add_generation_prompt` must not be true"):
        template.render(ASKED, add_generation_prompt=True, continue_final_message=True)
    with pytest.raises(PromptError, match="role must be one of system, user, assistant, tool, not 'wizard'"):
        template.render([turn("wizard", "x")])
    silent = ChatTemplate("{% for m in messages if m.role != 'assistant' %}{{ m.content }}{% endfor %}")
    with pytest.raises(PromptError, match="cannot be continued"):
        silent.render([*ASKED, turn("assistant", "Hi")])


@pytest.mark.parametrize("tokenizer", ["demo", "real"], indirect=True)
def test_the_tokens_with_a_role_are_the_model_file_s(tokenizer: Tokenizer) -> None:
    assert tokenizer.special_tokens == TOKENS | {"pad_token": "<|endoftext|>", "unk_token": "<unk>"}


CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALLED: list[Any] = [*ASKED, {"role": "assistant", "content": None, "tool_calls": [CALL]}]
CALLED += [{"role": "tool", "tool_call_id": "c1", "content": "2"}]


@cases
def test_tools_calls_and_results_are_told_by_the_template_or_for_it(source: str, expected: str) -> None:
    marks = CALL_TOKENS if source == "Phi-4-mini-instruct" else BARE_MARKS
    template = FOUND[source]["template"] if source in FOUND else source
    rendered = ChatTemplate(template, TOKENS, marks).render(CALLED, tools=[ADD])
    assert rendered.endswith(expected)
    if source == "built in":
        system = rendered.removesuffix(expected)
        assert system.startswith("<|system|>\nBe brief.\n\n")
        assert system.endswith('\n{"name": "add", "parameters": {"type": "object"}}')
        assert "functools[{" in system
        assert "<|system|>\n" + system.partition("\n\n")[2] in ChatTemplate(BUILT_IN).render(ASKED[1:], tools=[ADD])


@given(st.lists(st.integers(1, 30), max_size=40))
def test_calls_are_read_however_their_text_is_cut(sizes: list[int]) -> None:
    calls = [("add", '{"a": "}\\\\\\"]", "b": [{}, {"c": "functools["}]}'), ("go", "{}")]
    written = ", ".join(f'{{"name": "{name}","arguments": {arguments}}}' for name, arguments in calls)
    for begin, end in (("functools[", "]"), ("<|tool_call|>[", "]<|/tool_call|>"), ("So, functools: functools[", "]")):
        text, reader, place = begin + written + end, CallReader(), 0
        parts: list[str | CallPart] = []
        for size in [*sizes, len(text)]:
            parts += reader.push(text[place : place + size], last=place + size >= len(text))
            place += size
        beside = begin.removesuffix("functools[").removesuffix("<|tool_call|>[")
        assert "".join(part for part in parts if isinstance(part, str)) == beside
        read = [part for part in parts if isinstance(part, CallPart)]
        assert [(part.name, part.index) for part in read if not part.arguments] == [("add", 0), ("go", 1)]
        for index, (_, arguments) in enumerate(calls):
            assert "".join(part.arguments for part in read if part.index == index) == arguments
