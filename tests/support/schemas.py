"""Schemas for random requests, and a vocabulary of few tokens that can write what they ask for."""

import random
from collections.abc import Iterable
from functools import cache
from typing import Any, Final, cast

import numpy as np
from numpy.typing import NDArray

from edge_phi3.engine.constraint import ConstraintVocabulary
from edge_phi3.engine.grammars import calls_grammar, choice_grammar, json_grammar, written_grammar
from edge_phi3.engine.tokenizer import Tokenizer
from tests.support.scenarios import END, INFINITE, NAN, VOCABULARY

_PIECES: Final = ('{"', '"}', '":', '",', "[[", "]]", "],", "true", "null", "12", "0.", '"a"', '"b":')
_TREE: Final[dict[str, Any]] = {
    "anyOf": [{"type": "integer"}, {"type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": 3}]
}
SCHEMAS: Final[tuple[dict[str, Any], ...]] = (
    {},
    {"type": "array", "items": {"type": "number"}},
    {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "string"}}, "required": ["a"]},
    {"enum": ["a", "ab", 12, None, [1, 2]]},
    {"type": "string", "pattern": "^(ab|ba){2,5}$"},
    {"$ref": "#/$defs/tree", "$defs": {"tree": _TREE}},
    {"type": "integer", "minimum": 5, "maximum": 2100},
)
_TOOLS: Final = [("ab", SCHEMAS[2]), ("a", {"type": "object", "properties": {}})]
GRAMMARS: Final = (
    *map(json_grammar, SCHEMAS),
    calls_grammar(_TOOLS, None, may_answer=False, parallel=True),
    calls_grammar(_TOOLS[:1], None, may_answer=True, parallel=False),
    choice_grammar(["a", "ab", "b"]),
    written_grammar('root ::= ("ab" | "ba")+ "c"'),
)


class Pieces:
    """What a constraint reads of a vocabulary whose tokens are some texts, again and again."""

    unused_ids = control_ids = frozenset[int]()

    def __init__(self, pieces: Iterable[bytes], special_ids: set[int], vocab_size: int) -> None:
        self.pieces, self.special_ids, self.vocab_size = [*pieces], special_ids, vocab_size

    def bytes_of(self, token: int) -> bytes:
        return self.pieces[token % len(self.pieces)]

    def encode(self, text: str, *, parse_special: bool) -> NDArray[np.int32]:
        assert not parse_special
        return np.array([self.pieces.index(bytes([byte])) for byte in text.encode()], np.int32)


@cache
def small_vocabulary() -> ConstraintVocabulary:
    """Return one of JSON's punctuation, some letters, digits, and pieces of several."""
    texts = (*'{}[]":,.+- 0123456789abcdefgilmnorstu\\', *_PIECES)
    tokens = Pieces(map(str.encode, texts), {0, END, NAN, INFINITE}, VOCABULARY)
    return ConstraintVocabulary(cast("Tokenizer", tokens))


def random_schema(chance: random.Random, depth: int) -> dict[str, Any]:
    """Return the schema of an object with up to four properties, of which some are lists and objects again."""

    def value(depth: int) -> dict[str, Any]:
        simple: list[dict[str, Any]] = [
            {"type": "string"} | chance.choice(({}, {"maxLength": chance.randint(0, 9)}, {"format": "date"})),
            {"type": "integer", "minimum": chance.randint(-5, 5), "maximum": chance.randint(6, 1000)},
            {"type": "number"},
            {"type": chance.choice(("boolean", "null"))},
            {"enum": chance.sample(["a", "b c", 1, None, 2.5, "ü", '"'], 3)},
            {"anyOf": [{"type": "integer"}, {"type": "string", "pattern": "^[a-c]{1,4}$"}]},
        ]
        if depth == 0 or chance.random() < 0.5:
            return chance.choice(simple)
        if chance.random() < 0.5:
            return random_schema(chance, depth - 1)
        return {"type": "array", "items": value(depth - 1), "minItems": chance.randint(0, 1), "maxItems": 3}

    names = chance.sample(["a", "b", "name", "x y", "ä", "id"], chance.randint(0, 4))
    required = [name for name in names if chance.random() < 0.6]
    properties = {name: value(depth - 1) for name in names} if depth else {}
    schema: dict[str, Any] = {"type": "object", "properties": properties}
    return schema | ({"required": [name for name in required if name in properties], "additionalProperties": False})
