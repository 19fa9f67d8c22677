"""JSON schemas as grammars in llama.cpp's language, GBNF.

Every text of the grammar is JSON that the schema accepts. It need not be the other way round: object keys come in the
schema's order, keys that it does not name only where it names none, numbers are of limited length, and space is scarce,
so that an answer comes to its end. What cannot be held to is refused by name, never ignored.

Keywords are those of JSON Schema 2020-12 (https://json-schema.org/draft/2020-12).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, Final, NoReturn

from edge_phi3.engine.json_exclusion import exclude_each_other
from edge_phi3.engine.json_rules import FORMATS, between, one_of, quoted, with_shared_rules
from edge_phi3.llama import GrammarError

MOST_REPETITIONS: Final = 2000
"""How often llama.cpp lets a rule repeat; it takes any larger number for no limit at all."""

_MOST_RULES: Final = 4000
_MOST_EXPANDED: Final = 20_000
_MOST_ALTERNATIVES: Final = 128
_DEEPEST: Final = 64

_ANNOTATIONS: Final = frozenset(
    {
        "title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "discriminator",
        "$schema", "$id", "$comment", "$defs", "definitions", "$anchor",
    }
)  # fmt: skip
_KEYWORDS: Final[Mapping[str, frozenset[str]]] = {
    "object": frozenset({"properties", "required", "additionalProperties"}),
    "array": frozenset({"items", "prefixItems", "minItems", "maxItems"}),
    "string": frozenset({"minLength", "maxLength", "format"}),
    "integer": frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}),
    "number": frozenset({"minimum"}),
    "boolean": frozenset(),
    "null": frozenset(),
}
"""What each type may be narrowed by."""

_PYTHON_TYPES: Final[Mapping[str, tuple[type, ...]]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
}


def json_grammar(schema: object | None = None) -> str:
    """Return the grammar of the JSON texts that a schema accepts.

    Args:
        schema: parsed from JSON; None for any object.

    Returns:
        The grammar; its start symbol is ``root``. A text may begin with one space, as answers of Phi-3 do.

    Raises:
        GrammarError: the schema is none, or says what a grammar cannot. The message names the place and the keyword.
    """
    converter = _Converter(schema)
    start = "object" if schema is None else converter.rule_of(schema, "")
    return converter.text(f'" "? {start}')


class _Converter:
    """Turns one schema into rules, one for each schema inside it."""

    def __init__(self, root: object) -> None:
        self._root = root
        self._rules: dict[str, str] = {}
        self._references: dict[str, str] = {}
        self._alternatives = 0
        self._expanded = 0
        self._depth = 0

    def text(self, root: str) -> str:
        """Return all rules, the shared ones among them."""
        return with_shared_rules({"root": root, **self._rules})

    def rule_of(self, schema: object, place: str) -> str:
        """Add the rules of a schema, and give the name of the first.

        Args:
            schema: an object, true or false.
            place: JSON pointer to it.
        """
        self._depth += 1
        if self._depth > _DEEPEST:
            _refuse(place, f"schemas inside each other are taken up to {_DEEPEST} deep")
        try:
            return self._rule_of(schema, place)
        finally:
            self._depth -= 1

    def _rule_of(self, schema: object, place: str) -> str:
        if schema is True:
            return "value"
        if schema is False:
            _refuse(place, "false accepts nothing")
        keywords = _mapping(schema, place)
        own = {name: value for name, value in keywords.items() if name not in _ANNOTATIONS}
        if not own:
            return "value"
        for keyword in ("$ref", "anyOf", "oneOf", "allOf"):
            if keyword in own:
                if beside := [name for name in own if name != keyword and not (name == "type" and keyword != "$ref")]:
                    _refuse(place, f"`{beside[0]}` beside `{keyword}` is not supported")
                return self._combined(keyword, own, place)
        if "const" in own:
            return self._literals([own["const"]], own, "const", place)
        if "enum" in own:
            return self._literals(_list(own["enum"], f"{place}/enum"), own, "enum", place)
        types = _types(own, place)
        allowed = frozenset({"type"}).union(*(_KEYWORDS[kind] for kind in types))
        for name in own:
            if name not in allowed:
                _refuse(place, f"`{name}` is not supported for the type {' or '.join(types)}")
        return self._either([getattr(self, f"_{kind}")(own, place) for kind in types])

    # -- several schemas

    def _combined(self, keyword: str, own: Mapping[str, Any], place: str) -> str:
        if keyword == "$ref":
            return self._reference(own[keyword], place)
        schemas = _list(own[keyword], f"{place}/{keyword}")
        if not schemas:
            _refuse(f"{place}/{keyword}", "it is empty")
        if keyword == "allOf" and len(schemas) > 1:
            _refuse(place, "`allOf` is not supported for more than one schema")
        # Each is followed by itself for as long as it may be the one that is meant.
        self._alternatives += len(schemas)
        if self._alternatives > _MOST_ALTERNATIVES:
            raise GrammarError(f"its `anyOf` and `oneOf` hold more than {_MOST_ALTERNATIVES} schemas in all")
        if "type" in own:
            schemas = [{"type": own["type"]} | _mapping(each, f"{place}/{keyword}") for each in schemas]
        if keyword == "oneOf" and not exclude_each_other([self._resolved(each) for each in schemas]):
            _refuse(
                place,
                "`oneOf` is supported where types, or a required property with a `const`, tell its schemas apart; use"
                " `anyOf`",
            )
        return self._either([self.rule_of(each, f"{place}/{keyword}/{at}") for at, each in enumerate(schemas)])

    def _reference(self, pointer: object, place: str) -> str:
        if not isinstance(pointer, str) or not (pointer == "#" or pointer.startswith("#/")):
            _refuse(place, "`$ref` must point into the schema itself, as `#/$defs/name` does")
        if pointer not in self._references:
            name = f"ref-{len(self._references)}"
            self._references[pointer] = name
            target = self._target(pointer, place)
            self._rules[name] = self.rule_of(target, pointer[1:])
        return self._references[pointer]

    def _target(self, pointer: str, place: str) -> object:
        found: Any = self._root
        for part in pointer.split("/")[1:]:
            key = part.replace("~1", "/").replace("~0", "~")
            if isinstance(found, list) and key.isdecimal() and int(key) < len(found):
                found = found[int(key)]
            elif isinstance(found, dict) and key in found:
                found = found[key]
            else:
                _refuse(place, f"`$ref` points to {pointer[:80]!r}, where nothing is")
        return found

    def _resolved(self, schema: object) -> object:
        """Follow a reference, and references to references, as far as there are new ones."""
        seen: set[str] = set()
        while isinstance(schema, dict) and isinstance(pointer := schema.get("$ref"), str) and pointer not in seen:
            seen.add(pointer)
            schema = self._target(pointer, "")
        return schema

    def _literals(self, values: list[Any], own: Mapping[str, Any], keyword: str, place: str) -> str:
        if beside := [name for name in own if name not in {keyword, "type"}]:
            _refuse(place, f"`{beside[0]}` beside `{keyword}` is not supported")
        kinds = _types(own, place) if "type" in own else list(_PYTHON_TYPES)
        fitting = [value for value in values if any(_is_a(value, kind) for kind in kinds)]
        if not fitting:
            _refuse(place, f"`{keyword}` leaves no value")
        return self._add(one_of([json.dumps(value, ensure_ascii=False) for value in fitting]))

    # -- types

    def _object(self, own: Mapping[str, Any], place: str) -> str:
        properties = _mapping(own.get("properties", {}), f"{place}/properties")
        required = _list(own.get("required", []), f"{place}/required")
        if not all(isinstance(name, str) for name in required):
            _refuse(f"{place}/required", "it must be a list of texts")
        others = own.get("additionalProperties", True)
        unnamed = dict.fromkeys(name for name in required if name not in properties)
        if others is False and unnamed:
            _refuse(place, f"`required` names {next(iter(unnamed))[:60]!r}, which is not among the properties")
        members = {name: self.rule_of(each, f"{place}/properties/{name}") for name, each in properties.items()}
        if not properties:
            if others is False:
                return self._add('"{" ws "}"')
            value = self.rule_of(others, f"{place}/additionalProperties")
            if not unnamed:
                member = self._add(f'string ":" ws {value} ws')
                return self._add(f'"{{" ws ({member} ("," ws {member})*)? "}}"')
            members = {}
        if unnamed:
            value = self.rule_of(others, f"{place}/additionalProperties")
            members |= dict.fromkeys(unnamed, value)
        return self._add(f'"{{" ws {self._members(members, frozenset(required))} "}}"')

    def _members(self, members: Mapping[str, str], required: frozenset[str]) -> str:
        """Add the rules of members in their order, built from the last one: with and without one before them."""
        if sum(name not in required for name in members) > _MOST_ALTERNATIVES:
            raise GrammarError(f"an object has more than {_MOST_ALTERNATIVES} properties that are not required")
        first, after = '""', '""'
        for name, value in reversed(list(members.items())):
            member = self._add(f'{quoted(json.dumps(name, ensure_ascii=False))} ":" ws {value} ws')
            if name in required:
                first, after = self._add(f"{member} {after}"), self._add(f'"," ws {member} {after}')
            else:
                first = self._add(f"{member} {after} | {first}")
                after = self._add(f'("," ws {member})? {after}')
        return first

    def _array(self, own: Mapping[str, Any], place: str) -> str:
        prefix = _list(own.get("prefixItems", []), f"{place}/prefixItems")
        least = _count(own, "minItems", place) or 0
        most = _count(own, "maxItems", place)
        if most is not None and most < least:
            _refuse(place, "`maxItems` is below `minItems`")
        if most == 0:
            return self._add('"[" ws "]"')
        items = [self.rule_of(each, f"{place}/prefixItems/{at}") for at, each in enumerate(prefix)][:most]
        rest = own.get("items", True)
        if rest is False or len(items) == most:
            if least > len(items):
                _refuse(place, f"`minItems` is {least}, but no more than {len(items)} items are allowed")
            tail, left = "", '""'
        else:
            item = self.rule_of(rest, f"{place}/items")
            # A tuple, as it is written nowadays, leaves open what comes after it: nothing is fine.
            more = most if "items" in own or not items or least > len(items) else len(items)
            taken = len(items)
            tail = self._repeated(self._add(f'"," ws {item} ws'), max(least - max(taken, 1), 0), more, max(taken, 1))
            if not items:
                whole = self._add(f"{item} ws {tail}")
                return self._add(f'"[" ws {whole} "]"' if least else f'"[" ws {whole}? "]"')
            left = tail or '""'
        for at in range(len(items) - 1, 0, -1):
            left = self._add(f'"," ws {items[at]} ws {left}' if at < least else f'("," ws {items[at]} ws {left})?')
        if not items:
            return self._add('"[" ws "]"')
        whole = self._add(f"{items[0]} ws {left}")
        return self._add(f'"[" ws {whole} "]"' if least else f'"[" ws {whole}? "]"')

    def _repeated(self, rule: str, least: int, most: int | None, taken: int) -> str:
        """Repeat a rule at least so often, and up to `most` less what is taken."""
        upper = None if most is None else min(most - taken, MOST_REPETITIONS)
        if upper == 0:
            return ""
        self._expanded += max(least, upper or 0)
        if self._expanded > _MOST_EXPANDED:
            raise GrammarError(f"its lengths add up to more than {_MOST_EXPANDED}")
        return f"{rule}{{{least},{'' if upper is None else upper}}}"

    def _string(self, own: Mapping[str, Any], place: str) -> str:
        least, most = _count(own, "minLength", place), _count(own, "maxLength", place)
        if "format" in own:
            if own["format"] not in FORMATS:
                _refuse(place, f"`format` {str(own['format'])[:40]!r} is not supported; {', '.join(FORMATS)} are")
            if least is not None or most is not None:
                _refuse(place, "`minLength` and `maxLength` beside `format` are not supported")
            return self._add(rf'"\"" {own["format"]} "\""')
        if least is None and most is None:
            return "string"
        if most is not None and most < (least or 0):
            _refuse(place, "`maxLength` is below `minLength`")
        return self._add(rf'"\"" {self._repeated("char", least or 0, most, 0)} "\""')

    def _integer(self, own: Mapping[str, Any], place: str) -> str:
        lows = [
            own[name] + step for name, step in (("minimum", 0), ("exclusiveMinimum", 1)) if _whole(own, name, place)
        ]
        highs = [
            own[name] - step for name, step in (("maximum", 0), ("exclusiveMaximum", 1)) if _whole(own, name, place)
        ]
        if not lows and not highs:
            return "integer"
        low, high = max(lows, default=None), min(highs, default=None)
        if low is not None and high is not None and low > high:
            _refuse(place, "no integer lies between its bounds")
        return self._add(between(low, high))

    def _number(self, own: Mapping[str, Any], place: str) -> str:
        if beside := [name for name in own if name in _KEYWORDS["integer"] and name != "minimum"]:
            _refuse(place, f"`{beside[0]}` is not supported for the type number")
        if "minimum" not in own:
            return "number"
        if own["minimum"] != 0 or isinstance(own["minimum"], bool):
            _refuse(place, "`minimum` of a number is supported at 0 only; integers take any bounds")
        return self._add("natural fraction")

    def _boolean(self, _own: Mapping[str, Any], _place: str) -> str:
        return "boolean"

    def _null(self, _own: Mapping[str, Any], _place: str) -> str:
        return "null"

    # -- rules

    def _either(self, names: Iterable[str]) -> str:
        different = list(dict.fromkeys(names))
        return different[0] if len(different) == 1 else self._add(" | ".join(different))

    def _add(self, body: str) -> str:
        name = f"rule-{len(self._rules)}"
        if len(self._rules) >= _MOST_RULES:
            raise GrammarError(f"it needs more than {_MOST_RULES} rules")
        self._rules[name] = body
        return name


def _refuse(place: str, why: str) -> NoReturn:
    raise GrammarError(f"at {place[:120] or 'its top'}: {why}")


def _mapping(value: object, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        _refuse(place, "it must be an object")
    return value


def _list(value: object, place: str) -> list[Any]:
    if not isinstance(value, list):
        _refuse(place, "it must be a list")
    return value


def _count(own: Mapping[str, Any], name: str, place: str) -> int | None:
    value = own.get(name)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        _refuse(place, f"`{name}` must be an integer of at least 0")
    if name.startswith("min") and value > MOST_REPETITIONS:
        _refuse(place, f"`{name}` is supported up to {MOST_REPETITIONS}")
    return value


def _whole(own: Mapping[str, Any], name: str, place: str) -> bool:
    """Return whether an integer has this bound."""
    value = own.get(name)
    if value is None:
        return False
    if not isinstance(value, int) or isinstance(value, bool) or abs(value) > 10**15:
        _refuse(place, f"`{name}` of an integer must be an integer between -10^15 and 10^15")
    return True


def _types(own: Mapping[str, Any], place: str) -> list[str]:
    """Return the types that a schema names, or that its keywords are about."""
    named = own.get("type")
    if named is None:
        named = [kind for kind, keywords in _KEYWORDS.items() if keywords & own.keys()][:1]
        if not named:
            _refuse(place, f"`{next(iter(own))}` is not supported")
    types = [named] if isinstance(named, str) else _list(named, f"{place}/type")
    for kind in types:
        if not isinstance(kind, str) or kind not in _KEYWORDS:
            _refuse(place, f"`type` must be one of {', '.join(_KEYWORDS)}, or a list of them")
    if not types:
        _refuse(place, "`type` names none")
    return types


def _is_a(value: object, kind: str) -> bool:
    return isinstance(value, _PYTHON_TYPES[kind]) and (kind == "boolean" or not isinstance(value, bool))
