"""Grammars that answers are held to, in llguidance's dialect of Lark.

https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from llguidance import LLMatcher
from llguidance.gbnf_to_lark import gbnf_to_lark

from edge_phi3.engine.errors import SchemaError

BARE_CALLS: Final = "functools"
"""What stands before a list of calls where a vocabulary has no tokens for that; Phi-4-mini writes it too."""
CALL_TOKENS: Final = ("<|tool_call|>", "<|/tool_call|>")

_JSON_EVERYWHERE, _JSON_NOWHERE, _JSON_IN_CALLS = map(
    re.compile, (b"", b"(?!)", rb"\xff|(functools|<\|tool_call\|>)\[")
)
_LONGEST_GBNF: Final = 16 << 10  # characters; the time that it takes to translate grows with their square
_START: Final = re.compile(r"(?m)^[?!]*start\b[^:\n]*:(?!:=)")  # the first rule of Lark
_ESCAPE: Final = re.compile(r"\\(?:u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|.)", re.DOTALL)
_MOST_OPTIONAL: Final = 1000  # parts of a regular expression; the time that they take grows with their square
_OPTIONS: Final = '%llguidance {"no_forcing": true}\n'
_LIST: Final = r"""
calls: "[" rest
rest: call {more} "]"
TEXT: /(.|\n)*/
bare[lazy]: /(.|\n)*({bare}|<\|tool_call\|>)\[/
OPEN: /\{{"name": ?/
MIDDLE: /, ?"arguments": ?/
"""


@dataclass(frozen=True, slots=True)
class Grammar:
    """A language: its rules, and what ``@name`` stands for in them, JSON schemas, parsed from JSON, or further rules.

    `json_from` finds the text behind which JSON begins; the bytes of special tokens begin with 0xff.
    """

    lark: str
    named: Mapping[str, Any] = field(default_factory=dict)
    json_from: re.Pattern[bytes] = _JSON_NOWHERE


def json_grammar(schema: object) -> Grammar:
    """Return the JSON texts that follow a schema; a space may stand before them."""
    return Grammar(_OPTIONS + 'start: " "? @json', {"json": schema}, _JSON_EVERYWHERE)


def regex_grammar(pattern: str) -> Grammar:
    """Return the texts that a regular expression matches as a whole."""
    if sum(map(pattern.count, ("?", "*", "{0,", "|)", "(|"))) > _MOST_OPTIONAL:
        raise SchemaError(f"more than {_MOST_OPTIONAL} of its parts may be empty")
    whole = pattern.removeprefix("^")
    if whole.endswith("$") and not whole.endswith("\\$"):
        whole = whole[:-1]
    return Grammar(_OPTIONS + json.loads(LLMatcher.grammar_from_regex(whole))["grammars"][0]["lark_grammar"])


def choice_grammar(choices: Sequence[str]) -> Grammar:
    """Return the given texts, one or more."""
    return Grammar(f"{_OPTIONS}start: TEXT\nTEXT: {' | '.join(_text(choice) for choice in choices)}")


def written_grammar(text: str) -> Grammar:
    """Return the language of a grammar in Lark, or in llama.cpp's GBNF, as far as Lark can say it; or `SchemaError`."""
    if "%json" in text:
        raise SchemaError("it holds a JSON schema (`%json`), which has fields of its own, such as `guided_json`")
    if "::=" in text and not _START.search(text):
        if len(text) > _LONGEST_GBNF:
            raise SchemaError(f"GBNF is taken up to {_LONGEST_GBNF} characters, Lark up to --max-schema-size")
        try:
            text = gbnf_to_lark(_ESCAPE.sub(_character, text))
        except Exception as error:  # noqa: BLE001 - of many kinds, some of them Python's own
            raise SchemaError(f"it is no GBNF: {error}") from None
    return Grammar(_OPTIONS + re.sub(r"(?m)^%llguidance.*$", "", text))


def _character(escape: re.Match[str]) -> str:
    r"""Return what an escape such as ``\u00e9`` stands for: the translator would drop its zeros."""
    if not (digits := escape[1] or escape[2]):
        return escape[0]
    return chr(int(digits, 16)) if int(digits, 16) > 127 else f"\\x{int(digits, 16):02x}"


def calls_grammar(
    tools: Sequence[tuple[str, object]],
    tokens: tuple[int, int] | None,
    *,
    answer: Grammar | None = None,
    may_answer: bool,
    parallel: bool,
) -> Grammar:
    """Return lists of calls of one or more tools, each a name and the schema of its arguments.

    `tokens` are those that stand around a list; None where `BARE_CALLS` stands before it. With `may_answer` something
    else may come: `answer`, or any text if that is None, behind which calls may come too. With `parallel` there may be
    several calls.
    """
    around = "" if tokens is None else f"<[{tokens[0]}]> calls <[{tokens[1]}]>"
    forms = [around or f'" "? "{BARE_CALLS}" calls']
    if may_answer and answer is None:
        forms = ["TEXT", "bare rest"] + [f"TEXT {around}"] * bool(around)
    elif may_answer:
        forms.append("@answer")
    names = [f"call_{number}" for number in range(len(tools))]
    rules = [f"start: {' | '.join(forms)}", f"call: {' | '.join(names)}"]
    named = {}
    for name, (tool, schema) in zip(names, tools, strict=True):
        rules.append(f'{name}: OPEN {_text(json.dumps(tool))} MIDDLE @{name} "}}"')
        named[name] = schema
    if answer is not None:
        named |= {"answer": answer.lark, **answer.named}
    lark = _OPTIONS + "\n".join(rules) + _LIST.format(more="(/, ?/ call)*" * parallel, bare=BARE_CALLS)
    is_json = not may_answer or (answer is not None and answer.json_from is _JSON_EVERYWHERE)
    return Grammar(lark, named, _JSON_EVERYWHERE if is_json else _JSON_IN_CALLS)


def _text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
