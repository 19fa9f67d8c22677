"""Rules for JSON in llama.cpp's language, GBNF, that every schema may use, and ranges of integers digit by digit."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Final

_SHARED: Final = {
    "ws": r'"\n"? " "{0,16}',
    "char": (
        r'[^"\\\x00-\x1F] | "\\" ["\\/bfnrt] | "\\u" [0-9a-cefA-CEF] hex hex hex | "\\u" [dD] [0-7] hex hex'
        r' | "\\u" [dD] [89abAB] hex hex "\\u" [dD] [c-fC-F] hex hex'
    ),
    "hex": "[0-9a-fA-F]",
    "string": r'"\"" char* "\""',
    "integer": '"-"? natural',
    "natural": '"0" | [1-9] [0-9]{0,15}',
    "fraction": '("." [0-9]{1,16})? ([eE] [-+]? [0-9]{1,2})?',
    "number": '"-"? natural fraction',
    "boolean": '"true" | "false"',
    "null": '"null"',
    "value": "object | array | string | number | boolean | null",
    "member": 'string ":" ws value',
    "object": '"{" ws (member ws ("," ws member ws)*)? "}"',
    "array": '"[" ws (value ws ("," ws value ws)*)? "]"',
    "date": (
        '[12] [0-9]{3} "-" (("0" [13578] | "10" | "12") "-" ("0" [1-9] | [12] [0-9] | "3" [01])'
        ' | ("0" [469] | "11") "-" ("0" [1-9] | [12] [0-9] | "30") | "02-" ("0" [1-9] | "1" [0-9] | "2" [0-8]))'
    ),
    "time": (
        '([01] [0-9] | "2" [0-3]) ":" [0-5] [0-9] ":" [0-5] [0-9] ("." [0-9]{1,6})?'
        ' ("Z" | [-+] ([01] [0-9] | "2" [0-3]) ":" [0-5] [0-9])'
    ),
    "date-time": 'date "T" time',
    "uuid": 'hex{8} "-" hex{4} "-" hex{4} "-" hex{4} "-" hex{12}',
    "ipv4": 'byte "." byte "." byte "." byte',
    "byte": '"25" [0-5] | "2" [0-4] [0-9] | "1" [0-9] [0-9] | [1-9] [0-9] | [0-9]',
}
"""Rules that schemas share. Half of a surrogate pair is no character, so `\\u` takes both or none."""

FORMATS: Final = ("date", "time", "date-time", "uuid", "ipv4")
"""Formats of strings, each a rule of its own."""

_WORD: Final = re.compile(r"[a-z][a-z0-9-]*")

_DEEPEST_BRANCH: Final = 40

_MOST_DIGITS: Final = 16
"""Digits of a number that has no bound on this side."""


def with_shared_rules(rules: Mapping[str, str]) -> str:
    """Write a grammar: the given rules, and the shared ones that they use."""
    written = dict(rules)
    waiting = list(rules.values())
    while waiting:
        # Words of literals count too, which does no harm.
        for name in _WORD.findall(waiting.pop()):
            if name in _SHARED and name not in written:
                written[name] = _SHARED[name]
                waiting.append(_SHARED[name])
    return "\n".join(f"{name} ::= {body}" for name, body in written.items())


def quoted(text: str) -> str:
    """Write a text as a literal of GBNF, in which only its own quotation marks and backslashes are special."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def one_of(texts: Iterable[str]) -> str:
    """Return a rule's body for some texts.

    Common beginnings stand once: llama.cpp follows every alternative that is still possible, at a cost for each token.
    """
    return _branches(sorted(set(texts)), _DEEPEST_BRANCH)


def _branches(texts: list[str], deepest: int) -> str:
    if len(texts) == 1 or deepest == 0:
        return " | ".join(quoted(text) for text in texts)
    # Sorted, so what the first and the last have in common all have.
    pairs = enumerate(zip(texts[0], texts[-1], strict=False))
    begin = texts[0][: next((place for place, (one, other) in pairs if one != other), len(texts[0]))]
    groups: dict[str, list[str]] = {}
    for text in texts:
        rest = text[len(begin) :]
        groups.setdefault(rest[:1], []).append(rest)
    branches = " | ".join(_branches(group, deepest - 1) for group in groups.values())
    return f"{quoted(begin)} ({branches})"


def between(low: int | None, high: int | None) -> str:
    """Return a rule's body for the integers from `low` to `high`, both included; None leaves that side open.

    Args:
        low: at most `high`.
        high: not None where `low` is.
    """
    parts: list[str] = []
    if low is None or low < 0:
        # The mirror image: from -low down to 1, or to -high.
        least = 1 if high is None or high >= 0 else -high
        parts.append(f'"-" ({_natural(least, None if low is None else -low)})')
    if high is None or high >= 0:
        parts.append(_natural(max(low or 0, 0), high))
    return " | ".join(parts)


def _natural(low: int, high: int | None) -> str:
    """Return alternatives for the numbers from `low` to `high`, of each count of digits."""
    digits = len(str(low))
    longest = digits if high is None else len(str(high))
    parts: list[str] = []
    for length in range(digits, longest + 1):
        smallest = max(low, 0 if length == 1 else 10 ** (length - 1))
        largest = 10**length - 1 if high is None else min(high, 10**length - 1)
        parts.append(_same_length(str(smallest), str(largest)))
    if high is None:
        parts.append(f"[1-9] [0-9]{{{digits},{max(digits, _MOST_DIGITS - 1)}}}")
    return " | ".join(parts)


def _same_length(low: str, high: str) -> str:
    """Return what lies between two numbers of equally many digits."""
    rest = len(low) - 1
    if low[0] == high[0]:
        return f'"{low[0]}"' + (f" ({_same_length(low[1:], high[1:])})" if rest else "")
    first, last = int(low[0]), int(high[0])
    parts: list[str] = []
    if rest and low[1:] != "0" * rest:
        parts.append(f'"{first}" ({_same_length(low[1:], "9" * rest)})')
        first += 1
    top = ""
    if rest and high[1:] != "9" * rest:
        top = f'"{last}" ({_same_length("0" * rest, high[1:])})'
        last -= 1
    if first <= last:
        parts.append(f"[{first}-{last}]" + (f" [0-9]{{{rest}}}" if rest else ""))
    return " | ".join([*parts, top] if top else parts)
