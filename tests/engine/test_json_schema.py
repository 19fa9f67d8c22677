"""Schemas as grammars: whatever a grammar lets through, the schema accepts, and the other way round where it can be."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import jsonschema
import numpy as np
import pytest

from edge_phi3.engine.constraint import GrammarConstraint, constrain
from edge_phi3.engine.json_rules import between
from edge_phi3.engine.json_schema import json_grammar
from edge_phi3.engine.tokenizer import Tokenizer
from edge_phi3.llama import GrammarError
from edge_phi3.llama.model import Model
from tests.engine.conftest import MakeModel

STEPS = 600


class Vocabulary:
    """A model's vocabulary, and texts made or read with it under a grammar."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.tokenizer = Tokenizer(model)
        self.end = model.eos_token_id
        texts = [self.tokenizer.bytes_of(token) for token in range(model.vocab_size)]
        self.closing = np.array([bool(text.strip()) and not text.strip(b'"}], \n') for text in texts])
        self.token_of = {text: token for token, text in enumerate(texts) if token not in self.tokenizer.control_ids}

    def start(self, schema: object) -> GrammarConstraint:
        return constrain(self.model, self.tokenizer, json_grammar(schema), [self.end])

    def write(self, constraint: GrammarConstraint, random_: random.Random) -> str | None:
        """Go a random way through a grammar, rather to its end; None where that was not met in time."""
        tokens: list[int] = []
        for _ in range(STEPS):
            scores = np.zeros(self.model.vocab_size, np.float32)
            constraint.mask(scores)
            allowed = np.flatnonzero(scores == 0)
            assert len(allowed)
            if scores[self.end] == 0:
                return self.tokenizer.decode([self.end, *tokens])
            closing = allowed[self.closing[allowed]]
            choices = closing if len(closing) and random_.random() < 0.3 else allowed
            tokens.append(int(random_.choice(choices.tolist())))
            constraint.accept(tokens[-1])
        return None

    def reads(self, schema: object, text: str) -> bool:
        """Return whether a grammar lets a text through, byte by byte."""
        constraint = self.start(schema)
        for byte in text.encode():
            token = next(token for token, each in self.tokenizer.byte_of.items() if each == byte)
            if not constraint.permits(token):
                return False
            constraint.accept(token)
        return constraint.permits(self.end)


@pytest.fixture(scope="module")
def vocabulary(make_model: MakeModel) -> Iterator[Vocabulary]:
    model = Model(make_model("4k"), n_gpu_layers=0)
    yield Vocabulary(model)
    model.close()


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "mail": {"anyOf": [{"type": "string", "minLength": 2, "maxLength": 5}, {"type": "null"}], "default": None},
        "tags": {
            "type": "array",
            "items": {"enum": ["a b", 'quo"te', "back\\slash", "né\n", 1.5, None]},
            "maxItems": 3,
        },
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
TREE = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {"v": {"type": "boolean"}, "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}},
            "required": ["v", "next"],
        }
    },
    "$ref": "#/$defs/node",
}
SCHEMAS: list[Any] = [
    True,
    {},
    PERSON,
    TREE,
    {"type": ["integer", "null", "boolean"]},
    {"type": "number"},
    {"type": "number", "minimum": 0},
    {"type": "object"},
    {"type": "object", "additionalProperties": {"type": "integer"}},
    {"type": "object", "required": ["a", "b"], "additionalProperties": {"type": "null"}},
    {"type": "object", "properties": {"a": True, "b": {"const": {"x": [1, "y"]}}, "c": {"type": "null"}}},
    {"type": "object", "properties": {}, "additionalProperties": False},
    {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 4},
    {"type": "array", "items": {"type": "null"}, "minItems": 1},
    {"type": "array", "maxItems": 0},
    {"type": "array", "prefixItems": [{"type": "integer"}, {"const": "x"}], "minItems": 2, "maxItems": 2},
    {"type": "array", "prefixItems": [{"type": "integer"}, {"const": "x"}], "items": {"type": "null"}, "maxItems": 5},
    {"type": "array", "prefixItems": [{"const": 1}, {"const": 2}], "items": {"const": 3}, "minItems": 4, "maxItems": 6},
    {"type": "array", "prefixItems": [{"const": 1}, {"const": 2}], "items": False, "minItems": 1},
    {"type": "string", "minLength": 3, "maxLength": 3},
    {"type": "string", "minLength": 2},
    {"type": "string", "enum": ["x", 7, "y"]},
    {"type": "integer", "exclusiveMinimum": -12, "maximum": 345},
    {"type": "integer", "maximum": -7},
    {"type": "integer", "minimum": 99},
    {"const": None},
    {"enum": [{"a": 1}, [True], "\u2603 \U0001f600"]},
    {"oneOf": [{"type": "string", "maxLength": 3}, {"type": "integer"}]},
    {
        "oneOf": [
            {"type": "object", "properties": {"k": {"const": "a"}, "v": {"type": "null"}}, "required": ["k"]},
            {"type": "object", "properties": {"k": {"const": "b"}, "w": {"type": "integer"}}, "required": ["k", "w"]},
        ],
        "discriminator": {"propertyName": "k"},
    },
    {"allOf": [{"type": "boolean"}], "title": "a title"},
    {"type": "object", "anyOf": [{"required": ["x"]}, {"properties": {"y": {"type": "null"}}, "required": ["y"]}]},
    {"type": "string", "format": "date"},
    {"type": "string", "format": "date-time"},
    {"type": "string", "format": "uuid"},
    {"type": "string", "format": "ipv4"},
]


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: json.dumps(schema)[:60])
def test_what_a_grammar_lets_through_the_schema_accepts(vocabulary: Vocabulary, schema: Any) -> None:
    random_ = random.Random(1)
    start = vocabulary.start(schema)
    written = [text for _ in range(12) if (text := vocabulary.write(start.clone(), random_)) is not None]
    assert len(written) >= 6
    checker = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker())
    for text in written:
        checker.validate(json.loads(text))


@pytest.mark.parametrize(
    ("schema", "accepted", "refused"),
    [
        (PERSON, ['{"name": "Ünal 😀", "age": 7}', '{"name":"\\ud83d\\ude00","age":130,"mail":null,"tags":["a b",1.5]}',
                  ' {"name": "", "age": 0,\n  "tags": []\n}'],
         ['{"name": "x"}', '{"age": 7, "name": "x"}', '{"name": "x", "age": 131}', '{"name": "x", "age": -1}',
          '{"name": "\\ud83d", "age": 7}', '{"name": "x", "age": 7, "more": 1}', '{"name": "x", "age": 7,}',
          '{"name": "0123456789abc", "age": 7}', '{"name": "x", "age": 07}']),
        (TREE, ['{"v": true, "next": {"v": false, "next": null}}'], ['{"v": true}', '{"v": 1, "next": null}', "null"]),
        ({"type": "string", "format": "date"}, ['"2026-02-28"', '"2026-12-31"'],
         ['"2026-02-30"', '"2026-13-01"', '"2026-04-31"', '"0000-01-01"']),
        ({"type": "integer"}, ["0", "-5", "123456"], ["01", "1.5", "+1", "", "1e3"]),
        ({"type": "number"}, ["0.5", "-5e-7", "1E+3"], [".5", "5.", "NaN", "--1"]),
        ({"type": "array", "minItems": 1}, ['[1, "a", {}]', "[[[]]]"], ["[]", "[1,]", "[,1]"]),
        (None, ['{"a": [1, 2.5, null, true, "x"], "b": {}}', "{}"], ["[]", '"x"', "{a: 1}", "{'a': 1}", '{"a": "\n"}']),
    ],
)  # fmt: skip
def test_texts_are_accepted_and_refused(
    vocabulary: Vocabulary, schema: Any, accepted: list[str], refused: list[str]
) -> None:
    assert [text for text in accepted if not vocabulary.reads(schema, text)] == []
    assert [text for text in refused if vocabulary.reads(schema, text)] == []


@pytest.mark.parametrize(
    ("low", "high"),
    [(0, 0), (0, 7), (3, 10), (7, 1234), (99, 101), (100, 999), (-5, 5), (-120, -13), (1, 20), (-1, 0), (250, 4999)],
)
def test_ranges_of_integers_hold_exactly_their_numbers(vocabulary: Vocabulary, low: int, high: int) -> None:
    constraint = constrain(vocabulary.model, vocabulary.tokenizer, f"root ::= {between(low, high)}", [vocabulary.end])
    token_of = {chr(byte): token for token, byte in vocabulary.tokenizer.byte_of.items() if byte < 128}
    found = set()

    def follow(state: GrammarConstraint, text: str) -> None:
        if state.permits(vocabulary.end):
            found.add(text)
        for digit in "-0123456789":
            if state.permits(token_of[digit]):
                further = state.clone()
                further.accept(token_of[digit])
                follow(further, text + digit)

    follow(constraint, "")
    assert found == {str(number) for number in range(low, high + 1)}


def test_many_literals_are_all_there_and_nothing_else(vocabulary: Vocabulary) -> None:
    words = [word[:size] for word in ("abcdef" * 20, 'q"uo\\te', "äöü") for size in range(len(word) + 1)]
    schema = {"enum": [*words, *range(200), 1.5, None, ["a"], {"a": 1}]}
    start = vocabulary.start(schema)
    found = {vocabulary.write(start.clone(), random.Random(seed)) for seed in range(40)} - {None}
    assert len(found) > 10
    assert all(json.loads(text or "") in schema["enum"] for text in found)
    for value in schema["enum"]:
        assert vocabulary.reads(schema, json.dumps(value, ensure_ascii=False))
    for wrong in ('"abcdefb"', '"ä ö"', "200", "1.55", "nul"):
        assert not vocabulary.reads(schema, wrong)


@pytest.mark.parametrize(
    ("schema", "sentence"),
    [
        (False, "accepts nothing"),
        ([], "must be an object"),
        ({"type": "text"}, "`type` must be one of"),
        ({"type": [["object"]]}, "`type` must be one of"),
        ({"type": []}, "names none"),
        ({"properties": 3}, "at /properties: it must be an object"),
        ({"type": "object", "required": [1]}, "/required"),
        ({"type": "object", "required": ["a"], "additionalProperties": False}, "'a'"),
        ({"type": "object", "patternProperties": {}}, "`patternProperties` is not supported for the type object"),
        ({"properties": {"a": {"type": "string", "pattern": "^a"}}}, "at /properties/a: `pattern`"),
        ({"type": "string", "format": "email"}, "'email' is not supported"),
        ({"type": "string", "minLength": 3, "maxLength": 2}, "below `minLength`"),
        ({"type": "string", "minLength": 2001}, "up to 2000"),
        ({"type": "string", "minLength": -1}, "at least 0"),
        ({"type": "integer", "multipleOf": 2}, "`multipleOf` is not supported"),
        ({"type": "integer", "minimum": 5, "maximum": 4}, "no integer"),
        ({"type": "integer", "minimum": 1.5}, "`minimum`"),
        ({"type": "number", "minimum": 1}, "at 0 only"),
        ({"type": ["number", "integer"], "maximum": 1}, "`maximum` is not supported for the type number"),
        ({"type": "array", "uniqueItems": True}, "`uniqueItems`"),
        ({"type": "array", "items": [{}]}, "/items: it must be an object"),
        ({"type": "array", "minItems": 2, "maxItems": 1}, "below `minItems`"),
        ({"type": "array", "prefixItems": [{}], "items": False, "minItems": 2}, "no more than 1"),
        ({"allOf": [{}, {}]}, "`allOf` is not supported for more than one"),
        ({"anyOf": []}, "is empty"),
        ({"anyOf": [{}], "properties": {}}, "`properties` beside `anyOf`"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "use `anyOf`"),
        ({"oneOf": [{"const": 1}, {"const": 1.0}]}, "use `anyOf`"),
        (
            {
                "oneOf": [
                    {"type": "object", "properties": {"k": {"const": [number]}}, "required": ["k"]}
                    for number in (1, 1.0)
                ]
            },
            "use `anyOf`",
        ),
        ({"not": {}}, "`not` is not supported"),
        ({"if": {}, "then": {}}, "`if` is not supported"),
        ({"enum": []}, "leaves no value"),
        ({"enum": ["a"], "type": "integer"}, "leaves no value"),
        ({"$ref": "https://example.org/schema"}, "must point into the schema itself"),
        ({"$ref": "#/$defs/none"}, "where nothing is"),
        ({"$ref": "#/$defs/a", "maxLength": 3, "$defs": {"a": {}}}, "`maxLength` beside `$ref`"),
    ],
)
def test_what_a_grammar_cannot_hold_is_refused_by_name(schema: Any, sentence: str) -> None:
    with pytest.raises(GrammarError) as caught:
        json_grammar(schema)
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#"},
        {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
        {"anyOf": [{"type": "null"}, {"$ref": "#"}]},
    ],
)
def test_schemas_that_only_mean_themselves_are_refused(vocabulary: Vocabulary, schema: Any) -> None:
    with pytest.raises(GrammarError, match="left recursion"):
        vocabulary.start(schema)


def test_schemas_without_bounds_are_refused_before_they_cost_anything() -> None:
    deep: Any = {}
    for _ in range(200):
        deep = {"type": "array", "items": deep}
    with pytest.raises(GrammarError, match="64 deep"):
        json_grammar(deep)
    names = [str(number) for number in range(3000)]
    with pytest.raises(GrammarError, match="more than 4000 rules"):
        json_grammar({"properties": {name: {"const": name} for name in names}, "required": names})
    with pytest.raises(GrammarError, match="more than 128 properties"):
        json_grammar({"properties": {str(number): {"type": "null"} for number in range(129)}})
    with pytest.raises(GrammarError, match="more than 128 schemas"):
        json_grammar({"anyOf": [{"enum": [number]} for number in range(129)]})
    with pytest.raises(GrammarError, match="add up"):
        json_grammar({"prefixItems": [{"type": "string", "maxLength": 2000}] * 11})
